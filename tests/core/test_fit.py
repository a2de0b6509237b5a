"""Training as a pure function: against a plain loop, in pieces, under vmap, when it goes wrong, and its precision and memory policies."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax import nn
from ergodax.core import Fit, fit
from ergodax.core.precision import InDtype, in_dtype, rematerialised
from ergodax.testing import count_traces


X = jax.random.normal(jax.random.key(0), (60, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5]) + 0.3
OPTIMISER = optax.adam(0.05)


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax itself does not run under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Line(eqx.Module):
    """Trainable arrays, a static field, and an integer array that must stay as it is."""

    weight: jax.Array
    bias: jax.Array
    count: jax.Array
    name: str = eqx.field(static=True, default="line")

    def __call__(self, x):
        return x @ self.weight + self.bias


LINE = Line(jnp.zeros(3), jnp.zeros(()), jnp.array(7))


def loss(model, batch, key):
    x, y = batch
    error = model(x) - y
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def noisy(model, batch, key):
    x, y = batch
    return jnp.mean((model(x) - y + 0.1 * jax.random.normal(key, y.shape)) ** 2), {}


def make(**options):
    return Fit(loss, LINE, OPTIMISER, (X, Y), **({"batch_size": 20} | options))


def test_equals_a_plain_loop():
    """Batches recorded by a loss that returns what it saw; then the same batches through optax by hand, with the average by its recursion."""

    def recording(model, batch, key):
        value, _ = loss(model, batch, key)
        return value, {"x": batch[0], "y": batch[1]}

    fitted = fit(recording, LINE, OPTIMISER, (X, Y), jax.random.key(1), num_steps=9, batch_size=20, ema_decay=0.5)
    model, average, state = LINE, LINE, OPTIMISER.init(eqx.filter(LINE, eqx.is_inexact_array))
    for n in range(9):
        batch = fitted.metrics["x"][n], fitted.metrics["y"][n]
        (value, _), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model, batch, None)
        np.testing.assert_allclose(value, fitted.metrics["loss"][n], rtol=1e-10)
        np.testing.assert_allclose(optax.tree.norm(gradient), fitted.metrics["grad_norm"][n], rtol=1e-10)
        updates, state = OPTIMISER.update(gradient, state, model)
        model = eqx.apply_updates(model, updates)
        decay = min(0.5, (1 + n) / (10 + n))
        average = eqx.tree_at(lambda m: m.weight, average, decay * average.weight + (1 - decay) * model.weight)
    np.testing.assert_allclose(fitted.model.weight, model.weight, rtol=1e-10)
    np.testing.assert_allclose(fitted.average.weight, average.weight, rtol=1e-10)
    assert fitted.model.name == "line"
    assert fitted.model.count == 7


def test_an_epoch_sees_every_example_once():
    rows = jnp.arange(60)
    fitting = Fit(lambda m, b, k: (jnp.sum(m.bias), {"rows": b}), LINE, OPTIMISER, rows, batch_size=16)
    seen = fitting.run(jax.random.key(0), 9).metrics["rows"]
    for epoch in range(3):  # 3 whole batches an epoch, 12 examples dropped
        assert len(np.unique(seen[3 * epoch : 3 * epoch + 3])) == 48
    assert not np.array_equal(seen[0], seen[3])


def test_metrics_are_means_and_blocks_do_not_matter():
    fine = make(every=1).run(jax.random.key(2), 12)
    coarse = make(every=4).run(jax.random.key(2), 12)
    np.testing.assert_allclose(coarse.metrics["loss"], fine.metrics["loss"].reshape(3, 4).mean(1), rtol=1e-10)
    np.testing.assert_allclose(coarse.metrics["mae"], fine.metrics["mae"].reshape(3, 4).mean(1), rtol=1e-10)
    np.testing.assert_allclose(coarse.model.weight, fine.model.weight, rtol=1e-10)


def test_pieces_are_the_whole_to_the_bit():
    fitting = make(every=2, ema_decay=0.9)
    advance = jax.jit(lambda state: fitting.advance(state, 2))
    state = fitting.init(jax.random.key(3))
    for _ in range(4):
        state, _ = advance(state)
    resumed = jax.tree.map(lambda a: a, state)  # what a checkpoint holds
    for _ in range(2):
        state, _ = advance(state)
        resumed, _ = advance(resumed)
    whole = fitting.run(jax.random.key(3), 12)
    np.testing.assert_array_equal(state.model.weight, resumed.model.weight)
    np.testing.assert_allclose(state.average.weight, whole.average.weight, rtol=1e-10)
    assert int(state.step) == 12


def test_accumulation_is_the_large_batch():
    """Means of means of equal parts: only the rounding of a sum of 20 differs, in each of 6 steps, where adam's division can enlarge it little."""
    whole, parts = (make(accumulate=n).run(jax.random.key(4), 6) for n in (1, 5))
    np.testing.assert_allclose(parts.model.weight, whole.model.weight, rtol=1e-13)
    for name in ("loss", "mae", "grad_norm"):
        np.testing.assert_allclose(parts.metrics[name], whole.metrics[name], rtol=1e-13)


