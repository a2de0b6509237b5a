"""Exact targets, toy and small real data, and sample-to-sample distances. Knows no method."""

from .distances import (
    energy_distance as energy_distance,
    memorised_share as memorised_share,
    nearest_distance as nearest_distance,
    sliced_wasserstein as sliced_wasserstein,
)
from .mixture import GaussianMixture as GaussianMixture, MixtureDenoiser as MixtureDenoiser
from .noisy_quadratic import NoisyQuadratic as NoisyQuadratic
from .real import Split as Split, digits as digits, mnist as mnist
from .targets import Funnel as Funnel, ManyWell as ManyWell
from .toy import (
    checkerboard as checkerboard,
    checkerboard_log_prob as checkerboard_log_prob,
    eight_gaussians as eight_gaussians,
    pinwheel as pinwheel,
    swiss_roll as swiss_roll,
    two_moons as two_moons,
)
