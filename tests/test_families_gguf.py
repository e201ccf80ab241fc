"""Every architecture of GGUF files against transformers: the golden models, written as llama.cpp's converter writes them.

What the converter leaves out cannot come back. A golden model whose file leaves something out, and so means another
model, is compared with the Hugging Face checkpoint of that other model, whose reader test_families.py holds to
transformers: DIFFERS says how its config.json differs.
"""

import dataclasses
import sys

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from jaxemo.checkpoints import families, families_gguf
from jaxemo.checkpoints import gguf as gguf_lib
from test_families import BOUND, GOLDEN, NAMES, Golden, error, unpad
from test_families import write as write_hf

import jaxemo
from jaxemo import Capture, checkpoints

sys.path.insert(0, str(GOLDEN))
import write_gguf

PLAIN = {"rope_theta": 10000.0, "rope_type": "default"}
NO_WINDOW = {"sliding_window": None}
UNUSED_WINDOW = {"use_sliding_window": False, "layer_types": None}
EVERY_FOURTH = {"no_rope_layers": [1, 1, 1, 0]}
DIFFERS = {
    "cohere2-mha": {"rope_parameters": {**PLAIN, "rope_theta": 100.0}},
    "gemma-bias": {"rope_parameters": PLAIN},
    "gemma2-hub": {"query_pre_attn_scalar": 16},
    "gemma2-order": {"query_pre_attn_scalar": 6},
    "gemma2-uncapped": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3-sees": {"sliding_window_pattern": 6},
    "gemma3_text-capped": {"query_pre_attn_scalar": 12, "layer_types": ["sliding_attention"] * 3},
    "gemma3_text-hub": {"query_pre_attn_scalar": 16},
    "gpt2-gelu": {"activation_function": "gelu_new"},
    "gpt_neox-serial": {"rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0}},
    "gpt_neox-tied": {"hidden_act": "gelu", "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
    "llama-dynamic": {"rope_scaling": None, "max_position_embeddings": 24},
    "llama-yarn": {"mscale": None, "mscale_all_dim": None},
    "mistral-saved": NO_WINDOW,
    "mistral-v1": NO_WINDOW,
    "mixtral-window": NO_WINDOW,
    "olmoe-normalised": {"norm_topk_prob": False},
    "phi-gqa": {"hidden_act": "gelu_new", "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
    "phi-tied": {"rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0}},
    "phi3-saved": {"factor": 64 / 14},
    "qwen2-window": UNUSED_WINDOW,
    "qwen2-yarn": UNUSED_WINDOW,
    "qwen3-window": UNUSED_WINDOW,
    "qwen3_moe-unnormalised": {"norm_topk_prob": True},
    "qwen3_moe-window": {**UNUSED_WINDOW, "norm_topk_prob": True},
    "smollm3-hub": EVERY_FOURTH,
    "smollm3-interval": {**EVERY_FOURTH, "no_rope_layer_interval": 4},
    "smollm3-window": {**EVERY_FOURTH, **UNUSED_WINDOW},
    "starcoder2-full": {"hidden_act": "gelu_pytorch_tanh"},
    "starcoder2-hub": NO_WINDOW,
    "starcoder2-unbiased": NO_WINDOW,
}
# Keys that llama.cpp reads and its converter does not write for these, which can do without them.
PATTERN = "{arch}.attention.sliding_window_pattern"
EXTRA = {
    "gemma2-order": {PATTERN: [False, True, True, False]},
    "gemma3_text-linear": {PATTERN: 2},
    "gpt_oss-plain": {PATTERN: [False, True]},
    "llama-dynamic": {"{arch}.context_length": 24},
}
REFUSED_BY_CONVERTER = {"cohere2-order"}  # a bias that is not zero
WRITTEN = [name for name in NAMES if name not in REFUSED_BY_CONVERTER]
EXACT = [name for name in WRITTEN if name not in DIFFERS]


def changed(config: dict, changes: dict) -> dict:
    """The configuration with these keys, wherever in it they stand."""
    parts = [key for key in ("text_config", "rope_parameters") if key not in changes and key in config]
    for part in parts:
        inside = {key: value for key, value in changes.items() if part == "text_config" or key in config[part]}
        config = {**config, part: {key: v for key, v in {**config[part], **inside}.items() if v is not None}}
        changes = {key: value for key, value in changes.items() if key not in inside}
    return {**config, **changes}


def write(path, name: str, **options):
    golden = Golden(name)
    write_gguf.write(path, golden.config, golden.tensors(), **{"extra": EXTRA.get(name), **options})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


def load(folder, name: str, **options) -> jaxemo.LanguageModel:
    path = folder / f"{name}.gguf"
    return jaxemo.load(path if path.exists() else write(path, name), dtype="float32", **options)


def errors(lm, golden) -> dict[str, float]:
    """Largest differences of logits, of what enters the first block and of what leaves each, in one ragged batch."""
    batch = golden.batch()
    out = lm.forward(batch, capture=Capture(raw={"resid_pre": [0], "resid_post": "all"}))
    raw = {key: unpad(value, batch.lengths) for key, value in out.captured.raw.items()}
    got = {"logits": unpad(out.logits, batch.lengths), "embed": raw["resid_pre"][0], "resid": raw["resid_post"]}
    return {key: error(key, got[key], golden.arrays[key]) for key in got}


@pytest.mark.parametrize("name", EXACT)
def test_forward(folder, name):
    assert max(errors(load(folder, name), Golden(name)).values()) <= BOUND


def plain(config: jaxemo.ModelConfig) -> dict:
    """Mistral is a Llama here, and biases stand in another order."""
    return {**dataclasses.asdict(config), "family": "", "biases": sorted(config.biases)}


def alike(ours, theirs, where: str = "") -> None:
    """Equal, but for floats that a GGUF rounds to 32 bits."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            alike(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), (where, ours, theirs)
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            alike(*pair, f"{where}[{i}]")
    else:
        assert ours == (pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else theirs), where


@pytest.mark.parametrize("name", sorted(DIFFERS))
def test_what_the_converter_leaves_out(folder, name):
    """The same ModelConfig and the same weights, bit by bit, as those of the other Hugging Face checkpoint."""
    golden = Golden(name)
    other = write_hf(folder / name, changed(golden.config, DIFFERS[name]), golden.tensors())
    ours, theirs = load(folder, name), jaxemo.load(other, dtype="float32")
    assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    alike(plain(ours.config), plain(theirs.config))
    with pytest.raises(AssertionError):  # else it would belong with the exact ones
        alike(plain(ours.config), plain(families.config_from_hf("golden", golden.config)))


def test_every_architecture_is_tested():
    written = {write_gguf.ARCHITECTURES[Golden(name).config["model_type"]] for name in WRITTEN} | {"MISTRAL3"}
    names = {gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, name)] for name in written}
    assert names == set(families_gguf.ARCHITECTURES)


@pytest.mark.parametrize(
    "name", ["gemma3_text-linear", "glm4-tied", "gpt2-hub", "gpt_oss-hub", "llama-v3", "phi3-long"]
)
def test_cached(folder, name):
    """Cached greedy decoding, layers stacked."""
    golden = Golden(name)
    expected = golden.arrays["greedy"]
    got = load(folder, name, stacked=True).generate(golden.batch(), max_new_tokens=expected.shape[1], stop=[])
    known = expected[:, 0] >= 0
    assert known.any()
    np.testing.assert_array_equal(got.tokens[known], expected[known])


# ---- other ways to write the same ------------------------------------------------------------------------------------


def same_as(folder, name: str, path) -> None:
    ours, theirs = jaxemo.load(path, dtype="float32"), load(folder, name)
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_mistral3(folder, tmp_path):
    """The newer name for the part of Mistral Small 3 that reads."""
    same_as(folder, "mistral-nemo", write(tmp_path / "a.gguf", "mistral-nemo", architecture="MISTRAL3"))


@pytest.mark.parametrize("name", ["mixtral-hub", "gemma3_text-linear"])
def test_version_2(folder, name, tmp_path):
    """Version 3 only adds that a file may be big-endian."""
    path = write(tmp_path / "a.gguf", name)
    data = bytearray(path.read_bytes())
    assert data[4:8] == b"\x03\0\0\0"
    data[4] = 2
    path.write_bytes(data)
    same_as(folder, name, path)


def test_experts_one_by_one(folder, tmp_path):
    """As files of early 2024 have them."""
    path = write(tmp_path / "a.gguf", "mixtral-hub", one_by_one=True)
    assert "blk.0.ffn_up.3.weight" in gguf_lib.open_gguf(path).shapes
    same_as(folder, "mixtral-hub", path)


@pytest.mark.parametrize("name", ["phi-2", "llama-linear", "qwen2-hub"])
def test_queries_keys_and_values_in_one(folder, name, tmp_path):
    path = write(tmp_path / "a.gguf", name, fused=True)
    assert "blk.0.attn_qkv.weight" in gguf_lib.open_gguf(path).shapes
    same_as(folder, name, path)


def test_linear_scaling_by_its_older_name(folder, tmp_path):
    golden = Golden("llama-linear")
    config = golden.config | {"rope_parameters": {"rope_theta": golden.config["rope_parameters"]["rope_theta"]}}
    write_gguf.write(tmp_path / "a.gguf", config, golden.tensors(), extra={"{arch}.rope.scale_linear": 2.5})
    same_as(folder, "llama-linear", tmp_path / "a.gguf")


def test_the_number_of_layers_chooses_gemmas_scale():
    """Gemma 2 and 3 of 27 B scale queries by the width per head (config.json: 144 and 168)."""
    for arch, layers, width, heads, head_dim, scalar in (("gemma2", 46, 4608, 32, 128, 144), ("gemma2", 42, 3584, 16, 256, 256),
                                                         ("gemma3", 62, 5376, 32, 128, 168), ("gemma3", 48, 3840, 16, 256, 256)):  # fmt: skip
        meta = {"general.architecture": arch, f"{arch}.context_length": 8192, f"{arch}.embedding_length": width,
                f"{arch}.block_count": layers, f"{arch}.attention.head_count": heads, f"{arch}.attention.key_length": head_dim,
                f"{arch}.feed_forward_length": 9, f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
                f"{arch}.attention.head_count_kv": 16, f"{arch}.attention.sliding_window": 1024}  # fmt: skip
        config, _, _ = families_gguf.config_from_gguf("made up", meta, {"token_embd.weight": (32, width)}, None)
        assert config.attn_scale == pytest.approx(scalar**-0.5)


# ---- quantised -------------------------------------------------------------------------------------------------------


def test_mixed_kinds_load_to_what_gguf_makes_of_them(tmp_path):
    """A file as quantisers leave them; random bytes stand for the kinds that the package cannot write."""
    config = {"model_type": "llama", "vocab_size": 96, "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 512, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}  # fmt: skip
    shapes = {"model.embed_tokens.weight": (96, 256), "model.norm.weight": (256,), "lm_head.weight": (96, 256)}
    for name, shape in {"input_layernorm": (256,), "post_attention_layernorm": (256,), "self_attn.q_proj": (256, 256),
                        "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256), "self_attn.o_proj": (256, 256),
                        "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256), "mlp.down_proj": (256, 512)}.items():  # fmt: skip
        shapes[f"model.layers.0.{name}.weight"] = shape
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}

    def random(kind: Type, rows: int, columns: int) -> np.ndarray:
        block, width = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, (rows, columns // block, width), np.uint8)
        where = {"Q4_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "IQ4_XS": (0,)}[
            kind.name
        ]  # the blocks' float16 scales
        for at in where:
            data[..., at : at + 2] = rng.uniform(1e-3, 1e-2, (*data.shape[:2], 1)).astype(np.float16).view(np.uint8)
        return data.reshape(rows, -1)

    raw = {f"blk.0.{name}.weight": (kind, random(kind, *shape)) for name, kind, shape in (
        ("attn_q", Type.Q4_K, (256, 256)), ("attn_k", Type.Q6_K, (128, 256)), ("ffn_gate", Type.Q4_K, (512, 256)),
        ("ffn_down", Type.Q6_K, (256, 512)), ("attn_output", Type.Q3_K, (256, 256)), ("ffn_up", Type.IQ4_XS, (512, 256)))}  # fmt: skip
    kinds = {"token_embd": Type.Q8_0, "output": Type.F16, "attn_v": Type.BF16}
    path = tmp_path / "mixed.gguf"
    write_gguf.write(path, config, tensors, raw=raw, kinds=kinds)
    assert {"Q8_0", "Q4_K", "Q6_K", "Q3_K", "IQ4_XS", "F16", "BF16", "F32"} == set(
        gguf_lib.open_gguf(path).kinds.values()
    )

    read = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    got = jaxemo.load(path, dtype="float32").params
    layer = got["layers"][0]

    def apart(w, heads):  # undoes write_gguf.permute
        return w.reshape(heads, -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)

    for ours, theirs in ((got["embed"], read["token_embd.weight"]), (got["unembed"], read["output.weight"]),
                         (layer["wq"], apart(read["blk.0.attn_q.weight"], 4).T), (layer["wk"], apart(read["blk.0.attn_k.weight"], 2).T),
                         (layer["wv"], read["blk.0.attn_v.weight"].T), (layer["wo"], read["blk.0.attn_output.weight"].T),
                         (layer["w_gate"], read["blk.0.ffn_gate.weight"].T), (layer["w_up"], read["blk.0.ffn_up.weight"].T),
                         (layer["w_down"], read["blk.0.ffn_down.weight"].T)):  # fmt: skip
        np.testing.assert_array_equal(np.asarray(ours).reshape(theirs.shape), theirs)


# ---- refusals --------------------------------------------------------------------------------------------------------


def edit(path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert len(old) == len(new) and data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def refused(path, *words: str) -> None:
    with pytest.raises(checkpoints.CheckpointError) as caught:
        jaxemo.load(path, dtype="float32")
    print(caught.value)
    for word in (path.name, *words):
        assert word in str(caught.value)


ONE_OF_EACH = sorted({write_gguf.ARCHITECTURES[Golden(name).config["model_type"]]: name for name in WRITTEN}.values())


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_unknown_key(name, tmp_path):
    golden = Golden(name)
    write_gguf.write(tmp_path / "a.gguf", golden.config, golden.tensors(), extra={"{arch}.attention.flavour": 3})
    refused(tmp_path / "a.gguf", ".attention.flavour")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_unknown_and_missing_tensors(name, tmp_path):
    """Of the last layer and of those outside the layers, each tensor in turn is taken for another."""
    path = write(tmp_path / "a.gguf", name)
    whole, shapes = path.read_bytes(), gguf_lib.open_gguf(path).shapes
    last = max(int(tensor.split(".")[1]) for tensor in shapes if tensor.startswith("blk."))
    for tensor in shapes:
        if tensor.startswith("blk.") and not tensor.startswith(f"blk.{last}."):
            continue
        if tensor == "output.weight":  # without it, embeddings are tied
            continue
        path.write_bytes(whole)
        other = tensor[:-1] + "X"
        edit(path, *(len(label).to_bytes(8, "little") + label.encode() for label in (tensor, other)))
        found_early = tensor == "token_embd.weight" or tensor.startswith("rope_factors")
        refused(path, *([] if tensor == "rope_freqs.weight" else [tensor]), *([] if found_early else [other]))


REFUSED = [  # further keys, and what the message must name
    ("llama-v1", {"{arch}.rope.scaling.type": "spiral"}, "rope scaling", "spiral"),
    ("llama-v1", {"{arch}.rope.scaling.type": "dynamic", "{arch}.rope.scaling.factor": 2.0}, "rope scaling", "dynamic"),
    ("llama-v1", {"{arch}.rope.scaling.yarn_log_multiplier": 1.0}, "yarn_log_multiplier"),
    ("llama-v1", {"{arch}.attention.sliding_window": 5}, "llama.attention.sliding_window"),
    ("llama-v1", {"{arch}.attention.temperature_scale": 0.1}, "attention.temperature_scale"),
    ("qwen3-hub", {"{arch}.rope.freq_base_swa": 1e4}, "qwen3.rope.freq_base_swa"),
    ("phi3-long", {"{arch}.rope.dimension_count": 6}, "rope_factors_short.weight", "[3]"),
    ("llama-v3", {"{arch}.rope.dimension_count": 6}, "rope_freqs.weight", "[3]"),
    ("gemma2-hub", {PATTERN: [True, False]}, "sliding_window_pattern"),
    ("gemma2-hub", {PATTERN: [1, 0, 2]}, "sliding_window_pattern"),
    ("granite-hub", {"{arch}.rope.scaling.finetuned": False}, "rope.scaling.finetuned"),
    ("qwen3_moe-hub", {"{arch}.expert_gating_func": 2}, "expert_gating_func"),
    ("gpt2-hub", {"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": 2.0}, "rope.scaling"),
    ("qwen2-hub", {"{arch}.block_count": 5000}, "5000 layers"),
    (
        "qwen2-yarn",
        {"{arch}.attention.key_length": 1 << 30, "{arch}.attention.value_length": 1 << 30},
        "cannot be rotated",
    ),
]


@pytest.mark.parametrize("name, extra, words", [(name, extra, words) for name, extra, *words in REFUSED])
def test_what_is_not_supported_is_named(name, extra, words, tmp_path):
    golden = Golden(name)
    write_gguf.write(tmp_path / "a.gguf", golden.config, golden.tensors(), extra=extra)
    refused(tmp_path / "a.gguf", *words)


def test_unknown_architecture(tmp_path):
    path = write(tmp_path / "a.gguf", "qwen2-hub")
    data = path.read_bytes().replace(b"qwen2", b"qwen9")
    path.write_bytes(data)
    refused(path, "architecture 'qwen9'", "known: llama")


def test_one_part_of_several(tmp_path):
    path = write(tmp_path / "a.gguf", "qwen2-hub", extra={"split.count": 3})
    refused(path, "split.count")
