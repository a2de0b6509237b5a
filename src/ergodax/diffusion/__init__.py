"""Diffusion and flow models: solvers, grids, guidance, objectives. Paths, parametrisations and the driver are in `ergodax.core`."""

from .accelerated_ddim_ddpm import (
    AcceleratedDDIM as AcceleratedDDIM,
    AcceleratedDDPM as AcceleratedDDPM,
    accelerated_grid as accelerated_grid,
)
from .ambient_diffusion_scaling import AmbientLoss as AmbientLoss, noise_level_time as noise_level_time
from .ancestral import Ancestral as Ancestral
from .bdia import (
    BDIA as BDIA,
    bdia_integrate as bdia_integrate,
    bdia_invert as bdia_invert,
    ddim_move as ddim_move,
    heun_move as heun_move,
)
from .conjugate_splitting_integrators import (
    ConjugateDDIM as ConjugateDDIM,
    ConjugateIntegrator as ConjugateIntegrator,
    ConjugateSplitting as ConjugateSplitting,
    Splitting as Splitting,
    StochasticSplitting as StochasticSplitting,
    bao as bao,
    conjugate_symplectic_euler as conjugate_symplectic_euler,
    conjugate_velocity_verlet as conjugate_velocity_verlet,
    oba as oba,
    obab as obab,
    symplectic_euler as symplectic_euler,
    velocity_verlet as velocity_verlet,
)
from .ddim import DDIM as DDIM
from .dpm_solver_pp import DPMSolverPP2M as DPMSolverPP2M
from .er_sde import ERSDE as ERSDE, ExponentialNoiseScale as ExponentialNoiseScale, PowerNoiseScale as PowerNoiseScale
from .euler_maruyama import EulerMaruyama as EulerMaruyama
from .geometric_view_ode_jump import (
    EmpiricalDenoiser as EmpiricalDenoiser,
    chord_deviation as chord_deviation,
    denoiser_deviation as denoiser_deviation,
    mean_shift as mean_shift,
    ode_jump as ode_jump,
    trajectories as trajectories,
)
from .grids import (
    karras_grid as karras_grid,
    log_snr_grid as log_snr_grid,
    quadratic_grid as quadratic_grid,
    uniform_grid as uniform_grid,
)
from .guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
from .heun import Heun as Heun
from .iia import IIA as IIA, ddim_update as ddim_update, fit_iia as fit_iia, heun_update as heun_update, noise_update as noise_update
from .immiscible_diffusion import Immiscible as Immiscible, immiscible_assignment as immiscible_assignment
from .knn_immiscible import NearestNoise as NearestNoise, ScaledDataPath as ScaledDataPath
from .linear_sde import (
    LinearBeta as LinearBeta,
    LinearSDE as LinearSDE,
    LinearSDETerm as LinearSDETerm,
    NoiseScore as NoiseScore,
    ReverseDrift as ReverseDrift,
    linear_transition as linear_transition,
    reverse_sde_terms as reverse_sde_terms,
)
from .linear_sde_mixture import LinearMixtureScore as LinearMixtureScore
from .min_snr import MinSNR as MinSNR
from .multivariate_diffusion_models import (
    DenoisingBound as DenoisingBound,
    ImplicitBound as ImplicitBound,
    LikelihoodLoss as LikelihoodLoss,
    alda as alda,
    denoising_integrand as denoising_integrand,
    implicit_integrand as implicit_integrand,
    malda as malda,
    random_recipe as random_recipe,
)
from .objective import DenoisingLoss as DenoisingLoss, uniform_weight as uniform_weight
from .pfgmpp import EmpiricalPFGMPPDenoiser as EmpiricalPFGMPPDenoiser, PFGMPPNoise as PFGMPPNoise, pfgmpp_prior as pfgmpp_prior
from .pndm import PNDM as PNDM, WarmUp as WarmUp, transfer as transfer
from .psld import (
    PSLD as PSLD,
    CompleteRecipe as CompleteRecipe,
    HybridScoreLoss as HybridScoreLoss,
    SymmetricSplitting as SymmetricSplitting,
    diffusion_weight as diffusion_weight,
    uniform_noise_weight as uniform_noise_weight,
)
from .restoration_degradation import (
    ForwardProcess as ForwardProcess,
    LinearRestorationDegradation as LinearRestorationDegradation,
    RestorationDegradation as RestorationDegradation,
    ReverseProcessDrift as ReverseProcessDrift,
    square_root_look_back as square_root_look_back,
    whole_look_back as whole_look_back,
)
from .score_sde import ReverseDiffusion as ReverseDiffusion
from .solver import DenoiserSolver as DenoiserSolver, NoisyDenoiserSolver as NoisyDenoiserSolver
from .time_shift_sampler import TimeShift as TimeShift
from .tiw_dsm import (
    DensityRatioLoss as DensityRatioLoss,
    ImportanceWeightedLoss as ImportanceWeightedLoss,
    MixtureRatio as MixtureRatio,
    ReweightedLoss as ReweightedLoss,
)
