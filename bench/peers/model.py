"""The model and the inputs that all contenders share: `python model.py SPEC.json FOLDER`, with transformers.

Writes FOLDER as Hugging Face lays it out, from SPEC's `gguf` or with random weights of the `config` there, and inputs.npz beside its
files: `prompts [256, length]` and `texts [rows, length]` of token ids, unit `directions [L, 171, D]`, and 256 `vectors [256, D]`,
each a quarter as long as the residual stream is on average after block `layer`.
"""

import json
import os
import pathlib
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import numpy as np
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
ROWS, EMOTIONS = 256, 171


def build(spec, folder: pathlib.Path):
    dtype = getattr(torch, spec["dtype"])
    torch.manual_seed(0)
    if gguf := spec.get("gguf"):
        path = pathlib.Path(gguf)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(folder)
        about = json.loads((folder / "tokenizer_config.json").read_text())
        about["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows, too
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
        read = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        artefacts = {"quantization_config", "_model_name_or_path", "unk_token_id"}  # the weights are plain now
        config = {key: value for key, value in read.config.to_dict().items() if key not in artefacts}
    else:
        read, config = None, spec["config"]
    with torch.device(spec["device"]):
        made = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype)
    if read is not None:
        model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:  # where transformers 4 looks for it; it would take another without a word
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": theta}, indent=1))
    return model.to(spec["device"]).eval()


def token_ids(spec, folder, vocabulary: int, lengths: dict[str, int]) -> dict[str, np.ndarray]:
    """Beginnings of stories where there is a tokenizer, else random ids."""
    if "stories" not in spec:
        rng = np.random.default_rng(0)
        return {name: rng.integers(0, vocabulary, (ROWS, n), np.int32) for name, n in lengths.items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with open(spec["stories"], encoding="utf-8") as lines:
        rows = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    rows = [row for row in rows if len(row) >= max(lengths.values())][:: len(rows) // (2 * ROWS)][:ROWS]
    return {name: np.array([row[:n] for row in rows], np.int32) for name, n in lengths.items()}


@torch.no_grad()
def main() -> None:
    spec, folder = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    model = build(spec, folder)
    L, D = model.config.num_hidden_layers, model.config.hidden_size
    ids = token_ids(spec, folder, model.config.vocab_size, spec["lengths"])
    assert {len(rows) for rows in ids.values()} == {ROWS}, "too few stories are long enough"
    layer = spec["layer"] = 2 * L // 3
    prompts = torch.from_numpy(ids["prompts"][:16].astype(np.int64)).to(spec["device"])
    stream = model(prompts, output_hidden_states=True).hidden_states[layer + 1]
    norm = stream[:, 1:].float().norm(dim=-1).mean().item()  # the first token is many times as long in some models

    rng = np.random.default_rng(1)
    directions, vectors = rng.standard_normal((L, EMOTIONS, D)), rng.standard_normal((ROWS, D))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    vectors *= 0.25 * norm / np.linalg.norm(vectors, axis=-1, keepdims=True)
    np.savez(folder / "inputs.npz", directions=directions.astype(np.float32), vectors=vectors.astype(np.float32), **ids)
    (folder / "about.json").write_text(json.dumps({"layer": layer, "layers": L, "residual_norm": norm}))


if __name__ == "__main__":
    main()