def test_accumulation_holds_one_gradient():
    """The parts are summed as they come: twice as many parts need no more memory, although each gradient (400 kB) outweighs all else."""
    model = eqx.nn.Linear(100, 500, key=jax.random.key(0))
    x = jnp.ones((16, 100))

    def temporary(parts):
        fitting = Fit(lambda m, b, k: (jnp.mean(jax.vmap(m)(b) ** 2), {}), model, optax.sgd(0.1), x, batch_size=16, accumulate=parts)
        return jax.jit(lambda state: fitting.advance(state, 1)).lower(fitting.init(jax.random.key(0))).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) <= temporary(8)


def test_batch_function_and_evaluate():
    """The function gets a fresh key and the step; `evaluate` sees the averaged model, always with the same key."""
    fitting = Fit(
        lambda m, b, k: (jnp.sum(m.weight**2) + jnp.sum(m.bias), {"step": b[0], "draw": b[1]}),
        LINE,
        OPTIMISER,
        lambda key, step: (step.astype(float), jax.random.normal(key)),
        ema_decay=0.9,
        evaluate=lambda model, key: {"bias": model.bias, "key": jax.random.normal(key)},
    )
    fitted = fitting.run(jax.random.key(5), 5)
    np.testing.assert_array_equal(fitted.metrics["step"], np.arange(5))
    assert len(np.unique(fitted.metrics["draw"])) == 5
    assert len(np.unique(fitted.metrics["key"])) == 1
    np.testing.assert_array_equal(fitted.metrics["bias"][-1], fitted.average.bias)
    assert fitted.average.bias != fitted.model.bias


def test_vmap_over_rate_and_seed_is_the_loop_in_one_trace():
    def train(rate, seed):
        return fit(noisy, LINE, optax.adam(rate), (X, Y), jax.random.key(seed), num_steps=8, batch_size=20, every=4).model.weight

    counted, traces = count_traces(train)
    rates, seeds = jnp.array([0.01, 0.1]), jnp.array([0, 5])
    run = jax.jit(jax.vmap(counted))
    together = run(rates, seeds)
    run(rates * 2, seeds + 1)
    assert traces() == 1
    alone = jnp.stack([jax.jit(train)(rate, seed) for rate, seed in zip(rates, seeds)])
    np.testing.assert_allclose(together, alone, rtol=1e-9)


def test_a_bad_step_stops_the_run_at_the_last_good_state():
    """The loss becomes NaN at step 5 only; nothing after it changes the model, and the step is named. A sweep's other lanes go on."""

    def train(bad_at):
        def breaking(model, batch, key):
            value, aux = loss(model, batch[:2], key)
            return jnp.where(batch[2] == bad_at, jnp.nan, value), aux

        def data(key, step):
            return X[:20], Y[:20], step

        fitted = Fit(breaking, LINE, OPTIMISER, data).run(jax.random.key(0), 8)
        return fitted.model.weight, fitted.failed_at, fitted.metrics["loss"]

    weights, failed, losses = jax.jit(jax.vmap(train))(jnp.array([5, 100], jnp.int32))
    np.testing.assert_array_equal(failed, [5, -1])
    five = Fit(loss, LINE, OPTIMISER, lambda key, step: (X[:20], Y[:20])).run(jax.random.key(0), 5)
    np.testing.assert_allclose(weights[0], five.model.weight, rtol=1e-10)
    assert bool(jnp.isfinite(losses[1]).all())
    assert not bool(jnp.isfinite(losses[0][5]))


def test_float32_stays_float32():
    narrow = jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, (LINE, X, Y))
    shapes = eqx.filter_eval_shape(
        lambda line, x, y: fit(loss, line, OPTIMISER, (x, y), jax.random.key(0), num_steps=2, batch_size=20, ema_decay=0.9), *narrow
    )
    assert shapes.model.weight.dtype == shapes.average.weight.dtype == jnp.float32


# Precision and memory


