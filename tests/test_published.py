"""Published models at their full size: their configurations are understood, and every weight is accounted for.

Nothing is computed: shapes alone go through initialisation and the forward pass. `parameters` in each file is the number of
distinct weights (tied embeddings counted once, vision towers and buffers not at all). `source` says where that number is
stated, and whether the configuration stands as published, key for key, or is put together from documented values.
`parity/test_published_parity.py` has transformers count them all.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jaxemo.checkpoints import families

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
