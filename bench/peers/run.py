"""One contender in a process of its own: `python run.py SPEC.json`, driven over stdin and stdout by bench/compare.py.

SPEC says which file of this folder it is (`script`), set up how (`how`: "user" or "skilled"), on what (`device`, `threads`, `dtype`,
`model`, `inputs`, `layer`). One line of JSON comes in for each thing to do and one goes out. A job names the function of the
script that does it (`do`). Only that function is timed, up to when its results are there: inputs are made ready before
(`prepare`) and results become NumPy arrays after.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time
import traceback
import types


def held(what: str) -> int:
    """Bytes that this process holds resident (VmRSS) or has held at most (VmHWM)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(what))


def forget_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier works left in the allocator is not this one's
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # not every kernel has it
        file.write("5")


def main() -> None:
    spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    if spec["device"] == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    del sys.path[0]  # no file of this repository may pass for a library
    package = sys.modules["peers"] = types.ModuleType("peers")
    package.__path__ = [str(pathlib.Path(__file__).parent)]

    def reply(**what) -> None:
        replies.write(json.dumps(what) + "\n")

    try:
        import numpy as np

        begin = time.perf_counter()
        peer = importlib.import_module("peers." + spec["script"])
        imported = time.perf_counter() - begin
        inputs = dict(np.load(spec["inputs"]))
        peer.start(spec)
        forget_peak()
        begin = time.perf_counter()
        model = peer.load(spec)
        seconds = time.perf_counter() - begin
        reply(ok=True, import_seconds=imported, load_seconds=seconds, resident=held("VmRSS"), load_peak=held("VmHWM"),
              versions={name: importlib.metadata.version(name) for name in peer.PACKAGES})  # fmt: skip
    except BaseException:
        traceback.print_exc()
        reply(ok=False, error=traceback.format_exc(limit=-3)[-2000:])
        return

    first: dict[str, dict] = {}  # each job's first outputs, which later ones are held against
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if job["do"] == "load":
                model = None  # or two would lie in memory
                forget_peak()
                begin = time.perf_counter()
                model = peer.load(spec)
                seconds, peak = time.perf_counter() - begin, held("VmHWM")
                job |= {"do": "prefill", "rows": 1}  # what was loaded is right if its logits are
                outputs = peer.prefill(model, peer.prepare(model, job, inputs))
            else:
                given = dict(np.load(job["inputs"])) if "inputs" in job else inputs
                ready = peer.prepare(model, job, given)
                forget_peak()
                peer.reset_peak()
                begin = time.perf_counter()
                outputs = peer.finish(getattr(peer, job["do"])(model, ready))
                seconds = time.perf_counter() - begin
                peak = peer.device_peak() or held("VmHWM")
            arrays = {name: peer.to_numpy(array) for name, array in outputs.items()}
            before = first.setdefault(job["name"], arrays)
            drift = {name: float(np.abs(array - before[name]).max()) for name, array in arrays.items()}
            if "out" in job:
                np.savez(job["out"], **arrays)
            reply(ok=True, seconds=seconds, peak=peak, drift=drift)
        except BaseException:
            traceback.print_exc()
            reply(ok=False, error=traceback.format_exc(limit=-3)[-2000:])


if __name__ == "__main__":
    main()