SIGNS = jnp.asarray(np.array(np.meshgrid(*3 * [[-1.0, 1.0]])).reshape(3, 8).T, jnp.float32)
NARROW_LINE = Line(jnp.zeros(3, jnp.float32), jnp.zeros((), jnp.float32), jnp.array(7))


def gamma(k):
    """The relative error of k roundings to bfloat16 (8 bits): k u / (1 - k u)."""
    return k * 2.0**-8 / (1 - k * 2.0**-8)


def rounding_bounds(weight, bias, x, y):
    """How far loss and gradient of mean((x w + b - y)²) may be when x w + b and its derivative are computed in bfloat16, sums included.

    Output: two casts, a dot of length 3, the bias's cast and sum make at most 7 roundings. Gradient: 2 r / B is cast, times x (cast), and summed
    over B examples, B + 3 roundings, on top of what the error of r brings.
    """
    size = len(x)
    ones = np.concatenate([x, np.ones((size, 1))], 1)
    residual = x @ weight + bias - y
    error = gamma(7) * (np.abs(x) @ np.abs(weight) + np.abs(bias))
    loss = np.mean(2 * np.abs(residual) * error + error**2)
    gradient = (2 / size) * np.abs(ones).T @ (gamma(size + 3) * (np.abs(residual) + error) + error)
    return loss, gradient


def test_bfloat16_stays_within_the_rounding_bound():
    """One step, then forty: gradient descent forgets a gradient's error at the rate 1 - η h, h the curvatures 2·1.1² and 2."""
    x, rate = 1.1 * SIGNS, 0.1
    y = x @ jnp.array([1.0, -2.0, 0.5], jnp.float32) + jnp.float32(0.3)
    key = jax.random.key(0)

    def make(dtype):
        return Fit(loss, NARROW_LINE, optax.sgd(rate), lambda key, step: (x, y), compute_dtype=dtype)

    wide, narrow = make(None), make(jnp.bfloat16)
    advance = {fitting.compute_dtype: fitting.compiled(fitting.init(key), 1) for fitting in (wide, narrow)}
    exact = wide.init(key)
    state, tolerance = narrow.init(key), np.zeros(4)
    rho = np.abs(1 - rate * np.array([2.42, 2.42, 2.42, 2]))
    for n in range(40):
        weight, bias = np.asarray(state.model.weight, float), float(state.model.bias)
        loss_bound, gradient_bound = rounding_bounds(weight, bias, np.asarray(x, float), np.asarray(y, float))
        plain, _ = loss(eqx.combine(state.model, NARROW_LINE), (x, y), key)
        state, metrics = advance[jnp.bfloat16](state)
        exact, _ = advance[None](exact)
        assert abs(float(metrics["loss"][0]) - float(plain)) <= loss_bound + 1e-6
        tolerance = rho * tolerance + rate * gradient_bound
        differences = np.abs(np.append(state.model.weight - exact.model.weight, state.model.bias - exact.model.bias))
        assert (differences <= tolerance + 1e-6).all()
        if n == 0:  # the step is -η times the gradient
            assert (differences / rate <= gradient_bound + 1e-6).all()
    assert differences.max() > 1e-4  # it was bfloat16
    assert tolerance.max() < 0.4  # and the bound says something about weights of up to 2


def test_what_bfloat16_touches():
    """Parameters and arrays that enter the model; not scalars, integers, the loss, gradients, optimiser, average or evaluation."""
    seen = {}

    class Model(eqx.Module):
        line: Line
        width: int = eqx.field(static=True, default=3)

        def __call__(self, t, x, label, *, key=None):
            seen["inside"] = t.dtype, x.dtype, label.dtype, self.line.weight.dtype, self.line.count.dtype
            return self.line(x)

    def denoise(model, batch, key):
        assert isinstance(model, InDtype)
        assert model.width == 3
        out = jax.vmap(model)(batch[:, 0], batch, jnp.arange(20))
        seen["outside"] = out.dtype, batch.dtype
        return jnp.mean(out**2), {}

    def update(gradient, state, params=None):
        seen["gradient"] = gradient.line.weight.dtype
        return gradient, state

    def evaluate(model, key):
        seen["evaluate"] = model.line.weight.dtype
        return {"same": model(jnp.float32(0), SIGNS[0], jnp.array(0))}

    optimiser = optax.chain(optax.adam(0.1), optax.GradientTransformation(lambda params: optax.EmptyState(), update))
    fitting = Fit(
        denoise, Model(NARROW_LINE), optimiser, X.astype(jnp.float32), batch_size=20, ema_decay=0.9, evaluate=evaluate, compute_dtype=jnp.bfloat16
    )
    before = fitting.init(jax.random.key(0))
    after = jax.eval_shape(lambda state: fitting.advance(state, 1)[0], before)
    f32, bf16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    assert seen.pop("inside")[:4] == (f32, f32, jnp.dtype(int), f32)  # the last call: `evaluate`
    assert seen == {"outside": (f32, f32), "gradient": f32, "evaluate": f32}
    assert jax.tree.map(lambda a: a.dtype, before) == jax.tree.map(lambda a: a.dtype, after)
    assert bf16 not in {leaf.dtype for leaf in jax.tree.leaves(after)}
    jax.eval_shape(lambda model: denoise(model, X.astype(jnp.float32)[:20], None), InDtype(Model(NARROW_LINE), bf16, f32))
    assert seen["inside"][:3] == (f32, bf16, jnp.dtype(int))


