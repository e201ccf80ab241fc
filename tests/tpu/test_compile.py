"""Whole programs compile for TPUs: libtpu brings its compiler to machines without one (`make test-tpu`).

What is proved: the steered and read forward pass and the decode loop lower and compile for a v5e and a v6e chip, in bfloat16
with stacked layers, and fit its memory. What is not: that they are fast, or right, on the chip.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxemo import Capture, ModelConfig, Steering, TokenBatch, capture, generate, model, params, steering
from jaxemo.config import Attention, Rope

SMOLLM2 = ModelConfig("llama", 49152, 576, 30, 9, 3, 64, 1536, 8192, attention=(Attention(Rope(64, 1e5)),))
LLAMA_8B = ModelConfig("llama", 128256, 4096, 32, 32, 8, 128, 14336, 8192, False, (Attention(Rope(128, 5e5)),))
LOCAL, GLOBAL = Attention(Rope(256, 1e4), 512), Attention(Rope(256, 1e6))
GEMMA3_1B = ModelConfig(
    "gemma3", 262144, 1152, 26, 4, 1, 256, 6912, 32768, attention=(LOCAL, GLOBAL), pattern=(0, 0, 0, 0, 0, 1) * 4 + (0, 0),
    qk_norm="head", norms=("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"), embed_scale=1152**0.5,
    activation="gelu_tanh",
)  # fmt: skip
QWEN3_MOE = ModelConfig(  # Qwen3-30B-A3B with 6 of its 48 layers
    "qwen3_moe", 151936, 2048, 6, 32, 4, 128, 768, 40960, False, (Attention(Rope(128, 1e6)),), qk_norm="head", n_experts=128,
    n_active=8,
)  # fmt: skip
GPT_OSS = ModelConfig(  # gpt-oss-20b with 4 of its 24 layers
    "gpt_oss", 201088, 2880, 4, 64, 8, 64, 2880, 131072, False, (Attention(Rope(64, 1.5e5), 128), Attention(Rope(64, 1.5e5))),
    pattern=(0, 1) * 2, attn_sinks=True, biases=("wq", "wk", "wv", "wo", "router", "w_gate", "w_up", "w_down"), n_experts=32,
    n_active=4, activation="quick_gelu", glu_limit=7.0,
)  # fmt: skip
MEMORY = {"v5e:2x2": 16 << 30, "v6e:2x2": 32 << 30}  # bytes of HBM a chip
B, T, ROOM, E = 8, 256, 64, 171


@pytest.fixture(scope="module", params=list(MEMORY))
def chip(request):
    topology = topologies.get_topology_desc(request.param, "tpu")
    return SingleDeviceSharding(topology.devices[0]), MEMORY[request.param]


def on(sharding, tree):
    """The tree's shapes, placed on the chip."""

    def place(x):
        x = x if isinstance(x, jax.ShapeDtypeStruct) else jax.eval_shape(lambda: jnp.asarray(x))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def inputs(config):
    weights = jax.eval_shape(lambda: params.stack(params.init(config, 0, jnp.bfloat16)))
    batch = TokenBatch(np.zeros((B, T), np.int32), np.full(B, T, np.int32))
    vectors = np.broadcast_to(np.eye(1, config.d_model, dtype=np.float32), (config.n_layers, config.d_model))
    rows = [steering.add(vectors, 1.0, [3]) + steering.ablate(vectors)] * (B - 1) + [Steering()]
    interventions = steering.resolve(config, rows, batch, ROOM)
    bank = np.zeros((config.n_layers, E, config.d_model), np.float32)
    return weights, batch, interventions, bank


def report(label, compiled, limit):
    memory = compiled.memory_analysis()
    used = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    print(f"\n{label}: weights and inputs {memory.argument_size_in_bytes / 1e9:.2f} GB, "
          f"temporaries {memory.temp_size_in_bytes / 1e9:.2f} GB, of {limit / 1e9:.0f} GB")  # fmt: skip
    assert used < limit


