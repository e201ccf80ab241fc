"""GGUF files: every architecture against transformers with the same weights, its own reader of such files on the very same
ones, and Gemma 3 270M, quantised."""

import sys
import time

import numpy as np
import pytest
import test_families
import test_families_gguf
import torch
import transformers
from checked import record
from parity_texts import MAX_TOKENS, PROMPTS, TEXTS
from test_model_parity import NEW_TOKENS, compare, kept, until_stop

import jaxemo
from jaxemo import Capture
from jaxemo import tokens as tokens_lib

sys.path.insert(0, str(test_families.GOLDEN))
import make_families

BOUND = test_families.BOUND
EAGER = {"dtype": torch.float32, "attn_implementation": "eager"}


def meant(name: str, folder):
    """A checkpoint of the model that a golden model's GGUF file means, as Hugging Face has it, and its configuration."""
    golden = test_families.Golden(name)
    config = test_families_gguf.changed(golden.config, test_families_gguf.DIFFERS.get(name, {}))
    return test_families.write(folder, config, golden.tensors()), golden


@pytest.mark.parametrize("name", test_families_gguf.WRITTEN)
def test_transformers_with_the_same_weights(name, tmp_path):
    folder, golden = meant(name, tmp_path / "hf")
    how = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if "mxfp4" in name else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **EAGER, **how).eval()
    lm = jaxemo.load(test_families_gguf.write(tmp_path / "a.gguf", name), dtype="float32")
    batch, watch = golden.batch(), make_families.Watch(model)
    out = lm.forward(batch, capture=Capture(raw={"resid_post": "all"}))
    with torch.inference_mode():
        rows = [watch.run(ids) for ids in golden.rows]
    worst = []
    for got, site in ((out.logits, "logits"), (out.captured.raw["resid_post"], "resid")):
        want = np.concatenate([row[site] for row in rows], axis=-2)
        worst.append(float(np.abs(test_families.unpad(got, batch.lengths) - want).max()))
    print(f"{name}: logits {worst[0]:.1e}, residual stream {worst[1]:.1e} (bound {BOUND:g})")
    assert max(worst) <= BOUND
    record(golden.config["model_type"], "GGUF", *worst)


# The families whose GGUF files transformers reads. Not those of gpt-oss: there it takes the lengths of keys for their
# values, and the names of experts for others. It has no names for Mixtral's experts, and no gemma3 that also sees.
READ = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gpt2", "starcoder2", "gemma2", "gemma3_text")


@pytest.mark.parametrize("name", [name for name in test_families_gguf.WRITTEN if name.split("-")[0] in READ])
def test_transformers_reads_the_same_file(name, tmp_path):
    """The tensors as transformers finds them in the file. It does not read windows, scalings and the widths of experts from
    the metadata, so the configuration is given to it."""
    folder, golden = meant(name, tmp_path)
    path = test_families_gguf.write(tmp_path / "a.gguf", name)
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type == "mistral":  # it takes no Mistral for what it is; without a window, that is a Llama
        config = transformers.LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=config, **EAGER
    ).eval()
    lm = jaxemo.load(path, dtype="float32")
    got = lm.forward(golden.batch()).logits
    worst = 0.0
    for i, ids in enumerate(golden.rows):
        with torch.inference_mode():
            want = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        worst = max(worst, float(np.abs(got[i, : len(ids)] - want).max()))
    print(f"{name}: logits {worst:.1e} (bound {BOUND:g})")
    assert worst <= BOUND


# ---- Gemma 3 270M ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma():
    """jaxemo's model and transformers', of the same file (Q4_K_M). Its terms have to be accepted, see `jaxemo pull`."""
    path = jaxemo.checkpoints.registry.path_of("gemma-3-270m")
    if not path.exists():
        try:
            path = jaxemo.checkpoints.pull("gemma-3-270m")
        except PermissionError as error:
            pytest.skip(str(error))
    return jaxemo.load(path, dtype="float32"), transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, **EAGER
    ).eval()


def test_gemma_logits(gemma):
    """Each text alone, and all as one right-padded batch of which the last logits of every row are compared."""
    lm, peer = gemma
    rows = {name: lm.tokenizer.encode(text)[:MAX_TOKENS] for name, text in TEXTS.items()}
    assert len(rows) >= 8 and max(map(len, rows.values())) == MAX_TOKENS
    together = np.asarray(lm.forward(tokens_lib.pad(list(rows.values())), logits="last").logits)
    print()
    worst = 0.0
    for i, (name, ids) in enumerate(rows.items()):
        with torch.inference_mode():
            theirs = peer(torch.tensor([ids])).logits[0].numpy()
        worst = max(worst, compare(name, lm.forward(tokens_lib.pad([ids])).logits[0, : len(ids)], theirs),
                    compare("  last, in the batch", together[i : i + 1], theirs[-1:]))  # fmt: skip
    print(f"  worst: {worst:.2e}")


def test_gemma_greedy(gemma):
    """The base model has no chat template: of a chat, the last message is continued."""
    lm, peer = gemma
    prompts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in PROMPTS]
    rows = [lm.tokenizer.encode(prompt) for prompt in prompts]
    assert len(rows) >= 8
    got = lm.generate(tokens_lib.pad(rows), max_new_tokens=NEW_TOKENS)
    stop = list(lm.tokenizer.stop_ids)
    for row, ids in enumerate(rows):
        with torch.inference_mode():
            whole = peer.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                  do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=stop)  # fmt: skip
        expected = until_stop(whole[0, len(ids) :].tolist(), stop)
        print(f"  {len(ids):3d} + {len(expected):2d} tokens: {lm.tokenizer.decode(expected)[:70]!r}")
        assert kept(got, row) == expected


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma-3-270m"])
def test_loading_is_faster(model):
    """The same file, in float32; the best of three of each, one after another. bench/loading.py measures more carefully."""
    path = jaxemo.checkpoints.registry.path_of(model)
    if not path.exists():
        pytest.skip(f"{model} has not been pulled")

    def seconds(load) -> float:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            load()
            times.append(time.perf_counter() - begin)
        return min(times)

    ours = seconds(lambda: jaxemo.load(path, dtype="float32"))
    theirs = seconds(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **EAGER)
    )
    print(f"\n  {model}: {ours:.2f} s, transformers {theirs:.2f} s, {theirs / ours:.0f} times as long")
    assert theirs >= 5 * ours
