"""One row per catalogued method: the `Plug` that the laws are checked on. Shapes are tiny and shared; truth tests judge the numbers."""

import equinox as eqx
import jax
import jax.numpy as jnp

from ergodax.core import DenoiserTerm, Lanes, VPPath, VPrediction, integrate, replay, uniform_times
from ergodax.data import GaussianMixture
from ergodax.diffusion import DenoisingLoss, EulerMaruyama, Immiscible, MinSNR, ReverseDiffusion, log_snr_grid
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


def wsd_schedule_(hyper, x, key):
    cooldown = exponential_cooldown(hyper["half_life"])
    return wsd_schedule(hyper["peak"], hyper["total"], warmup_steps=hyper["warmup"], decay_steps=hyper["decay"], cooldown=cooldown)(x)


LAWS = {
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
