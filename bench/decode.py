"""Where the time of a decode step goes, beside what this machine could do at most.

    python bench/decode.py [--model NAME] [--batches 1,16,64] [--out FILE.json]

For each batch, in milliseconds a step (least of five): the step itself (from generations of 64 tokens and of one, after 32); the
same matrix products with the same weights and nothing else; attention over a cache of that size alone; sampling alone; and two
bounds: the weights read once at the rate of summing a large array, and the arithmetic at the rate of a large matrix product. And
what the compiled loop copies: large `copy` instructions in it, temporary memory, and how much of its state is updated in place. Run
it on a quiet machine.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import re
import time

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import jaxemo
from jaxemo import generate, model

PROMPT, NEW = 32, 64


def least(f, *args, n: int = 5) -> float:
    """Milliseconds of a call, once compiled."""
    jax.block_until_ready(f(*args))
    best = math.inf
    for _ in range(n):
        begin = time.perf_counter()
        jax.block_until_ready(f(*args))
        best = min(best, 1000 * (time.perf_counter() - begin))
    return best


@jax.jit
def products(params, x):
    """All of a step's products with weights, for `x [B, D]`."""
    for w in params["layers"]:
        q, k, v = (model.einsum("bd,dnh->bnh", x, w[name]) for name in ("wq", "wk", "wv"))
        out = model.einsum("bno,nod->bd", q + k[:, :1] + v[:, :1], w["wo"])
        hidden = model.einsum("bd,df->bf", out, w["w_up"]) * model.einsum("bd,df->bf", out, w["w_gate"])
        x = x + model.einsum("bf,fd->bd", hidden, w["w_down"])
    return model.einsum("bd,vd->bv", x, params["embed" if "unembed" not in params else "unembed"])


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "decode.json")
    args = parser.parse_args()
    lm = jaxemo.load(args.model)
    config, rng = lm.config, np.random.default_rng(0)
    weights = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    large, square = jnp.ones((1 << 27,)), jnp.asarray(rng.standard_normal((2048, 2048)), jnp.float32)
    bandwidth = large.nbytes / least(jax.jit(jnp.sum), large) / 1e6  # GB/s
    rate = 2 * 2048**3 / least(jax.jit(lambda a: model.einsum("ab,bc->ac", a, a)), square) / 1e6  # GFLOP/s
    del large
    result = {
        "model": args.model,
        "reading memory, GB/s": round(bandwidth, 1),
        "a product of 2048 x 2048 matrices, GFLOP/s": round(rate, 1),
        "batches": {},
        "machine": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}",
        "versions": {"jaxemo": jaxemo.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__},
    }
    for B in map(int, args.batches.split(",")):
        ids = rng.integers(0, config.vocab_size, (B, PROMPT)).astype(np.int32)
        many = least(lambda ids=ids: lm.generate(ids, max_new_tokens=NEW, stop=[]).tokens)
        one = least(lambda ids=ids: lm.generate(ids, max_new_tokens=1, stop=[]).tokens)
        cache = model.init_cache(config, B, PROMPT + NEW, jnp.float32, False)
        q = jnp.ones((B, config.n_kv_heads, config.n_heads // config.n_kv_heads, config.head_dim))
        greedy = generate.Sampling(jnp.zeros(B), jnp.zeros(B, jnp.int32), jnp.ones(B), jnp.zeros(B),
                                   jax.random.split(jax.random.key(0), B))  # fmt: skip
        logits = jnp.asarray(rng.standard_normal((B, config.vocab_size)), jnp.float32)
        row = {
            "tokens/s, prompt included": B * NEW / many * 1000,
            "step": (many - one) / (NEW - 1),
            "products alone": least(products, lm.params, jnp.full((B, config.d_model), 0.01)),
            "attention alone": least(attend, cache, q),
            "sampling alone": least(jax.jit(generate.sample), logits, greedy, jnp.zeros(B, jnp.int32)),
            "bound: weights read once": 4 * weights / bandwidth / 1e6,
            "bound: arithmetic": 2 * weights * B / rate / 1e6,
        }
        result["batches"][B] = {name: round(value, 1) for name, value in row.items()} | compiled_loop(lm, ids)
        print(B, json.dumps(result["batches"][B], indent=1), flush=True)
    print(json.dumps({name: value for name, value in result.items() if name != "batches"}, indent=1))
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
