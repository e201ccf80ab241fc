"""Open whatever a path names: a Hugging Face directory, a store that `jaxemo convert` wrote, or a GGUF file."""

import pathlib
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
from jaxemo.checkpoints import store
from jaxemo.checkpoints.convert import Source
from jaxemo.checkpoints.keys import CheckpointError

from jaxemo.tokens import Tokenizer

FLOATS = tuple(map(np.dtype, (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)))


def open_model(path: pathlib.Path) -> tuple[Source, Tokenizer | None]:
    """The model at `path`, its weights not yet read, and its tokenizer if it has one. Raises CheckpointError."""
    if (path / store.MARK).exists():
        source, tokenizer = store.open_store(path)
        return source._replace(read=floats(source.where, source.read)), tokenizer
    if path.is_dir():
        return open_directory(path)
    if path.suffix == ".gguf":
        from jaxemo.checkpoints import gguf

        return gguf.open_source(path)
    raise CheckpointError(f"{path}: a model is a directory with config.json and .safetensors files, or a .gguf file")


def open_directory(path: pathlib.Path) -> tuple[Source, Tokenizer | None]:
    """A directory as Hugging Face lays it out: config.json, *.safetensors, and perhaps a tokenizer."""
    from jaxemo.checkpoints import families, huggingface, mxfp4, safetensors

    raw = huggingface.read_config(path)
    config = families.config_from_hf(str(path / "config.json"), raw)
    family = families.FAMILIES[raw["model_type"]]
    shapes: Mapping[str, tuple[int, ...]]
    shapes, read = safetensors.open_tensors(huggingface.weight_files(path))
    if raw.get("quantization_config"):  # config_from_hf has refused all but MXFP4
        shapes, read = mxfp4.unpacked(str(path), shapes, read)
    read = floats(str(path), read)
    source = Source(str(path), config, family.table, shapes, read, family.prefixes, family.ignored)
    return source, huggingface.tokenizer(path)


def floats(where: str, read: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`read(name, out=None)` of tensors that hold plain floating-point numbers, and nothing else in their place."""

    def read_floats(name: str, out: np.ndarray | None = None) -> np.ndarray:
        array = read(name)
        if array.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {name} holds {array.dtype}; a weight should be float32, float16 or bfloat16"
            )
        if out is None:
            return array
        out[...] = array
        return out

    return read_floats
