"""Read 10,000 texts from the command line: time, and the most memory held, beside a quarter as many; then kill it and go on.

    python bench/reading.py [--model NAME] [--vectors FILE] [--texts N] [--kills N]

The texts are sentences of the shipped stories, and the quarter is every fourth of them by length, the longest among them: a
program for each length bucket is most of the memory beside the weights, and both runs are to need the same ones. Each run is a
process of its own; a killed run (SIGKILL at a random moment) is started again by the same command, and what it writes is
compared with the whole run's, row by row and byte by byte. Run it on a quiet machine.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import re
import subprocess
import sys
import tempfile
import time

import jax
import pyarrow.parquet as pq

import jaxemo
from jaxemo.emotions import EmotionVectors, corpus, extraction


def sentences(count: int) -> list[str]:
    found = [s for story in corpus.shipped().stories for s in re.split(r"(?<=[.!?]) (?=[A-Z])", story.text)]
    assert len(found) >= count, f"the shipped stories have {len(found)} sentences"
    return found[:count]


def most_held(process: subprocess.Popen) -> int:
    """The kernel's own record of the most memory a process has held so far, in bytes (0 once it is gone)."""
    try:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def run(command: list[str]) -> tuple[float, int]:
    begin, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, most_held(process))
        time.sleep(0.2)
    assert process.returncode == 0
    return time.monotonic() - begin, peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--vectors", help="by default extracted from the starter corpus first")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=8)
    args = parser.parse_args()
    out = pathlib.Path(__file__).parent / "results" / "reading.json"
    with tempfile.TemporaryDirectory() as where:
        place = pathlib.Path(where)
        vectors = args.vectors
        if not vectors:
            vectors = str(place / "vectors.safetensors")
            extraction.extract(jaxemo.load(args.model), corpus.starter()).save(vectors)

        texts = sentences(args.texts)
        quarter = sorted(sorted(range(len(texts)), key=lambda i: -len(texts[i]))[::4])  # with the longest

        def command(of, name: str) -> list[str]:
            source = place / f"{len(of)}.jsonl"
            source.write_text("".join(json.dumps({"id": str(i), "text": texts[i]}) + "\n" for i in of))
            given = ["read", "-m", args.model, "--vectors", vectors, "--input", str(source), "-o", str(place / name)]
            return [sys.executable, "-m", "jaxemo.cli", *given]

        _, few = run(command(quarter, "few.parquet"))
        seconds, many = run(command(range(args.texts), "whole.parquet"))
        rng, kills = random.Random(0), 0
        while True:
            process = subprocess.Popen(command(range(args.texts), "resumed.parquet"), stderr=subprocess.DEVNULL)
            try:
                assert process.wait(rng.uniform(3, max(5, seconds / 4)) if kills < args.kills else None) == 0
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        whole, resumed = (pq.read_table(place / f"{name}.parquet") for name in ("whole", "resumed"))
        passages = [(place / f"{name}.parquet.passages.jsonl").read_bytes() for name in ("whole", "resumed")]
        result = {
            "model": args.model,
            "directions": len(EmotionVectors.load(vectors).names),
            "texts": whole.num_rows,
            "tokens": int(whole["tokens"].to_numpy().sum()),
            "seconds": round(seconds, 1),
            "most memory held, MB": round(many / 1e6),
            "the same with a quarter of the texts, of the same lengths, MB": round(few / 1e6),
            "kills": kills,
            "the same after the kills": whole.equals(resumed) and passages[0] == passages[1],
            "every text once": whole["row"].to_pylist() == list(range(args.texts)),
            "machine": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}, {platform.machine()}",
            "versions": {"jaxemo": jaxemo.__version__, "jax": jax.__version__},
        }
    print(json.dumps(result, indent=1))
    assert result["the same after the kills"] and result["every text once"]
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
