"""Open whatever a path names: a Hugging Face directory, a GGUF file, or a store that `jaxemo convert` has written."""

import pathlib

from jaxemo.checkpoints.convert import Source
from jaxemo.checkpoints.keys import CheckpointError

from jaxemo.tokens import Tokenizer


def open_model(path: pathlib.Path) -> tuple[Source, Tokenizer | None]:
    """The model at `path`, its weights not yet read, and its tokenizer if it has one. Raises CheckpointError."""
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
    shapes, read = safetensors.open_tensors(huggingface.weight_files(path))
    if "quantization_config" in raw:  # config_from_hf has refused all but MXFP4
        shapes, read = mxfp4.unpacked(str(path), shapes, read)
    source = Source(str(path), config, family.table, shapes, read, family.prefixes, family.ignored)
    tokenizer = huggingface.tokenizer(path)
    return source, tokenizer
