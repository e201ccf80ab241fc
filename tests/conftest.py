"""What the tests share: tiny random models, one tolerance, a counter of compilations."""

import dataclasses
import pathlib

import hypothesis
import jax
import jax.monitoring
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import jaxemo
from jaxemo import params as params_lib
from jaxemo.tokens import Tokenizer

# The same examples on every run; no deadline, since an example may compile.
hypothesis.settings.register_profile(
    "jaxemo", derandomize=True, deadline=None, database=None, max_examples=25, print_blob=False
)
hypothesis.settings.load_profile("jaxemo")

# 256 bytes, three special tokens, and some tokens of several characters for texts cut across tokens.
SPECIAL = ("<s>", "</s>", "<|end|>")
LONG = ("sto", "p!x", "<|", "end|")
CONFIG = {
    "family": "llama", "vocab_size": 256 + len(SPECIAL) + len(LONG), "d_model": 32, "n_layers": 3, "n_heads": 4,
    "n_kv_heads": 2, "head_dim": 8, "d_ff": 48, "max_positions": 64,
}  # fmt: skip


def make_model(seed=0, dtype="float32", stacked=False, tokenizer=None, **changes) -> jaxemo.LanguageModel:
    """Random weights like those of `params.init`, from NumPy, which compiles nothing.

    Norm gains are not one, so that a gain in the wrong place shows.
    """
    sizes = {**CONFIG, **changes}
    rope = jaxemo.config.Rope(sizes["head_dim"], sizes.pop("theta", 10000.0))
    config = jaxemo.ModelConfig(**{"attention": (jaxemo.config.Attention(rope),), **sizes})
    rng = np.random.default_rng(seed)

    def make(leaf: params_lib.Leaf):
        values = (
            rng.standard_normal(leaf.shape) / np.sqrt(leaf.fan_in) if leaf.fan_in else rng.uniform(0.5, 1.5, leaf.shape)
        )
        return jnp.asarray(values.astype(params_lib.dtype_of(leaf, dtype)))

    params = jax.tree.map(make, params_lib.describe(config), is_leaf=params_lib.is_leaf)
    return jaxemo.LanguageModel(config, params_lib.stack(params) if stacked else params, tokenizer, source="tiny")


def byte_tokenizer(**kwargs) -> Tokenizer:
    """One token a byte, after `tokenizers.ByteLevel`'s alphabet; ids 0 to 255 are the bytes themselves."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    # The alphabet: printable characters stand for themselves, the other bytes for the characters from 256 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocab = {letters[b]: b for b in range(256)} | {token: 256 + i for i, token in enumerate((*SPECIAL, *LONG))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, **{"bos": 256, "eos": 257, "stop_ids": (257,), **kwargs})


def check_close(got, want, k, what="", scale=None, dtype=np.float32):
    """Assert max |got − want| ≤ eps(dtype) · √k · scale, and print both sides.

    `k` is the number of roundings that add up on the way to one element, each at most eps/2 of the size of the terms
    (`scale`, by default the largest of `want`). Independent ones have a standard deviation of eps · √(k/12), so the
    bound is three and a half of those.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    error = np.max(np.abs(got - want), initial=0.0)
    scale = np.max(np.abs(want), initial=0.0) if scale is None else scale
    bound = float(ml_dtypes.finfo(dtype).eps) * np.sqrt(k) * scale
    print(f"{what}: error {error:.2e}, bound {bound:.2e}")
    assert error <= bound, f"{what}: error {error:.2e} exceeds {bound:.2e}"  # fails for NaN, too


def roundings(config, tokens) -> int:
    """How many roundings lie between a token and its logits: the sums of every layer, one after another."""
    layer = 4 * config.d_model + config.head_dim + tokens + config.n_heads * config.head_dim + config.d_ff
    return config.n_layers * layer + 2 * config.d_model


@pytest.fixture(scope="module", autouse=True)
def release_programs():
    """Compiled programs are dropped after each file of tests. Every one maps memory, and a process that keeps a thousand
    reaches the system's limit on the number of its maps, where XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny():
    """A model with separate layers, grouped-query attention and tied embeddings."""
    return make_model()


@pytest.fixture(scope="session")
def tiny_stacked(tiny):
    """The same weights, stacked for `lax.scan`."""
    return jaxemo.LanguageModel(tiny.config, params_lib.stack(tiny.params), source="tiny, stacked")


@pytest.fixture(scope="session", params=["separate", "stacked"])
def either(request, tiny, tiny_stacked):
    return tiny if request.param == "separate" else tiny_stacked


@pytest.fixture(scope="session")
def weights(tiny):
    """The weights of `tiny` in float64, for the oracle."""
    return oracle.as_float64(tiny.params)


@pytest.fixture(scope="session")
def lm():
    """A model that was written by other code, with its tokenizer and chat template, and with room for a chat."""
    golden = jaxemo.load(pathlib.Path(__file__).parent / "golden" / "gqa_tied.gguf")
    config = dataclasses.replace(golden.config, max_positions=512)
    return jaxemo.LanguageModel(config, golden.params, golden.tokenizer, "tiny")


@pytest.fixture(scope="session")
def random_vectors():
    """Directions by their names, in a model whose residual streams have `norms`, one for all layers or one for each."""

    def make(lm, names, norms=3.0):
        L, draw = lm.config.n_layers, np.random.default_rng(0).standard_normal
        directions = {name: draw((L, lm.config.d_model)) for name in names}
        return jaxemo.EmotionVectors.from_directions(directions, np.broadcast_to(np.asarray(norms, np.float64), L))

    return make


@pytest.fixture(scope="session")
def make_tokenizer():
    return byte_tokenizer


@pytest.fixture(scope="session")
def model_of():
    return make_model


@pytest.fixture(scope="session")
def close():
    return check_close


@pytest.fixture(scope="session")
def k_of():
    return roundings


class Compiles:
    """Counts every program that the backend compiles in this process, however it came about."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event, duration, **_):
        self.count += event == self.EVENT


@pytest.fixture(scope="session")
def compiles():
    counter = Compiles()
    jax.jit(lambda x: x * 3 - 1)(np.float32(1))
    assert counter.count == 1, "the event that counts compilations has another name in this jax"
    return counter
