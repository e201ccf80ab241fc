"""The transformer against a float64 oracle, in every layout, with and without a cache, and its gradients."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxemo
from jaxemo import capture, model, steering
from jaxemo import params as params_lib
from jaxemo.config import ModelConfig
from jaxemo.tokens import TokenBatch

forward = jax.jit(model.forward, static_argnums=0)
LENGTHS = (7, 16, 11)


def random_rows(lengths=LENGTHS, seed=0, width=16, padding=None):
    """A right-padded batch of random tokens; `padding` other than None fills the padding with random tokens, too."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 256, (len(lengths), width)).astype(np.int32)
    if padding is None:
        ids[np.arange(width) >= np.array(lengths)[:, None]] = 0
    return TokenBatch(ids, np.array(lengths, np.int32))


def logits(lm, batch, **kwargs):
    return np.asarray(lm.forward(batch, **kwargs).logits)  # on the host, where a slice compiles nothing


def unpadded(batch):
    return [row[:n] for row, n in zip(batch.ids, batch.lengths, strict=True)]


# ---- against the oracle ----------------------------------------------------------------------------------------------


def test_float32_agrees_with_the_oracle(either, weights, close, k_of):
    batch = random_rows()
    got = logits(either, batch)
    for row, ids in enumerate(unpadded(batch)):
        want = oracle.forward(either.config, weights, ids).logits
        close(got[row, : len(ids)], want, k_of(either.config, len(ids)), f"logits of row {row}")


@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_heads": 4, "tie_embeddings": False},  # multi-head attention
        {"n_kv_heads": 1, "head_dim": 12, "theta": 500000.0},  # multi-query, H other than D / N
        {"n_heads": 6, "n_kv_heads": 2, "tie_embeddings": False, "norm_eps": 0.1, "d_ff": 20},
        {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 2},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_shapes_and_constants_agree_with_the_oracle(model_of, close, k_of, changes):
    lm = model_of(seed=1, **changes)
    ids = random_rows((13,), width=13).ids
    want = oracle.forward(lm.config, oracle.as_float64(lm.params), ids[0]).logits
    close(logits(lm, ids)[0], want, k_of(lm.config, 13), "logits")


def test_bfloat16_is_as_good_as_a_plain_bfloat16_implementation(model_of):
    """Rounding to bfloat16 after each operation is what the type costs; the compiled path may cost 1.5 times that."""
    ours, plain = [], []
    for seed in range(3):
        lm = model_of(seed, "bfloat16")
        weights = oracle.as_float64(lm.params)  # the rounded weights: only the arithmetic differs
        batch = random_rows((16, 16), seed)
        got = logits(lm, batch)
        for row, ids in enumerate(batch.ids):
            want = oracle.forward(lm.config, weights, ids).logits
            ours.append(got[row] - want)
            plain.append(oracle.forward(lm.config, weights, ids, rounded=oracle.to_bfloat16).logits - want)
    error, reference = (np.sqrt(np.mean(np.square(e))) for e in (ours, plain))
    print(f"bfloat16: root mean square error {error:.2e}, of the plain implementation {reference:.2e}, bound 1.5 of it")
    assert 0 < error <= 1.5 * reference


def test_scanned_layers_equal_separate_ones(tiny, tiny_stacked, close, k_of):
    batch = random_rows()
    a, b = logits(tiny, batch), logits(tiny_stacked, batch)
    close(b, a, k_of(tiny.config, 16), "scanned against separate")
    back = params_lib.unstack(tiny_stacked.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, tiny.params))
    assert jax.tree.structure(back) == jax.tree.structure(tiny.params)


# ---- rule 1: right padding, explicit positions -----------------------------------------------------------------------


def test_a_row_alone_equals_the_row_in_a_mixed_batch(either, close, k_of):
    """Two sums of the same terms in another order: twice the roundings of one."""
    batch = random_rows((3, 16, 9, 1, 12))
    together, last = logits(either, batch), logits(either, batch, logits="last")
    for row, ids in enumerate(unpadded(batch)):
        n, k = len(ids), 2 * k_of(either.config, len(ids))
        alone = logits(either, TokenBatch(batch.ids[row : row + 1], np.array([n], np.int32)))[0, :n]
        close(together[row, :n], alone, k, f"row {row} of {n} tokens")
        close(last[row], alone[-1], k, f"last logits of row {row}")
        if n == 3:
            close(together[row, :n], logits(either, ids[None])[0], k, f"row {row} without any padding")


def test_padding_is_never_read(either):
    """Whatever the padding holds, the real tokens' logits keep every bit."""
    batch, junk = random_rows(), random_rows(padding="random")
    a, b = logits(either, batch), logits(either, junk)
    for row, n in enumerate(LENGTHS):
        np.testing.assert_array_equal(a[row, :n], b[row, :n])


