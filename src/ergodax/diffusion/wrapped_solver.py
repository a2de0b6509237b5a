"""What solvers share that wrap another solver on a `DenoiserTerm` and change where it starts or what it sees of the model."""

from typing import Any, get_origin

import diffrax as dfx


class WrappedSolver(dfx.AbstractWrappedSolver):
    """A solver round `solver`, stochastic where that is. Subclasses give the field `solver`, and `init` and `step`."""

    @property
    def term_structure(self):  # pyrefly: ignore[bad-override]
        """That of the wrapped solver."""
        return self.solver.term_structure

    @property
    def interpolation_cls(self):  # pyrefly: ignore[bad-override]
        """That of the wrapped solver."""
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        """That of the wrapped solver."""
        return self.solver.term_compatible_contr_kwargs

    def order(self, terms):
        """That of the wrapped solver."""
        return self.solver.order(terms)

    def func(self, terms, t0, y0, args):
        """The model at step index `t0`."""
        return self.solver.func(terms, t0, y0, args)

    def parts(self, terms: Any) -> tuple[dfx.AbstractTerm, ...]:
        """(model,), or (model, noise) for a stochastic solver."""
        return terms.terms if get_origin(self.term_structure) is dfx.MultiTerm else (terms,)


def join(model: dfx.AbstractTerm, *noise: dfx.AbstractTerm) -> dfx.AbstractTerm:
    """The terms of the wrapped solver from their parts."""
    return dfx.MultiTerm(model, *noise) if noise else model


__all__ = ["WrappedSolver", "join"]
