"""Checks for whoever writes a plug: the laws that every method obeys, and numeric checks that a wrong coefficient fails."""

from .drivers import check_drivers as check_drivers
from .laws import (
    LAWS as LAWS,
    Plug as Plug,
    check_all as check_all,
    check_batch as check_batch,
    check_checkpoint as check_checkpoint,
    check_devices as check_devices,
    check_dtype as check_dtype,
    check_gradient as check_gradient,
    check_hyper as check_hyper,
    check_jit as check_jit,
    check_key as check_key,
    check_one_trace as check_one_trace,
)
from .numeric import (
    assert_covariance as assert_covariance,
    assert_mean as assert_mean,
    convergence_order as convergence_order,
    count_traces as count_traces,
    z_scores as z_scores,
)
