"""The tokenizer that a GGUF's own metadata describe: byte-level and SentencePiece-style byte-pair encoding.

A GGUF keeps the vocabulary, but how text is cut and normalised only by a name (`tokenizer.ggml.pre`); what the names
mean is in PRE_TYPES. They are the rules of the tokenizers that the models were published with, as transformers runs
them. Other kinds of vocabulary (WordPiece, unigram, RWKV, ...) and names that are not in the table are refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxemo.checkpoints.keys import CheckpointError
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxemo.tokens import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_PIECE = 256  # characters of a SentencePiece token, every cut of which is tried; Gemma's longest have 31

END_OF_TURN = frozenset({
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<|return|>", "<|call|>",
    "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<|EOT|>", "<eos>", "</s>",
})  # fmt: skip


def ends_of_turn(special: Iterable[str]) -> frozenset[str]:
    """Those of a model's special tokens that end an answer, whatever else it names."""
    ends = END_OF_TURN & set(special)
    # In the Harmony format <|end|> ends a message, and the answer may go on with another one.
    return ends - {"<|end|>"} if {"<|return|>", "<|call|>"} <= ends else ends


def _split(pattern: str):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


_DIGITS = pre_tokenizers.Digits(individual_digits=True)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def _words(digits: str, suffix: str = "") -> str:
    """Cased words, as GPT-4o's and Mistral's Tekken tokenizers cut them."""
    either = (rf"{_UPPER}*{_LOWER}+", rf"{_UPPER}+{_LOWER}*")
    words = "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{letters}{suffix}" for letters in either)
    return words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _SPACES


def _cl100k(digits: str, letters: str = r"\p{L}") -> str:
    return rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*{_SPACES}"


class PreType(NamedTuple):
    """What a `tokenizer.ggml.pre` means."""

    cut: Sequence[Any]  # pre-tokenizers before the bytes
    ignore_merges: bool = False  # a piece that is a token as a whole stays one
    nfc: bool = False  # text is first composed (Unicode's NFC)
    add_bos: bool = False  # where the metadata do not say


_GPT = PreType([_GPT2])
_GPT_NFC = PreType([_GPT2], nfc=True)
_DIGITS_GPT = PreType([_DIGITS, _GPT2])
_LLAMA3 = PreType([_split(_cl100k(r"\p{N}{1,3}"))], ignore_merges=True, add_bos=True)
_CL100K = PreType([_split(_cl100k(r"\p{N}{1,3}"))])
_QWEN2 = PreType([_split(_cl100k(r"\p{N}"))], nfc=True)
_O200K = PreType([_split(_words(r"\p{N}{1,3}", _SUFFIX + "?"))])

# The letters of scripts with upper and lower case, as the DeepSeek tokenizers list them.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = _split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")

