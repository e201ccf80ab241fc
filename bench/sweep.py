"""Sweeps on a real model: their speed, what they compile, what many conditions cost, and a store that is killed and taken up again.

    python bench/sweep.py [--model NAME] [--kills N] [--out FILE.json]

Runs of what is compared take turns; a ratio is the median of the pairs'. The killed sweep is a process of its own (SIGKILL, at a
moment drawn at random), started again by the same command; its store has to equal that of a sweep that nothing interrupted, byte for
byte. Run it on a quiet machine.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import random
import subprocess
import sys
import tempfile
import time
import types

import jax
import jaxlib
import numpy as np
from tqdm import tqdm

import jaxemo
from jaxemo.cli import cache_compilations

HERE = pathlib.Path(__file__).parent
CONDITIONS, PROMPTS, LENGTH, NEW = 64, 16, 24, 32
ROUNDS = 5


def prompts(lm, n: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, lm.config.vocab_size, (n, LENGTH)).astype(np.int32)


def steerings(lm, n: int, seed: int) -> list[jaxemo.Steering]:
    """As many different ones: a random direction each, a strength and a layer."""
    rng, config = np.random.default_rng(seed), lm.config
    L, D = config.n_layers, config.d_model
    made = []
    for _ in range(n):
        direction = np.broadcast_to(rng.standard_normal(D).astype(np.float32), (L, D))
        made.append(jaxemo.steering.add(direction, rng.uniform(1, 20), [int(rng.integers(L // 2, L))]))
    return made


def grid(lm, seed: int, conditions: int = CONDITIONS, n: int = PROMPTS, **kwargs) -> jaxemo.Grid:
    named = {"none": None} | {f"{i}": s for i, s in enumerate(steerings(lm, conditions - 1, seed))}
    return jaxemo.sweep(lm, prompts(lm, n), named, max_new_tokens=NEW, stop=[], **kwargs)


def speed(lm) -> dict:
    """A sweep, then one of the same size with all else different, which must compile nothing."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    first = grid(lm, 1)
    programs = len(compiled)
    second = grid(lm, 2)
    assert programs and len(compiled) == programs, f"{len(compiled) - programs} compilations in the second sweep"
    tokens = int(second.lengths.sum())
    return {
        "conditions x prompts": f"{CONDITIONS} x {PROMPTS}, {NEW} tokens after {LENGTH}",
        "seconds, compilations included": round(first.seconds, 1),
        "programs compiled": programs,
        "seconds": round(second.seconds, 1),
        "programs compiled by the second": len(compiled) - programs,
        "tokens/s": round(tokens / second.seconds, 1),
    }


def ratio(plain, other) -> dict:
    """How fast `other` is beside `plain`, both called in turns after a call that compiles."""
    plain(), other()
    pairs = []
    for round_ in tqdm(range(ROUNDS), desc="pairs", leave=False):
        seconds = {}
        for run in (plain, other) if round_ % 2 else (other, plain):
            begin = time.monotonic()
            run()
            seconds[run] = time.monotonic() - begin
        pairs.append(seconds[plain] / seconds[other])
    low, median, high = np.quantile(pairs, [0.25, 0.5, 0.75]).round(3)
    return {"speed beside the plain loop": float(median), "quartiles": [float(low), float(high)], "pairs": ROUNDS}


def costs(lm) -> dict:
    """What conditions and scores cost in the loop, beside the same loop without."""
    rng = np.random.default_rng(3)
    L, D = lm.config.n_layers, lm.config.d_model
    directions = rng.standard_normal((L, 171, D)).astype(np.float32)
    read = types.SimpleNamespace(names=[str(i) for i in range(171)], directions=directions, layer=2 * L // 3)
    found = {}
    for rows in (64, 256):
        ids, own = prompts(lm, rows), steerings(lm, rows, 4)

        def generate(*steering, ids=ids, **kwargs):
            jax.block_until_ready(lm.generate(ids, *steering, max_new_tokens=NEW, stop=[], **kwargs).tokens)

        steered, scored = functools.partial(generate, own), functools.partial(generate, own, read=read)
        found[f"{rows} rows, {rows} conditions"] = ratio(generate, steered)
        found[f"{rows} rows, {rows} conditions, 171 scores of every token"] = ratio(generate, scored)
    return found


def killed(model: str, kills: int) -> dict:
    def start(out, **kwargs):
        return subprocess.Popen([sys.executable, __file__, "--model", model, "--store", str(out)], **kwargs)

    with tempfile.TemporaryDirectory() as place:
        whole, resumed = pathlib.Path(place, "whole.jsonl"), pathlib.Path(place, "resumed.jsonl")
        begin = time.monotonic()
        assert start(whole).wait() == 0
        seconds = time.monotonic() - begin
        rng, done, texts, same = random.Random(0), 0, [], []
        with tqdm(total=kills, desc="kills", unit="kill") as bar:
            while done < kills or not same:
                running = start(resumed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                try:
                    status = running.wait(rng.uniform(1, seconds / 2.5) if done < kills else None)
                    assert status == 0, f"exit status {status}"
                    same.append(whole.read_bytes() == resumed.read_bytes())
                    resumed.unlink()
                except subprocess.TimeoutExpired:
                    running.kill()
                    running.wait()
                    done += 1
                    texts.append(max(len(resumed.read_bytes().splitlines()) - 1, 0) if resumed.exists() else 0)
                    bar.update()
    return {
        "seconds": round(seconds, 1),
        "kills": done,
        "texts in the store after each": texts,
        "whole stores made": len(same),
        "the same, byte for byte": all(same),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results" / "sweep.json")
    parser.add_argument("--store", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    lm = jaxemo.load(args.model)
    if args.store:  # the sweep that is killed: sampled, so that texts differ in length, and scored
        cache_compilations()
        grid(lm, 5, 24, 8, rows=16, temperature=1.0, out=args.store)
        return
    result = {
        "model": args.model,
        "speed": speed(lm),
        "costs": costs(lm),
        "killed": killed(args.model, args.kills),
        "machine": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}",
        "versions": {"jaxemo": jaxemo.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__},
    }
    print(json.dumps(result, indent=1))
    assert result["killed"]["the same, byte for byte"]
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
