"""Every law on every row of the table, and a row for every catalogued method."""

import pytest

from ergodax import catalog
from ergodax.testing import LAWS as CHECKS, check_checkpoint

from .table import LAWS


def test_every_method_has_a_row():
    assert sorted(LAWS) == sorted(method.slug for method in catalog.load())


# The laws of a method share its compiled programs, so `--dist loadgroup` keeps them in one worker.
METHODS = [pytest.param(slug, marks=pytest.mark.xdist_group(slug)) for slug in LAWS]


@pytest.mark.parametrize("law", CHECKS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("slug", METHODS)
def test_law(slug, law):
    law(LAWS[slug])


@pytest.mark.parametrize("slug", METHODS)
def test_state_survives_a_checkpoint(slug, tmp_path):
    check_checkpoint(LAWS[slug], tmp_path)
