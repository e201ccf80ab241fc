"""Every model family against transformers, without torch: the files that tests/golden/make_families.py made with it.

Each golden is a config.json, tensor names and shapes, and what transformers computes; the weights come from the names
(tests/golden/seeded.py). Here they become a directory like those on the Hugging Face hub, in turn of float32, bfloat16 and
float16 (which hold the same numbers) and in one file or several, and jaxemo loads it.
"""

import functools
import json
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jaxemo.checkpoints import CheckpointError, rope

import jaxemo
from jaxemo import checkpoints, model
from jaxemo import params as params_lib
from jaxemo import tokens as tokens_lib

GOLDEN = pathlib.Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import seeded  # noqa: E402

NAMES = sorted(path.stem for path in (GOLDEN / "families").glob("*.json"))
FAMILIES = {name.split("-")[0]: name for name in reversed(NAMES)}  # family → one of its goldens
# float32 on both sides with sums in different orders; logits are up to 16 in size and the residual stream up to 33.
BOUND = 1e-4
STORED = (("float32", 1), ("bfloat16", 1), ("float16", 3))  # dtype in the file, number of files


def write(folder: pathlib.Path, config: dict, tensors: dict, dtype: str = "float32", files: int = 1) -> pathlib.Path:
    """A checkpoint as `save_pretrained` lays it out. Integers are stored as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors = {name: w.astype(kind) if w.dtype == np.float32 else w for name, w in tensors.items()}
    if files == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    shards = {f"model-{i + 1:05}-of-{files:05}.safetensors": list(tensors)[i::files] for i in range(files)}
    for file, names in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(w.nbytes for w in tensors.values())},
             "weight_map": {name: file for file, names in shards.items() for name in names}}  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Golden:
    """One model's files. Arrays over tokens hold the rows' tokens one after another, without padding."""

    def __init__(self, name: str):
        described = json.loads((GOLDEN / "families" / f"{name}.json").read_text(encoding="ascii"))
        self.config, self.shapes = described["config"], described["tensors"]
        self.arrays = dict(np.load(GOLDEN / "families" / f"{name}.npz"))
        self.rows = [ids.tolist() for ids in np.split(self.arrays["ids"], np.cumsum(self.arrays["lengths"])[:-1])]

    def tensors(self) -> dict[str, np.ndarray]:
        return seeded.checkpoint(self.config, self.shapes)

    def batch(self):
        """All rows, right-padded with a token that is not harmless should anything read it."""
        batch = tokens_lib.pad(self.rows)
        padding = np.arange(batch.ids.shape[1]) >= batch.lengths[:, None]
        assert padding.any()
        return batch.replace(ids=np.where(padding, 7, batch.ids))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A golden's model by name; its directory is written once."""

    @functools.cache
    def folder(name: str) -> pathlib.Path:
        golden = Golden(name)
        dtype, files = STORED[NAMES.index(name) % len(STORED)]
        return write(tmp_path_factory.mktemp(name), golden.config, golden.tensors(), dtype, files)

    return functools.cache(lambda name, stacked=False: jaxemo.load(folder(name), dtype="float32", stacked=stacked))


def unpad(x, lengths):
    """`[..., B, T, D]` to `[..., tokens, D]`."""
    x = np.asarray(x)
    return np.concatenate([x[..., row, :n, :] for row, n in enumerate(np.asarray(lengths))], axis=-2)


def error(what: str, got, want) -> float:
    worst = float(np.max(np.abs(np.asarray(got, np.float64) - want)))
    print(f"{what}: error {worst:.1e}, bound {BOUND:.0e}, values up to {np.max(np.abs(want)):.1f}")
    return worst


def test_every_family_has_three():
    for family in set(FAMILIES) - {"gemma3"}:  # which is gemma3_text and a part that sees
        assert sum(name.split("-")[0] == family for name in NAMES) >= 3, family


def layout(name: str) -> bool:
    """Every other golden is read with stacked layers, so that each family is in both layouts."""
    return NAMES.index(name) % 2 == 1


def forward(lm, batch):
    return lm.forward(batch, capture=jaxemo.Capture(raw={"resid_pre": [0], "resid_post": "all"}))


