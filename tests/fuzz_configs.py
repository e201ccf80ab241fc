"""Damaged configurations without end: `python tests/fuzz_configs.py [COUNT] [SEED]` tries COUNT of them (100,000).

Each is a configuration of a tiny model, of a `config.json` or of a GGUF's metadata, with one to three values changed,
removed or added, offered with that model's tensors. It must be refused with a CheckpointError that names the file, or
loaded; loaded with the very same meaning where the change is one that means nothing. A warning (of a division by zero,
say) counts as a fault. The tests run some hundreds.
"""

import copy
import json
import pathlib
import random
import sys
import time
import tracemalloc
import warnings

import numpy as np
from jaxemo.checkpoints import CheckpointError, convert, families, families_gguf

GOLDEN = pathlib.Path(__file__).parent / "golden"
ODD = [None, 0, 1, -1, 2, 3, 7, 10**9, 2**31, 2**63, 10**400, 0.0, -0.5, 0.25, 1e-300, 1e300, float("inf"), float("nan"), True,
       False, "", "gelu", "full_attention", "default", "\ud800", [], [1], [None], [0, 1], ["full_attention"] * 3, {}, {"a": 1},
       {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 0}, {"rope_type": "dynamic", "factor": 2.0},
       {"rope_type": "llama3"}, {"type": "longrope", "factor": -1}, {"full_attention": 3}, [[[[[]]]]]]  # fmt: skip


def samples() -> list[tuple[dict, dict]]:
    """(config.json, tensor shapes) of the tiny models."""
    paths = sorted((GOLDEN / "families").glob("*.json"))
    read = (json.loads(path.read_text(encoding="ascii")) for path in paths)
    return [(golden["config"], {name: tuple(shape) for name, shape in golden["tensors"].items()}) for golden in read]


def mutate(rng: random.Random, config: dict, others: list[dict]) -> dict:
    config = copy.deepcopy(config)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        table = config
        inner = [value for value in config.values() if isinstance(value, dict) and value]
        if inner and rng.random() < 0.3:
            table = rng.choice(inner)
        how, name = rng.randrange(6), rng.choice(list(table))
        if how == 0:
            del table[name]
        elif how == 1:
            table[name + rng.choice(["_", "s", "2"])] = table[name]
        elif how == 2:
            other = rng.choice(others)
            name = rng.choice(list(other))
            table[name] = copy.deepcopy(other[name])
        elif how == 3 and isinstance(table[name], int | float) and not isinstance(table[name], bool):
            table[name] = rng.choice(
                [table[name] + 1, table[name] * 2, -table[name], table[name] // 3, str(table[name])]
            )
        else:
            table[name] = copy.deepcopy(rng.choice(ODD))
        if not table:
            break
    return config


def attempt(config: dict, shapes: dict) -> bool:
    """Whether the configuration is accepted, tensors and all. Raises whatever is not a CheckpointError of this file."""
    where = "fuzzed/config.json"
    try:
        built = families.config_from_hf(where, config)
        family = families.FAMILIES[config["model_type"]]

        def read(name, out=None):
            values = np.zeros(shapes[name], np.float32)
            return values if out is None else np.copyto(out, values)

        source = convert.Source(where, built, family.table, shapes, read, family.prefixes, family.ignored)
        convert.load(source, np.float32, stacked=True)
    except CheckpointError as error:
        assert str(error).startswith(where), error
        str(error).encode("utf-8", "surrogatepass")
        return False
    hash(built)
    return True


META = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 64, "llama.embedding_length": 32,
    "llama.feed_forward_length": 48, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 1e4, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": 8,
    "llama.vocab_size": 96, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0,
    "llama.attention.key_length": 8, "llama.attention.value_length": 8,
}  # fmt: skip


def attempt_gguf(meta: dict) -> bool:
    try:
        shapes = {"token_embd.weight": (96, 32), "rope_freqs.weight": (4,)}
        families_gguf.config_from_gguf("fuzzed.gguf", meta, shapes, lambda name, out=None: np.ones(shapes[name]))
    except CheckpointError as error:
        assert str(error).startswith("fuzzed.gguf"), error
        return False
    return True


def main(count: int, seed: int) -> None:
    rng, given, begin = random.Random(seed), samples(), time.perf_counter()
    others = [config for config, _ in given]
    loaded, longest, peak = 0, 0.0, 0
    warnings.simplefilter("error")
    tracemalloc.start()
    for i in range(count):
        tracemalloc.reset_peak()
        start = time.perf_counter()
        if i % 4 == 3:
            meta = mutate(rng, META, [META])
            case, accepted = meta, lambda meta=meta: attempt_gguf(meta)
        else:
            config, shapes = rng.choice(given)
            case = mutate(rng, config, others)
            accepted = lambda case=case, shapes=shapes: attempt(case, shapes)  # noqa: E731
        try:
            loaded += accepted()
        except BaseException:
            print(f"seed {seed}, case {i}: {case}")
            raise
        longest, peak = max(longest, time.perf_counter() - start), max(peak, tracemalloc.get_traced_memory()[1])
    print(f"{count} configurations in {time.perf_counter() - begin:.0f} s (seed {seed}): {loaded} loaded, {count - loaded} "
          f"refused; the slowest took {longest * 1e3:.0f} ms, the largest {peak / 1e6:.1f} MB")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
