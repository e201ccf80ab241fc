"""Every family against transformers itself: the golden files are what it computes, and what it saves loads here."""

import sys

import numpy as np
import pytest
import test_families
import torch
import transformers
from checked import record
from jaxemo.checkpoints import families

import jaxemo
from jaxemo import Capture
from jaxemo import tokens as tokens_lib

sys.path.insert(0, str(test_families.GOLDEN))
import make_families

BOUND = test_families.BOUND
SAME = 1e-5  # of transformers' results on this machine and on the one that made the files


@pytest.mark.parametrize("name", make_families.NAMES)
def test_the_golden_files_are_what_transformers_computes(name, tmp_path):
    described, arrays = make_families.make(name)
    golden = test_families.Golden(name)
    assert described["config"] | {"transformers_version": None} == golden.config | {"transformers_version": None}
    assert {key: list(shape) for key, shape in described["tensors"].items()} == golden.shapes
    assert arrays.keys() == golden.arrays.keys()
    for key, array in arrays.items():
        assert np.abs(array - golden.arrays[key]).max(initial=0) <= SAME * max(1, np.abs(array).max(initial=0)), key

    lm = jaxemo.load(test_families.write(tmp_path, golden.config, golden.tensors()), dtype="float32")
    batch = golden.batch()
    out = lm.forward(batch, capture=Capture(raw={"resid_post": "all"}))
    errors = [float(np.abs(test_families.unpad(got, batch.lengths) - arrays[key]).max())
              for got, key in ((out.logits, "logits"), (out.captured.raw["resid_post"], "resid"))]  # fmt: skip
    print(f"{name}: logits {errors[0]:.1e}, residual stream {errors[1]:.1e} (bound {BOUND:g})")
    assert max(errors) <= BOUND
    record(golden.config["model_type"], "safetensors", *errors)


SAVED = [name for name in sorted(test_families.FAMILIES.values()) if "mxfp4" not in name]


@pytest.mark.parametrize("name", SAVED)
def test_what_transformers_saves_loads(name, tmp_path):
    """transformers' own initialisation, saved in bfloat16 in several files, with its names and its configuration."""
    torch.manual_seed(0)
    golden = test_families.Golden(name)
    test_families.write(tmp_path / "config", golden.config, {})
    config = transformers.AutoConfig.from_pretrained(tmp_path / "config")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():
        weight.requires_grad_(False)
        weight += 0.2 * torch.randn_like(weight)  # biases start as zeros, gains as ones
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = [np.random.default_rng(0).integers(0, config.get_text_config().vocab_size, n).tolist() for n in (12, 5)]
    lm = jaxemo.load(tmp_path / "saved", dtype="float32")
    got = np.asarray(lm.forward(tokens_lib.pad(rows)).logits)
    worst = 0.0
    for i, ids in enumerate(rows):
        with torch.inference_mode():
            want = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        worst = max(worst, float(np.abs(got[i, : len(ids)] - want).max()))
    print(f"{name}: logits {worst:.1e} (bound {BOUND:g}), up to {np.abs(want).max():.1f}")
    assert worst <= BOUND
    record(golden.config["model_type"], "saved in bfloat16, in shards", worst)


SIZES = {"vocab_size": 96, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 32, "intermediate_size": 48,
         "max_position_embeddings": 64}  # fmt: skip
OUR_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


@pytest.mark.parametrize("name", sorted(set(families.FAMILIES) - {"gemma3", "gpt2"}))
def test_what_a_configuration_leaves_out_has_transformers_defaults(name):
    """Only the sizes are given; experts have to say more."""
    given = SIZES | ({"moe_intermediate_size": 16} if name == "qwen3_moe" else {})
    ours = families.config_from_hf(name, {"model_type": name, **given})
    theirs = transformers.AutoConfig.for_model(name, **given)
    first = lambda *keys: next((v for key in keys if (v := getattr(theirs, key, None)) is not None), None)  # noqa: E731
    assert ours.n_kv_heads == (first("num_key_value_heads") or 32)
    assert ours.head_dim == (first("head_dim") or 8)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.norm_eps == first("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
    act = first("hidden_activation", "hidden_act")
    assert name == "gpt_oss" or ours.activation == OUR_NAMES.get(act, act)
    assert ours.n_active == (first("num_experts_per_tok") or 0)
    assert (ours.attn_softcap, ours.logit_softcap) == tuple(
        first(key) or 0 for key in ("attn_logit_softcapping", "final_logit_softcapping")
    )
    layers = [ours.attention[i] for i in ours.pattern or (0,) * 6]
    types = first("layer_types") or ["sliding_attention" if first("sliding_window") else "full_attention"] * 6
    for layer, kind in zip(layers, types, strict=True):
        assert layer.window == (first("sliding_window") if kind == "sliding_attention" else 0)
        rope = theirs.rope_parameters
        assert layer.rope is None or layer.rope.theta == rope.get(kind, rope)["rope_theta"]