PRE_TYPES = {
    "gpt-2": _GPT,
    "phi-2": _GPT,
    "olmo": _GPT_NFC,  # OLMo 1 and GPT-NeoX, Pythia
    "smollm": _DIGITS_GPT,
    "starcoder": _DIGITS_GPT,
    "refact": _DIGITS_GPT,  # Granite too
    "command-r": _DIGITS_GPT._replace(nfc=True),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "lfm2": _LLAMA3,
    "smaug-bpe": _CL100K,
    "dbrx": _CL100K,  # OLMo 2 and Phi-4 too
    "chatglm-bpe": _CL100K,
    "glm4": _CL100K,
    "stablelm2": _QWEN2._replace(nfc=False),
    "qwen2": _QWEN2,  # Qwen 3 too
    "megrez": _QWEN2,
    "deepseek-r1-qwen": _QWEN2._replace(nfc=False),
    "qwen35": PreType([_split(_cl100k(r"\p{N}", r"\p{L}\p{M}"))], nfc=True),
    "gpt-4o": _O200K,  # gpt-oss and Phi-4-mini too
    "llama4": _O200K,
    "tekken": PreType([_split(_words(r"\p{N}"))], ignore_merges=True, add_bos=True),
    "deepseek-llm": PreType([_split("[\r\n]"), _split(rf"\s?[{_CASED}]+"), _split("\\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+"),
                             _split(r"\s+$"), _CJK, pre_tokenizers.Digits(individual_digits=False)]),
    "deepseek-coder": PreType([_split("[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _CJK, _DIGITS]),
    "deepseek-v3": PreType([
        _split(r"\p{N}{1,3}"),
        _split("[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+"),
        _split(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
               r"| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES),
    ]),
}  # fmt: skip


class _Vocabulary(NamedTuple):
    """What the metadata say of the tokens, checked."""

    where: str
    meta: Mapping[str, Any]
    tokens: list[str]
    kinds: np.ndarray  # token types [V]
    ids: dict[str, int]

    def of(self, *kinds: int) -> list[str]:
        return [self.tokens[i] for i in np.flatnonzero(np.isin(self.kinds, kinds))]


def build_tokenizer(where: str, meta: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF's metadata describe; `where` names the file in errors. Raises CheckpointError."""
    name = _get(where, meta, "model", str)
    if name not in _BACKENDS:
        raise CheckpointError(f"{where}: tokenizer model {name!r} is not supported; known: {', '.join(_BACKENDS)}")
    tokens = _get(where, meta, "tokens", list)
    kinds = np.asarray(_get(where, meta, "token_type", (list, np.ndarray)))
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens is not a list of texts")
    if kinds.shape != (len(tokens),) or kinds.dtype.kind not in "iu":
        raise CheckpointError(f"{where}: {len(tokens)} tokens but token types of shape {list(kinds.shape)}")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise CheckpointError(f"{where}: the token {twice!a} stands in the vocabulary twice")
    known = {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED} | ({BYTE} if name != "gpt2" else set())
    if odd := sorted(set(np.unique(kinds).tolist()) - known):
        raise CheckpointError(f"{where}: token types {odd} do not belong in a vocabulary of the model {name}")
    vocabulary = _Vocabulary(where, meta, tokens, kinds, ids)
    for flag in ("add_eos_token", "remove_extra_whitespaces"):
        if _get(where, meta, flag, bool, False):
            raise CheckpointError(f"{where}: tokenizer.ggml.{flag} = true is not supported")
    try:
        backend, defaults = _BACKENDS[name](vocabulary)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise CheckpointError(f"{where}: the tokenizer's vocabulary or merges are damaged ({error})") from error

    special = [AddedToken(token, normalized=False, special=True, rstrip=_strips(vocabulary, token))
               for token in vocabulary.of(CONTROL, UNKNOWN)]  # fmt: skip
    backend.add_special_tokens(special)
    # A SentencePiece-style vocabulary has its runs of spaces respelled.
    defined = [token for token in vocabulary.of(USER_DEFINED) if backend.token_to_id(token) is not None]
    backend.add_tokens([AddedToken(token, normalized=False) for token in defined])

    bos, eos, eot, eom = (_index(vocabulary, key, defaults.get(key)) for key in ("bos", "eos", "eot", "eom"))
    add_bos = _get(where, meta, "add_bos_token", bool, defaults["add_bos"])
    if add_bos and bos is None:
        raise CheckpointError(f"{where}: texts are to begin with a token, but tokenizer.ggml.bos_token_id is missing")
    stop_ids = {ids[token] for token in ends_of_turn(vocabulary.of(CONTROL))} | {eos, eot, eom} - {None}
    template = meta.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise CheckpointError(f"{where}: tokenizer.chat_template is not a text")
    return Tokenizer(
        backend, bos=bos, eos=eos, prefix=[bos] if add_bos else [], chat_template=template, stop_ids=sorted(stop_ids)
    )


_REQUIRED = object()


def _get(where: str, meta: Mapping[str, Any], key: str, kind, default: Any = _REQUIRED) -> Any:
    """The value of `tokenizer.ggml.<key>`, of the type `kind`."""
    value = meta.get(f"tokenizer.ggml.{key}", default)
    if value is _REQUIRED:
        raise CheckpointError(f"{where}: tokenizer.ggml.{key} is missing")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{where}: tokenizer.ggml.{key} has the wrong type, {type(value).__name__}")
    return value


def _index(vocabulary: _Vocabulary, key: str, default: int | None = None) -> int | None:
    """The token id `tokenizer.ggml.<key>_token_id`, or where it is missing the default, if there is such a token."""
    found, n = _get(vocabulary.where, vocabulary.meta, f"{key}_token_id", int, -1), len(vocabulary.tokens)
    if f"tokenizer.ggml.{key}_token_id" not in vocabulary.meta:
        return default if default is not None and default < n else None
    if not 0 <= found < n:
        raise CheckpointError(f"{vocabulary.where}: tokenizer.ggml.{key}_token_id is {found}; there are {n} tokens")
    return found


def _strips(vocabulary: _Vocabulary, token: str) -> bool:
    """Whether white space after a special token belongs to it: so in Phi-3's SentencePiece-style vocabulary only."""
    phi3 = vocabulary.meta.get("general.architecture") == "phi3" and vocabulary.meta["tokenizer.ggml.model"] == "llama"
    return phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The listed merges as pairs, each checked to join two tokens into one of the vocabulary."""
    ids, merges = vocabulary.ids, []
    for line in _get(vocabulary.where, vocabulary.meta, "merges", list):
        left, _, right = line.partition(" ") if isinstance(line, str) else ("", "", "")
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(f"{vocabulary.where}: the merge {line!a} does not join two tokens into one of the "
                                  "vocabulary")  # fmt: skip
        merges.append((left, right))
    return merges


def _byte_level(vocabulary: _Vocabulary) -> tuple[Backend, dict[str, Any]]:
    """GPT-2's kind: text is cut by a pattern, and merges run over characters that stand for bytes."""
    name = _get(vocabulary.where, vocabulary.meta, "pre", str)
    if name not in PRE_TYPES:
        raise CheckpointError(
            f"{vocabulary.where}: tokenizer pre-type {name!r} is not known; known: {', '.join(PRE_TYPES)}"
        )
    pre = PRE_TYPES[name]
    backend = Backend(models.BPE(vocabulary.ids, _merges(vocabulary), ignore_merges=pre.ignore_merges))
    normalise: list[Any] = [normalizers.NFC()] if pre.nfc else []
    if _get(vocabulary.where, vocabulary.meta, "add_space_prefix", bool, False):
        normalise.append(normalizers.Replace(Regex(r"\A(?=[^ ])"), " "))
    if normalise:
        backend.normalizer = normalizers.Sequence(normalise)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*pre.cut, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, {"add_bos": pre.add_bos}


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Backend, dict[str, Any]]:
    """SentencePiece's byte-pair encoding: of all neighbours that join into a token, those of the best score join first.

    The tokenizers package orders pairs instead, so every way to cut a token in two becomes a merge, best score first.
    Spaces are written "▁"; what no token covers falls back to bytes.
    """
    where, meta, kinds = vocabulary.where, vocabulary.meta, vocabulary.kinds
    scores = np.asarray(_get(where, meta, "scores", (list, np.ndarray)))
    if scores.shape != kinds.shape or scores.dtype.kind not in "iuf" or not np.isfinite(scores).all():
        raise CheckpointError(
            f"{where}: tokenizer.ggml.scores is not one finite number for each of {len(kinds)} tokens"
        )
    tokens = list(vocabulary.tokens)
    if str(meta.get("general.architecture")).startswith("gemma"):
        # Its runs of spaces are user-defined and stored as spaces, but published they are spelled and merged like others.
        for i in np.flatnonzero(kinds == USER_DEFINED).tolist():
            if not tokens[i].strip(" "):
                tokens[i] = "▁" * len(tokens[i])
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise CheckpointError(f"{where}: a run of spaces stands in the vocabulary twice")
    part = np.isin(kinds, (NORMAL, USER_DEFINED, UNUSED))  # not single bytes, control tokens and the unknown one
    for i in np.flatnonzero(part).tolist():
        if len(tokens[i]) > MAX_PIECE:
            raise CheckpointError(f"{where}: token {i} has {len(tokens[i])} characters, more than {MAX_PIECE}")
    defaults = {"bos": 1, "eos": 2, "unknown": 0}
    backend = _merging(vocabulary, ids, _best_first(tokens, kinds, part, scores.astype(float)), defaults)
    if _get(where, meta, "add_space_prefix", bool, True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([*_SPM_DECODERS, decoders.Strip(" ", 1, 0)])
    return backend, defaults | {"add_bos": True}


def _gemma4(vocabulary: _Vocabulary) -> tuple[Backend, dict[str, Any]]:
    """As SentencePiece's, but the merges are listed."""
    return _merging(vocabulary, vocabulary.ids, _merges(vocabulary), {}), {"add_bos": True}


_SPM_DECODERS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def _merging(vocabulary: _Vocabulary, ids, merges, defaults: Mapping[str, int]) -> Backend:
    unknown = _index(vocabulary, "unknown", defaults.get("unknown"))
    unk_token = None if unknown is None else vocabulary.tokens[unknown]
    backend = Backend(models.BPE(ids, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(_SPM_DECODERS)
    return backend


def _best_first(tokens: Sequence[str], kinds: np.ndarray, part: np.ndarray, scores: np.ndarray):
    """Every pair of tokens that joins into a token: best score of the whole first, then longest left half first.

    Only tokens that `part` says take part. User-defined ones come before all others, as they are never cut.
    """
    halves = {tokens[i]: tokens[i] for i in np.flatnonzero(part).tolist()}  # so that merges share the tokens' strings
    merges: list[tuple[str, str]] = []
    append = merges.append
    for i in np.lexsort((-scores, kinds != USER_DEFINED)).tolist():
        if part[i]:
            whole = tokens[i]
            for cut in range(len(whole) - 1, 0, -1):
                if (left := halves.get(whole[:cut])) and (right := halves.get(whole[cut:])):
                    append((left, right))
    return merges


_BACKENDS = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4}