@pytest.mark.parametrize("name", ["SMOLLM2", "LLAMA_8B", "GEMMA3_1B", "QWEN3_MOE", "GPT_OSS"])
def test_steered_and_read_forward_compiles_and_fits(chip, name):
    sharding, limit = chip
    config = globals()[name]
    weights, batch, interventions, bank = inputs(config)
    if name == "LLAMA_8B" and limit < 32 << 30:
        pytest.skip("16 GB of weights do not fit a 16 GB chip beside anything else")
    wanted = Capture(mean={"resid_post": "all"}, scores={"resid_post": "all"}, directions=bank, tokens=slice(50, None))
    probes = capture.resolve(config, wanted, batch)

    def run(weights, ids, interventions, probes):
        x, _, captured = model.forward(config, weights, ids, interventions=interventions, probes=probes)
        return model.unembed(config, weights, x[:, -1]), captured

    arguments = on(sharding, (weights, batch.ids, interventions, probes))
    report(f"{name} forward", jax.jit(run).lower(*arguments).compile(), limit)


@pytest.mark.parametrize("name", ["SMOLLM2", "LLAMA_8B"])
def test_reading_adds_no_more_than_its_arithmetic(name):
    """171 scores after every layer: two products with bfloat16 numbers for each weight of the (float32) directions, beside
    one for each weight of the layer."""
    sharding = SingleDeviceSharding(topologies.get_topology_desc("v6e:2x2", "tpu").devices[0])
    config = globals()[name]
    weights, batch, _, bank = inputs(config)

    def flops(probes):
        def run(weights, ids, probes):
            x, _, captured = model.forward(config, weights, ids, probes=probes)
            return x, captured

        return jax.jit(run).lower(*on(sharding, (weights, batch.ids, probes))).compile().cost_analysis()["flops"]

    reading = capture.resolve(config, Capture(scores={"resid_post": "all"}, directions=bank), batch)
    more = flops(reading) / flops(None) - 1
    of_layer = sum(leaf.size for leaf in jax.tree.leaves(weights["layers"])) / config.n_layers
    print(
        f"\n{name}: reading adds {more:.2%} to the FLOPs; {2 * E * config.d_model / of_layer:.2%} of the layers' products"
    )
    assert 0.5 * E * config.d_model / of_layer < more < 2.05 * E * config.d_model / of_layer


def test_decode_loop_compiles_and_updates_its_cache_in_place(chip):
    sharding, limit = chip
    config = SMOLLM2
    weights, batch, interventions, bank = inputs(config)
    probes = capture.resolve(config, Capture(scores={"resid_post": [24]}, directions=bank), batch)
    sampling = generate.Sampling(*(np.zeros(B, np.float32), np.zeros(B, np.int32), np.ones(B, np.float32)),
                                 np.zeros(B, np.float32), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B)))  # fmt: skip
    own, shared = steering.split(interventions)
    stop, one = np.zeros(8, np.int32), np.ones(B, np.int32)

    def begin(weights, ids, lengths, sampling, interventions, own, probes):
        logits, cache, _ = generate.prefill(
            config, weights, ids, lengths, lengths + ROOM, interventions, None, ids.shape[1] + ROOM
        )
        return generate.begin(logits, cache, one, lengths, ROOM * one, sampling, stop, own, probes, ROOM)

    state = jax.eval_shape(begin, weights, batch.ids, batch.lengths, sampling, interventions, own, probes)
    queue = jax.tree.map(lambda axis, leaf: jax.ShapeDtypeStruct(
        (*leaf.shape[:axis], B // 4, *leaf.shape[axis + 1 :]), leaf.dtype), generate.axes(state), state)  # fmt: skip
    arguments = (weights, shared, state, stop, np.int32(ROOM), probes, queue, np.ones(B // 4, bool), False)
    compiled = generate.decode.lower(config, *on(sharding, arguments)).compile()
    report("SMOLLM2 decode", compiled, limit)
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= cache, "the donated cache is not updated in place"


def test_reading_a_dataset_compiles_with_its_kernels():
    """Standardised scores pooled over each row and the batch's top tokens, attention sinks left out: what a dataset is read by."""
    sharding = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])
    config, rows = SMOLLM2, 512
    weights, _, _, bank = inputs(config)
    batch = TokenBatch(np.zeros((rows, 64), np.int32), np.full(rows, 64, np.int32))
    wanted = {"resid_post": [24]}
    z = np.ones(bank.shape[:2], np.float32)
    probes = capture.resolve(
        config, Capture(pooled=wanted, top=wanted, directions=bank, offset=z, scale=z, sinks=False, k=40), batch
    )

    def run(weights, ids, probes):
        return model.forward(config, weights, ids, probes=probes)[2]

    lowered = jax.jit(run).lower(*on(sharding, (weights, batch.ids, probes)))
    assert "tpu_custom_call" in lowered.as_text(), "the pooling is a kernel"
    report("SMOLLM2 dataset reading", lowered.compile(), 16 << 30)
