"""The kernels on the accelerator at hand: right, then how fast: `python bench/kernels.py [--quick] [--tune]`.

Each op and shape is compared with its reference, then timed beside it, XLA compiling the reference, and beside PyTorch where
that is installed (`x @ V.T`, eager and torch.compile). Times are medians of interleaved runs, each long enough that dispatch
is hidden; the bandwidth is told as a share of what copying the activations reaches in the same run. Writes
bench/results/kernels-DEVICE.json. `--tune` also tries every tile and writes kernels/tuned.json, from which `impl="auto"`
chooses on this kind of device from then on.

`--table` prints the roofline table of docs/kernels.md, for which no accelerator is needed.
"""

import argparse
import functools
import importlib
import json
import pathlib
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxemo.kernels import choice

from jaxemo import kernels

RESULTS = pathlib.Path(__file__).parent / "results"
RUNS, SECONDS = 11, 0.02  # timed runs of each candidate, and how long one takes at least
WIDTHS, COUNTS = (576, 2048, 4096, 8192), (24, 171, 342, 1024)
WRONG = 1e-2  # the largest difference, of the largest value, that bfloat16 can explain
M = 8  # steered directions
TILES = {"tpu": (1024, 512, 256, 128), "cuda": (256, 128, 64)}


def shapes(quick: bool):
    """What is timed: (op, options, dtype of the directions, tokens, D, E)."""
    kinds = [("project", {}, "bfloat16"), ("project", {}, "float32"), ("project", {"cosine": True}, "bfloat16"),
             ("project_pool", {"cosine": True}, "bfloat16"), ("steer_project", {}, "bfloat16")]  # fmt: skip
    for D in WIDTHS[:1] if quick else WIDTHS:
        for E in (171,) if quick else COUNTS:
            for op, options, dtype in kinds:
                yield op, options, dtype, 4096 if quick else 65536, D, E


def operands(op: str, dtype: str, N: int, D: int, E: int):
    """Rows of 1024 tokens, unit directions and, for steering, one addition and one ablation a row."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (N // 1024, 1024, D), jnp.bfloat16)
    d = jax.random.normal(keys[1], (E, D))
    d = (d / jnp.linalg.norm(d, axis=1, keepdims=True)).astype(dtype)
    rows = len(x)
    if op == "project":
        return x, d
    if op == "project_pool":
        return x, d, jnp.tile(jnp.array([[50, 900]], jnp.int32), (rows, 1, 1))
    bank = jax.random.normal(keys[2], (M, D))
    bank = bank / jnp.linalg.norm(bank, axis=1, keepdims=True)
    a, b = jnp.zeros((2, rows, M)).at[0, :, 0].set(5.0).at[1, :, 1].set(1.0)
    spans = jnp.tile(jnp.array([0, 1024], jnp.int32), (rows, M, 1))
    return x, bank, a, b, spans, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), d


def timed(candidates: dict, arguments: dict) -> dict[str, list[float]]:
    """Seconds a call of each candidate, RUNS of them, interleaved."""
    repeats = {}
    for name, run in candidates.items():
        jax.block_until_ready(run(*arguments[name]))
        begin = time.perf_counter()
        jax.block_until_ready(run(*arguments[name]))
        repeats[name] = max(1, round(SECONDS / max(time.perf_counter() - begin, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(RUNS):
        for name, run in candidates.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                out = run(*arguments[name])
            jax.block_until_ready(out)
            found[name].append((time.perf_counter() - begin) / repeats[name])
    return found


def difference(got, want) -> float:
    """The largest difference, as a share of the largest value."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    f32 = [(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)) for a, b in pairs]
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in f32)


def with_tile(op: str, platform: str, tile: int, options: dict, arrays):
    """The op's kernel with a tile of one's own, jitted."""
    module = importlib.import_module(f"jaxemo.kernels.{op}.{'gpu' if platform == 'cuda' else 'tpu'}")
    given = {"cosine": False, **({"how": "mean"} if op == "project_pool" else {}), **options}
    if op == "steer_project":
        return jax.jit(functools.partial(module.steer_project, tile=tile, interpret=False))
    run = functools.partial(getattr(module, op), tile=tile, interpret=False, **given)
    if op == "project":
        return jax.jit(lambda x, d: run(x.reshape(-1, x.shape[-1]), d, None, None, None))
    return jax.jit(lambda x, d, spans: run(x, d, spans, None, None, None))


def torch_candidates(x, d):
    """`x @ V.T` as PyTorch's users write it, or nothing where there is no PyTorch with a GPU."""
    try:
        import torch
    except ImportError:
        return {}, {}
    if not torch.cuda.is_available():
        return {}, {}
    given = tuple(torch.from_dlpack(v.astype(jnp.bfloat16)) for v in (x, d))

    def eager(x, d):
        out = x @ d.T
        torch.cuda.synchronize()
        return out

    compiled = torch.compile(lambda x, d: x @ d.T)

    def fast(x, d):
        out = compiled(x, d)
        torch.cuda.synchronize()
        return out

    run = {"torch": eager, "torch.compile": fast}
    return {name: lambda *v, f=f: (f(*v), None)[1] for name, f in run.items()}, dict.fromkeys(run, given)


