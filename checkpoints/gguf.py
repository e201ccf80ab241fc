"""Read a GGUF file: metadata, tokenizer and tensors. Decoding and de-quantisation are the `gguf` package's."""

import os
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from jaxemo.checkpoints import convert, families
from jaxemo.checkpoints.families import CheckpointError
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxemo import params as params_lib
from jaxemo.config import ModelConfig
from jaxemo.tokens import Tokenizer


class Reader(gguf.GGUFReader):
    """GGUFReader over a plain array: slicing a memmap costs 5x more, and a vocabulary is sliced 100,000 times."""

    @property
    def data(self):
        return self._data

    @data.setter
    def data(self, mapped):
        self._data = mapped.view(np.ndarray)


def open_gguf(path: str | os.PathLike) -> tuple[Reader, dict[str, Any]]:
    """The reader and the metadata of a file; CheckpointError if it is not a whole GGUF file."""
    try:
        reader = Reader(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # the package raises whatever a damaged byte leads to
        raise CheckpointError(f"{path}: not a readable GGUF file ({type(error).__name__}: {error})") from error
    size = os.path.getsize(path)
    for tensor in reader.tensors:
        if tensor.data_offset + tensor.n_bytes > size:
            raise CheckpointError(f"{path}: the file is truncated: {tensor.name} ends beyond its {size} bytes")
    return reader, {name: field.contents() for name, field in reader.fields.items()}


def load(path: str | os.PathLike, dtype, stacked: bool) -> tuple[ModelConfig, params_lib.Params, Tokenizer]:
    """Configuration, parameters and tokenizer of the model in a GGUF file. Raises CheckpointError."""
    where = os.fspath(path)
    reader, meta = open_gguf(path)
    architecture = meta.get("general.architecture")
    if architecture not in families.GGUF:
        raise CheckpointError(
            f"{where}: architecture {architecture!r} is not supported; known: {', '.join(families.GGUF)}"
        )
    family = families.GGUF[architecture]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if len(tensors) < len(reader.tensors):
        raise CheckpointError(f"{where}: a tensor name stands there twice")
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}
    config = family.config(where, meta, shapes)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{where}: {name} has type {tensor.tensor_type.name}, which gguf cannot read"
            ) from error
        if array.size != np.prod(shapes[name]):
            raise CheckpointError(f"{where}: {name} holds {array.size} values, its shape is {list(shapes[name])}")
        return array.reshape(shapes[name]).astype(np.float32, copy=False)

    tokenizer = build_tokenizer(where, meta)
    if tokenizer.backend.get_vocab_size() > config.vocab_size:
        raise CheckpointError(f"{where}: the tokenizer has {tokenizer.backend.get_vocab_size()} tokens, the model "
                              f"{config.vocab_size}")  # fmt: skip
    return config, convert.convert(where, config, family.table, shapes, read, dtype, stacked), tokenizer


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _split(pattern: str):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


# What `tokenizer.ggml.pre` means: how text is cut before byte-pair merging.
PRE_TYPES = {
    "gpt-2": [_split(_GPT2)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _split(_GPT2)],
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
END_OF_TURN = {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "</s>"}


def build_tokenizer(where: str, meta: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF's own vocabulary, merges and pre-type describe. Raises CheckpointError."""

    def need(key):
        if f"tokenizer.ggml.{key}" not in meta:
            raise CheckpointError(f"{where}: tokenizer.ggml.{key} is missing")
        return meta[f"tokenizer.ggml.{key}"]

    if need("model") != "gpt2":
        raise CheckpointError(
            f"{where}: tokenizer model {need('model')!r} is not supported; known: gpt2 (byte-level BPE)"
        )
    if need("pre") not in PRE_TYPES:
        raise CheckpointError(
            f"{where}: tokenizer pre-type {need('pre')!r} is not known; known: {', '.join(PRE_TYPES)}"
        )
    tokens, kinds = need("tokens"), need("token_type")
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{where}: {len(tokens)} tokens but {len(kinds)} token types")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise CheckpointError(f"{where}: a token stands in the vocabulary twice")
    if odd := sorted(set(kinds) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}):
        raise CheckpointError(f"{where}: token types {odd} do not belong in a byte-level vocabulary")
    merges = []
    for line in need("merges"):
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise CheckpointError(f"{where}: the merge {line!r} does not join two tokens into one of the vocabulary")
        merges.append(pair)
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*PRE_TYPES[need("pre")], byte_level])
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in defined])
    eos = meta.get("tokenizer.ggml.eos_token_id")
    return Tokenizer(
        backend,
        bos=meta.get("tokenizer.ggml.bos_token_id"),
        eos=eos,
        add_bos=meta.get("tokenizer.ggml.add_bos_token", False),
        chat_template=meta.get("tokenizer.chat_template"),
        stop_ids=sorted({vocab[token] for token in control if token in END_OF_TURN} | ({eos} - {None})),
    )