NETWORKS = {
    "mlp": lambda key, dtype: nn.TimeMLP((4, 4, 1), 8, 2, 3, dtype=dtype, key=key),
    "unet": lambda key, dtype: nn.UNet((4, 4, 1), 8, (1, 2), 3, heads=2, dtype=dtype, key=key),
    "dit": lambda key, dtype: nn.DiT((4, 4, 1), 2, 8, 2, 2, 3, dtype=dtype, key=key),
}


def equations(jaxpr):
    """Of a jaxpr and all within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "jaxpr") or hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_multiply_in_bfloat16_and_embed_time_in_float32(name):
    """In the forward pass every product; in the gradient none with two wide factors (that of the attention's float32 logits is one)."""
    network = jax.eval_shape(lambda key: NETWORKS[name](key, jnp.float32), jax.random.key(0))
    x = jnp.ones((4, 4, 4, 1), jnp.float32)

    def squares(model, batch, key):
        return jnp.mean(jax.vmap(model)(jnp.linspace(0, 1, 4, dtype=jnp.float32), batch, jnp.arange(4)) ** 2), {}

    def one_step(network):
        fitting = Fit(squares, network, optax.sgd(0.1), x, batch_size=4, compute_dtype=jnp.bfloat16)
        return fitting.advance(fitting.init(jax.random.key(0)), 1)

    forward = jax.make_jaxpr(lambda network: squares(in_dtype(network, jnp.bfloat16), x, None))(network)
    step = jax.make_jaxpr(one_step)(network)
    products = {
        part: [
            tuple(v.aval.dtype.name for v in equation.invars[:2])
            for equation in equations(jaxpr.jaxpr)
            if equation.primitive.name in ("dot_general", "conv_general_dilated")
        ]
        for part, jaxpr in (("forward", forward), ("step", step))
    }
    assert set(products["forward"]) == {("bfloat16", "bfloat16")}
    assert all("bfloat16" in pair for pair in products["step"])
    assert all(pair == ("bfloat16", "bfloat16") for pair in products["step"]) or name != "mlp"
    angles = [equation for equation in equations(forward.jaxpr) if equation.primitive.name in ("cos", "sin")]
    assert [equation.invars[0].aval.dtype.name for equation in angles] == ["float32"] * 2


class Residual(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, x, *, key=None):
        return x + self.mlp(x)


def test_remat_keeps_the_numbers_and_saves_memory():
    """Scanned blocks: the compiled step, measured by XLA."""
    model = jax.jit(lambda key: nn.TimeMLP((8,), 8, 8, key=key))(jax.random.key(0))
    model = jax.tree.map(lambda a: a + 0.1, model)  # a fresh network returns 0
    x = jax.random.normal(jax.random.key(1), (64, 8))

    def squares(model, batch, key):
        return jnp.mean((jax.vmap(lambda a: model(0.5, a))(batch) - batch) ** 2), {}

    def step(policy):
        fitting = Fit(squares, model, optax.sgd(0.1), x, batch_size=64, remat=policy)
        compiled = jax.jit(lambda state: fitting.advance(state, 1)).lower(fitting.init(jax.random.key(0))).compile()
        state, metrics = compiled(fitting.init(jax.random.key(0)))
        return (state.model, metrics), compiled.memory_analysis().temp_size_in_bytes

    (plain, memory), (remat, memory_remat) = (step(policy) for policy in (None, jax.checkpoint_policies.nothing_saveable))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)
    assert memory_remat < 0.6 * memory