def measure(op, options, dtype, N, D, E, tune: bool) -> dict:
    arrays = operands(op, dtype, N, D, E)
    x = arrays[0]
    work = choice.Work(op, len(x) if op != "project" else 1, N // len(x) if op != "project" else N, D, E, "bfloat16", dtype,
                       M if op == "steer_project" else 0, False, bool(options.get("cosine")))  # fmt: skip
    platform, kind = choice.here(), choice.device_kind(choice.here())
    public = getattr(kernels, op)
    run = {"reference": jax.jit(functools.partial(public, impl="reference", **options))}
    try:
        best = choice.choose(work, platform, kind, "kernel").tile
        for tile in TILES[platform] if tune else (best,):
            run[f"kernel {tile}"] = with_tile(op, platform, tile, options, arrays)
    except NotImplementedError as error:
        print(f"{op} D={D} E={E}: {error}")
    want = run["reference"](*arrays)
    errors = {}
    for name in [name for name in run if name != "reference"]:
        try:
            got = run[name](*arrays)
            got = got.reshape(want.shape) if op == "project" else got
            errors[name] = difference(got, want)
        except Exception as error:  # a tile that this chip cannot take: told, and left out
            print(f"{op} D={D} E={E} {name}: {type(error).__name__}: {str(error)[:300]}")
            del run[name]
    run["copy"] = jax.jit(lambda x: x + 1)
    arguments = dict.fromkeys(run, arrays) | {"copy": (x,)}
    if op == "project" and not options:
        peers, given = torch_candidates(x.reshape(-1, D), arrays[1])
        run |= peers
        arguments |= given
    seconds = timed(run, arguments)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tried = [name for name in median if name.startswith("kernel") and errors[name] <= WRONG]  # NaN is not
    for name in errors.keys() - set(tried):
        print(f"{op} D={D} E={E} {name} is WRONG: it differs by {errors[name]:.1e} and is not counted")
    bandwidth = 2 * x.nbytes / median["copy"]
    row = {
        **{"op": op, **options, "directions": dtype, "tokens": N, "D": D, "E": E},
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "microseconds": {name: [1e6 * q for q in np.quantile(values, (0.25, 0.5, 0.75))] for name, values in seconds.items()},
        "difference": errors,
    }  # fmt: skip
    if tried:
        best_name = min(tried, key=lambda name: median[name])
        moved, _ = choice.cost(work, True)
        row |= {"tile": int(best_name.split()[1]), "speedup": median["reference"] / median[best_name],
                "share_of_copy": moved / median[best_name] / bandwidth}  # fmt: skip
        row["tuned"] = {"op": op, "x": "bfloat16", "directions": dtype, "centred": False, "cosine": work.cosine, "D": D, "E": E,
                        "tile": row["tile"], "speedup": round(row["speedup"], 3)}  # fmt: skip
        print(f"{op:14s} {'cosine ' if work.cosine else '       '}{dtype:8s} D={D:5d} E={E:4d}  {1e6 * median[best_name]:8.0f} us  "
              f"{row['speedup']:5.2f}x XLA  {row['share_of_copy']:5.0%} of copying  error {errors[best_name]:.1e}  "
              f"tile {row['tile']}")  # fmt: skip
    return row


def table() -> str:
    """The roofline of each op at 65,536 tokens, for the chips whose figures are known."""
    lines = [
        "| op | D | E | bytes | FLOPs | FLOPs a byte | TPU v5e | TPU v6e | H100 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    chips = [choice.device(kind) for kind in ("TPU v5e", "TPU v6e", "NVIDIA H100")]
    for op, name, options in (("project", "project", {}), ("project", "project, cosine", {"cosine": True}),
                              ("project_pool", "project_pool, cosine", {"cosine": True}), ("steer_project", "steer_project", {})):  # fmt: skip
        for D in (576, 2048, 8192):
            work = choice.Work(
                op, 64, 1024, D, 171, "bfloat16", "bfloat16", M if op == "steer_project" else 0, **options
            )
            moved, flops = choice.cost(work, True)
            times = []
            for figures in chips:
                assert figures is not None
                kernel, reference = choice.seconds(work, figures, True), choice.seconds(work, figures, False)
                bound = "memory" if moved / figures.bandwidth >= flops / figures.flops else "arithmetic"
                times.append(f"{1e6 * kernel:.0f} µs ({bound}), {reference / kernel:.2f}x")
            lines.append(f"| {name} | {D} | 171 | {moved / 1e6:.0f} MB | {flops / 1e9:.0f} G | {flops / moved:.0f} | {' | '.join(times)} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, what in (("quick", "one small shape of each op"), ("tune", "try every tile; write kernels/tuned.json"),
                         ("table", "print the roofline table of docs/kernels.md")):  # fmt: skip
        parser.add_argument(f"--{option}", action="store_true", help=what)
    args = parser.parse_args()
    if args.quick and args.tune:
        parser.error("--tune chooses for the whole grid; leave --quick out")
    if args.table:
        print(table())
        return
    platform, kind = choice.here(), choice.device_kind(choice.here())
    if platform == "cpu":
        raise SystemExit("there is no accelerator here; the kernels are for TPUs and NVIDIA GPUs")
    rows = [measure(*shape, args.tune) for shape in shapes(args.quick)]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', kind)}.json"
    versions = {name: importlib.import_module(name).__version__ for name in ("jax", "jaxlib", "numpy")}
    path.write_text(json.dumps({"device": kind, "versions": versions, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")
    if args.tune:
        known = dict(choice.tuned()) | {kind: [row["tuned"] for row in rows if "tuned" in row]}
        choice.TUNED.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{len(known[kind])} choices for {kind} written to {choice.TUNED}")


if __name__ == "__main__":
    main()
