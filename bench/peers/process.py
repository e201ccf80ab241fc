"""The contenders as bench/compare.py sees them: their environments, and a process of its own for each, driven over pipes."""

import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import threading

import numpy as np

PEERS = pathlib.Path(__file__).resolve().parent
ROOT = PEERS.parents[1]
BUILD = ROOT / "build" / "bench"
LIMIT = 1800  # seconds after which a contender is given up


def write(path: pathlib.Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def environment(name: str, device: str) -> str:
    """The Python of one of the peers' environments, made first where it is missing or out of date; on a GPU the one at hand."""
    if name == "jaxemo" or device == "gpu":
        return sys.executable
    folder, wanted = ROOT / f".venv-bench-{name}", (PEERS / f"{name}.txt").read_text()
    python, done = folder / "bin" / "python", folder / ".requirements"
    if not done.exists() or done.read_text() != wanted:
        print(f"making {folder.name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", PEERS / f"{name}.txt"], check=True)
        done.write_text(wanted)
    return str(python)


def search_path() -> dict[str, str]:
    """What lets Python find jaxemo where it is not installed: a tree of links, as it would be."""
    if importlib.util.find_spec("jaxemo"):
        return {}
    tree = BUILD / "import" / "jaxemo"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for path in (*(ROOT / "jaxemo").iterdir(), ROOT / "kernels", ROOT / "checkpoints"):
        (tree / path.name).symlink_to(path)
    return {"PYTHONPATH": str(tree.parent)}


def make_model(folder: pathlib.Path, spec: dict, device: str) -> dict:
    """What peers/model.py says about the model of `spec` in `folder`, made first where it is missing or another."""
    known = folder / "spec.json"
    if not known.exists() or json.loads(known.read_text()) != spec:
        print(f"making {folder}", file=sys.stderr)
        write(BUILD / "making.json", json.dumps(spec))
        subprocess.run([environment("new", device), PEERS / "model.py", BUILD / "making.json", folder], check=True)
        write(known, json.dumps(spec))
    return json.loads((folder / "about.json").read_text())


class Peer:
    """A contender's process; `about` is what it said once its model was loaded."""

    def __init__(self, name: str, python: str, spec: dict, more: dict[str, str], build: pathlib.Path = BUILD):
        plain = re.sub(r"[^\w.]+", "-", name)
        logs, caches, self.out = build / "logs", build / "caches" / plain, build / "outputs" / f"{plain}.npz"
        shutil.rmtree(caches, ignore_errors=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write(logs / f"{plain}.json", json.dumps(spec))
        more |= {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton"),
                 "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": str(spec["threads"])}  # fmt: skip
        with open(logs / f"{plain}.log", "w") as log:
            self.process = subprocess.Popen([python, PEERS / "run.py", logs / f"{plain}.json"], stdin=subprocess.PIPE, text=True,
                                            stdout=subprocess.PIPE, stderr=log, env={**os.environ, **more})  # fmt: skip
        self.about = self.answer()

    def answer(self) -> dict:
        timer = threading.Timer(LIMIT, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        return json.loads(line) if line else {"ok": False, "error": "the process ended"}

    def ask(self, job: dict, outputs: bool = False) -> tuple[dict, dict[str, np.ndarray]]:
        """The answer to a job, and its outputs where they are asked for and it went well."""
        if not self.about["ok"]:
            return self.about, {}
        try:
            self.process.stdin.write(json.dumps(job | ({"out": str(self.out)} if outputs else {})) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"ok": False, "error": "the process has ended"}, {}
        answer = self.answer()
        return answer, dict(np.load(self.out)) if answer["ok"] and outputs else {}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def failure(answer: dict) -> str:
    last = answer["error"].strip().splitlines()[-1]
    return f"not installed: {last}" if "No module named" in last else f"failed: {last[:300]}"


def available() -> int:
    """Bytes of memory that are free or can be had."""
    return int(re.search(r"MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text()).group(1)) << 10


def machine(device: str) -> str:
    names = re.findall(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())
    text = f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}"
    if device == "gpu":
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        text = f"{subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]}, {text}"
    return text


def commit() -> str:
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
