"""Transport between two densities: interpolants, the fields they define, and flows and diffusions that sample with them."""

from .gaussian_bridge import GaussianBridge as GaussianBridge
from .interpolants import (
    AffineInterpolant as AffineInterpolant,
    BrownianBridgeGamma as BrownianBridgeGamma,
    EncoderDecoderInterpolant as EncoderDecoderInterpolant,
    Gamma as Gamma,
    Interpolant as Interpolant,
    LinearInterpolant as LinearInterpolant,
    SineSquaredGamma as SineSquaredGamma,
    SpatiallyLinearInterpolant as SpatiallyLinearInterpolant,
    TrigonometricInterpolant as TrigonometricInterpolant,
    VariancePreservingInterpolant as VariancePreservingInterpolant,
    ZeroGamma as ZeroGamma,
)
from .mixture_fields import MixtureInterpolantFields as MixtureInterpolantFields
from .reference import (
    Brownian as Brownian,
    LinearReference as LinearReference,
    OrnsteinUhlenbeck as OrnsteinUhlenbeck,
    ParametricReference as ParametricReference,
    ReferenceProcess as ReferenceProcess,
    sample_bridge as sample_bridge,
)
from .sde import AdditiveNoise as AdditiveNoise, sde_terms as sde_terms
from .stochastic_interpolants import (
    GammaDiffusion as GammaDiffusion,
    InterpolantLoss as InterpolantLoss,
    InterpolantVelocityLoss as InterpolantVelocityLoss,
    LatentLoss as LatentLoss,
    ScoreFromLatent as ScoreFromLatent,
    ScoreLoss as ScoreLoss,
    VelocityFromScore as VelocityFromScore,
    VelocityLoss as VelocityLoss,
    backward_ode_term as backward_ode_term,
    backward_sde_terms as backward_sde_terms,
    forward_sde_terms as forward_sde_terms,
    ode_term as ode_term,
)
