"""jaxemo's own store: a model as `jaxemo convert` writes it, in the layout that the forward pass uses.

    DIRECTORY/jaxemo.json            the ModelConfig, where the model came from, and what its tokenizer needs
    DIRECTORY/weights.safetensors    one tensor for every weight of `params.describe`: "embed", "layers.3.wq", ...
    DIRECTORY/tokenizer.json         as the `tokenizers` library writes it, if the model has a tokenizer

Nothing is decoded, transposed or split on loading: each weight is one copy out of the mapped file, and a part of it is
a slice. Writing streams one weight at a time and renames the finished directory into place.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import numpy as np
from jaxemo.checkpoints import convert
from jaxemo.checkpoints.convert import Source
from jaxemo.checkpoints.entries import Entry, same
from jaxemo.checkpoints.families import build
from jaxemo.checkpoints.keys import CheckpointError, Keys
from jaxemo.checkpoints.safetensors import header, open_tensors

from jaxemo import params as params_lib
from jaxemo.config import Attention, ModelConfig, Rope
from jaxemo.tokens import Tokenizer

FORMAT = 1
MARK = "jaxemo.json"
_TOKENIZER = ("bos", "eos", "prefix", "chat_template", "stop_ids", "template_vars")


def write(
    source: Source,
    tokenizer: Tokenizer | None,
    directory: pathlib.Path,
    dtype: np.dtype,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a model whose weights are not yet read. `progress` is called with the bytes of each weight written.

    Raises CheckpointError as loading does, and FileExistsError rather than touch what is there.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists already; remove it or choose another place")
    found = convert.match(source)
    described = params_lib.describe(source.config)
    leaves = {(n, -1): leaf for n, leaf in described.items() if n != "layers"}
    leaves |= {(n, i): leaf for i, layer in enumerate(described["layers"]) for n, leaf in layer.items()}

    head = header({_name(n, i): (np.dtype(params_lib.dtype_of(f, dtype)), f.shape) for (n, i), f in leaves.items()})

    directory.parent.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        with (work / "weights.safetensors").open("wb") as file:
            file.write(head)
            for (name, i), leaf in leaves.items():
                out = np.empty(leaf.shape, params_lib.dtype_of(leaf, dtype))
                convert.read_into(source, out, *found[name, i])
                file.write(out.view(np.uint8).data)
                progress(out.nbytes)
        about = {"format": FORMAT, "source": source.where, "config": dataclasses.asdict(source.config)}
        if tokenizer is not None:
            about["tokenizer"] = {key: getattr(tokenizer, key) for key in _TOKENIZER}
            tokenizer.backend.save(str(work / "tokenizer.json"))
        (work / MARK).write_text(json.dumps(about, indent=1), encoding="utf-8")
        work.chmod(0o755)
        os.rename(work, directory)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def open_store(directory: pathlib.Path) -> tuple[Source, Tokenizer | None]:
    """The model in a store, its weights not yet read, and its tokenizer if it has one. Raises CheckpointError."""
    where = str(directory / MARK)
    try:
        raw = json.loads((directory / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not readable ({error})") from error
    keys = Keys(where, raw, "store")
    if keys("format") != FORMAT:
        raise CheckpointError(f"{where}: format {keys('format')!r} is not {FORMAT}; this jaxemo cannot read it")
    keys.ignore("source")
    config = _config(where, keys("config"))
    about = keys("tokenizer", None)
    keys.finish()
    shapes, read = open_tensors([directory / "weights.safetensors"])
    table = {name: Entry(name, same) for name in params_lib.describe(config)}
    table |= {name: Entry("layers.{i}." + name, same) for name in params_lib.describe(config)["layers"][0]}
    return Source(str(directory), config, table, shapes, read), _tokenizer(directory, about)


def _name(name: str, layer: int) -> str:
    return name if layer < 0 else f"layers.{layer}.{name}"


def _config(where: str, raw) -> ModelConfig:
    """The ModelConfig that `dataclasses.asdict` made `raw` of."""
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    if not isinstance(raw, dict) or set(raw) != fields:
        odd = ", ".join(sorted(fields ^ set(raw))) if isinstance(raw, dict) else "no table"
        raise CheckpointError(f"{where}: the configuration is not one that this jaxemo wrote ({odd})")

    def tuples(value):
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    def rope(value):
        return value and Rope(**{key: tuples(v) for key, v in value.items()})

    try:
        kinds = tuple(Attention(rope(kind["rope"]), kind["window"]) for kind in raw["attention"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: attention: {error}") from error
    plain = {key: tuples(value) for key, value in raw.items() if key not in ("family", "attention")}
    plain_types = {"int": int, "float": (int, float), "bool": bool, "str": str}
    for field in dataclasses.fields(ModelConfig):
        name = field.type if isinstance(field.type, str) else field.type.__name__
        if not isinstance(raw[field.name], plain_types.get(name, object)):  # type: ignore[arg-type]
            raise CheckpointError(f"{where}: config.{field.name} is {raw[field.name]!r}")
    return build(where, str(raw["family"]), plain | {"attention": kinds})


def _tokenizer(directory: pathlib.Path, about) -> Tokenizer | None:
    import tokenizers

    if about is None:
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        return Tokenizer(backend, **{key: about[key] for key in _TOKENIZER})
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{directory / 'tokenizer.json'}: not readable ({error})") from error
