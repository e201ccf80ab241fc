"""The kernels on the accelerator at hand: right, then how fast: `python bench/kernels.py [--quick] [--tune] [--ops OP ...]`.

Each op and shape is compared with its reference, then timed beside it, XLA compiling the reference, and beside PyTorch where
that is installed (`x @ V.T`, eager and torch.compile). Times are medians of interleaved runs, each of so many calls that what
is waited for at its end is hidden; the bandwidth is told as a share of what copying the activations reaches in the same run.
Writes bench/results/kernels-DEVICE.json. `--tune` also tries every tile and writes kernels/tuned.json, from which
`impl="auto"` chooses on this kind of device from then on: `project`, `project_pool` and `steer_project` at all widths and
numbers of directions, the rarer options and `top_tokens` at some. `--ops` and `--widths` do a part, beside which what else is
in the files is kept.

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
ROWS = {False: (64, 1024), True: (4, 1024)}  # of tokens, in full and quickly
TILES = {"tpu": (1024, 512, 256, 128), "cuda": (256, 128)}  # steering on a GPU has a tile of 64 and no other
DEFAULTS = {"project_pool": {"how": "mean"}, "top_tokens": {"k": 8}}
TIMED = (*choice.Work._fields, "tile", "speedup")  # what kernels/tuned.json keeps


def shapes(quick: bool):
    """What is timed: (op, options, dtypes of activations and directions, rows, tokens a row, D, E). E is 0 for no scores."""
    b, f = "bfloat16", "float32"
    cosine, centred, both = {"cosine": True}, {"centred": True}, {"cosine": True, "centred": True}
    always = [(op, options, b, d) for op in ("project", "project_pool") for options in ({}, cosine) for d in (b, f)]
    always += [("steer_project", {}, b, d) for d in (b, f)]
    rare = [(op, options, x, f) for op in ("project", "project_pool", "top_tokens")
            for options, x in (({}, f), (cosine, f), (centred, b), (both, b), (centred, f), (both, f))]  # fmt: skip
    rare += [(op, options, b, b) for op in ("project", "project_pool", "top_tokens") for options in (centred, both)]
    rare += [("top_tokens", options, b, d) for options in ({}, cosine) for d in (b, f)]
    rare += [("project_pool", {"how": how}, b, f) for how in ("max", "last")] + [("steer_project", {}, f, f)]
    for D in WIDTHS[:1] if quick else WIDTHS:
        for x in (b, f):
            yield "steer_project", {}, x, f, *ROWS[quick], D, 0
        for E in (171,) if quick else COUNTS:
            for kind in always + (rare if E in COUNTS[:2] and not quick else []):
                yield *kind, *ROWS[quick], D, E
            for kind in () if quick else (("project", {}, b, f), ("steer_project", {}, b, f)):  # a prompt or two
                yield *kind, 4, 1024, D, E


def operands(work: choice.Work):
    """Rows of tokens, unit directions, a span of most of each row and, for steering, one addition and one ablation a row."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (work.rows, work.T, work.D), work.x)
    d, bank = (v / jnp.linalg.norm(v, axis=1, keepdims=True)
               for v in (jax.random.normal(key, (n, work.D)) for key, n in zip(keys[1:], (work.E, work.M), strict=True)))  # fmt: skip
    d = d.astype(work.directions)
    if work.op == "steer_project":
        a, b = jnp.zeros((2, work.rows, M)).at[0, :, 0].set(5.0).at[1, :, 1].set(1.0)
        spans = jnp.tile(jnp.array([0, work.T], jnp.int32), (work.rows, M, 1))
        return x, bank, a, b, spans, jnp.zeros(work.rows, jnp.int32), jnp.zeros(work.rows, bool), d if work.E else None
    centre = 0.1 * jnp.ones(work.D) if work.centred else None
    spans = jnp.tile(jnp.array([[50, 900]], jnp.int32), (work.rows, 1, 1))
    return (x, d, centre, None, None) if work.op == "project" else (x, d, spans, centre, None, None)


