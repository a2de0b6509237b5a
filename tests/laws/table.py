"""One row per catalogued method: the `Plug` that the laws are checked on. Shapes are tiny and shared; truth tests judge the numbers."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ergodax.core import (
    DataPrediction,
    Denoiser,
    DenoiserTerm,
    EDMPath,
    FlowMatchingPath,
    Lanes,
    NoisePrediction,
    VPPath,
    VPrediction,
    integrate,
    iterate,
    replay,
    standard_normal_log_prob,
    uniform_times,
    with_noise,
)
from ergodax.data import GaussianMixture
from ergodax.diffusion import (
    BDIA,
    CVDM,
    DDIM,
    ERSDE,
    IIA,
    NFDM,
    PNDM,
    PSLD,
    USF,
    AcceleratedDDIM,
    AcceleratedDDPM,
    AmbientLoss,
    Ancestral,
    BatchCentredNoise,
    BayesianFlowPath,
    BayesianUpdate,
    BlockStack,
    Branching,
    CategoricalFlowPath,
    CategoricalOutput,
    CategoricalReconstructionLoss,
    CategoricalStepLoss,
    ClippedOutput,
    ConditionalConv,
    ConditionedDenoiser,
    ConjugateDDIM,
    ConjugateIntegrator,
    ConstantFP,
    CorruptedConditionLoss,
    CVDMLoss,
    CVDMSchedule,
    DenoisingBound,
    DenoisingLangevinGibbs,
    DenoisingLoss,
    DenoisingMCMC,
    DensityRatioLoss,
    DiscreteReproduction,
    DiscretisedOutput,
    DPMSolverPP2M,
    DPMSolverPP3MSDE,
    EarlyExit,
    EarlyTimestepSharing,
    EdgeNetwork,
    EmpiricalDenoiser,
    EmpiricalPFGMPPDenoiser,
    ErrorPropagationLoss,
    EulerMaruyama,
    Evolution,
    ExponentialNoiseScale,
    FeatureInheritance,
    ForwardProcess,
    FPLoss,
    FrameTimes,
    FramewiseLoss,
    GaussianBlur,
    GaussianForward,
    GaussianKernel,
    GraphNoise,
    GraphPath,
    Heun,
    HybridScoreLoss,
    Immiscible,
    ImportanceWeightedLoss,
    Inpainting,
    KarrasDenoise,
    LangevinShift,
    LevelInput,
    LikelihoodLoss,
    LinearBeta,
    LinearRestorationDegradation,
    LinearSDETerm,
    MeanFieldNetwork,
    MinSNR,
    MixtureRatio,
    MonotoneNetwork,
    NaiveRestoration,
    NearestNoise,
    NFDMDrift,
    NFDMLoss,
    NodeNetwork,
    NoiseScore,
    OneMoreStep,
    PathDegradation,
    PathForward,
    PFGMPPNoise,
    PredictorCorrector,
    ProbabilityFlowBound,
    Restoration,
    RestorationDegradation,
    RestorationLoss,
    ReverseDiffusion,
    ReweightedLoss,
    S4Splitting,
    ScaledDataPath,
    ScoreExponential,
    SeparationMetric,
    SerialReproduction,
    SimulatedFPBound,
    SpectrumAwareNoise,
    SubdividedLoss,
    SwitchedNetwork,
    SymmetricSplitting,
    TimeCorrection,
    TimePredictor,
    TimePredictorLoss,
    TimesFrom,
    TimeShift,
    TimestepSpace,
    VanishingAtData,
    VariableFP,
    VelocityMetric,
    WarmUp,
    accelerated_grid,
    accuracy_weight,
    asynchronous_schedule,
    asynchronous_term,
    bdia_invert,
    branching_integrate,
    calibrate,
    chord_deviation,
    denoiser_deviation,
    diffusion_elbo,
    diffusion_weight,
    elbo_slope,
    evolve,
    fit_gaussian_mixture,
    fit_kinetic_optimal_path,
    fp_reverse_terms,
    heun_move,
    heun_update,
    karras_grid,
    key_steps,
    kinetic_energy_density,
    law_after,
    likelihood_weight,
    log_snr_grid,
    malda,
    mean_shift,
    nfdm_sde_terms,
    noise_level_time,
    noise_times,
    oba,
    ode_jump,
    optimal_start,
    pareto_weights,
    path_volatility,
    pfgmpp_prior,
    spectral_gap,
    timestep_grid,
    trajectories,
    uniform_grid,
)
from ergodax.diffusion.kinetic_optimal_path import TRIGONOMETRIC
from ergodax.distributed import Averaged, Fragmented, Replicated, Vocabulary, ZeroFlat, ZeroPerLeaf, split_atoms, union_fragments
from ergodax.schedules import exponential_cooldown, wsd_schedule
from ergodax.testing import Plug
from ergodax.transport import (
    ActionFlow,
    ActionMatchingLoss,
    AdversarialLoss,
    AdversarialTransition,
    Affine as AffineBijection,
    BarycentricLoss,
    BlendedMap,
    BlockSequence,
    Brownian,
    BrownianBridgeGamma,
    ConsistentFields,
    CoupledLoss,
    Coupling,
    Degradation,
    DeterministicBlock,
    EncodedFlow,
    EncoderCoupling,
    EnergyGuidedLoss,
    EnergyScoreLoss,
    ExtendedDensity,
    FixedNoiseEuler,
    FixedSolve,
    Flow,
    FlowAR,
    FlowTransition,
    ForceMatchingLoss,
    FourierPath,
    GaussianBridge,
    GaussianIMF,
    HamiltonianFlow,
    HamiltonianState,
    HMCBlock,
    Inpainting as InpaintingCoupling,
    InterpolantBridge,
    InterpolantBridgeLoss,
    InterpolatedSnapshots,
    KernelRegressor,
    LangevinBlock,
    LatentLoss,
    LearnedInterpolant,
    LightSB,
    LightSBLoss,
    LinearInterpolant,
    LinearRefit,
    MaskedVelocity,
    MatchedVelocity,
    MeanTransition,
    MetaBatch,
    MetaFlow,
    MetaFlowMatchingLoss,
    MetropolisBlock,
    MinCurvatureLoss,
    MirrorInterpolant,
    MixFlow,
    NormalMomentum,
    OneSidedInterpolant,
    ParametricReference,
    PathEnergyLoss,
    PathMetropolis,
    PathScore,
    PathVelocity,
    PhaseBridge,
    PhaseBridgeLoss,
    PhaseEstimate,
    PhaseExponential,
    PhaseFlow,
    PhaseSplitting,
    PopulationEmbedding,
    PopulationField,
    PotentialAction,
    PseudoHuber,
    ReflowLoss,
    RegressionBridgeSolver,
    ReplayTraining,
    Samples,
    ScaleModel,
    ScoreFromLatent,
    ScoreFromSource,
    SimplifiedBridgeLoss,
    SimulatedPaths,
    SmoothCircleTransformer,
    SmoothIntervalTransformer,
    Snapshots,
    SourceLoss,
    SpherePath,
    StandardNormal,
    StochasticNormalizingFlow,
    TerminalTransition,
    TOFlow,
    TOFlowLoss,
    UnderdampedLangevinBlock,
    UnfoldingBridge,
    UnfoldingLoss,
    UShapedTimes,
    VelocityLoss,
    WeightedSample,
    ZeroGamma,
    asymptotic_flow,
    fit_autoencoder_flow,
    fit_light_sb,
    fit_sbirr,
    fit_semi_discrete,
    generate_scales,
    inverted_pairs,
    kl_bound,
    mirrored_variances,
    phase_sde_terms,
    reflow_pairs,
    transported_sample,
    upsample,
)
from ergodax.transport.bijection import StandardUniform
from ergodax.tuning import AsynchronousHalving, Perturb, PopulationBasedTraining, SuccessiveHalving


POINTS = jax.random.normal(jax.random.key(0), (4, 2))
CURVES = jax.random.normal(jax.random.key(2), (4, 6, 4))
BATCHES = jax.random.normal(jax.random.key(1), (4, 6, 2))


class Affine(eqx.Module):
    """A stand-in for a network, smooth in everything."""

    weight: jax.Array

    def __call__(self, t, x, args):
        return jnp.tanh(self.weight.astype(x.dtype) @ x) + t


NETWORK = Affine(jnp.array([[0.5, -0.3], [0.2, 0.8]]))


def _mixture(dtype):
    return GaussianMixture.isotropic(jnp.array([0.4, 0.6], dtype), jnp.array([[1.0, 0.0], [-1.0, 0.5]], dtype), jnp.array([0.3, 0.5], dtype))


def immiscible_diffusion(hyper, x, key):
    return Immiscible()(key, x, jax.random.normal(key, x.shape, x.dtype), None)


def universal_checkpoint(hyper, x, key):
    table = [("qkv", Fragmented(parts=(2, 4))), ("rows", Vocabulary(6, multiple=4)), ("norm", Averaged()), ("bias", Replicated())]
    ranks = split_atoms({"qkv": x, "rows": x + 1, "norm": x[0], "bias": x[1]}, table, 2)
    drifted = [ranks[0], ranks[1] | {"norm": 3 * x[0]}]
    shapes = {name: leaf.shape for name, leaf in ranks[0].items()}
    vectors = ZeroFlat().split(ranks[0], 4), ZeroPerLeaf().split(ranks[0], 4)
    return {"ranks": ranks, "vectors": vectors, "atoms": union_fragments(drifted, table), "leaves": ZeroPerLeaf().union(vectors[1], shapes)}


def successive_halving(hyper, x, key):
    return replay(SuccessiveHalving(4, eta=2), x)


def asynchronous_halving(hyper, x, key):
    return replay(AsynchronousHalving(3, 4, eta=2), x)


def population_based_training(hyper, x, key):
    rule = PopulationBasedTraining(4, Perturb({"rate": (0.01, 1.0)}, (hyper["down"], 1.2)), fraction=0.3)
    lane = jnp.arange(len(x), dtype=jnp.int32)
    return rule(key, Lanes(x[:, 0], {"rate": x[:, 1] ** 2}, lane, jnp.full_like(lane, 2), {}), rule.init(len(x)))


def er_sde(hyper, x, key):
    path = VPPath()
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, log_snr_grid(path, 4, jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype)))
    return integrate(term, ERSDE(ExponentialNoiseScale(hyper["exponent"], hyper["offset"])), x, key=key)


def pndm(hyper, x, key):
    path = VPPath(0.1, hyper["beta_max"])
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 7))
    return integrate(term, PNDM(2, WarmUp.improved_euler()), integrate(term, PNDM(), x))


def bdia(hyper, x, key):
    path = VPPath()
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, log_snr_grid(path, 4, jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype)))
    end, states = integrate(term, BDIA(hyper["gamma"]), x, save=lambda t, y: y)
    return {
        "end": end,
        "inverse": bdia_invert(term, BDIA(hyper["gamma"]), (states[-2] + 0.1, end)),
        "heun": integrate(term, BDIA(hyper["gamma"], heun_move), x),
    }


def iia(hyper, x, key):
    path = VPPath()
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, log_snr_grid(path, 4, jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype)))
    coefficients = hyper["scale"] * jnp.linspace(jnp.asarray(-1.0, x.dtype), 1.0, 8).reshape(4, 2)
    return [integrate(term, IIA(coefficients, *update), x) for update in ((), (heun_update,))]


def accelerated_ddim_ddpm(hyper, x, key):
    path = FlowMatchingPath()
    # Without the last step, to σ = 0: gradients to a grid with an infinite clock are not finite.
    grid = accelerated_grid(path, 12, hyper["c0"], hyper["c1"]).astype(x.dtype)[:-1]
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, grid)
    return integrate(term, AcceleratedDDPM(), integrate(term, AcceleratedDDIM(hyper["correction"]), x), key=key)


def restoration_degradation(hyper, x, key):
    length = hyper["length"]
    process = ForwardProcess(lambda u, x, args: jnp.tanh(x), lambda u: 1.0, lambda u, x, args: -x / (1 + u), hyper["horizon"])
    y = integrate(process, RestorationDegradation(lambda u, h: length), x, times=jnp.linspace(jnp.asarray(0.0, x.dtype), 0.6, 5))
    path = VPPath()
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, jnp.linspace(jnp.asarray(0.1, x.dtype), 0.9, 5))
    return integrate(term, LinearRestorationDegradation(path, lambda u, h: h + length * (u - h)), y)


def psld(hyper, x, key):
    process = PSLD(hyper["gamma"], hyper["nu"], initial_scale=hyper["initial_scale"], beta=LinearBeta(hyper["beta"], hyper["beta"]))
    loss = HybridScoreLoss(process, weight=diffusion_weight)(lambda t, z, args: jnp.tanh(z) + t, x, key)[0]
    term = LinearSDETerm(lambda t, z, args: -jnp.tanh(z), process)
    z0 = jnp.stack([x[0], x[1]])
    times = jnp.asarray([0.1, 0.2], x.dtype)
    return loss, integrate(with_noise(term, key, z0), SymmetricSplitting(), z0, times=times)


def multivariate_diffusion_models(hyper, x, key):
    process = malda(hyper["friction"], hyper["initial"])
    return LikelihoodLoss(DenoisingBound(hyper["margin"]))(NoiseScore(lambda t, z, args: jnp.tanh(z) + t, process), x, key)[0]


def conjugate_splitting_integrators(hyper, x, key):
    path = VPPath()
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, jnp.asarray([0.2, 0.5], x.dtype))
    process = PSLD(hyper["gamma"], 3.0)
    linear, times = LinearSDETerm(lambda t, z, args: -jnp.tanh(z), process), jnp.asarray([0.1, 0.3], x.dtype)
    z = jnp.stack([x, x + 1])
    z = integrate(linear, ConjugateIntegrator(hyper["stability"], num_nodes=2), z, times=times)
    return integrate(term, ConjugateDDIM(hyper["stability"], 2), x), integrate(with_noise(linear, key, z), oba(reduced=True), z, times=times)


def pfgmpp(hyper, x, key):
    noise = PFGMPPNoise(hyper["extra_dims"], 1e-3)(key, x, x + 1, None)
    prior = pfgmpp_prior(key, VPPath(), (3, 2), hyper["extra_dims"], x.dtype)
    field = EmpiricalPFGMPPDenoiser(x, VPPath(), hyper["extra_dims"])
    return noise, prior + 0 * x[:3], field(jnp.asarray(0.6, x.dtype), x[0] + 0.5)


def knn_immiscible(hyper, x, key):
    loss = DenoisingLoss(ScaledDataPath(VPPath(), hyper["scale"]), VPrediction(), coupling=NearestNoise(3), times=uniform_times)
    return loss(NETWORK, x, key)[0], NearestNoise(3)(key, x, jax.random.normal(key, x.shape, x.dtype), None)


def tiw_dsm(hyper, x, key):
    base = DenoisingLoss(VPPath(hyper["beta_min"]), VPrediction(), times=uniform_times)

    def ratio(t, x, args):
        return jnp.sum(jnp.sin(x)) * t

    biased = ReweightedLoss(base, ratio)(NETWORK, x, key)[0]
    both = ReweightedLoss(base, MixtureRatio(ratio))(NETWORK, x, key)[0]
    clean = ImportanceWeightedLoss(base, lambda x, args: jnp.sum(x))(NETWORK, x, key)[0]
    discriminator = DensityRatioLoss(VPPath(hyper["beta_min"]))(ratio, (x, x[:2]), key)[0]
    return biased, both, clean, discriminator


def ambient_diffusion_scaling(hyper, x, key):
    path = VPPath(0.1, hyper["beta_max"])
    levels = jnp.asarray(hyper["level"], x.dtype) * jnp.arange(6).astype(x.dtype)
    loss = AmbientLoss(DenoisingLoss(path, VPrediction(), times=uniform_times))
    return loss(NETWORK, (x, levels), key)[0], noise_level_time(path, levels[1])


def geometric_view_ode_jump(hyper, x, key):
    path = EDMPath(10.0)
    grid = karras_grid(path, 5, 0.1, 10.0)[:-1].astype(x.dtype)
    optimal = EmpiricalDenoiser(POINTS.astype(x.dtype), path)
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, grid)
    states, denoised = trajectories(term, Heun(), 10 * x)
    return {
        "jump": ode_jump(term, Heun(), 10 * x, num_steps=3),
        "shift": mean_shift(x, POINTS.astype(x.dtype) + 1, hyper["bandwidth"]),
        "chord": chord_deviation(states)[1:-1],
        "deviation": denoiser_deviation(term.denoised, optimal, grid, states),
        "denoised": denoised,
    }


def time_shift_sampler(hyper, x, key):
    path = VPPath()
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 7))
    return integrate(term, TimeShift(DPMSolverPP2M(), hyper["window"], hyper["cutoff"]), x)


def kinetic_optimal_path_(hyper, x, key):
    metric = SeparationMetric(lambda s: 1 - hyper["share"].astype(s.dtype) / (1 + s**2))
    path = fit_kinetic_optimal_path(metric, 9, hyper["floor"])
    measured = VelocityMetric(_mixture(x.dtype).denoiser(TRIGONOMETRIC), x, x[::-1])
    grid = jnp.asarray([0.1, 0.3, 0.7, 0.9], x.dtype)
    samples = integrate(DenoiserTerm(_mixture(x.dtype).denoiser(path), path, grid), DDIM(), x)
    return samples, kinetic_energy_density(path, measured, jnp.asarray(0.4, x.dtype)), path.kinetic_energy.astype(x.dtype)


MONOTONE = MonotoneNetwork(width=4, key=jax.random.key(3))


def cvdm(hyper, x, key):
    def network(t, z, args):
        return jnp.tanh(z) * args[1] + args[0]

    schedule = CVDMSchedule(lambda c: c + 2, VanishingAtData(MONOTONE), lambda u: 0.2 + 20 * u, hyper["gamma_min"], hyper["gamma_max"])
    names = ("margin", "curvature", "schedule_weight", "prior_weight", "curvature_weight")
    loss = CVDMLoss(**{name: hyper[name] for name in names}, times=uniform_times)(CVDM(network, schedule), (x, x[::-1]), key)[0]
    path = schedule.path(x[0])
    grid = jnp.asarray([0.3, 0.6, 0.8], x.dtype)
    sample = integrate(DenoiserTerm(Denoiser(LevelInput(network, path), path, NoisePrediction()), path, grid), DDIM(), x[1], x[0])
    return loss, sample, schedule.product_path(x[0], 4).alpha(jnp.asarray(0.4, x.dtype))


def bayesian_flow_networks(hyper, x, key):
    grid = jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 4)
    first, second, third = jax.random.split(key, 3)
    path, classes = BayesianFlowPath(hyper["final_std"]), CategoricalFlowPath(2, hyper["accuracy"])
    bins = DiscretisedOutput(lambda t, x, args: jnp.stack([jnp.tanh(x), t * x]), path, 4, hyper["min_std"])
    mean = integrate(DenoiserTerm(bins, path, grid), BayesianUpdate(), x, key=first)
    output = CategoricalOutput(lambda t, theta, args: jnp.sin(3 * theta) + t)
    belief = integrate(DenoiserTerm(output, classes, grid), BayesianUpdate(), x, key=second)
    loss = DenoisingLoss(path, DataPrediction(), weight=accuracy_weight)(ClippedOutput(lambda t, x, args: x / 9 + t / 9), x, key)[0]
    terms = [f(output, x[:, None], third)[0] for f in (CategoricalStepLoss(classes, 5), CategoricalReconstructionLoss(classes))]
    return mean, belief, loss, terms


def cold_diffusion(hyper, x, key):
    times = jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 4)
    path, images = VPPath(0.1, hyper["beta_max"]), x.reshape(2, 3, 2)
    noisy = Restoration(_mixture(x.dtype).denoiser(path), PathDegradation(path))
    blurred = Restoration(lambda t, x, args: jnp.tanh(x) + t, GaussianBlur(hyper["max_std"], hyper["power"]))
    loss = RestorationLoss(blurred.degradation)(lambda t, x, args: x / (1 + t), images[:, :, None], key)[0]
    return integrate(noisy, dfx.Heun(), x, times=times), integrate(blurred, NaiveRestoration(), images, times=times), loss


def neural_flow_diffusion_models(hyper, x, key):
    forward = GaussianForward(lambda t, x, args: jnp.sin(x) + t, lambda t, x, args: jnp.tanh(x), hyper["delta"])
    model = NFDM(forward, NETWORK, lambda t: 1 + t)
    loss = NFDMLoss(hyper["decoder_std"], hyper["curvature"], times=uniform_times)(model, x, key)[0]
    linear = NFDM(PathForward(VPPath()), NETWORK, path_volatility(VPPath()))
    times = jnp.asarray([0.1, 0.2, 0.3], x.dtype)
    flow = integrate(dfx.ODETerm(NFDMDrift(linear, hyper["noise_scale"])), dfx.Euler(), x[0], times=times)
    return loss, flow, integrate(nfdm_sde_terms(model, key, x[0]), dfx.Euler(), x[0], times=times)


def autodiffusion_timestep_ea(hyper, x, key):
    path, times = VPPath(), jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 9)
    space = TimestepSpace(8, 3, 2, budget=4, mutation_rate=hyper["rate"])
    search = Evolution(space.random, space.mutate, space.crossover, space.valid, num_parents=2, num_mutants=2, num_crossovers=2, num_tries=2)

    def cost(candidate):
        term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, timestep_grid(times, candidate.steps))
        return jnp.sum(integrate(term, DDIM(), x) ** 2) + candidate.keep[0, 0].astype(x.dtype)

    return evolve(key, search, cost, search.first(key, 5), 3)


class Residual(eqx.Module):
    """A stand-in for the blocks of a network."""

    weight: jax.Array

    def __call__(self, h, c, *, key=None):
        return h + jnp.tanh(self.weight.astype(h.dtype) * h + c)


class Stacked(eqx.Module):
    """A stand-in for a network of residual blocks."""

    blocks: Residual

    def __call__(self, t, x, args=None, *, key=None):
        return jax.lax.scan(lambda h, block: (block(h, t), None), x, self.blocks)[0]


def ase_early_exit_diffusion(hyper, x, key):
    network = Stacked(Residual(hyper["weight"] * jnp.arange(1.0, 5.0, dtype=x.dtype)[:, None] * jnp.ones((4, 2), x.dtype)))
    model = EarlyExit(network, (4, 2, 1))
    loss = DenoisingLoss(VPPath(), VPrediction(), times=uniform_times)(model, x, key)[0]
    return loss, model(jnp.asarray(0.2, x.dtype), x[0])


def a_sdm_feature_inheritance(hyper, x, key):
    blocks = Residual(hyper["weight"] * jnp.arange(1.0, 4.0, dtype=x.dtype)[:, None] * jnp.ones((3, 2), x.dtype))
    network = BlockStack(lambda t, x, args: (jnp.sin(x), t), blocks, lambda t, x, h, c: h - x, jnp.array([True, False, True]))
    term = DenoiserTerm(Denoiser(network, VPPath(), VPrediction()), VPPath(), jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 5))
    y = integrate(term, FeatureInheritance(DDIM(), network, jnp.asarray(key_steps(4, 2))), x)
    switched = SwitchedNetwork(lambda t, x, args: x, lambda t, x, args: 2 * x, hyper["switch_time"])
    conv = ConditionalConv(1, 1, 2, 1, key=jax.random.key(0), dtype=x.dtype)
    return y, switched(0.5, x), conv(x.reshape(2, -1, 1))


def bcni_sacn(hyper, x, key):
    spectrum = SpectrumAwareNoise(hyper["strength"])(key, x)
    base = DenoisingLoss(VPPath(), VPrediction(), times=uniform_times)
    loss = CorruptedConditionLoss(base, BatchCentredNoise(hyper["strength"]))
    return spectrum, loss(lambda t, y, args: jnp.tanh(y + args), (x, jnp.sin(x)), key)[0]


def calibrated_dpm(hyper, x, key):
    path, labels = VPPath(0.1, hyper["beta_max"]), jnp.arange(6) % 2
    times = jnp.array([0.2, 0.5, 0.9], x.dtype)
    whole = calibrate(NETWORK, path, VPrediction(), x, times, key)
    classes = calibrate(NETWORK, path, VPrediction(), x, times, key, labels=labels, num_classes=2)
    t = jnp.asarray(0.6, x.dtype)
    return whole(t, x[0], None), classes(t, x[0], labels[1])


def one_more_step(hyper, x, key):
    path, start = VPPath(0.1, hyper["beta_max"]), FlowMatchingPath()
    step = OneMoreStep(Denoiser(NETWORK, start, VPrediction()), path, hyper["noise_scale"])
    loss = DenoisingLoss(start, VPrediction(), times=noise_times)(NETWORK, x[None], key)[0]
    return step(key, jnp.asarray(0.3, x.dtype), x), loss


def e_tsdm(hyper, x, key):
    # u = 0.05 is no end of a part for any of the values.
    return EarlyTimestepSharing(NETWORK, hyper["threshold"], hyper["num_intervals"])(jnp.asarray(0.95, x.dtype), x, None)


def dm_error_propagation_reg(hyper, x, key):
    path = VPPath()
    base = DenoisingLoss(path, VPrediction(), times=uniform_times)
    grid = jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 6)
    kernel = GaussianKernel(hyper["bandwidth"])
    return ErrorPropagationLoss(base, grid, hyper["scale"], hyper["rho"], window=2, kernel=kernel)(NETWORK, x, key)[0]


HYPER = {"scale": (0.5, 2.0), "rho": (0.1, 0.3), "bandwidth": (1.0, 2.0)}


def ar_diffusion(hyper, x, key):
    path, grid = VPPath(0.1, hyper["beta_max"]), jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 4)

    def network(t, x, args):
        return jnp.tanh(x) + t[:, None] * jnp.sum(x)

    loss = FramewiseLoss(DenoisingLoss(path, DataPrediction(), times=FrameTimes(grid, 3)))
    value = loss(network, x.reshape(2, 3, 2), key)[0]
    return value, integrate(asynchronous_term(network, path, grid[asynchronous_schedule(6, 3, 1)], 1), DDIM(), x)


def usf_s3(hyper, x, key):
    path = VPPath(0.1, hyper["beta_max"])
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, log_snr_grid(path, 4, jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype)))
    return integrate(term, DPMSolverPP3MSDE(hyper["eta"]), integrate(term, USF.unipc(4, 2), x), key=key)


FP_ROOT, FP_PAIRS = jnp.array([[1.1, 0.2], [0.0, 0.8]]), jnp.array([[0.0, 0.7], [0.1, 0.0]])


def fp_diffusion(hyper, x, key):
    beta = LinearBeta(hyper["beta_min"], hyper["beta_max"])
    loss = FPLoss(hyper["margin"], hyper["regulariser"], times=lambda key, n: jax.random.uniform(key, (n,)))
    root, pairs = FP_ROOT.astype(x.dtype), FP_PAIRS.astype(x.dtype)
    value = loss(NoiseScore(NETWORK, ConstantFP(root, pairs, beta)), x, key)[0]

    def score(t, x, args):
        return -jnp.tanh(x)

    process = VariableFP(lambda x: root + jnp.sin(x), lambda x: pairs * x, beta)
    terms = fp_reverse_terms(process, score, key, x[0], hyper["noise_scale"])
    sample = integrate(terms, dfx.Euler(), x[0], times=jnp.asarray([0.7, 0.8], x.dtype))
    return value, sample, SimulatedFPBound(2)(score, process, x[0], key)


_GRAPH_KEYS = jax.random.split(jax.random.key(7))
_GRAPH_NETWORKS = NodeNetwork(3, 4, key=_GRAPH_KEYS[0]), EdgeNetwork(3, 4, depth=1, channels=2, heads=2, key=_GRAPH_KEYS[1])


def gdss(hyper, x, key):
    path = GraphPath(VPPath(0.1, hyper["beta_max"]), EDMPath(2.0), 3, 3)

    def cast(leaf):
        return leaf.astype(x.dtype) if eqx.is_array(leaf) else leaf

    network = GraphNoise(*jax.tree.map(cast, _GRAPH_NETWORKS), path)
    mask = jnp.array([1.0, 0.0, 1.0], x.dtype)
    graphs = path.masked(x.reshape(1, 12), mask)
    loss = DenoisingLoss(path, NoisePrediction(), times=uniform_times, coupling=path.masked_noise)(network, (graphs, mask[None]), key)[0]
    term = DenoiserTerm(Denoiser(network, path, NoisePrediction()), path, jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 3))
    return loss, integrate(term, S4Splitting(path, hyper["snr"], hyper["noise_scale"]), graphs[0], mask, key=key)


def diffusion_time(hyper, x, key):
    path = VPPath(0.1, hyper["beta_max"])
    noise = jax.random.normal(key, x.shape, x.dtype)

    def score(t, y, args):
        return -jnp.tanh(y) - y / 2

    times = jnp.linspace(jnp.asarray(0.2, x.dtype), 0.9, 4)
    slopes = jax.vmap(lambda t: jnp.mean(elbo_slope(score, path, t, x, noise)))(times)
    mixture = fit_gaussian_mixture(key, x + hyper["shift"], 2, 3, ridge=0.1)
    elbo = diffusion_elbo(score, path, x, noise, standard_normal_log_prob, times)
    return elbo, slopes, optimal_start(times, slopes), mixture.log_prob(x), TimesFrom(0.5)(key, 3).astype(x.dtype)


def score_sde(hyper, x, key):
    path = VPPath(0.1, hyper["beta_max"])
    grid = log_snr_grid(path, 4, jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype))
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, grid)
    first, second, third = jax.random.split(key, 3)
    x = integrate(term, EulerMaruyama(hyper["noise_scale"]), integrate(term, ReverseDiffusion(), x, key=first), key=second)
    guided = ConditionedDenoiser(term.denoised, path, lambda t, y, args: -jnp.sum((y - 1) ** 2) / 8)
    solver = Inpainting(PredictorCorrector(ReverseDiffusion(), hyper["snr"]), jnp.ones_like(x), jnp.array([1, 0]))
    y = integrate(DenoiserTerm(guided, path, grid), solver, x, key=third)
    return y, likelihood_weight(path, VPrediction(), grid[1:-1])


def min_snr(hyper, x, key):
    # The weight has a kink where SNR = γ; the drawn times stay clear of it.
    loss = DenoisingLoss(VPPath(), VPrediction(), weight=MinSNR(hyper["gamma"]), times=uniform_times)
    return loss(NETWORK, x, key)[0], pareto_weights(x + 1, hyper["penalty"], 20)


def denoising_mcmc_dlg(hyper, x, key):
    path, mixture = EDMPath(5.0), _mixture(x.dtype)
    times = jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.95, x.dtype), 8)

    def bayes(x):
        return jax.vmap(lambda t: mixture.log_prob_at(path, t, x))(times)

    denoised = mixture.denoiser(path)
    chain = DenoisingLangevinGibbs(denoised, path, times, bayes, hyper["step_size"])
    kernel = DenoisingMCMC(chain, KarrasDenoise(denoised, path, Heun(), 3, hyper["sigma_min"]), 4)
    return kernel.step(key, kernel.init(x))


def serial_reproduction(hyper, x, key):
    def corrupt(key, x, level):
        return x + level * jax.random.normal(key, x.shape, x.dtype)

    def reproduce(key, y, level):
        gain = 1 / (1 + level**2)
        return gain * y + jnp.sqrt(gain) * level * jax.random.normal(key, y.shape, y.dtype)

    kernel = SerialReproduction(corrupt, reproduce, hyper["level"] * jnp.array([2.0, 1.0, 0.5], x.dtype))
    points = jnp.linspace(jnp.asarray(-2, x.dtype), jnp.asarray(2, x.dtype), 7)
    discrete = DiscreteReproduction(-((points - x[0]) ** 2) / 2, points, jax.scipy.stats.norm.logpdf)
    matrix, prior = discrete.transition(hyper["level"]), jax.nn.softmax(discrete.log_prior)
    law = law_after(jnp.eye(7, dtype=x.dtype)[2], jnp.stack([matrix, matrix]))
    return iterate(key, kernel.step, kernel.init(x), 4).position, law, spectral_gap(prior, matrix)


def pf_ode_w2_bounds(hyper, x, key):
    path = VPPath(0.1, 5.0)
    grid = uniform_grid(4, 0.05, 0.95).astype(x.dtype)
    bound = ProbabilityFlowBound(
        path, 2, hyper["second_moment"], hyper["strong_convexity"], hyper["smoothness"], hyper["time_lipschitz"], hyper["score_error"]
    )
    return bound(grid), bound.initialisation(), integrate(DenoiserTerm(_mixture(x.dtype).denoiser(path), path, grid), ScoreExponential(path), x)


def mean_field_chaos_diffusion(hyper, x, key):
    path, grid = VPPath(0.1, hyper["beta_max"]), jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 5)
    network = MeanFieldNetwork(lambda t, x, args: jnp.tanh(x) + t, lambda t, r, args: jnp.sin(r) * t)
    loss = SubdividedLoss(DenoisingLoss(path, NoisePrediction(), times=uniform_times), grid[jnp.array([0, 2, 4])], (2, 6))
    denoised = Denoiser(network, path, NoisePrediction())
    branching = Branching(LangevinShift(denoised, path, hyper["step_size"], 2))
    cloud = branching_integrate(denoised, path, (grid[:3], grid[2:]), EulerMaruyama(), x[:2], branching, key)
    return loss(network, x[None], key)[0], cloud


def time_correction_sampler(hyper, x, key):
    path, mixture = VPPath(), _mixture(x.dtype)
    grid = jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 7)

    def bayes(x):
        return jax.vmap(lambda t: mixture.log_prob_at(path, t, x))(grid[:-1])

    solver = TimeCorrection(Ancestral(), bayes, hyper["window"], lambda denoised, args: denoised[0] ** 2, hyper["guidance_scale"], hyper["share"])
    model = TimePredictor((2,), 6, 8, dtype=x.dtype, key=jax.random.key(3))
    loss = TimePredictorLoss(path, grid[:-1])(model, x[None] + 1, key)
    return integrate(DenoiserTerm(mixture.denoiser(path), path, grid), solver, x, key=key), loss


def action_matching(hyper, x, key):
    source = InterpolatedSnapshots(Snapshots([0.0, 0.4, 1.0], [x, x[:4] + 1, x[::-1] * 2]), 4, noise=hyper["noise"])
    action, growth = PotentialAction(NETWORK), hyper["growth"]
    loss = ActionMatchingLoss(sigma=hyper["sigma"], growth=growth)(action, source(key, 0), key)[0]
    return loss, ActionFlow(action, growth)(jnp.asarray(0.3, x.dtype), (x[0], x[0, 0]))


def agm_phase_bridge(hyper, x, key):
    bridge = PhaseBridge(hyper["noise_scale"], hyper["correlation"], noise_share=hyper["noise_share"])

    def network(t, m, args):
        return jnp.tanh(m[0] + m[1]) + t

    times = jnp.asarray([0.1, 0.4, 0.6], x.dtype)
    m = integrate(dfx.ODETerm(PhaseFlow(network, bridge)), PhaseExponential(bridge), bridge.perturb(times[0], x[0], x[:2]), times=times)
    m = integrate(phase_sde_terms(network, bridge, key, m), PhaseSplitting(bridge), m, times=times[1:])
    return PhaseBridgeLoss(bridge)(network, x, key)[0], m, PhaseEstimate(network, bridge)(times[2], m)


AGM_PHASE_BRIDGE_HYPER = {"noise_scale": (3.0, 2.0), "correlation": (-0.2, 0.3), "noise_share": (0.5, 0.8)}


def asbm_discrete_imf(hyper, x, key):
    times, batch = jnp.array([0.0, 0.4, 1.0], x.dtype), (x[::-1] + 1, x)
    reference = Brownian(hyper["epsilon"])
    chain = TerminalTransition(lambda t, x, z: NETWORK(t, x, None) + jnp.sin(z), reference, times)
    model = AdversarialTransition(chain, lambda t, after, state: jnp.sum(jnp.sin(after) * state))
    ends = jnp.diag(jnp.array([1.0, 0.5], x.dtype)), jnp.diag(jnp.array([0.6, 2.0], x.dtype))
    exact = GaussianIMF(GaussianBridge(x[0], ends[0], x[1], ends[1], reference), times)
    start = 0.1 * jnp.outer(jnp.tanh(x[0]), jnp.tanh(x[1]))
    loss = AdversarialLoss(hyper["r1"])  # its two losses apart: in their sum each holds the other player still, so its gradient is no derivative
    players = loss.generator(model, batch, key), loss.discriminator(model, batch, key)
    return players, EnergyScoreLoss()(chain, batch, key)[0], exact.project(start)


def dpm_ot(hyper, x, key):
    path = EDMPath(10.0)
    found = fit_semi_discrete(key, x, num_samples=16, batch_size=8, max_steps=4, learning_rate=hyper["learning_rate"], patience=1)
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, jnp.asarray([0.8, 0.9, 0.95], x.dtype))
    blended = BlendedMap(found.transport, 3, hyper["max_angle"])
    return found, transported_sample(key, blended, term, DDIM())


DPM_OT_HYPER = {"learning_rate": (0.1, 0.3), "max_angle": (0.2, 1.5)}


def eg_entropic_not(hyper, x, key):
    loss = EnergyGuidedLoss(hyper["epsilon"], hyper["step_size"], 2)

    def potential(y):
        return jnp.sum(jnp.sin(y))

    def contrastive(y):
        return jnp.sum(jnp.sin(hyper["epsilon"] * y))

    kernel = ReplayTraining(loss, optax.sgd(0.1), lambda key, step: (x[:2], x[2:]), buffer_size=4)
    state = kernel.init(contrastive, key)
    state, aux = kernel.step(key, state._replace(model=contrastive))
    return loss(potential, (x, x[:2]), key)[0], loss.plan(potential).sample(key, x[0]), state.x, state.y, aux


def flow_dae_sharp_asymptotics(hyper, x, key):
    flow = fit_autoencoder_flow(jax.random.normal(key, x.shape, x.dtype), x, ridge=hyper["ridge"])
    limit = asymptotic_flow(hyper["num_samples"], hyper["cluster_std"], hyper["mean_square"], ridge=hyper["ridge"])
    return flow(0.3, x[0]), flow.transport(0.7, x[0]), limit.class_mean(1.0), limit.autoencoder(0.4).skip


class Scales(ScaleModel):
    """A stand-in for the networks of FlowAR."""

    slope: jax.Array
    shape: tuple[int, ...] = eqx.field(static=True, default=(2, 2, 1))
    num_scales: int = eqx.field(static=True, default=2)

    def semantics(self, coarser, label=None):
        return [jnp.full((1, 1, 1), label * self.slope), *(label * self.slope + upsample(x) for x in coarser)]

    def velocity(self, t, x, args):
        return jnp.sin(x) + args


_FLOWAR = jax.eval_shape(lambda key: FlowAR((1, 2, 1), 1, 4, 1, 1, 1, mlp_ratio=1, key=key), jax.random.key(0))


def flowar(hyper, x, key):
    model = jax.tree.map(lambda leaf: jnp.sin(hyper["frequency"] * jnp.arange(leaf.size).reshape(leaf.shape).astype(x.dtype)), _FLOWAR)
    scales, times = Scales(jnp.sum(x)), jnp.array([0.0, 0.4, 1.0], x.dtype)
    drawn = generate_scales(scales, key, 1, guidance_scale=hyper["guidance_scale"], guidance_start=0.1, times=times)
    return drawn, model.velocity(0.3, x.reshape(1, 2, 1), *model.semantics([]))


def light_sb(hyper, x, key):
    key_fit, key_sample = jax.random.split(key)
    with jax.numpy_dtype_promotion("standard"):
        bridge = fit_light_sb(key_fit, x, x[:3] + 1, hyper["epsilon"], 2, full=True, num_steps=2, batch_size=2, learning_rate=hyper["learning_rate"])
    diagonal = LightSB(bridge.log_weights, bridge.centres, jnp.zeros_like(bridge.centres), hyper["epsilon"])
    loss = LightSBLoss()(diagonal, (x, x[:2]), key)[0]
    return bridge.sample(key_sample, x), bridge(0.3, x[0]), bridge.log_prob(x, x), diagonal.sample(key_sample, x), loss


_META_FLOW = eqx.filter_jit(lambda key: MetaFlow(PopulationEmbedding(2, 3, 4, 2, 2, key=key), PopulationField(2, 3, 4, 1, 1, key=key)))(
    jax.random.key(3)
)


def meta_flow_matching(hyper, x, key):
    model = jax.tree.map(lambda leaf: leaf.astype(x.dtype) if eqx.is_array(leaf) else leaf, _META_FLOW)
    scaled = eqx.tree_at(lambda m: m.field.mlp.layers[-1].weight, model, replace_fn=lambda w: w * hyper["scale"])
    loss = MetaFlowMatchingLoss(VelocityLoss(LinearInterpolant(ZeroGamma()), times=uniform_times, antithetic=False))
    batch = MetaBatch(x[None], jnp.ones((1, 6), x.dtype), x[None, :3], x[None, 3:])
    times = jnp.array([0.0, 0.5, 1.0], x.dtype)
    return loss(scaled, batch, key)[0], scaled.transport(x, solver=dfx.Euler(), times=times)


def min_curvature_ode(hyper, x, key):
    def encoder(x, args):
        return (x / 2, jnp.sin(x))

    loss, aux = MinCurvatureLoss(hyper["beta"], hyper["prior_std"])(EncodedFlow(NETWORK, encoder), x, key)
    return loss, aux, EncoderCoupling(encoder)(key, x, x, None)


def mixflow_(hyper, x, key):
    target, momentum = ExtendedDensity(_mixture(x.dtype), NormalMomentum()), NormalMomentum()
    flow = HamiltonianFlow(lambda x: -jnp.sum(jnp.cosh(x)), hyper["step_size"], 2, hyper["pseudotime_step"], momentum)
    model = MixFlow(flow, ExtendedDensity(StandardNormal((2,), x.dtype), momentum), 3)
    return model.log_prob(HamiltonianState(x, x[::-1], jnp.asarray(0.3, x.dtype))), model.elbo(key, target.log_prob), model.sample(key)


def multimarginal_si(hyper, x, key):
    fields = ConsistentFields(lambda a, x, args: a[:, None] * NETWORK(a[0], x, None) + 1)
    path = FourierPath(hyper["first"] * jnp.ones((2, 3), x.dtype).at[1, 0].set(2), 0, 2)
    batch = x, x[::-1] + 1, jnp.sin(x)
    t = jnp.asarray(0.3, x.dtype)
    return {
        "loss": BarycentricLoss()(fields, batch, key)[0],
        "energy": PathEnergyLoss(fields)(path, batch, key)[0],
        "velocity": PathVelocity(fields, SpherePath(path))(t, x[0]),
        "score": PathScore(fields, path)(t, x[0]),
    }


def rectified_flow_pp(hyper, x, key):
    velocity = MatchedVelocity(NETWORK, EDMPath(20.0))
    times = jnp.linspace(0, 0.9, 4, dtype=x.dtype)
    pairs = jax.vmap(lambda x: reflow_pairs(velocity, x, times=times, solver=FixedNoiseEuler()))(x)
    back, _ = inverted_pairs(NETWORK, x[0], times=times)
    loss = ReflowLoss(UShapedTimes(hyper["concentration"]), PseudoHuber(hyper["scale"]), lambda a, b: jnp.sum(jnp.sin(a - b) ** 2))
    return {"loss": loss(NETWORK, pairs, key)[0], "pairs": pairs, "back": back}


def sbirr(hyper, x, key):
    snapshots = Snapshots([0.0, 0.4, 1.0], [x, x[:4] + 1, x[::-1] * 2])
    reference = ParametricReference(lambda p, t, x: p[0] - p[1] * x, hyper["rate"] * jnp.array([0.2, 1.0], x.dtype), hyper["epsilon"])
    solver = RegressionBridgeSolver(KernelRegressor(2, hyper["bandwidth"], hyper["ridge"]), 1, start=None)
    fitted = fit_sbirr(key, snapshots, reference, rounds=1, steps=2, solver=solver, refit=LinearRefit())
    return fitted.parameters, fitted.kl, fitted.bridges.paths


def sbunfold(hyper, x, key):
    bridge = UnfoldingBridge(mirrored_variances(6, hyper["lowest"], hyper["highest"]))

    def network(t, x, detector):
        return jnp.tanh(x - detector) + t

    return UnfoldingLoss(bridge)(network, (x, x[::-1]), key)[0], bridge.unfold(key, network, x[0], 3)


def sdsb_(hyper, x, key):
    times, epsilon = jnp.array([0.0, 0.4, 1.0], x.dtype), hyper["epsilon"]
    paths = SimulatedPaths(Samples(x), 3)(MeanTransition(NETWORK, epsilon, times))(key, 0)
    plain, flow = MeanTransition(NETWORK, epsilon, times, False), FlowTransition(NETWORK, epsilon, times, False)
    terminal = TerminalTransition(NETWORK, Brownian(epsilon), times, False)
    losses = [SimplifiedBridgeLoss()(model, paths, key)[0] for model in (plain, flow, terminal)]
    return losses, terminal.sample_path(key, x[0]), flow.sample(key, x[0])


def si_data_coupling(hyper, x, key):
    loss = VelocityLoss(LinearInterpolant(ZeroGamma()), antithetic=False)
    network = MaskedVelocity(lambda t, x, args: NETWORK(t, x, None) + args[0] * args[1])
    first = InpaintingCoupling(lambda key, x1: jnp.zeros_like(x1).at[0].set(1))
    inpainting = CoupledLoss(loss, first)(network, (x, x[:, :1]), key)[0]
    degraded = CoupledLoss(loss, Degradation(jnp.flip, hyper["sigma"]))(lambda t, x, args: NETWORK(t, x, None) + args[0], x, key)[0]
    return {"inpainting": inpainting, "degraded": degraded}


def smooth_flow_(hyper, x, key):
    def conditioner(kept):
        return jnp.sin(jnp.arange(5, dtype=x.dtype) + 2 * jnp.pi * kept)

    circle = Coupling(conditioner, (1,), SmoothCircleTransformer(1.0, hyper["min_density"], hyper["alpha"]))
    interval = Coupling(lambda kept: conditioner(kept)[:4], (0,), SmoothIntervalTransformer(1.0, hyper["min_density"], hyper["alpha"]))
    x = jax.nn.sigmoid(x)
    loss = ForceMatchingLoss(hyper["temperature"])(Flow(interval, StandardUniform((2,))), (x[None], x[None] ** 2), key)
    return *loss, circle.forward(x)


def stochastic_interpolants(hyper, x, key):
    interpolant = LinearInterpolant(BrownianBridgeGamma(hyper["a"]))
    source, t = x[::-1] + 1, jnp.asarray(0.3, x.dtype)
    one_sided = OneSidedInterpolant(lambda t: jnp.cos(jnp.pi / 2 * t), lambda t, x1: t * jnp.tanh(x1))
    # its γ and ε are held, so their gradients are no derivatives
    bridge = InterpolantBridge(LearnedInterpolant(LinearInterpolant(), lambda t, x0, x1: t * x0 * jnp.sin(x1)), NETWORK, 0.7)
    latent = LatentLoss(interpolant)(NETWORK, (source, x), key)[0]
    return {
        "velocity": VelocityLoss(interpolant)(NETWORK, (source, x), key)[0],
        "latent": latent,
        "score": ScoreFromLatent(NETWORK, interpolant.gamma)(t, x[0], None),
        "source": SourceLoss(one_sided)(NETWORK, (source, x), key)[0],
        "one_sided_score": ScoreFromSource(NETWORK, one_sided)(t, x[0]),
        "mirror": MirrorInterpolant(interpolant.gamma).interpolate(t, x[0], x[1], x[2]),
        "bridge": InterpolantBridgeLoss()(bridge, (source, x), key)[0],
        "kl_bound": kl_bound(latent**2, latent**2, hyper["epsilon"]),
    }


class NormalBase(eqx.Module):
    """N(0, I) in the plane, in the dtype of a number."""

    like: jax.Array

    def sample(self, key):
        return jax.random.normal(key, (2,), self.like.dtype)

    def log_prob(self, x):
        return standard_normal_log_prob(x)


def stochastic_normalizing_flow(hyper, x, key):
    log_step, share = jnp.log(hyper["step_size"]), hyper["share"]
    blocks = (
        DeterministicBlock(AffineBijection(log_step, x[0])),
        MetropolisBlock(0.0, share),
        LangevinBlock(log_step, share),
        HMCBlock(log_step, share, 2),
        UnderdampedLangevinBlock(log_step, share, hyper["friction"]),
    )
    flow = StochasticNormalizingFlow(BlockSequence(blocks), NormalBase(x[0]))
    kernel = PathMetropolis(flow, _mixture(x.dtype).log_prob)
    return kernel.step(key, WeightedSample(x, jnp.sum(x)))


def to_flow(hyper, x, key):
    model = TOFlow(NETWORK, StandardNormal((2,)), hyper["duration"], FixedSolve(2))
    loss, aux = TOFlowLoss(hyper["alpha"], kinetic=hyper["kinetic"])(model, x, key)
    return loss, aux["moving_speed"], model.decode(x[0])


def wsd_schedule_(hyper, x, key):
    cooldown = exponential_cooldown(hyper["half_life"])
    return wsd_schedule(hyper["peak"], hyper["total"], warmup_steps=hyper["warmup"], decay_steps=hyper["decay"], cooldown=cooldown)(x)


LAWS = {
    "to_flow": Plug(
        to_flow,
        BATCHES,
        {"duration": (0.7, 1.0), "alpha": (0.1, 0.3), "kinetic": (0.2, 0.5)},
        random=True,
        differentiable=False,
    ),
    "stochastic_normalizing_flow": Plug(
        stochastic_normalizing_flow, POINTS, {"step_size": (0.1, 0.3), "share": (0.6, 0.9), "friction": (1.0, 2.0)}, random=True
    ),
    "stochastic_interpolants": Plug(stochastic_interpolants, BATCHES, {"a": (2.0, 0.5), "epsilon": (0.9, 0.4)}, random=True),
    "smooth_flow": Plug(smooth_flow_, POINTS, {"alpha": (1.0, 0.7), "min_density": (0.1, 0.2), "temperature": (1.0, 1.5)}),
    "si_data_coupling": Plug(si_data_coupling, BATCHES, {"sigma": (0.3, 1.0)}, random=True),
    "sdsb": Plug(sdsb_, BATCHES, {"epsilon": (0.7, 1.1)}, random=True),
    "sbunfold": Plug(sbunfold, BATCHES, {"lowest": (0.01, 0.02), "highest": (0.3, 0.5)}, random=True),
    "sbirr": Plug(
        sbirr,
        BATCHES,
        {"rate": (0.5, 1.0), "epsilon": (0.5, 1.0), "bandwidth": (1.0, 0.7), "ridge": (1.0, 3.0)},
        random=True,
        differentiable=False,
        check_vma=False,
    ),
    "rectified_flow_pp": Plug(rectified_flow_pp, BATCHES, {"concentration": (4.0, 1.0), "scale": (0.00054, 0.1)}, random=True),
    "multimarginal_si": Plug(multimarginal_si, BATCHES, {"first": (0.5, 1.0)}, random=True),
    "mixflow": Plug(mixflow_, POINTS, {"step_size": (0.1, 0.2), "pseudotime_step": (0.2, 0.3)}, random=True),
    "min_curvature_ode": Plug(min_curvature_ode, BATCHES, {"beta": (10.0, 1.0), "prior_std": (1.0, 6.0)}, random=True),
    "meta_flow_matching": Plug(meta_flow_matching, BATCHES, {"scale": (1.0, 2.0)}, random=True),
    "light_sb": Plug(light_sb, BATCHES, {"epsilon": (0.5, 1.0), "learning_rate": (0.03, 0.1)}, random=True, differentiable=False, check_vma=False),
    "flowar": Plug(flowar, POINTS, {"frequency": (1.0, 2.0), "guidance_scale": (2.0, 3.0)}, random=True),
    "flow_dae_sharp_asymptotics": Plug(
        flow_dae_sharp_asymptotics,
        BATCHES,
        {"ridge": (0.1, 1.0), "num_samples": (8.0, 3.5), "cluster_std": (0.7, 1.5), "mean_square": (1.0, 2.0)},
        random=True,
    ),
    "eg_entropic_not": Plug(eg_entropic_not, BATCHES, {"epsilon": (0.5, 1.0), "step_size": (0.01, 0.02)}, random=True, differentiable=False),
    "dpm_ot": Plug(dpm_ot, BATCHES, DPM_OT_HYPER, random=True, differentiable=False),
    "asbm_discrete_imf": Plug(asbm_discrete_imf, BATCHES, {"epsilon": (0.7, 1.1), "r1": (0.1, 0.3)}, random=True),
    "agm_phase_bridge": Plug(agm_phase_bridge, BATCHES, AGM_PHASE_BRIDGE_HYPER, random=True),
    "action_matching": Plug(action_matching, BATCHES, {"sigma": (0.5, 1.0), "growth": (0.7, 0.2), "noise": (0.3, 0.1)}, random=True),
    "time_correction_sampler": Plug(
        time_correction_sampler,
        POINTS,
        {"window": (2.0, 0.0), "guidance_scale": (0.1, 0.3), "share": (0.8, 0.4)},
        random=True,
        differentiable=False,
    ),
    "mean_field_chaos_diffusion": Plug(mean_field_chaos_diffusion, BATCHES, {"beta_max": (15.0, 20.0), "step_size": (0.1, 0.2)}, random=True),
    "pf_ode_w2_bounds": Plug(
        pf_ode_w2_bounds,
        POINTS,
        {
            "second_moment": (4.0, 2.0),
            "strong_convexity": (0.5, 1.0),
            "smoothness": (4.0, 8.0),
            "time_lipschitz": (0.3, 1.0),
            "score_error": (0.1, 0.0),
        },
    ),
    "serial_reproduction": Plug(serial_reproduction, POINTS, {"level": (0.7, 1.5)}, random=True),
    "denoising_mcmc_dlg": Plug(denoising_mcmc_dlg, POINTS, {"step_size": (0.05, 0.1), "sigma_min": (0.02, 0.05)}, random=True, differentiable=False),
    "min_snr": Plug(min_snr, BATCHES, {"gamma": (5.0, 0.7, 20.0), "penalty": (2.0, 5.0)}, random=True),
    "score_sde": Plug(score_sde, POINTS, {"beta_max": (15.0, 20.0), "noise_scale": (1.0, 0.5), "snr": (0.1, 0.2)}, random=True),
    "diffusion_time": Plug(diffusion_time, BATCHES, {"beta_max": (15.0, 20.0), "shift": (0.1, 0.3)}, random=True),
    "gdss": Plug(gdss, BATCHES, {"beta_max": (15.0, 20.0), "snr": (0.1, 0.2), "noise_scale": (1.0, 0.7)}, random=True),
    "fp_diffusion": Plug(
        fp_diffusion,
        BATCHES,
        {"beta_min": (0.1, 0.3), "beta_max": (2.0, 4.0), "margin": (0.05, 0.1), "regulariser": (0.1, 1.0), "noise_scale": (1.0, 0.5)},
        random=True,
    ),
    "usf_s3": Plug(usf_s3, POINTS, {"beta_max": (15.0, 20.0), "eta": (1.0, 0.5)}, random=True),
    "ar_diffusion": Plug(ar_diffusion, BATCHES, {"beta_max": (15.0, 20.0)}, random=True),
    "dm_error_propagation_reg": Plug(dm_error_propagation_reg, BATCHES, HYPER, random=True, differentiable=False),
    "e_tsdm": Plug(e_tsdm, POINTS, {"threshold": (0.1, 0.3), "num_intervals": (5.0, 3.0)}),
    "one_more_step": Plug(one_more_step, POINTS, {"beta_max": (5.0, 10.0), "noise_scale": (0.4, 0.9)}, random=True),
    "calibrated_dpm": Plug(calibrated_dpm, BATCHES, {"beta_max": (15.0, 20.0)}, random=True),
    "bcni_sacn": Plug(bcni_sacn, BATCHES, {"strength": (0.1, 0.2)}, random=True, differentiable=False),
    "a_sdm_feature_inheritance": Plug(a_sdm_feature_inheritance, POINTS, {"weight": (0.3, 0.5), "switch_time": (0.6, 0.2)}),
    # JAX 0.10's batching of a `cond` marks what it broadcasts as varying twice, which the check refuses.
    "ase_early_exit_diffusion": Plug(ase_early_exit_diffusion, BATCHES, {"weight": (0.3, 0.5)}, random=True, check_vma=False),
    "autodiffusion_timestep_ea": Plug(autodiffusion_timestep_ea, POINTS, {"rate": (0.1, 0.9)}, random=True, differentiable=False),
    "neural_flow_diffusion_models": Plug(
        neural_flow_diffusion_models,
        BATCHES,
        {"delta": (0.1, 0.2), "decoder_std": (0.1, 0.2), "curvature": (0.1, 1.0), "noise_scale": (0.5, 1.0)},
        random=True,
    ),
    "cold_diffusion": Plug(cold_diffusion, BATCHES, {"beta_max": (15.0, 20.0), "max_std": (0.5, 1.0), "power": (1.0, 2.0)}, random=True),
    "bayesian_flow_networks": Plug(
        bayesian_flow_networks,
        BATCHES,
        {"final_std": (0.1, 0.3), "accuracy": (2.0, 1.0), "min_std": (0.4, 3.0)},
        random=True,
    ),
    "cvdm": Plug(
        cvdm,
        BATCHES,
        {
            "margin": (1e-3, 1e-2),
            "curvature": (1e-3, 1e-2),
            "schedule_weight": (2.0, 1.0),
            "prior_weight": (2.0, 1.0),
            "curvature_weight": (2.0, 1.0),
            "gamma_min": (1e-6, 1e-2),
            "gamma_max": (0.99999, 0.98),
        },
        random=True,
    ),
    "kinetic_optimal_path": Plug(kinetic_optimal_path_, BATCHES, {"share": (0.5, 0.9), "floor": (1e-3, 0.8)}),
    "time_shift_sampler": Plug(time_shift_sampler, POINTS, {"window": (0.1, 0.02), "cutoff": (0.7, 0.3)}, differentiable=False),
    "geometric_view_ode_jump": Plug(geometric_view_ode_jump, POINTS, {"bandwidth": (0.8, 1.5)}),
    "ambient_diffusion_scaling": Plug(ambient_diffusion_scaling, BATCHES, {"beta_max": (15.0, 20.0), "level": (0.2, 0.5)}, random=True),
    "tiw_dsm": Plug(tiw_dsm, BATCHES, {"beta_min": (0.1, 0.3)}, random=True, differentiable=False),
    "knn_immiscible": Plug(knn_immiscible, BATCHES, {"scale": (2.0, 1.2)}, random=True),
    "pfgmpp": Plug(pfgmpp, BATCHES, {"extra_dims": (16.0, 128.0)}, random=True),
    "conjugate_splitting_integrators": Plug(conjugate_splitting_integrators, POINTS, {"gamma": (0.1, 0.3), "stability": (0.5, 1.0)}, random=True),
    "multivariate_diffusion_models": Plug(
        multivariate_diffusion_models,
        BATCHES,
        {"friction": (2.0, 1.0), "initial": (0.1, 0.3), "margin": (0.01, 0.1)},
        random=True,
    ),
    "psld": Plug(
        psld,
        BATCHES,
        {"gamma": (0.1, 0.3), "nu": (3.0, 4.0), "initial_scale": (0.04, 0.1), "beta": (8.0, 4.0)},
        random=True,
    ),
    "restoration_degradation": Plug(restoration_degradation, POINTS, {"length": (0.3, 0.2), "horizon": (1.0, 1.2)}),
    "accelerated_ddim_ddpm": Plug(accelerated_ddim_ddpm, POINTS, {"correction": (1.0, 0.5), "c0": (2.0, 1.5), "c1": (4.0, 3.0)}, random=True),
    "iia": Plug(iia, POINTS, {"scale": (0.1, 0.3)}),
    "bdia": Plug(bdia, POINTS, {"gamma": (0.8, 0.5)}),
    "pndm": Plug(pndm, POINTS, {"beta_max": (15.0, 20.0)}),
    "er_sde": Plug(er_sde, POINTS, {"exponent": (0.3, 0.6), "offset": (10.0, 2.0)}, random=True),
    "asynchronous_halving": Plug(asynchronous_halving, CURVES, differentiable=False),
    # optax's Hungarian algorithm starts its loop from constants, which the check refuses.
    "immiscible_diffusion": Plug(immiscible_diffusion, BATCHES, random=True, check_vma=False),
    "population_based_training": Plug(population_based_training, CURVES, {"down": (0.8, 0.5)}, random=True, differentiable=False),
    "successive_halving": Plug(successive_halving, CURVES, differentiable=False),
    "universal_checkpoint": Plug(universal_checkpoint, BATCHES),
    "wsd_schedule": Plug(
        wsd_schedule_,
        # An example is a step in each stretch; none is on a knot, where the schedule has no derivative.
        jnp.array([3.3, 40.0, 91.3, 97.7]) + 0.2 * jnp.arange(4.0)[:, None],
        {"peak": (0.1, 0.2), "total": (100.0, 110.0), "warmup": (10.0, 20.0), "decay": (12.0, 20.0), "half_life": (0.3, 0.5)},
    ),
}
