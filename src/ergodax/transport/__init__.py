"""Transport between densities: interpolants, couplings, Schrödinger bridges, dynamics from snapshots, and flows as densities."""

from .action_matching import (
    ActionBatch as ActionBatch,
    ActionFlow as ActionFlow,
    ActionMatchingLoss as ActionMatchingLoss,
    ActionVelocity as ActionVelocity,
    InterpolatedSnapshots as InterpolatedSnapshots,
    PotentialAction as PotentialAction,
    SampledPath as SampledPath,
)
from .agm_phase_bridge import (
    PhaseBridge as PhaseBridge,
    PhaseBridgeLoss as PhaseBridgeLoss,
    PhaseEstimate as PhaseEstimate,
    PhaseFlow as PhaseFlow,
    phase_sde_terms as phase_sde_terms,
    phase_times as phase_times,
)
from .asbm_discrete_imf import (
    AdversarialLoss as AdversarialLoss,
    AdversarialTransition as AdversarialTransition,
    EnergyScoreLoss as EnergyScoreLoss,
    GaussianIMF as GaussianIMF,
)
from .bijection import (
    Affine as Affine,
    AffineTransformer as AffineTransformer,
    Bijection as Bijection,
    Chain as Chain,
    Coupling as Coupling,
    Flow as Flow,
    Inverted as Inverted,
    StandardNormal as StandardNormal,
    StandardUniform as StandardUniform,
)
from .bridge_solvers import (
    Bridge as Bridge,
    BridgeSolver as BridgeSolver,
    GaussianBridgeSolver as GaussianBridgeSolver,
    KernelRegressor as KernelRegressor,
    RegressionBridgeSolver as RegressionBridgeSolver,
)
from .coupling import (
    EntropicCoupling as EntropicCoupling,
    IndependentCoupling as IndependentCoupling,
    MatchedShare as MatchedShare,
    OptimalCoupling as OptimalCoupling,
    PairBatches as PairBatches,
    cosine_distances as cosine_distances,
)
from .discrete_bridge import (
    Alternation as Alternation,
    Learner as Learner,
    SimulatedPairs as SimulatedPairs,
    SimulatedPaths as SimulatedPaths,
    TerminalTransition as TerminalTransition,
    Transition as Transition,
)
from .dpm_ot import (
    BlendedMap as BlendedMap,
    SemiDiscreteFit as SemiDiscreteFit,
    SemiDiscreteMap as SemiDiscreteMap,
    fit_semi_discrete as fit_semi_discrete,
    transported_sample as transported_sample,
)
from .eg_entropic_not import (
    EnergyGuidedLoss as EnergyGuidedLoss,
    EnergyGuidedPlan as EnergyGuidedPlan,
    ReplayState as ReplayState,
    ReplayTraining as ReplayTraining,
)
from .flow_dae_sharp_asymptotics import (
    AutoencoderFlow as AutoencoderFlow,
    AutoencoderRisk as AutoencoderRisk,
    TiedAutoencoder as TiedAutoencoder,
    asymptotic_error as asymptotic_error,
    asymptotic_flow as asymptotic_flow,
    bayes_error as bayes_error,
    fit_autoencoder_flow as fit_autoencoder_flow,
)
from .flowar import (
    FlowAR as FlowAR,
    FlowARLoss as FlowARLoss,
    ScaleModel as ScaleModel,
    ScaleTransformer as ScaleTransformer,
    SpatialVelocity as SpatialVelocity,
    downsample as downsample,
    generate_scales as generate_scales,
    scale_pyramid as scale_pyramid,
    upsample as upsample,
)
from .gaussian_bridge import GaussianBridge as GaussianBridge
from .interpolant_bridge import (
    InterpolantBridge as InterpolantBridge,
    InterpolantBridgeLoss as InterpolantBridgeLoss,
    LearnedInterpolant as LearnedInterpolant,
)
from .interpolants import (
    AffineInterpolant as AffineInterpolant,
    BrownianBridgeGamma as BrownianBridgeGamma,
    EncoderDecoderInterpolant as EncoderDecoderInterpolant,
    Gamma as Gamma,
    Interpolant as Interpolant,
    LinearInterpolant as LinearInterpolant,
    MirrorInterpolant as MirrorInterpolant,
    SineSquaredGamma as SineSquaredGamma,
    SpatiallyLinearInterpolant as SpatiallyLinearInterpolant,
    TrigonometricInterpolant as TrigonometricInterpolant,
    VariancePreservingInterpolant as VariancePreservingInterpolant,
    ZeroGamma as ZeroGamma,
)
from .light_sb import LightSB as LightSB, LightSBLoss as LightSBLoss, fit_light_sb as fit_light_sb
from .meta_flow_matching import (
    MetaBatch as MetaBatch,
    MetaFlow as MetaFlow,
    MetaFlowMatchingLoss as MetaFlowMatchingLoss,
    PopulationBatches as PopulationBatches,
    PopulationEmbedding as PopulationEmbedding,
    PopulationField as PopulationField,
    alternating_updates as alternating_updates,
    stack_populations as stack_populations,
)
from .min_curvature_ode import (
    EncodedFlow as EncodedFlow,
    EncoderCoupling as EncoderCoupling,
    MinCurvatureLoss as MinCurvatureLoss,
    gaussian_kl as gaussian_kl,
)
from .mixflow import (
    ExtendedDensity as ExtendedDensity,
    HamiltonianFlow as HamiltonianFlow,
    HamiltonianState as HamiltonianState,
    LaplaceMomentum as LaplaceMomentum,
    MixFlow as MixFlow,
    MixFlowLoss as MixFlowLoss,
    Momentum as Momentum,
    NormalMomentum as NormalMomentum,
)
from .mixture_fields import MixtureInterpolantFields as MixtureInterpolantFields
from .multimarginal_si import (
    BarycentricLoss as BarycentricLoss,
    ConsistentFields as ConsistentFields,
    EdgePath as EdgePath,
    FourierPath as FourierPath,
    PathEnergyLoss as PathEnergyLoss,
    PathScore as PathScore,
    PathVelocity as PathVelocity,
    SpherePath as SpherePath,
    simplex_weights as simplex_weights,
    sphere_weights as sphere_weights,
)
from .one_sided import (
    OneSidedInterpolant as OneSidedInterpolant,
    ScoreFromSource as ScoreFromSource,
    SourceLoss as SourceLoss,
    VelocityFromSource as VelocityFromSource,
)
from .path_blocks import (
    BlockSequence as BlockSequence,
    DeterministicBlock as DeterministicBlock,
    GeometricDensities as GeometricDensities,
    HMCBlock as HMCBlock,
    KernelBlock as KernelBlock,
    LangevinBlock as LangevinBlock,
    MetropolisBlock as MetropolisBlock,
    PathBlock as PathBlock,
    SamplingBlock as SamplingBlock,
    ScannedBlocks as ScannedBlocks,
    UnderdampedLangevinBlock as UnderdampedLangevinBlock,
)
from .phase_solvers import PhaseExponential as PhaseExponential, PhaseSplitting as PhaseSplitting
from .rectified_flow_pp import (
    FixedNoiseEuler as FixedNoiseEuler,
    MatchedVelocity as MatchedVelocity,
    PseudoHuber as PseudoHuber,
    ReflowLoss as ReflowLoss,
    UShapedTimes as UShapedTimes,
    inverted_pairs as inverted_pairs,
    reflow_pairs as reflow_pairs,
)
from .reference import (
    Brownian as Brownian,
    LinearReference as LinearReference,
    OrnsteinUhlenbeck as OrnsteinUhlenbeck,
    ParametricReference as ParametricReference,
    ReferenceProcess as ReferenceProcess,
    sample_bridge as sample_bridge,
)
from .samples import Minibatches as Minibatches, Samples as Samples
from .sbirr import SBIRR as SBIRR, LeastSquaresRefit as LeastSquaresRefit, LinearRefit as LinearRefit, fit_sbirr as fit_sbirr
from .sbunfold import (
    ClassifierRatio as ClassifierRatio,
    PriorRefinement as PriorRefinement,
    RefinementState as RefinementState,
    SBUnfold as SBUnfold,
    UnfoldingBridge as UnfoldingBridge,
    UnfoldingLoss as UnfoldingLoss,
    fit_sbunfold as fit_sbunfold,
    mirrored_variances as mirrored_variances,
)
from .sde import AdditiveNoise as AdditiveNoise, sde_terms as sde_terms
from .sdsb import FlowTransition as FlowTransition, MeanTransition as MeanTransition, SimplifiedBridgeLoss as SimplifiedBridgeLoss
from .si_data_coupling import (
    CoupledLoss as CoupledLoss,
    Degradation as Degradation,
    Inpainting as Inpainting,
    MaskedVelocity as MaskedVelocity,
    Pooled as Pooled,
    TileMask as TileMask,
)
from .smooth_flow import (
    CircularShift as CircularShift,
    ForceMatchingLoss as ForceMatchingLoss,
    IncreasingBijection as IncreasingBijection,
    PeriodicInput as PeriodicInput,
    SmoothCircle as SmoothCircle,
    SmoothCircleTransformer as SmoothCircleTransformer,
    SmoothInterval as SmoothInterval,
    SmoothIntervalTransformer as SmoothIntervalTransformer,
)
from .snapshots import Snapshots as Snapshots
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
    kl_bound as kl_bound,
    kl_optimal_epsilon as kl_optimal_epsilon,
    ode_term as ode_term,
)
from .stochastic_normalizing_flow import (
    PathKLLoss as PathKLLoss,
    PathLikelihoodLoss as PathLikelihoodLoss,
    PathMetropolis as PathMetropolis,
    StochasticNormalizingFlow as StochasticNormalizingFlow,
    WeightedSample as WeightedSample,
    effective_sample_size as effective_sample_size,
    log_mean_weight as log_mean_weight,
    weighted_mean as weighted_mean,
)
from .straightness import path_cost as path_cost
from .to_flow import (
    AdaptiveSolve as AdaptiveSolve,
    Encoded as Encoded,
    FixedSolve as FixedSolve,
    TOFlow as TOFlow,
    TOFlowLoss as TOFlowLoss,
    coordinate_descent as coordinate_descent,
)
