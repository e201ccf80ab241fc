"""The parameter counts of published models, counted by transformers on its meta device: shapes without memory."""

import json
import pathlib

import pytest
import torch
import transformers

PUBLISHED = sorted((pathlib.Path(__file__).parents[1] / "published").glob("*.json"))


def count(module: torch.nn.Module) -> int:
    return sum({id(p): p.numel() for p in module.parameters()}.values())  # shared weights once


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_transformers_counts_the_same(path):
    model = json.loads(path.read_text())
    # The code that auto_map names is not at hand, and MXFP4 packs the same weights into fewer numbers.
    given = {k: v for k, v in model["config"].items() if k not in ("model_type", "auto_map", "quantization_config")}
    config = transformers.AutoConfig.for_model(model["config"]["model_type"], **given)
    sees = "vision_config" in given
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        peer = auto.from_config(config)
    peer.tie_weights()
    if not sees:
        assert count(peer) == model["parameters"]
        return
    language = peer.model.language_model
    assert count(language) == model["parameters"]  # the unembedding is tied to its embedding
    assert f"is {count(peer)}," in model["source"] and f"have {count(peer) - count(language)};" in model["source"]