def test_remat_keeps_only_what_enters_each_layer():
    """Layers in turn, where XLA's CPU compiler undoes the order that saves memory: so count what the backward pass is given."""
    layers = [Residual(eqx.nn.MLP(8, 8, 32, 1, jax.nn.gelu, key=key)) for key in jax.random.split(jax.random.key(0), 4)]
    model = eqx.nn.Sequential(layers)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    x = jax.random.normal(jax.random.key(1), (64, 8))

    def residuals(policy):
        _, pullback = jax.vjp(lambda params, x: jax.vmap(rematerialised(eqx.combine(params, rest), policy))(x), params, x)
        gradient = pullback(jnp.ones_like(x))
        given = [id(leaf) for leaf in jax.tree.leaves((params, x))]
        return gradient, sum(leaf.nbytes for leaf in jax.tree.leaves(pullback) if id(leaf) not in given)

    everything, nothing = (residuals(policy) for policy in (jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.nothing_saveable))
    for a, b in zip(jax.tree.leaves(everything[0]), jax.tree.leaves(nothing[0]), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert nothing[1] <= 3 * x.nbytes + parameters  # what enters the second to the fourth layer
    assert everything[1] > 4 * 64 * 32 * x.itemsize  # at least one hidden vector a layer


def test_remat_of_models_with_and_without_parts():
    mlp = eqx.nn.MLP(2, 2, 4, 2, key=jax.random.key(0))
    policy = jax.checkpoint_policies.nothing_saveable
    for model, count in ((mlp, 3), (LINE, 1), ({"a": mlp, "b": LINE, "c": jnp.ones(2)}, 4)):
        assert str(jax.tree.structure(rematerialised(model, policy))).count("Rematerialised") == count
    assert rematerialised(mlp, policy).layers[0].weight is mlp.layers[0].weight


def test_a_compiled_piece_donates_its_state_and_nothing_else():
    """The state's memory is written over; the model and the key that were given live on, and the numbers are the same."""
    key, results = jax.random.key(3), []
    for donate in (True, False):
        fitting = make(every=2, ema_decay=0.9, donate=donate)
        state = fitting.init(key)
        advance = fitting.compiled(state, 4)
        after, metrics = advance(state)
        assert {leaf.is_deleted() for leaf in jax.tree.leaves(state)} == {donate}
        results.append((after.model.weight, after.average.bias, metrics["loss"]))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((LINE, X, Y, key)))
    for donated, kept in zip(*results, strict=True):
        np.testing.assert_array_equal(donated, kept)
    whole = jax.jit(lambda: eqx.filter(make(every=2, ema_decay=0.9).run(key, 4), eqx.is_array))()
    np.testing.assert_allclose(results[0][0], whole.model.weight, rtol=1e-12)


def test_policies_together_under_vmap():
    """All of them at once, swept: the fields are part of one pure function."""

    def train(rate, **policies):
        fitting = Fit(loss, NARROW_LINE, optax.sgd(rate), (X.astype(jnp.float32), Y.astype(jnp.float32)), batch_size=20, **policies)
        return fitting.run(jax.random.key(0), 4).model.weight

    rates = jnp.array([0.01, 0.1], jnp.float32)
    policies = {"remat": jax.checkpoint_policies.dots_saveable, "accumulate": 2}
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda r: train(r, **policies)))(rates), jax.jit(jax.vmap(train))(rates), rtol=1e-5)
    narrow = jax.jit(jax.vmap(lambda r: train(r, compute_dtype=jnp.bfloat16, **policies)))(rates)
    assert narrow.dtype == jnp.float32


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 61}, "`batch_size` 61 exceeds the 60 examples"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ({"accumulate": 3}, "`accumulate` must divide `batch_size`, got 3 and 20"),
        ({"ema_decay": 1.0}, r"`ema_decay` must lie in \[0, 1\), got 1.0"),
        ({"every": 0}, "`every`"),
        ({"compute_dtype": jnp.int8}, "`compute_dtype` must be a floating dtype"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_refusals_of_data_and_steps():
    with pytest.raises(ValueError, match="must share one leading axis"):
        Fit(loss, LINE, OPTIMISER, (X, Y[:5]), batch_size=2)
    with pytest.raises(ValueError, match="`batch_size` goes with arrays"):
        Fit(loss, LINE, OPTIMISER, lambda key, step: (X, Y), batch_size=2)
    with pytest.raises(ValueError, match=r"`accumulate` must divide the leading axis .*, got 7 and shape \(60, 3\)"):
        Fit(loss, LINE, OPTIMISER, lambda key, step: (X, Y), accumulate=7).run(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="`num_steps` must be a multiple of `every`, got 5 and 2"):
        make(every=2).advance(make(every=2).init(jax.random.key(0)), 5)