@pytest.mark.parametrize("name", NAMES)
def test_forward(load, name):
    """Logits and the residual stream before the first and after every block: a ragged batch, and its first row without
    the others (rows of one token stand in their place: the program is the same)."""
    golden, lm = Golden(name), load(name, layout(name))
    batch = golden.batch()
    out = forward(lm, batch)
    raw = out.captured.raw
    assert error("embeddings", unpad(raw["resid_pre"], batch.lengths)[0], golden.arrays["embed"]) <= BOUND
    assert error("residual stream", unpad(raw["resid_post"], batch.lengths), golden.arrays["resid"]) <= BOUND
    assert error("logits", unpad(out.logits, batch.lengths), golden.arrays["logits"]) <= BOUND

    first, (B, T) = golden.rows[0], batch.ids.shape
    alone = forward(lm, tokens_lib.pad([first, *[[0]] * (B - 1)], T)).logits[0, : len(first)]
    assert error("first row", alone, golden.arrays["logits"][: len(first)]) <= BOUND


# Where a row's length changes its frequencies, besides one model of each family.
LENGTH_MATTERS = ("llama-dynamic", "phi3-long", "phi3-partial", "phi3-saved")
CACHED = sorted({*FAMILIES.values(), *LENGTH_MATTERS})


# Compiled in half the time; this program runs once, and only here.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def read_on(config, params, ids, lengths, after):
    """Logits `[B, 1 + N, V]` at the last token of each prompt and at the tokens `after [B, N]` it, through the cache."""
    (B, T), N = ids.shape, after.shape[1]
    cache = model.init_cache(config, B, T + N, params["embed"].dtype, params_lib.is_stacked(params))
    x, cache, _ = model.forward(config, params, ids, cache=cache, lengths=lengths + N)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    x, _, _ = model.forward(config, params, after, lengths, cache, lengths=lengths + N)
    return model.unembed(config, params, jnp.concatenate([last, x], axis=1))


@pytest.mark.parametrize("name", CACHED)
def test_cached(load, name):
    """Through the cache, every token of transformers' uncached continuation is the likeliest after those before it.

    make_families.py has seen to it that no two logits come closer than ten times the bound.
    """
    golden, lm = Golden(name), load(name, stacked=True)
    batch, expected = golden.batch(), golden.arrays["greedy"].astype(np.int32)
    logits = read_on(lm.config, lm.params, batch.ids, np.asarray(batch.lengths), np.maximum(expected, 0))
    known = expected[:, 0] >= 0
    assert known.any()
    np.testing.assert_array_equal(np.asarray(logits)[known, :-1].argmax(-1), expected[known])


@pytest.mark.parametrize("name", ("gemma2-order", "gpt2-hub", "gpt_oss-hub", "llama-dynamic", "phi3-long"))
def test_generate(load, name):
    """The decode loop writes these continuations, token by token."""
    golden, lm = Golden(name), load(name, layout(name))
    expected = golden.arrays["greedy"]
    got = lm.generate(golden.batch(), max_new_tokens=expected.shape[1], stop=[])
    known = expected[:, 0] >= 0
    np.testing.assert_array_equal(got.tokens[known], expected[known])


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(folder, *names: str) -> None:
    with pytest.raises(checkpoints.CheckpointError) as caught:
        jaxemo.load(folder, dtype="float32")
    print(caught.value)
    for name in names:
        assert name in str(caught.value)


@pytest.fixture(params=sorted(FAMILIES.values()))
def golden(request):
    return Golden(request.param)


def test_unknown_key(golden, tmp_path):
    refused(write(tmp_path, golden.config | {"attention_flavour": 3}, golden.tensors()), "attention_flavour")


def test_unknown_tensor(golden, tmp_path):
    tensors = golden.tensors()
    name = next(name for name in sorted(tensors) if ".0." in name and "vision" not in name) + "_extra"
    refused(write(tmp_path, golden.config, {**tensors, name: np.ones(3, np.float32)}), "extra")


def test_missing_tensor(golden, tmp_path):
    """Each kind of tensor in turn: all of the last layer's and those outside the layers."""
    tensors = golden.tensors()
    seen = set()
    for name in sorted(tensors, reverse=True):
        kind = tuple(part for part in name.split(".") if not part.isdigit())
        buffer = name.endswith(("attn.bias", "attention.bias", "masked_bias", "inv_freq")) and tensors[name].ndim != 1
        if kind in seen or buffer or "inv_freq" in name or "vision" in name or "multi_modal" in name:
            continue
        seen.add(kind)
        rest = {key: w for key, w in tensors.items() if key != name}
        refused(write(tmp_path, golden.config, rest), name.rsplit(".", 2)[-2])