@pytest.mark.parametrize("chunks", [(1,) * 8, (4, 4)], ids=str)
def test_cached_equals_uncached(either, close, k_of, chunks):
    """Prompts of unequal length are read at once, the rest in chunks, steered and measured: as in one pass over all."""
    config = either.config
    prompts, total = np.array([3, 8, 6], np.int32), np.array([11, 16, 14], np.int32)
    batch = random_rows(total)
    rng = np.random.default_rng(1)
    specs = [steering.add(rng.standard_normal((3, 32)), 2.0, tokens=slice(5, None)),
             steering.ablate(rng.standard_normal((3, 32)), [0, 2], tokens=[1, 4, 9], keep_norm=True), None]  # fmt: skip
    interventions = steering.resolve(config, specs, batch)
    probes = capture.resolve(config, jaxemo.Capture(norm={"resid_post": [2, 0]}, dose=True), batch)

    def run(ids, start, cache):
        """The residual stream, norms and dose, each with row and token in front, and the cache."""
        x, cache, captured = forward(config, either.params, ids, start, cache, interventions, probes)
        norm, dose = (np.moveaxis(np.asarray(a), 0, 2) for a in (captured.norm["resid_post"], captured.dose))
        return (np.asarray(x), norm, dose), cache

    want, _ = run(batch.ids, None, None)
    cache = model.init_cache(config, 3, 16, jnp.float32, params_lib.is_stacked(either.params))
    padded = random_rows(prompts, seed=2, width=8, padding="random").ids  # what fills the padding must not matter
    for row, n in enumerate(prompts):
        padded[row, :n] = batch.ids[row, :n]
    first, cache = run(padded, None, cache)
    pieces = [[[part[row, :n] for part in first]] for row, n in enumerate(prompts)]
    start = prompts
    for size in chunks:
        parts, cache = run(
            np.stack([ids[at : at + size] for ids, at in zip(batch.ids, start, strict=True)]), start, cache
        )
        for row in range(3):
            pieces[row].append([part[row] for part in parts])
        start = start + size
    for row, n in enumerate(total):
        for what, got, whole in zip(("residual", "norms", "dose"), zip(*pieces[row], strict=True), want, strict=True):
            close(np.concatenate(got), whole[row, :n], 2 * k_of(config, 16), f"{what} of row {row}")
    dose = want[2]
    assert dose[0, 5, 0] > 0 and not dose[0, :5].any()  # steered from position 5 on, as asked


# ---- gradients -------------------------------------------------------------------------------------------------------


def steered_inputs(config, batch, keep_norm):
    """Interventions whose first direction is a free vector at layer 1, and the same for the oracle."""
    rng = np.random.default_rng(5)
    vector, fixed = rng.standard_normal((2, config.n_layers, config.d_model)).astype(np.float32)
    rows = [steering.add(vector, 1.0, 1, keep_norm=keep_norm) + steering.dampen(fixed, 0.7, 2)] * len(batch.lengths)
    return steering.resolve(config, rows, batch), vector[1], fixed


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(config, params, vector, ids, lengths, interventions):
    """Mean negative log-likelihood of a batch, and its gradients by the weights and by a vector added at layer 1."""

    def loss(params, vector):
        layers = interventions.layers.replace(bank=interventions.layers.bank.at[1, 0].set(vector))
        x, _, _ = model.forward(config, params, ids, interventions=interventions.replace(layers=layers))
        logp = jax.nn.log_softmax(model.unembed(config, params, x[:, :-1]))
        chosen = jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]
        seen = jnp.arange(1, ids.shape[1]) < lengths[:, None]
        return -jnp.where(seen, chosen, 0).sum() / seen.sum()

    return jax.value_and_grad(loss, (0, 1))(params, vector)


def oracle_loss(config, params, batch, vector, fixed, keep_norm):
    """The same loss in float64; `intervene` normalises what it adds, so the vector's length is its value."""
    total = 0.0
    for ids in unpadded(batch):
        everywhere = range(len(ids))
        acts = [oracle.Act("add", np.tile(vector, (config.n_layers, 1)), np.linalg.norm(vector), [1], everywhere),
                oracle.Act("dampen", fixed.astype(np.float64), 0.7, [2], everywhere)]  # fmt: skip
        logp = oracle.log_softmax(oracle.forward(config, params, ids, acts, keep_norm).logits[:-1])
        total -= logp[np.arange(len(ids) - 1), ids[1:]].sum()
    return total / (batch.lengths - 1).sum()


