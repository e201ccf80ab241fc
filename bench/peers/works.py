"""What bench/compare.py measures: the libraries, the models and the works, with the sizes that suit the device."""

from typing import NamedTuple

LIBRARIES = {  # library: (its file here, the environment it runs in: jaxemo's, or what new.txt or old.txt says)
    "jaxemo": ("jaxemo_", "jaxemo"),
    "transformers": ("transformers_", "new"),
    "torch.compile": ("compiled", "new"),
    "TransformerLens": ("transformer_lens_", "new"),
    "nnsight": ("nnsight_", "new"),
    "steering-vectors": ("steering_vectors_", "old"),
    "repeng": ("repeng_", "old"),
}
ENGINES, READERS = tuple(LIBRARIES)[:3], tuple(LIBRARIES)[:5]  # run a model; give back what is inside; all steer
REFERENCE = "transformers, skilled"
MODELS = {  # a configuration stands for random weights
    "cpu": {"SmolLM2-135M-Instruct": {}},
    "gpu": {
        "Qwen2.5-1.5B (random weights)": {
            "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "tie_word_embeddings": True},
        "Llama-3.1-8B (random weights)": {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
            "rope_theta": 5e5, "tie_word_embeddings": False},
    },
}  # fmt: skip
# texts: rows, tokens; generate: tokens after tokens, and the batches; mixed: rows, tokens after tokens; sweep: conditions, prompts,
# tokens after tokens. The second is --quick.
SIZES = {
    "cpu": ({"texts": (2, 64), "generate": (64, 32), "batches": (1, 8, 16, 64, 256), "steer": 8, "mixed": (256, 4, 8), "sweep": (64, 16, 32, 16)},
            {"texts": (2, 16), "generate": (4, 8), "batches": (1, 8), "steer": 8, "mixed": (8, 4, 8), "sweep": (4, 2, 4, 8)}),
    "gpu": ({"texts": (16, 256), "generate": (64, 32), "batches": (1, 8, 16, 64, 256), "steer": 16, "mixed": (256, 64, 32), "sweep": (64, 16, 32, 32)},
            {"texts": (2, 64), "generate": (8, 32), "batches": (1, 16), "steer": 16, "mixed": (16, 8, 8), "sweep": (8, 2, 8, 8)}),
}  # fmt: skip
LENGTHS = {device: {"prompts": 32, "texts": full["texts"][1]} for device, (full, _) in SIZES.items()}


class Work(NamedTuple):
    about: str
    job: dict  # what run.py is told
    libraries: tuple[str, ...]
    hows: tuple[str, ...] = ("user", "skilled")
    part: dict = {}  # noqa: RUF012  how → (conditions, prompts) of a sweep that are timed instead of all

    def contenders(self) -> list[str]:
        """The reference first."""
        names = [f"{name}, {how}" for name in self.libraries if name != "jaxemo" for how in self.hows]
        return [REFERENCE, "jaxemo", *(name for name in names if name != REFERENCE)]


def works(device: str, quick: bool) -> dict[str, Work]:
    s = SIZES[device][quick]
    (rows, length), (new, short) = s["texts"], s["generate"]
    every, skilled = tuple(LIBRARIES), ("skilled",)
    texts, prompts = (
        {"ids": "texts", "rows": rows, "length": length},
        {"ids": "prompts", "rows": s["steer"], "length": short, "new": new},
    )
    loading = tuple(name for name in every if name != "torch.compile")  # transformers, before it compiles
    found = {
        "load": Work("weights and tokenizer, from safetensors in the page cache", {**texts, "do": "load"}, loading),
        "prefill": Work(f"last logits of {rows} x {length} tokens", {**texts, "do": "prefill"}, READERS),
        "readout": Work("the same, and 171 scores of every token after every layer", {**texts, "do": "readout"}, READERS),
    }  # fmt: skip
    generating = {}
    for B in s["batches"]:
        large = device == "cpu" and B > 16  # minutes there
        generating[f"generate-{B}"] = Work(f"{new} tokens after {short}, {B} row{'s' * (B > 1)}", {**prompts, "do": "generate", "rows": B},
                                      ENGINES[: 2 if large and B > 64 else 3], skilled if large else ("user", "skilled"))  # fmt: skip
    steered = {**prompts, "do": "generate", "steer": "same", "conditions": 1, "read": True}
    found[f"steer-read-{s['steer']}"] = Work(
        f"{new} tokens after {short}, {s['steer']} rows, steered, and 171 scores of every new token", steered, every
    )
    rows, new, length = s["mixed"]
    for steer, about in (("none", "unsteered"), ("same", "one vector for all"), ("own", "a vector for each")):
        job = {"do": "generate", "ids": "prompts", "rows": rows, "length": length, "new": new, "conditions": rows}
        job |= {} if steer == "none" else {"steer": steer}
        found[f"rows-{steer}"] = Work(f"{new} tokens after {length}, {rows} rows, {about}", job, ENGINES if steer == "none" else every, skilled)  # fmt: skip
    conditions, rows, new, length = s["sweep"]
    part = {"user": (2, 2)}
    if device == "cpu":  # a batch of 64 rows, and four of jaxemo's, whose sweep goes through them by itself
        part |= {"skilled": (max(1, conditions // 16), rows), "": (max(1, conditions // 4), rows)}
    job = {"do": "sweep", "ids": "prompts", "rows": rows, "length": length, "new": new, "steer": "own", "conditions": conditions,
           "batch": 64 if device == "cpu" else 256}  # fmt: skip
    found["sweep"] = Work(f"{conditions} vectors x {rows} prompts, {new} tokens after {length}", job, every, part=part)
    return found | generating  # the longest last
