"""`import ergodax` loads nothing; families load when they are asked for."""

import subprocess
import sys

import pytest

import ergodax


def test_import_is_lazy():
    code = "import sys, ergodax; assert not {'jax', 'equinox', 'diffrax', 'optax', 'numpy'} & set(sys.modules); ergodax.core.integrate"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_core_does_not_need_the_extras():
    """A bare install: none of the optional packages is imported by the library itself."""
    optional = "flax orbax rich tyro yaml matplotlib sklearn mlxtend blackjax ott pandas pyarrow filelock tensorboardX"
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {optional.split()!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import ergodax
for family in ergodax.__all__:
    getattr(ergodax, family)
import ergodax.core.run, ergodax.core.config, ergodax.core.report, ergodax.core.figures, ergodax.sweep
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_unknown_family():
    with pytest.raises(AttributeError, match="module 'ergodax' has no attribute 'difusion'; its families are core"):
        ergodax.difusion  # noqa: B018