@pytest.mark.parametrize("keep_norm", [False, True], ids=["free", "keep_norm"])
def test_gradients_equal_finite_differences_of_the_oracle(either, weights, close, k_of, keep_norm):
    """Central differences in float64 are exact to 1e-8; a gradient has the roundings of the pass and of its way back."""
    config, batch = either.config, random_rows((4, 8), width=8)
    interventions, vector, fixed = steered_inputs(config, batch, keep_norm)
    value, gradient = loss_and_gradients(config, either.params, vector, batch.ids, batch.lengths, interventions)
    vector = vector.astype(np.float64)

    def at(tree, v):
        return oracle_loss(config, tree, batch, v, fixed, keep_norm)

    k, h = 3 * k_of(config, 8), 1e-5
    close(value, at(weights, vector), k, "loss")
    in_weights = params_lib.unstack(gradient[0])
    rng = np.random.default_rng(3)
    leaves, treedef = jax.tree.flatten(weights)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.flatten_with_path(weights)[0]]
    for i, (path, leaf, g) in enumerate(zip(paths, leaves, jax.tree.leaves(in_weights), strict=True)):
        if "[0]" in path or "[2]" in path:
            continue  # one layer of the three, to save time
        way = rng.standard_normal(leaf.shape)
        way /= np.linalg.norm(way)
        high, low = (at(treedef.unflatten([*leaves[:i], leaf + s * way, *leaves[i + 1 :]]), vector) for s in (h, -h))
        close(np.sum(np.asarray(g) * way), (high - low) / (2 * h), k, path, scale=np.linalg.norm(g))
    for way in [*np.eye(config.d_model)[:3], rng.standard_normal(config.d_model)]:
        high, low = (at(weights, vector + s * way) for s in (h, -h))
        scale = np.linalg.norm(gradient[1]) * np.linalg.norm(way)
        close(gradient[1] @ way, (high - low) / (2 * h), k, "the added vector", scale=scale)


def test_gradients_are_finite_on_padding_and_zero_vectors(either):
    """Token 0 is a zero vector here, real at position 0 of a row and in the padding: norms must not divide by it."""
    config, batch = either.config, random_rows((4, 8), width=8)
    batch.ids[0, 0] = 0
    params = {**either.params, "embed": either.params["embed"].at[0].set(0.0)}
    for keep_norm in (False, True):
        interventions, vector, _ = steered_inputs(config, batch, keep_norm)
        for start in (vector, np.zeros_like(vector)):
            value, gradient = loss_and_gradients(config, params, start, batch.ids, batch.lengths, interventions)
            assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
            assert keep_norm or np.any(gradient[1])


# ---- configuration and weights ---------------------------------------------------------------------------------------


def test_wrong_weights_are_all_named(tiny):
    layers = [dict(layer) for layer in tiny.params["layers"]]
    layers[1]["wq"], layers[2]["bias"] = layers[1]["wq"][:, :2], np.zeros(3)
    del layers[0]["w_up"]
    with pytest.raises(ValueError) as error:
        jaxemo.LanguageModel(tiny.config, {**tiny.params, "layers": tuple(layers)})
    for offender in (
        "[0]['w_up'] is missing",
        "[1]['wq'] has shape (32, 2, 8), expected (32, 4, 8)",
        "[2]['bias'] is not a weight",
    ):
        assert offender in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_ff": 0}, "d_ff is 0"),
        ({"n_kv_heads": 3}, "n_kv_heads=3"),
        ({"head_dim": 7}, "heads of 7"),
        ({"pattern": (0, 1, 0)}, "pattern"),
        ({"pattern": (0,)}, "pattern"),
        ({"n_active": 2}, "2 of 0 experts"),
    ],
)
def test_impossible_configurations_are_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**vars(tiny.config), **changes})


def test_init_draws_what_is_described(model_of):
    config = model_of(n_layers=1, n_kv_heads=4, d_ff=32).config  # few shapes, each of which compiles
    params = params_lib.init(config, seed=1)
    params_lib.check(config, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, params_lib.init(config, seed=1)))
    assert (params["final_norm"] == 1).all()
    # The sample deviation of n normal numbers has relative standard deviation 1/√(2n); four of those.
    for leaf, fan_in in ((params["embed"], 32), (params["layers"][0]["wo"], 32), (params["layers"][0]["w_up"], 32)):
        deviation = np.std(np.asarray(leaf)) * fan_in**0.5
        print(f"relative deviation {deviation:.3f}, bound 1 ± {4 / np.sqrt(2 * leaf.size):.3f}")
        assert abs(deviation - 1) < 4 / np.sqrt(2 * leaf.size)


def test_count_is_the_number_of_weights(tiny):
    assert params_lib.count(tiny.config) == sum(leaf.size for leaf in jax.tree.leaves(tiny.params))


@hypothesis.given(st.lists(st.integers(0, 70), min_size=1, max_size=9).filter(any), st.integers(0, 2**31))
@hypothesis.settings(max_examples=12)
def test_each_row_meets_its_own_expert(close, counts, seed):
    """Experts without rows, with one and with several blocks of them, on the CPU's path and on the accelerators'."""
    rng = np.random.default_rng(seed)
    expert = np.repeat(np.arange(len(counts)), counts)
    x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in
               ((len(expert), 12), (len(counts), 12, 5), (len(counts), 5)))  # fmt: skip
    want = np.einsum("ni,nio->no", x, w[expert], dtype=np.float64) + b[expert]
    weights = {"w_up": jnp.asarray(w), "w_up_bias": jnp.asarray(b)}
    got = model.grouped(jnp.asarray(expert), jnp.asarray(counts), "", jnp.asarray(x), weights, "w_up")
    close(got, want, 13, "blocks", scale=np.abs(x).max() * np.abs(w).max() * 12)
    other = jax.lax.ragged_dot(x, w, jnp.asarray(counts, jnp.int32), precision="highest") + b[expert]
    close(other, want, 13, "ragged_dot", scale=np.abs(x).max() * np.abs(w).max() * 12)
