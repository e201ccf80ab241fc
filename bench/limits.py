"""Where the time goes, beside what this machine could do at most.

    python bench/limits.py [--model NAME] [--batches 1,16,64] [--texts 2x64,8x256] [--out FILE.json]

In milliseconds, least of five. For each batch, of a decode step: the step itself (from generations of 64 tokens and of one, after 32);
the same matrix products with the same weights and nothing else, by JAX and by PyTorch (in bench/compare.py's environment); attention
over a cache of that size alone; sampling alone; and two bounds: the weights read once at the rate of summing a large array, and the
arithmetic at the rate of a large matrix product. And what the compiled loop copies: large `copy` instructions in it, temporary memory,
and how much of its state is updated in place. For each size of texts: a forward pass to the last logits, its products alone, the same
with 171 scores of every token after every layer, which share of a large product's rate it reaches, and the memory of the compiled
program beside that of the residual streams it would take to keep. Run it on a quiet machine.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import time

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from peers import process

import jaxemo
from jaxemo import capture, generate, language_model, model

PROMPT, NEW, E = 32, 64, 171
TORCH = """
import json, sys, time, torch
torch.set_grad_enabled(False)
torch.set_num_threads(int(sys.argv[1]))
L, D, F, Q, KV, V = json.loads(sys.argv[2])
linear = torch.nn.functional.linear
layers = [[torch.randn(o, i) * 0.02 for o, i in ((Q, D), (KV, D), (KV, D), (D, Q), (F, D), (F, D), (D, F))] for _ in range(L)]
embed = torch.randn(V, D)

def products(x, last):
    for q, k, v, o, gate, up, down in layers:
        mixed = linear(x, q)
        mixed[:, :KV] += linear(x, k) + linear(x, v)
        mixed = linear(mixed, o)
        x = x + linear(linear(mixed, up) * linear(mixed, gate), down)
    return linear(x[:last], embed)

for B, last in json.loads(sys.argv[3]):
    x, best = torch.full((B, D), 0.01), 1e9
    products(x, last)
    for _ in range(5):
        begin = time.perf_counter()
        products(x, last)
        best = min(best, 1000 * (time.perf_counter() - begin))
    print(best)
"""


def least(f, *args, n: int = 5) -> float:
    """Milliseconds of a call, once compiled."""
    jax.block_until_ready(f(*args))
    best = math.inf
    for _ in range(n):
        begin = time.perf_counter()
        jax.block_until_ready(f(*args))
        best = min(best, 1000 * (time.perf_counter() - begin))
    return best


def products(params, x, last: int):
    """All of a step's products with weights, for `x [B, D]`, logits for the first `last` rows."""
    for w in params["layers"]:
        q, k, v = (model.einsum("bd,dnh->bnh", x, w[name]) for name in ("wq", "wk", "wv"))
        mixed = model.einsum("bno,nod->bd", q.at[:, : k.shape[1]].add(k + v), w["wo"])
        hidden = model.einsum("bd,df->bf", mixed, w["w_up"]) * model.einsum("bd,df->bf", mixed, w["w_gate"])
        x = x + model.einsum("bf,fd->bd", hidden, w["w_down"])
    return model.einsum("bd,vd->bv", x[:last], params["embed" if "unembed" not in params else "unembed"])


