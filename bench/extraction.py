"""Time a whole extraction from the command line, then kill it at random moments and compare what comes out, byte for byte.

    python bench/extraction.py [--model NAME] [--corpus NAME] [--kills N] [--out FILE.json]

Each run is a process of its own, as a user starts it. A killed run (SIGKILL, at a moment drawn uniformly from a tenth of the
whole time) is started again by the same command. Run it on a quiet machine.
"""

import argparse
import hashlib
import json
import os
import pathlib
import platform
import random
import subprocess
import sys
import tempfile
import time

import jax
import jaxlib
from tqdm import tqdm

import jaxemo


def command(args, out: pathlib.Path) -> list[str]:
    return [sys.executable, "-m", "jaxemo.cli", "extract", args.model, "--corpus", args.corpus, "-o", str(out)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--corpus", default="shipped")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "extraction.json"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        whole, resumed = pathlib.Path(place, "whole.safetensors"), pathlib.Path(place, "resumed.safetensors")
        begin = time.monotonic()
        done = subprocess.run(command(args, whole), check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - begin
        print(done.stdout)
        rng, kills, taken_up, begin = random.Random(0), 0, 0, time.monotonic()
        with tqdm(total=args.kills, desc="kills", unit="kill", disable=not args.kills) as bar:
            while args.kills:
                running = subprocess.Popen(command(args, resumed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                limit = rng.uniform(2, max(4.0, seconds / 10)) if kills < args.kills else None
                try:
                    status = running.wait(limit)
                    assert status == 0, f"exit status {status}"
                    break
                except subprocess.TimeoutExpired:
                    running.kill()
                    running.wait()
                    kills += 1
                    taken_up += pathlib.Path(f"{resumed}.part").exists()
                    bar.update()
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (whole, resumed) if path.exists()]
    result = {
        "model": args.model,
        "corpus": args.corpus,
        "said": done.stdout.replace(f"{place}/", "").strip().splitlines(),
        "seconds": round(seconds, 1),
        "kills": kills,
        "restarts from a checkpoint": taken_up,
        "bit-equal after the kills": len(files) == 2 and len(set(files)) == 1,
        "seconds with the kills": round(time.monotonic() - begin, 1),
        "machine": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}",
        "versions": {"jaxemo": jaxemo.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__},
    }
    print(json.dumps(result, indent=1))
    if args.kills:
        assert result["bit-equal after the kills"]
    kept = json.loads(args.out.read_text()) if args.out.exists() else []
    kept = [entry for entry in kept if (entry["model"], entry["corpus"]) != (args.model, args.corpus)] + [result]
    args.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
