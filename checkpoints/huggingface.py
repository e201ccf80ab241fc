"""A model's directory as Hugging Face lays it out: its configuration, its weight files and its tokenizer.

Nothing in it is trusted, and no pickle is ever opened. Every fault is a CheckpointError that names the file. The
tokenizer is what `tokenizer.json` says, by the `tokenizers` package: cutting and merging as published, whatever class
`tokenizer_config.json` names.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxemo.checkpoints.gguf_tokenizer import ends_of_turn
from jaxemo.checkpoints.keys import CheckpointError
from jaxemo.checkpoints.safetensors import read_header, unique
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from jaxemo.tokens import Tokenizer

CONFIG_LIMIT, SETTINGS_LIMIT, TOKENIZER_LIMIT = 1 << 20, 1 << 24, 1 << 28  # bytes
DEPTH_LIMIT = 32  # of tables and lists in each other
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FETCH = "fetch it again (`jaxemo pull ORG/NAME`; in a git clone `git lfs pull`)"


def read_json(path: Path, limit: int = SETTINGS_LIMIT) -> dict[str, Any]:
    """The table in a JSON file of at most `limit` bytes. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if (size := path.stat().st_size) > limit:
        raise CheckpointError(f"{path}: the file has {size} bytes; at most {limit} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError(f"it holds {type(value).__name__}, not a table")
        _check_depth(value, DEPTH_LIMIT)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the JSON file it should be: {error}") from error
    return value


def _check_depth(value: Any, left: int) -> None:
    if not left:
        raise ValueError(f"its tables and lists lie in each other more than {DEPTH_LIMIT} deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, left - 1)


def read_config(directory: Path) -> dict[str, Any]:
    """The table in a model directory's `config.json`. Raises CheckpointError."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: there is no config.json; a model's directory has one, beside *.safetensors files"
        )
    return read_json(path, CONFIG_LIMIT)


# ---- weights ---------------------------------------------------------------------------------------------------------


def weight_files(directory: Path) -> list[Path]:
    """The .safetensors files of a model: `model.safetensors`, or the shards that its index names.

    Without either, one file of any name or one whole set of numbered shards will do. Raises CheckpointError where files
    are missing, where the index and the shards' own headers disagree, and where there are only pickles.
    """
    directory = Path(directory)
    if (single := directory / "model.safetensors").is_file():
        return [single]
    if (index := directory / "model.safetensors.index.json").is_file():
        return _indexed(index)
    names = sorted(p.name for p in directory.iterdir() if p.is_file())
    files = [name for name in names if name.endswith(".safetensors")]
    if "adapter_model.safetensors" in files:
        raise CheckpointError(
            f"{directory}: adapter_model.safetensors is an adapter, not a model; merge it into its model"
        )
    shards = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", name) for name in files]
    if files and all(shards) and len({(m[1], m[3]) for m in shards if m}) == 1:
        first = shards[0]
        assert first is not None
        wanted = [f"{first[1]}-{i + 1:05}-of-{first[3]}.safetensors" for i in range(int(first[3]))]
        _all_there(directory, wanted)
        return [directory / name for name in wanted]
    if len(files) == 1:
        return [directory / files[0]]
    if files:
        raise CheckpointError(f"{directory}: which of {_some(files)} are the model? There is no model.safetensors and no "
                              "model.safetensors.index.json")  # fmt: skip
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise CheckpointError(
            f"{directory}: the weights are only there as pickles ({_some(pickles)}), which are never read: opening one runs "
            "code that is in it. Fetch the model's .safetensors files, or convert it where you trust it: transformers' "
            "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)` writes them"
        )
    raise CheckpointError(f"{directory}: there are no .safetensors files; {FETCH}")


def _indexed(index: Path) -> list[Path]:
    directory, table = index.parent, read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: weight_map is not a table from tensors to files")
    for name, file in table.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {name!r} lies in {file!r}, which is not a .safetensors file beside the index"
            )
    files = sorted(set(table.values()))
    _all_there(directory, files)
    wrong = []
    for file in files:
        held = set(read_header(directory / file))
        listed = {name for name, where in table.items() if where == file}
        wrong += [f"{name!r} is in {file}, the index says {table.get(name, 'nothing of it')}" for name in held - listed]
        wrong += [f"{name!r} is not in {file}" for name in listed - held]
    if wrong:
        raise CheckpointError(f"{index}: the index and the files disagree: {_some(sorted(wrong), '; ')}")
    return [directory / file for file in files]


def _all_there(directory: Path, names: Iterable[str]) -> None:
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise CheckpointError(f"{directory}: {len(missing)} files of the model are missing: {_some(missing)}; {FETCH}")


def _some(names: list[str], between: str = ", ") -> str:
    return between.join(names[:5]) + (f"{between}and {len(names) - 5} more" if len(names) > 5 else "")


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer that `tokenizer.json` and the files beside it describe; None where there is no `tokenizer.json`.

    Plain texts are given the tokens that transformers gives them: those of the file's post-processor. Raises
    CheckpointError for files that are damaged, and for a tokenizer that puts tokens after a text.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    if path.stat().st_size > TOKENIZER_LIMIT:
        raise CheckpointError(f"{path}: the file has {path.stat().st_size} bytes; at most {TOKENIZER_LIMIT} are read")
    with _refusing(path):
        backend = Backend.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()

    def beside(name: str) -> dict[str, Any]:
        return read_json(directory / name) if (directory / name).is_file() else {}

    settings, config = beside("tokenizer_config.json"), beside("config.json")
    # As transformers reads them: special_tokens_map.json says nothing new beside an added_tokens_decoder.
    named = settings if "added_tokens_decoder" in settings else {**settings, **beside("special_tokens_map.json")}
    with _refusing(path):
        _add_tokens(directory / "tokenizer_config.json", backend, settings, named)
        prefix = _prefix(path, backend)
    backend.encode_special_tokens = settings.get("split_special_tokens") is True

    def index(name: str) -> int | None:
        token = _content(named.get(name))
        return None if token is None else backend.token_to_id(token)

    bos, eos = index("bos_token"), index("eos_token")
    if "eos_token" not in named:  # GPT-2 names it in config.json alone
        found = _ids(directory / "config.json", config, "eos_token_id")
        eos = found[0] if found and backend.id_to_token(found[0]) is not None else None
    if bos is not None and len(prefix) == 1 and bos != prefix[0]:
        raise CheckpointError(f"{path}: texts are to begin with {backend.id_to_token(prefix[0])!r}, but the bos_token is "
                              f"{backend.id_to_token(bos)!r}")  # fmt: skip
    stop = {eos} - {None}
    for name, table in (("config.json", config), ("generation_config.json", beside("generation_config.json"))):
        inner = table.get("text_config")
        stop |= {*_ids(directory / name, table, "eos_token_id")}
        stop |= {*_ids(directory / name, inner if isinstance(inner, dict) else {}, "eos_token_id")}
    special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
    stop |= {special[token] for token in ends_of_turn(special)}
    others = {key: token for key, value in named.items() if key.endswith("_token") and (token := _content(value))}
    return Tokenizer(
        backend,
        bos=prefix[0] if len(prefix) == 1 and bos is None else bos,
        eos=eos,
        prefix=prefix,
        chat_template=_chat_template(directory, settings),
        stop_ids=sorted(stop),
        template_vars={key: token for key, token in others.items() if key not in ("bos_token", "eos_token")},
    )


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """The tokenizers package meets what it does not expect with bare Exceptions, and panics, which are not even those."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise CheckpointError(f"{path}: not a readable tokenizer: {str(error)[:500]}") from error


def no_tokenizer(directory: Path) -> str:
    """Why `tokenizer` returned None, and what to do about it."""
    path = next(
        (p for name in ("tokenizer.model", "tekken.json", "vocab.json") if (p := Path(directory) / name).is_file()),
        None,
    )
    if path is None:
        return f"{directory} has no tokenizer.json; give token ids [B, T] instead of texts"
    return (f"{path} is not a format of tokenizer that is read; make a tokenizer.json of it with transformers' "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`, or give token ids [B, T] instead of texts")  # fmt: skip


def _content(token: Any) -> str | None:
    """The text of a special token, which is written as it is or as a table."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _ids(where: Path, table: Mapping[str, Any], key: str) -> list[int]:
    value = table.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
        raise CheckpointError(f"{where}: {key} is {value!r}, not a token id or several")
    return ids


def _added(where: Path, token: Any) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    if _content(token) is None or not all(isinstance(token.get(flag, False), bool) for flag in flags):
        raise CheckpointError(f"{where}: {token!r} does not describe a token")
    return AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})


def _special(named: Mapping[str, Any]) -> Iterator[Any]:
    """Every special token that the settings name."""
    for key, value in named.items():
        if key.endswith("_token"):
            yield value
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            yield from value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _add_tokens(where: Path, backend: Backend, settings: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """Make the backend know the special tokens that stand beside tokenizer.json and not in it."""
    table = settings.get("added_tokens_decoder", {})
    if not isinstance(table, dict) or not all(key.isascii() and key.isdigit() and len(key) < 10 for key in table):
        raise CheckpointError(f"{where}: added_tokens_decoder is not a table from token ids to tokens")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for key, value in sorted(table.items(), key=lambda item: int(item[0])):
        token = _added(where, value if isinstance(value, dict) else {})
        if token.content not in known:
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
            known.add(token.content)
        if backend.token_to_id(token.content) != int(key):
            raise CheckpointError(f"{where}: added_tokens_decoder says that {token.content!r} is token {key}; in tokenizer.json "
                                  f"it is {backend.token_to_id(token.content)}")  # fmt: skip
    for token in _special(named):
        text = _content(token)
        # One that is not in the vocabulary would be given an id that the model has no row for.
        if text and text not in known and backend.token_to_id(text) is not None:
            flags = (
                {"normalized": False, **token} if isinstance(token, dict) else {"content": text, "normalized": False}
            )
            backend.add_special_tokens([_added(where, {**flags, "special": True})])
            known.add(text)


def _prefix(path: Path, backend: Backend) -> tuple[int, ...]:
    """The tokens that the post-processor puts before a text."""
    plain, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    before = len(whole) - len(plain)
    if before < 0 or whole[before:] != plain:
        raise CheckpointError(f"{path}: its post-processor makes {whole} of the tokens {plain}; only tokens before a text "
                              "are supported")  # fmt: skip
    return tuple(whole[:before])


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path, template = directory / "tokenizer_config.json", settings.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        path = directory / "chat_template.jinja"
        if path.stat().st_size > CONFIG_LIMIT:
            raise CheckpointError(f"{path}: the file has {path.stat().st_size} bytes; at most {CONFIG_LIMIT} are read")
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise CheckpointError(f"{path}: not a text ({error})") from error
    if template is None and (directory / "chat_template.json").is_file():
        path = directory / "chat_template.json"
        template = read_json(path).get("chat_template")
    if isinstance(template, list) and all(isinstance(one, dict) for one in template):  # several, by name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise CheckpointError(f"{path}: chat_template is {type(template).__name__}, not a text or a list of named ones")
    return template
