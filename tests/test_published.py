"""Published models at their full size: their configurations are understood, and every weight is accounted for.

Nothing is computed: shapes alone go through initialisation and the forward pass. `parameters` in each file is the number of
distinct weights (tied embeddings counted once, vision towers and buffers not at all). `source` says where that number is
stated, and whether the configuration stands as published, key for key, or is put together from documented values.
The hub itself was not at hand: its totals are quoted from public repositories that cite them.
`parity/test_published_parity.py` has transformers count them all.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jaxemo.checkpoints import CheckpointError, families

from jaxemo import model, params

MODELS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((pathlib.Path(__file__).parent / "published").glob("*.json"))
}


def test_enough_of_the_counts_are_published_ones():
    stated = [m["parameters"] for m in MODELS.values() if m["source"].startswith("stated")]
    assert len([n for n in stated if n >= 6.5e9]) >= 12 and max(stated) > 4e11


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_accounted_for(name):
    config = families.config_from_hf(name, MODELS[name]["config"])
    assert params.count(config) == MODELS[name]["parameters"]

    def run(ids):
        weights = params.stack(params.init(config, 0, jnp.bfloat16))
        x, _, _ = model.forward(config, weights, ids)
        return weights, model.unembed(config, weights, x)

    weights, logits = jax.eval_shape(run, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights)) == MODELS[name]["parameters"]
    assert logits.shape == (1, 8, config.vocab_size) and logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gpt2-xl", {"n_special": 0, "predict_special_tokens": True, "_num_labels": 1}),
        (
            "gpt-neox-20b",
            {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0, "use_deepspeed_checkpointing": True},
        ),
        ("Qwen3-235B-A22B", {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}),
        ("Llama-2-7b", {"max_length": 4096, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_beams": 1}),
    ],
)
def test_keys_of_their_kin_change_nothing(name, more):
    config = MODELS[name]["config"]
    assert not set(more) & set(config)
    assert families.config_from_hf(name, config | more) == families.config_from_hf(name, config)


@pytest.mark.parametrize(
    ("key", "value"), [("qkv_bias", True), ("use_qk_norm", False), ("shared_expert_intermediate_size", 5632)]
)
def test_a_mixture_that_is_not_qwen3s_is_refused(key, value):
    with pytest.raises(CheckpointError, match=f"Qwen3-30B-A3B.*{key}"):
        families.config_from_hf("Qwen3-30B-A3B", MODELS["Qwen3-30B-A3B"]["config"] | {key: value})