def torch_products(config, sizes) -> list[float]:
    """The same by PyTorch, on random weights of those shapes, for (rows, logits) in `sizes`."""
    shape = [config.n_layers, config.d_model, config.d_ff, config.n_heads * config.head_dim,
             config.n_kv_heads * config.head_dim, config.vocab_size]  # fmt: skip
    threads = len(os.sched_getaffinity(0))
    command = [process.environment("new", "cpu"), "-c", TORCH, str(threads), json.dumps(shape), json.dumps(sizes)]
    return [float(line) for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


@jax.jit
def attend(cache, q):
    """One query group a key-value head, `q [B, K, G, H]`, over the whole cache in every layer."""
    for k, v in zip(cache.k, cache.v, strict=True):
        q = model.einsum("bkgs,bksh->bkgh", jax.nn.softmax(model.einsum("bkgh,bkhs->bkgs", q, k), axis=-1), v)
    return q


def compiled_loop(lm, ids) -> dict:
    """Of the program that `lm.generate` runs: large copies inside its loop, and memory."""
    seen, decode = [], generate.decode
    generate.decode = lambda *args, **kwargs: seen.append(decode.lower(*args, **kwargs)) or decode(*args, **kwargs)
    try:
        lm.generate(ids, max_new_tokens=NEW, stop=[])
    finally:
        generate.decode = decode
    program = seen[0].compile()
    memory = program.memory_analysis()
    sizes = [
        math.prod(map(int, dims.split(","))) for dims in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", program.as_text())
    ]
    return {
        "copies of a megabyte or more": sum(4 * size >= 1 << 20 for size in sizes),
        "temporaries, MB": round(memory.temp_size_in_bytes / 1e6, 1),
        "updated in place, MB": round(memory.alias_size_in_bytes / 1e6, 1),
        "of, MB": round(memory.output_size_in_bytes / 1e6, 1),
    }


def step(lm, B: int, weights: int, bandwidth: float, rate: float) -> dict:
    config, rng = lm.config, np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (B, PROMPT)).astype(np.int32)
    many = least(lambda: lm.generate(ids, max_new_tokens=NEW, stop=[]).tokens)
    one = least(lambda: lm.generate(ids, max_new_tokens=1, stop=[]).tokens)
    cache = model.init_cache(config, B, PROMPT + NEW, jnp.float32, False)
    q = jnp.ones((B, config.n_kv_heads, config.n_heads // config.n_kv_heads, config.head_dim))
    greedy = generate.Sampling(jnp.zeros(B), jnp.zeros(B, jnp.int32), jnp.ones(B), jnp.zeros(B),
                               jax.random.split(jax.random.key(0), B))  # fmt: skip
    logits = jnp.asarray(rng.standard_normal((B, config.vocab_size)), jnp.float32)
    row = {
        "tokens/s, prompt included": B * NEW / many * 1000,
        "step": (many - one) / (NEW - 1),
        "products alone": least(jax.jit(products, static_argnums=2), lm.params, jnp.full((B, config.d_model), 0.01), B),
        "products alone, by PyTorch": torch_products(config, [(B, B)])[0],
        "attention alone": least(attend, cache, q),
        "sampling alone": least(jax.jit(generate.sample), logits, greedy, jnp.zeros(B, jnp.int32)),
        "bound: weights read once": 4 * weights / bandwidth / 1e6,
        "bound: arithmetic": 2 * weights * B / rate / 1e6,
    }
    return {name: round(value, 1) for name, value in row.items()} | compiled_loop(lm, ids)


def texts(lm, B: int, T: int, rate: float) -> dict:
    config, rng = lm.config, np.random.default_rng(0)
    batch = lm.batch(rng.integers(0, config.vocab_size, (B, T)).astype(np.int32))
    directions = rng.standard_normal((config.n_layers, E, config.d_model)).astype(np.float32)
    scores = jaxemo.Capture(scores={"resid_post": "all"}, directions=directions)
    probes = capture.resolve(config, scores, batch)
    plain = scored = math.inf
    for _ in range(3):  # in turns
        plain = min(plain, least(lambda: lm.forward(batch, logits="last").logits))
        scored = min(scored, least(lambda: lm.forward(batch, capture=scores, logits="last")))
    n = B * T
    inside = sum(leaf.size for leaf in jax.tree.leaves(lm.params["layers"]))
    work = 2 * (n * inside + B * config.vocab_size * config.d_model)
    program = language_model._forward.lower(config, lm.params, batch.ids, batch.lengths, None, probes, "last").compile()
    memory = program.memory_analysis()
    return {
        "forward": round(plain, 1),
        "with 171 scores of every token and layer": round(scored, 1),
        "products alone": round(
            least(jax.jit(products, static_argnums=2), lm.params, jnp.full((n, config.d_model), 0.01), B), 1
        ),
        "products alone, by PyTorch": round(torch_products(config, [(n, B)])[0], 1),
        "share of a large product's rate": round(work / plain / 1e6 / rate, 2),
        "temporaries, MB": round(memory.temp_size_in_bytes / 1e6, 1),
        "scores, MB": round(4 * config.n_layers * n * E / 1e6, 1),
        "residual streams of all layers, MB": round(4 * config.n_layers * n * config.d_model / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--texts", default="2x64,8x256")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "limits.json")
    args = parser.parse_args()
    lm = jaxemo.load(args.model)
    weights = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    large = jnp.ones((1 << 27,))
    square = jnp.asarray(np.random.default_rng(0).standard_normal((2048, 2048)), jnp.float32)
    bandwidth = large.nbytes / least(jax.jit(jnp.sum), large) / 1e6  # GB/s
    rate = 2 * 2048**3 / least(jax.jit(lambda a: model.einsum("ab,bc->ac", a, a)), square) / 1e6  # GFLOP/s
    del large
    result = {
        "model": args.model,
        "reading memory, GB/s": round(bandwidth, 1),
        "a product of 2048 x 2048 matrices, GFLOP/s": round(rate, 1),
        "decode steps": {},
        "texts": {},
        "machine": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}",
        "versions": {"jaxemo": jaxemo.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__},
    }
    for B in map(int, args.batches.split(",")):
        result["decode steps"][B] = step(lm, B, weights, bandwidth, rate)
        print(f"a step of {B} rows", json.dumps(result["decode steps"][B], indent=1), flush=True)
    for size in args.texts.split(","):
        B, T = map(int, size.split("x"))
        result["texts"][size] = texts(lm, B, T, rate)
        print(f"{B} texts of {T} tokens", json.dumps(result["texts"][size], indent=1), flush=True)
    print(json.dumps({name: value for name, value in result.items() if not isinstance(value, dict)}, indent=1))
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