def test_wrong_shape(golden, tmp_path):
    tensors = golden.tensors()
    name = next(
        name
        for name, w in sorted(tensors.items())
        if ".0." in name and w.ndim > 1 and "vision" not in name and "bias" not in name
    )
    refused(write(tmp_path, golden.config, {**tensors, name: tensors[name][:-1]}), name.rsplit(".", 2)[-2])


# Of a golden, the change to its configuration, and what the message must name.
REFUSED = [
    ("qwen3_moe-hub", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("qwen3_moe-hub", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ("gpt2-hub", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2-hub", {"add_cross_attention": True}, "add_cross_attention"),
    ("phi-2", {"qk_layernorm": True}, "qk_layernorm"),
    ("olmoe-hub", {"clip_qkv": 8.0}, "clip_qkv"),
    ("gemma3_text-hub", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("llama-v3", {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
    ("llama-v3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 1}}, "twist"),
    ("llama-v3", {"hidden_act": "sparkle"}, "sparkle"),
    ("llama-v3", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ("llama-v3", {"model_type": "llama5"}, "llama5"),
    ("llama-v3", {"model_type": "gemma4_text"}, "gemma4_text"),
    ("llama-v3", {"model_type": "qwen3_5_text"}, "qwen3_5_text"),
    ("llama-v3", {"num_attention_heads": 3}, ""),
    ("llama-v3", {"hidden_size": "32"}, "hidden_size"),
    ("cohere2-hub", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    ("smollm3-hub", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ("qwen2-window", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types"),
]


@pytest.mark.parametrize("name, change, named", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_supported_is_named(name, change, named, tmp_path):
    golden = Golden(name)
    refused(write(tmp_path, golden.config | change, golden.tensors()), named)


@pytest.mark.parametrize("changed, named", [
    ({"rope_theta": 1.0}, "rope_theta"), ({"rope_theta": 0.5}, "rope_theta"), ({"beta_fast": 1e-300}, "beta_fast"),
    ({"original_max_position_embeddings": 1e-300, "beta_slow": 1e250}, "beta_slow"),
    ({"original_max_position_embeddings": 4096, "factor": 5e-324}, "factor"),
    ({"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor"),
    ({"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "high_freq_factor"),
])  # fmt: skip
def test_rope_scaling_that_makes_no_frequencies(changed, named):
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1e10, **changed}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=f"damaged/config.json.*{named}"):
            rope.read("damaged/config.json", scaling, 64, 10000.0, 4096)


@pytest.mark.parametrize("factor", [1e-300, 1e-3, 1.0, 1e250])
def test_rope_scaling_by_any_factor(factor):
    """No division by zero where frequencies are divided by a number so large that nothing is left beside 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = rope.read("config.json", {"rope_type": "yarn", "factor": factor}, 64, 10000.0, 4096)
    assert read.factors[0] == 1 and read.factors[-1] == pytest.approx(factor)


def test_experts_fused_in_the_file(load, tmp_path):
    """transformers 5 can write experts as it holds them, in one tensor."""
    for name in ("mixtral-hub", "qwen3_moe-hub"):
        golden, kept, found = Golden(name), {}, {}
        for key, w in golden.tensors().items():
            if ".experts." not in key:
                kept[key.replace("block_sparse_moe", "mlp")] = w
                continue
            start, expert, matrix, _ = key.replace("block_sparse_moe", "mlp").rsplit(".", 3)
            found[start, int(expert), {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(matrix, matrix)] = w
        for start in {key[0] for key in found}:
            count = 1 + max(key[1] for key in found)
            gate, up, down = ([found[start, i, f"{m}_proj"] for i in range(count)] for m in ("gate", "up", "down"))
            kept[f"{start}.gate_up_proj"] = np.concatenate([np.stack(gate), np.stack(up)], axis=1)
            kept[f"{start}.down_proj"] = np.stack(down)
        fused = jaxemo.load(write(tmp_path / name, golden.config, kept), dtype="float32")
        want = load(name).params["layers"]
        for layer, other in zip(fused.params["layers"], want, strict=True):
            for weight in ("w_gate", "w_up", "w_down", "router"):
                np.testing.assert_array_equal(layer[weight], other[weight])
