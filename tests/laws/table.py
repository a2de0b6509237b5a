"""One row per catalogued method: the `Plug` that the laws are checked on. Shapes are tiny and shared; truth tests judge the numbers."""

import equinox as eqx
import jax
import jax.numpy as jnp

from ergodax.core import DenoiserTerm, EDMPath, FlowMatchingPath, Lanes, VPPath, VPrediction, integrate, replay, uniform_times, with_noise
from ergodax.data import GaussianMixture
from ergodax.diffusion import (
    BDIA,
    ERSDE,
    IIA,
    PNDM,
    PSLD,
    AcceleratedDDIM,
    AcceleratedDDPM,
    AmbientLoss,
    ConjugateDDIM,
    ConjugateIntegrator,
    DenoisingBound,
    DenoisingLoss,
    DensityRatioLoss,
    DPMSolverPP2M,
    EmpiricalDenoiser,
    EmpiricalPFGMPPDenoiser,
    EulerMaruyama,
    ExponentialNoiseScale,
    ForwardProcess,
    Heun,
    HybridScoreLoss,
    Immiscible,
    ImportanceWeightedLoss,
    LikelihoodLoss,
    LinearBeta,
    LinearRestorationDegradation,
    LinearSDETerm,
    MinSNR,
    MixtureRatio,
    NearestNoise,
    NoiseScore,
    PFGMPPNoise,
    RestorationDegradation,
    ReverseDiffusion,
    ReweightedLoss,
    ScaledDataPath,
    SymmetricSplitting,
    TimeShift,
    WarmUp,
    accelerated_grid,
    bdia_invert,
    chord_deviation,
    denoiser_deviation,
    diffusion_weight,
    heun_move,
    heun_update,
    karras_grid,
    log_snr_grid,
    malda,
    mean_shift,
    noise_level_time,
    oba,
    ode_jump,
    pfgmpp_prior,
    trajectories,
)
from ergodax.distributed import Averaged, Fragmented, Replicated, Vocabulary, ZeroFlat, ZeroPerLeaf, split_atoms, union_fragments
from ergodax.schedules import exponential_cooldown, wsd_schedule
from ergodax.testing import Plug
from ergodax.transport import BrownianBridgeGamma, LatentLoss, LinearInterpolant, ScoreFromLatent, VelocityLoss
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


def score_sde(hyper, x, key):
    path = VPPath(0.1, hyper["beta_max"])
    term = DenoiserTerm(_mixture(x.dtype).denoiser(path), path, log_snr_grid(path, 4, jnp.asarray(0.1, x.dtype), jnp.asarray(0.9, x.dtype)))
    first, second = jax.random.split(key)
    return integrate(term, EulerMaruyama(hyper["noise_scale"]), integrate(term, ReverseDiffusion(), x, key=first), key=second)


def min_snr(hyper, x, key):
    # The weight has a kink where SNR = γ; the drawn times stay clear of it.
    loss = DenoisingLoss(VPPath(), VPrediction(), weight=MinSNR(hyper["gamma"]), times=uniform_times)
    return loss(NETWORK, x, key)[0]


def immiscible_diffusion(hyper, x, key):
    return Immiscible()(key, x, jax.random.normal(key, x.shape, x.dtype), None)


def stochastic_interpolants(hyper, x, key):
    interpolant = LinearInterpolant(BrownianBridgeGamma(hyper["a"]))
    source = x[::-1] + 1
    latent = LatentLoss(interpolant)(NETWORK, (source, x), key)[0]
    score = ScoreFromLatent(NETWORK, interpolant.gamma)(jnp.asarray(0.3, x.dtype), x[0], None)
    return {"velocity": VelocityLoss(interpolant)(NETWORK, (source, x), key)[0], "latent": latent, "score": score}


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


def wsd_schedule_(hyper, x, key):
    cooldown = exponential_cooldown(hyper["half_life"])
    return wsd_schedule(hyper["peak"], hyper["total"], warmup_steps=hyper["warmup"], decay_steps=hyper["decay"], cooldown=cooldown)(x)


LAWS = {
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
    "min_snr": Plug(min_snr, BATCHES, {"gamma": (5.0, 0.7, 20.0)}, random=True),
    "population_based_training": Plug(population_based_training, CURVES, {"down": (0.8, 0.5)}, random=True, differentiable=False),
    "score_sde": Plug(score_sde, POINTS, {"beta_max": (15.0, 20.0), "noise_scale": (1.0, 0.5)}, random=True),
    "stochastic_interpolants": Plug(stochastic_interpolants, BATCHES, {"a": (2.0, 0.5)}, random=True),
    "successive_halving": Plug(successive_halving, CURVES, differentiable=False),
    "universal_checkpoint": Plug(universal_checkpoint, BATCHES),
    "wsd_schedule": Plug(
        wsd_schedule_,
        # An example is a step in each stretch; none is on a knot, where the schedule has no derivative.
        jnp.array([3.3, 40.0, 91.3, 97.7]) + 0.2 * jnp.arange(4.0)[:, None],
        {"peak": (0.1, 0.2), "total": (100.0, 110.0), "warmup": (10.0, 20.0), "decay": (12.0, 20.0), "half_life": (0.3, 0.5)},
    ),
}
