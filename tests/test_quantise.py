"""Weights in 8 and 4 bits: how far they are from what they stand for, and that a model with them computes just that."""

import pathlib

import gguf
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxemo
from jaxemo import params as params_lib
from jaxemo import quantise
from jaxemo.language_model import compare

GOLDEN = pathlib.Path(__file__).parent / "golden"


@hypothesis.given(
    st.sampled_from(["int8", "int4"]),
    st.integers(1, 40).map(lambda n: 2 * n),
    st.sampled_from([(), (3,), (2, 3)]),
    st.integers(1, 5),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.integers(0, 2**31),
)
def test_every_weight_is_within_half_a_step(kind, inputs, lead, outputs, size, seed):
    w = np.random.default_rng(seed).standard_normal((*lead, inputs, outputs)).astype(np.float32) * np.float32(size)
    q = quantise.quantise(w, inputs, (inputs, outputs), kind)
    assert q.shape == w.shape
    got = np.asarray(q.full(jnp.float32), np.float64)
    groups = q.scale.shape[-2]
    assert groups == (1 if kind == "int8" else inputs // np.gcd(inputs, 32))
    step = np.repeat(np.asarray(q.scale, np.float64), inputs // groups, axis=-2)
    # Half a step, and what rounding the scale and the lowest weight to their type can move the ends of the range.
    eps = np.finfo(q.low.dtype).eps if kind == "int4" else np.finfo(np.float32).eps
    tiny = float(np.finfo(q.low.dtype).smallest_subnormal) * 16
    slack = 2 * eps * np.abs(w).max() + tiny
    assert (np.abs(got - w) <= step / 2 + slack).all()


def test_four_bits_lose_nothing_that_was_in_four_bits():
    """Q4_1 has the same groups, and uses both ends of its range in each."""
    kind = gguf.GGMLQuantizationType.Q4_1
    w = np.random.default_rng(0).standard_normal((24, 96)).astype(np.float32)
    stored = gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind)  # [out, in]
    q = quantise.quantise(np.ascontiguousarray(stored.T), 96, (96, 24), "int4")
    error = np.abs(np.asarray(q.full(jnp.float32)) - stored.T).max()
    print(f"{kind.name}: error {error:.1e}")
    assert error <= np.finfo(np.float16).eps * np.abs(stored).max()


def quantised(lm, kind, stacked=False):
    """The model with its projections quantised, and with the same ones multiplied out beforehand."""
    described = params_lib.describe(lm.config)["layers"][0]

    def small(name, w):
        leaf = described[name]
        inner = leaf.shape[1:] if leaf.axes[0] == "experts" else leaf.shape
        q = quantise.quantise(np.asarray(w, np.float32), leaf.fan_in, inner, kind)
        return jax.tree.map(jnp.asarray, q)

    packed = tuple(
        {n: small(n, w) if n in quantise.PROJECTIONS else w for n, w in layer.items()} for layer in lm.params["layers"]
    )
    opened = tuple({n: quantise.full(w, lm.params["embed"].dtype) for n, w in layer.items()} for layer in packed)
    trees = ({**lm.params, "layers": layers} for layers in (packed, opened))
    return tuple(jaxemo.LanguageModel(lm.config, params_lib.stack(p) if stacked else p) for p in trees)


MOE = {"n_experts": 4, "n_active": 2, "biases": ("router", "w_up", "wq")}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "experts"])
def test_a_quantised_model_is_the_model_with_those_weights(model_of, close, k_of, changes, kind, stacked):
    packed, opened = quantised(model_of(3, **changes), kind, stacked)
    ids = np.random.default_rng(0).integers(0, packed.config.vocab_size, (2, 16))
    close(packed.forward(ids).logits, opened.forward(ids).logits, k_of(packed.config, 16), kind)
    a, b = (lm.generate(ids, max_new_tokens=8, stop=[]).tokens for lm in (packed, opened))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stacked", [False, True])
def test_loading_quantised(stacked):
    """A file's weights quantised on loading are those quantised afterwards, and take less memory."""
    path = GOLDEN / "mha_untied.gguf"
    plain, small = jaxemo.load(path, stacked=stacked), jaxemo.load(path, stacked=stacked, quantise="int8")
    again, _ = quantised(jaxemo.load(path, stacked=False), "int8", stacked)
    for a, b in zip(jax.tree.leaves(small.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params)) for lm in (plain, small)]
    assert sizes[1] < 0.7 * sizes[0]
    d = compare(plain, small, np.arange(60).reshape(3, 20))
    print(d)
    assert d["max_logit"] > 0 and 0 <= d["kl"] < 0.01 and d["top1"] > 0.9
    assert compare(plain, plain, np.arange(6)[None]) == {"max_logit": 0, "mean_logit": 0, "kl": 0, "top1": 1}


def test_what_cannot_be_held_is_refused():
    with pytest.raises(ValueError, match="int3"):
        jaxemo.load(GOLDEN / "mha_untied.gguf", quantise="int3")
    with pytest.raises(ValueError, match="7 inputs"):
        quantise.quantise(np.ones((7, 3), np.float32), 7, (7, 3), "int4")


def test_wrong_shape_is_named(tiny):
    packed, _ = quantised(tiny, "int8")
    layers = [dict(layer) for layer in packed.params["layers"]]
    layers[1]["wq"] = layers[1]["wk"]
    with pytest.raises(ValueError, match=r"\[1\]\['wq'\] has shape"):
        jaxemo.LanguageModel(tiny.config, {**packed.params, "layers": tuple(layers)})
