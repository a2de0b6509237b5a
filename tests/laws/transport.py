"""Rows of `ergodax.transport`."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ergodax.core import (
    DenoiserTerm,
    EDMPath,
    integrate,
    standard_normal_log_prob,
    uniform_times,
)
from ergodax.diffusion import (
    DDIM,
)
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
    StandardUniform,
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

from .shared import BATCHES, NETWORK, POINTS, two_clusters


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
    term = DenoiserTerm(two_clusters(x.dtype).denoiser(path), path, jnp.asarray([0.8, 0.9, 0.95], x.dtype))
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
    target, momentum = ExtendedDensity(two_clusters(x.dtype), NormalMomentum()), NormalMomentum()
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
    kernel = PathMetropolis(flow, two_clusters(x.dtype).log_prob)
    return kernel.step(key, WeightedSample(x, jnp.sum(x)))


def to_flow(hyper, x, key):
    model = TOFlow(NETWORK, StandardNormal((2,)), hyper["duration"], FixedSolve(2))
    loss, aux = TOFlowLoss(hyper["alpha"], kinetic=hyper["kinetic"])(model, x, key)
    return loss, aux["moving_speed"], model.decode(x[0])


ROWS = {
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
}
