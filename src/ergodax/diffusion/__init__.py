"""Diffusion and flow models: solvers, grids, guidance, objectives. Paths, parametrisations and the driver are in `ergodax.core`."""

from .a_sdm_feature_inheritance import (
    BlockStack as BlockStack,
    ConditionalConv as ConditionalConv,
    FeatureInheritance as FeatureInheritance,
    Inherited as Inherited,
    InheritingNetwork as InheritingNetwork,
    SwitchedNetwork as SwitchedNetwork,
    key_steps as key_steps,
)
from .accelerated_ddim_ddpm import (
    AcceleratedDDIM as AcceleratedDDIM,
    AcceleratedDDPM as AcceleratedDDPM,
    accelerated_grid as accelerated_grid,
)
from .ambient_diffusion_scaling import AmbientLoss as AmbientLoss, noise_level_time as noise_level_time
from .ancestral import Ancestral as Ancestral
from .ar_diffusion import (
    AsynchronousPath as AsynchronousPath,
    FrameTimes as FrameTimes,
    FramewiseDenoiser as FramewiseDenoiser,
    FramewiseLoss as FramewiseLoss,
    asynchronous_schedule as asynchronous_schedule,
    asynchronous_term as asynchronous_term,
)
from .ase_early_exit_diffusion import EarlyExit as EarlyExit
from .autodiffusion_timestep_ea import (
    SkippingNetwork as SkippingNetwork,
    TimestepCandidate as TimestepCandidate,
    TimestepSpace as TimestepSpace,
    timestep_grid as timestep_grid,
)
from .bayesian_flow_networks import (
    BayesianFlowPath as BayesianFlowPath,
    BayesianUpdate as BayesianUpdate,
    CategoricalFlowPath as CategoricalFlowPath,
    CategoricalOutput as CategoricalOutput,
    CategoricalReconstructionLoss as CategoricalReconstructionLoss,
    CategoricalStepLoss as CategoricalStepLoss,
    ClippedOutput as ClippedOutput,
    DiscretisedOutput as DiscretisedOutput,
    StepTimes as StepTimes,
    StepWeight as StepWeight,
    accuracy_weight as accuracy_weight,
    categorical_draw as categorical_draw,
    centred_one_hot as centred_one_hot,
    mean_output as mean_output,
)
from .bcni_sacn import (
    BatchCentredNoise as BatchCentredNoise,
    CorruptedConditionLoss as CorruptedConditionLoss,
    SpectrumAwareNoise as SpectrumAwareNoise,
)
from .bdia import (
    BDIA as BDIA,
    bdia_integrate as bdia_integrate,
    bdia_invert as bdia_invert,
    ddim_move as ddim_move,
    heun_move as heun_move,
)
from .calibrated_dpm import (
    Calibrated as Calibrated,
    ClassShiftTable as ClassShiftTable,
    ShiftTable as ShiftTable,
    calibrate as calibrate,
)
from .cold_diffusion import (
    Degradation as Degradation,
    DeterministicDegradation as DeterministicDegradation,
    GaussianBlur as GaussianBlur,
    NaiveRestoration as NaiveRestoration,
    PathDegradation as PathDegradation,
    Restoration as Restoration,
    RestorationLoss as RestorationLoss,
    Restored as Restored,
    constant_image_prior as constant_image_prior,
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
from .cvdm import (
    CVDM as CVDM,
    CVDMLoss as CVDMLoss,
    CVDMPath as CVDMPath,
    CVDMSchedule as CVDMSchedule,
    LevelInput as LevelInput,
    MonotoneNetwork as MonotoneNetwork,
    VanishingAtData as VanishingAtData,
)
from .ddim import DDIM as DDIM
from .denoising_mcmc_dlg import (
    CleanSample as CleanSample,
    DenoisingLangevinGibbs as DenoisingLangevinGibbs,
    DenoisingMCMC as DenoisingMCMC,
    KarrasDenoise as KarrasDenoise,
    LevelState as LevelState,
    most_likely as most_likely,
)
from .diffusion_time import (
    TimesFrom as TimesFrom,
    diffusion_elbo as diffusion_elbo,
    elbo_slope as elbo_slope,
    fit_gaussian_mixture as fit_gaussian_mixture,
    optimal_start as optimal_start,
    standard_normal_score as standard_normal_score,
)
from .dm_error_propagation_reg import (
    ErrorPropagationLoss as ErrorPropagationLoss,
    GaussianKernel as GaussianKernel,
    squared_mmd as squared_mmd,
)
from .dpm_solver_2 import DPMSolver2 as DPMSolver2
from .dpm_solver_pp import DPMSolverPP2M as DPMSolverPP2M
from .dpm_solver_pp_sde import DPMSolverPP2MSDE as DPMSolverPP2MSDE, DPMSolverPP3MSDE as DPMSolverPP3MSDE
from .e_tsdm import EarlyTimestepSharing as EarlyTimestepSharing, shared_time as shared_time
from .er_sde import ERSDE as ERSDE, ExponentialNoiseScale as ExponentialNoiseScale, PowerNoiseScale as PowerNoiseScale
from .euler_maruyama import EulerMaruyama as EulerMaruyama
from .evolution import Evolution as Evolution, Memory as Memory, evolve as evolve
from .fp_diffusion import (
    ConstantFP as ConstantFP,
    FPLoss as FPLoss,
    FPProcess as FPProcess,
    FPReverse as FPReverse,
    SimulatedFPBound as SimulatedFPBound,
    VariableFP as VariableFP,
    conditioning_penalty as conditioning_penalty,
    fp_integrand as fp_integrand,
    fp_reverse_terms as fp_reverse_terms,
)
from .gdss import (
    EdgeNetwork as EdgeNetwork,
    GraphNoise as GraphNoise,
    GraphPath as GraphPath,
    NodeNetwork as NodeNetwork,
    S4Splitting as S4Splitting,
)
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
from .kinetic_optimal_path import (
    KineticOptimalPath as KineticOptimalPath,
    SeparationMetric as SeparationMetric,
    VelocityMetric as VelocityMetric,
    fit_kinetic_optimal_path as fit_kinetic_optimal_path,
    kinetic_energy_density as kinetic_energy_density,
)
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
from .lms import LMS as LMS
from .mean_field_chaos_diffusion import (
    Branching as Branching,
    LangevinShift as LangevinShift,
    MeanFieldNetwork as MeanFieldNetwork,
    SubdividedLoss as SubdividedLoss,
    branching_integrate as branching_integrate,
)
from .min_snr import MinSNR as MinSNR, SNRWeight as SNRWeight, pareto_weights as pareto_weights
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
from .neural_flow_diffusion_models import (
    NFDM as NFDM,
    GaussianForward as GaussianForward,
    NeuralForward as NeuralForward,
    NFDMDrift as NFDMDrift,
    NFDMLoss as NFDMLoss,
    PathForward as PathForward,
    Volatility as Volatility,
    acceleration as acceleration,
    nfdm_integrand as nfdm_integrand,
    nfdm_sde_terms as nfdm_sde_terms,
    path_volatility as path_volatility,
)
from .objective import DenoisingLoss as DenoisingLoss, uniform_weight as uniform_weight
from .one_more_step import OneMoreStep as OneMoreStep, noise_times as noise_times
from .pf_ode_w2_bounds import (
    ProbabilityFlowBound as ProbabilityFlowBound,
    ScoreExponential as ScoreExponential,
    exponential_coefficients as exponential_coefficients,
    log_concavity as log_concavity,
)
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
from .score_sde import (
    ConditionedDenoiser as ConditionedDenoiser,
    Inpainting as Inpainting,
    PredictorCorrector as PredictorCorrector,
    ReverseDiffusion as ReverseDiffusion,
    likelihood_weight as likelihood_weight,
    score_weight as score_weight,
)
from .serial_reproduction import (
    DiscreteReproduction as DiscreteReproduction,
    ReproductionState as ReproductionState,
    SerialReproduction as SerialReproduction,
    law_after as law_after,
    spectral_gap as spectral_gap,
)
from .skipped_blocks import SkippableBlock as SkippableBlock, keep_blocks as keep_blocks
from .solver import DenoiserSolver as DenoiserSolver, NoisyDenoiserSolver as NoisyDenoiserSolver
from .solver_search import (
    SolverSchedule as SolverSchedule,
    SolverSpace as SolverSpace,
    ranking_loss as ranking_loss,
    s3_search as s3_search,
)
from .time_correction_sampler import TimeCorrection as TimeCorrection
from .time_predictor import TimePredictor as TimePredictor, TimePredictorLoss as TimePredictorLoss
from .time_shift_sampler import TimeShift as TimeShift
from .tiw_dsm import (
    DensityRatioLoss as DensityRatioLoss,
    ImportanceWeightedLoss as ImportanceWeightedLoss,
    MixtureRatio as MixtureRatio,
    ReweightedLoss as ReweightedLoss,
)
from .usf_s3 import USF as USF, Relaxation as Relaxation
