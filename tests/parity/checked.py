"""What the parity run has checked, for the table in docs/families.md, which it writes."""

import pathlib
from typing import NamedTuple

import torch
import transformers
from jaxemo.checkpoints import families, families_gguf

TABLE = pathlib.Path(__file__).parent.parent.parent / "docs" / "families.md"
FORMATS = ("safetensors", "saved in bfloat16, in shards", "GGUF")


class Checked(NamedTuple):
    models: int
    logits: float  # largest difference from transformers
    resid: float | None  # likewise, of the residual stream after any layer


RESULTS: dict[tuple[str, str], list[Checked]] = {}  # (family, format) → ...


def record(family: str, form: str, logits: float, resid: float | None = None) -> None:
    assert form in FORMATS
    RESULTS.setdefault((family, form), []).append(Checked(1, logits, resid))


def cell(family: str, form: str) -> str:
    found = RESULTS.get((family, form))
    if not found:
        return "–"
    resid = [one.resid for one in found if one.resid is not None]
    shown = f"{len(found)} × logits {max(one.logits for one in found):.0e}"
    return shown + (f", residuals {max(resid):.0e}" if resid else "")


def write() -> None:
    refused = "".join(f"- `{name}`: {why}\n" for name, why in families.REFUSED.items())
    architectures: dict[str, list[str]] = {}
    for name, architecture in families_gguf.ARCHITECTURES.items():
        architectures.setdefault(architecture.family, []).append(f"`{name}`")
    for family, name in (("mistral", "llama"), ("mixtral", "llama"), ("olmo3", "olmo2"), ("gemma3", "gemma3")):
        architectures[family] = [f"`{name}`"]  # told from its kin by what the file holds
    rows = "".join(
        f"| `{family}` | {', '.join(architectures.get(family, ['–']))} | {' | '.join(cell(family, form) for form in FORMATS)} |\n"
        for family in sorted(families.FAMILIES)
    )
    TABLE.write_text(
        f"""# Model families

`make parity` writes this page (transformers {transformers.__version__}, torch {torch.__version__.split("+")[0]}, float32 on CPU). Families are named
by the `model_type` of their `config.json`, and by their GGUF architecture. A cell says how many models were checked and the
largest absolute difference from what transformers computes with the same weights, of logits and of the residual stream after
any layer (allowed: 1e-4). The models are tiny, with random weights, and differ in heads, windows, rescaled rotary embeddings,
biases, tied embeddings and whatever else their configuration can say:

- *safetensors*: the golden models of `tests/golden/families`, whose files hold float32, bfloat16 or float16, made again by
  transformers in this run and found equal to the ones that `make test` compares with;
- *saved in bfloat16, in shards*: a model with transformers' own random initialisation, as its `save_pretrained` writes it;
- *GGUF*: golden models written as llama.cpp's converter writes them.

| family | GGUF architecture | {" | ".join(FORMATS)} |
|---|---|{"---|" * len(FORMATS)}
{rows}
On real weights, SmolLM2-135M and Gemma 3 270M are compared with transformers reading the same GGUF file: see the README.

## Not supported

One attention transformer does not cover these; loading them says so:

{refused}""",
        encoding="utf-8",
    )