def timed(candidates: dict, arguments: dict, wait: dict) -> dict[str, list[float]]:
    """Seconds a call of each candidate, RUNS of them, interleaved; `wait[name]` waits for what its calls returned."""
    repeats = {}

    def seconds(name, calls):
        begin = time.perf_counter()
        for _ in range(calls):
            out = candidates[name](*arguments[name])
        wait.get(name, jax.block_until_ready)(out)
        return (time.perf_counter() - begin) / calls

    for name in candidates:
        seconds(name, 1)
        repeats[name] = max(1, round(SECONDS / max(seconds(name, 1), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(RUNS):
        for name in candidates:
            found[name].append(seconds(name, repeats[name]))
    return found


def difference(got, want) -> float:
    """The largest difference of what is no place, as a share of the largest value."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    f32 = [(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)) for a, b in pairs if b.dtype != jnp.int32]
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in f32)


def with_tile(work: choice.Work, platform: str, tile: int, options: dict):
    """The op's kernel with a tile of one's own, jitted."""
    module = importlib.import_module(f"jaxemo.kernels.{work.op}.{'gpu' if platform == 'cuda' else 'tpu'}")
    return jax.jit(functools.partial(getattr(module, work.op), tile=tile, interpret=False, **options))


def torch_candidates(x, d):
    """`x @ V.T` as PyTorch's users write it, or nothing where there is no PyTorch with a GPU."""
    try:
        import torch
    except ImportError:
        return {}, {}, {}
    if not torch.cuda.is_available():
        return {}, {}, {}
    given = tuple(torch.from_dlpack(v.astype(jnp.bfloat16)) for v in (x, d))
    run = {"torch": lambda x, d: x @ d.T, "torch.compile": torch.compile(lambda x, d: x @ d.T)}
    return run, dict.fromkeys(run, given), dict.fromkeys(run, lambda _: torch.cuda.synchronize())


def measure(op, options, x_dtype, dtype, rows, T, D, E, tune: bool) -> dict:
    options = dict(options)
    flat = op == "project"
    work = choice.Work(op, 1 if flat else rows, rows * T if flat else T, D, E, x_dtype, dtype, M if op == "steer_project" else 0,
                       options.pop("centred", False), options.get("cosine", False))  # fmt: skip
    if op != "steer_project":
        options.setdefault("cosine", False)
    arrays = operands(work)
    if op in DEFAULTS:
        options = DEFAULTS[op] | options
    x = arrays[0]
    platform, kind = choice.here(), choice.device_kind(choice.here())
    run = {"reference": jax.jit(functools.partial(getattr(kernels, op), impl="reference", **options))}
    label = f"{op} {x_dtype} {dtype} {'centred ' * work.centred}{'cosine ' * work.cosine}{options.get('how', '')} D={D} E={E}"
    try:
        best = choice.tiles(work, platform, choice.device(kind))
        for tile in [best] + [tile for tile in TILES[platform] if tile < best] * tune:
            run[f"kernel {tile}"] = with_tile(work, platform, tile, options)
    except NotImplementedError as error:
        print(f"{label}: {error}")
    want = run["reference"](*arrays)
    errors = {}
    for name in [name for name in run if name != "reference"]:
        try:
            errors[name] = difference(run[name](*arrays), want)
        except Exception as error:  # a tile that this chip cannot take: told, and left out
            print(f"{label} {name}: {type(error).__name__}: {str(error)[:300]}")
            del run[name]
    run["copy"] = jax.jit(lambda x: x + 1)
    arguments, wait = dict.fromkeys(run, arrays) | {"copy": (x,)}, {}
    if flat and dtype == x_dtype == "bfloat16" and not (work.centred or work.cosine):
        peers, given, wait = torch_candidates(x.reshape(-1, D), arrays[1])
        run |= peers
        arguments |= given
    seconds = timed(run, arguments, wait)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tried = [name for name in median if name.startswith("kernel") and errors[name] <= WRONG]  # NaN is not
    for name in errors.keys() - set(tried):
        print(f"{label} {name} is WRONG: it differs by {errors[name]:.1e} and is not counted")
    bandwidth = 2 * x.nbytes / median["copy"]
    row = {
        **work._asdict(), **options,
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "microseconds": {name: [1e6 * q for q in np.quantile(values, (0.25, 0.5, 0.75))] for name, values in seconds.items()},
        "difference": errors,
    }  # fmt: skip
    if tried:
        best_name = min(tried, key=lambda name: median[name])
        moved, _ = choice.cost(work, True)
        row |= {"tile": int(best_name.split()[1]), "speedup": round(median["reference"] / median[best_name], 3),
                "share_of_copy": moved / median[best_name] / bandwidth}  # fmt: skip
        print(f"{label:60s}  {1e6 * median[best_name]:8.0f} us  {row['speedup']:5.2f}x XLA  {row['share_of_copy']:5.0%} of copying  "
              f"error {errors[best_name]:.1e}  tile {row['tile']}")  # fmt: skip
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


def merged(old: list[dict], new: list[dict], key: tuple[str, ...]) -> list[dict]:
    """`old` rows and `new` ones, which take the place of those with the same key."""
    found = {tuple(row.get(name) for name in key) for row in new}
    return [row for row in old if tuple(row.get(name) for name in key) not in found] + new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, what in (("quick", "one small shape of each op"), ("tune", "try every tile; write kernels/tuned.json"),
                         ("table", "print the roofline table of docs/kernels.md")):  # fmt: skip
        parser.add_argument(f"--{option}", action="store_true", help=what)
    parser.add_argument("--ops", nargs="+", default=kernels.ops.REFERENCES, help="only these")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="only these")
    args = parser.parse_args()
    if args.quick and args.tune:
        parser.error("--tune chooses for the whole grid; leave --quick out")
    if args.table:
        print(table())
        return
    platform, kind = choice.here(), choice.device_kind(choice.here())
    if platform == "cpu":
        raise SystemExit("there is no accelerator here; the kernels are for TPUs and NVIDIA GPUs")
    chosen = [shape for shape in shapes(args.quick) if shape[0] in args.ops and shape[-2] in args.widths]
    rows = [measure(*shape, args.tune) for shape in chosen]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', kind)}.json"
    versions = {name: importlib.import_module(name).__version__ for name in ("jax", "jaxlib", "numpy")}
    key = (*choice.Work._fields, "how")
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = merged(known, rows, key)
    path.write_text(json.dumps({"device": kind, "versions": versions, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")
    if args.tune:
        timings = [{name: row[name] for name in TIMED} for row in rows if "tile" in row]
        choice.TUNED.write_text(json.dumps(choice.tuned() | {kind: timings}, indent=1) + "\n")
        print(f"{len(timings)} choices for {kind} written to {choice.TUNED}")


if __name__ == "__main__":
    main()
