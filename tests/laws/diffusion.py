"""Rows of `ergodax.diffusion`."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp

from ergodax.core import (
    DataPrediction,
    Denoiser,
    DenoiserTerm,
    EDMPath,
    FlowMatchingPath,
    NoisePrediction,
    VPPath,
    VPrediction,
    integrate,
    iterate,
    standard_normal_log_prob,
    uniform_times,
    with_noise,
)
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
from ergodax.testing import Plug

from .shared import BATCHES, NETWORK, POINTS, two_clusters


def immiscible_diffusion(hyper, x, key):
    return Immiscible()(key, x, jax.random.normal(key, x.shape, x.dtype), None)


def er_sde(hyper, x, key):
    path = VPPath()
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, log_snr_grid(path, 4, jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype)))
    return integrate(term, ERSDE(ExponentialNoiseScale(hyper["exponent"], hyper["offset"])), x, key=key)


def pndm(hyper, x, key):
    path = VPPath(0.1, hyper["beta_max"])
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 7))
    return integrate(term, PNDM(2, WarmUp.improved_euler()), integrate(term, PNDM(), x))


def bdia(hyper, x, key):
    path = VPPath()
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, log_snr_grid(path, 4, jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype)))
    end, states = integrate(term, BDIA(hyper["gamma"]), x, save=lambda t, y: y)
    return {
        "end": end,
        "inverse": bdia_invert(term, BDIA(hyper["gamma"]), (states[-2] + 0.1, end)),
        "heun": integrate(term, BDIA(hyper["gamma"], heun_move), x),
    }


def iia(hyper, x, key):
    path = VPPath()
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, log_snr_grid(path, 4, jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype)))
    coefficients = hyper["scale"] * jnp.linspace(jnp.asarray(-1.0, x.dtype), 1.0, 8).reshape(4, 2)
    return [integrate(term, IIA(coefficients, *update), x) for update in ((), (heun_update,))]


def accelerated_ddim_ddpm(hyper, x, key):
    path = FlowMatchingPath()
    # Without the last step, to σ = 0: gradients to a grid with an infinite clock are not finite.
    grid = accelerated_grid(path, 12, hyper["c0"], hyper["c1"]).astype(x.dtype)[:-1]
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, grid)
    return integrate(term, AcceleratedDDPM(), integrate(term, AcceleratedDDIM(hyper["correction"]), x), key=key)


def restoration_degradation(hyper, x, key):
    length = hyper["length"]
    process = ForwardProcess(lambda u, x, args: jnp.tanh(x), lambda u: 1.0, lambda u, x, args: -x / (1 + u), hyper["horizon"])
    y = integrate(process, RestorationDegradation(lambda u, h: length), x, times=jnp.linspace(jnp.asarray(0.0, x.dtype), 0.6, 5))
    path = VPPath()
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, jnp.linspace(jnp.asarray(0.1, x.dtype), 0.9, 5))
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
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, jnp.asarray([0.2, 0.5], x.dtype))
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
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, grid)
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
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 7))
    return integrate(term, TimeShift(DPMSolverPP2M(), hyper["window"], hyper["cutoff"]), x)


def kinetic_optimal_path_(hyper, x, key):
    metric = SeparationMetric(lambda s: 1 - hyper["share"].astype(s.dtype) / (1 + s**2))
    path = fit_kinetic_optimal_path(metric, 9, hyper["floor"])
    measured = VelocityMetric(two_clusters(x.dtype).denoiser(TRIGONOMETRIC), x, x[::-1])
    grid = jnp.asarray([0.1, 0.3, 0.7, 0.9], x.dtype)
    samples = integrate(DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, grid), DDIM(), x)
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
    noisy = Restoration(two_clusters(x.dtype).denoiser(path), PathDegradation(path))
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
        term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, timestep_grid(times, candidate.steps))
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
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, log_snr_grid(path, 4, jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype)))
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
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, grid)
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
    path, mixture = EDMPath(5.0), two_clusters(x.dtype)
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
    return bound(grid), bound.initialisation(), integrate(DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, grid), ScoreExponential(path), x)


def mean_field_chaos_diffusion(hyper, x, key):
    path, grid = VPPath(0.1, hyper["beta_max"]), jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 5)
    network = MeanFieldNetwork(lambda t, x, args: jnp.tanh(x) + t, lambda t, r, args: jnp.sin(r) * t)
    loss = SubdividedLoss(DenoisingLoss(path, NoisePrediction(), times=uniform_times), grid[jnp.array([0, 2, 4])], (2, 6))
    denoised = Denoiser(network, path, NoisePrediction())
    branching = Branching(LangevinShift(denoised, path, hyper["step_size"], 2))
    cloud = branching_integrate(denoised, path, (grid[:3], grid[2:]), EulerMaruyama(), x[:2], branching, key)
    return loss(network, x[None], key)[0], cloud


def time_correction_sampler(hyper, x, key):
    path, mixture = VPPath(), two_clusters(x.dtype)
    grid = jnp.linspace(jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype), 7)

    def bayes(x):
        return jax.vmap(lambda t: mixture.log_prob_at(path, t, x))(grid[:-1])

    solver = TimeCorrection(Ancestral(), bayes, hyper["window"], lambda denoised, args: denoised[0] ** 2, hyper["guidance_scale"], hyper["share"])
    model = TimePredictor((2,), 6, 8, dtype=x.dtype, key=jax.random.key(3))
    loss = TimePredictorLoss(path, grid[:-1])(model, x[None] + 1, key)
    return integrate(DenoiserTerm(mixture.denoiser(path), path, grid), solver, x, key=key), loss


ROWS = {
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
    # optax's Hungarian algorithm starts its loop from constants, which the check refuses.
    "immiscible_diffusion": Plug(immiscible_diffusion, BATCHES, random=True, check_vma=False),
}
