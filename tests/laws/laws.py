"""Rows of `ergodax.laws`."""

import jax.numpy as jnp

from ergodax.laws import (
    AdditiveSurface,
    AnnealingLaw,
    BatchTokens,
    LossCurve,
    MultiPowerLaw,
    OffsetPowerLaw,
    PowerLaw,
    average_weights,
    data_efficiency,
    ensemble_losses,
    fit_annealing_law,
    fit_loss_to_loss,
    optimal_weight_decay,
    rate_history,
)
from ergodax.testing import Plug

from .shared import POINTS


def power_lines_(hyper, x, key):
    """Best decay, trade-off and memory of a run at given batches, and the compute-optimal size of a surface."""
    decay = optimal_weight_decay(2e8, 4e9, x, hyper["rate"], timescale=PowerLaw.of(hyper["factor"], hyper["exponent"]))
    surface = AdditiveSurface.of(1.7, 400.0, hyper["size_exponent"], 410.0, 0.28)
    return (
        decay,
        BatchTokens.of(3e9 * hyper["factor"], 2e6 * hyper["factor"]).trade_off(2e8, x),
        average_weights(decay / 10),
        surface.optimal_sizes(1e6 * x),
    )


def loss_to_loss_(hyper, x, key):
    """A map from four pairs, its interval at a fifth, and the map back."""
    fit = fit_loss_to_loss(x[0], x[1], hyper["source_floor"], hyper["target_floor"])
    return fit.law(x[0]), fit.interval(x[0][:1] - 0.1, source_error=hyper["source_error"]), fit.law.inverse()(x[1])


def infinite_compute_asymptote_(hyper, x, key):
    """Losses of averages of up to four members, as a share of the tokens a baseline would need."""
    losses = 3 + ensemble_losses(x, lambda mean: jnp.mean((mean - hyper["truth"]) ** 2))
    return losses, data_efficiency(OffsetPowerLaw.of(hyper["floor"], 30.0, hyper["exponent"]), losses, 100)


def lr_annealing_law_(hyper, x, key):
    at = jnp.arange(2, 12)
    rates = jnp.stack([jnp.ones_like(x[0]) * jnp.ones(12, x.dtype), jnp.linspace(1.0, 0.1, 12, dtype=x.dtype)])
    histories = [rate_history(row, at) for row in rates]
    true = AnnealingLaw.of(2 + x[0] ** 2, 1.0, hyper["exponent"], hyper["annealing"], hyper["momentum"])
    losses = true(histories).reshape(2, -1)
    curves = [LossCurve(history, row) for history, row in zip(histories, losses)]
    law = fit_annealing_law(curves, momentum=hyper["momentum"], max_steps=30).law
    return true(histories), law(histories)


def multi_power_law_(hyper, x, key):
    rates = jnp.exp(-0.1 * jnp.arange(12, dtype=x.dtype) * (1 + x[0] ** 2))
    law = MultiPowerLaw.of(2.0, hyper["coefficient"], hyper["exponent"], hyper["drop"], hyper["scale"], hyper["power"], hyper["rate_power"])
    return law([rate_history(rates, jnp.arange(2, 12))])


ROWS = {
    "power_lines": Plug(
        power_lines_,
        jnp.array([[1e5, 1e6], [3e5, 4e6]]),
        {"rate": (0.01, 0.02), "factor": (1.084, 0.5), "exponent": (-0.527, -0.4), "size_exponent": (0.34, 0.5)},
    ),
    "loss_to_loss": Plug(
        loss_to_loss_,
        jnp.array([[[2.4, 2.7, 3.0, 3.6], [1.9, 2.1, 2.45, 2.8]], [[2.3, 2.6, 3.3, 3.5], [2.0, 2.2, 2.4, 2.9]]]),
        {"source_floor": (1.7, 1.5), "target_floor": (1.2, 1.0), "source_error": (0.01, 0.03)},
    ),
    "infinite_compute_asymptote": Plug(
        infinite_compute_asymptote_,
        jnp.arange(24.0).reshape(2, 4, 3) % 7 / 10,
        {"truth": (0.3, 0.5), "floor": (2.0, 2.5), "exponent": (0.5, 0.4)},
    ),
    "lr_annealing_law": Plug(lr_annealing_law_, POINTS, {"exponent": (0.5, 0.4), "annealing": (0.1, 0.2), "momentum": (0.9, 0.8)}),
    "multi_power_law": Plug(
        multi_power_law_,
        POINTS,
        {"coefficient": (1.0, 0.5), "exponent": (0.5, 0.4), "drop": (0.3, 0.2), "scale": (1.0, 2.0), "power": (0.5, 0.6), "rate_power": (0.5, 0.3)},
    ),
}
