"""GGUF files: every architecture against transformers with the same weights, and its own reader of such files on the very
same ones. The real models are in test_model_parity.py."""

import sys

import numpy as np
import pytest
import test_families
import test_families_gguf
import torch
import transformers
from checked import record

import jaxemo
from jaxemo import Capture

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
