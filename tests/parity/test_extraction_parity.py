"""Extraction on the real model against NumPy in float64 on transformers' hidden states."""

import numpy as np
import pytest
import torch
import transformers

from jaxemo.emotions import corpus, extraction

EMOTIONS = corpus.DISPLAY[:9]


@pytest.mark.parametrize("denoise", [0.0, 0.5])
def test_directions_equal_those_from_transformers(lm, hidden, denoise):
    """108 stories (9 emotions on all topics) and 24 neutral texts, at every layer: relative error at most 1e-4."""
    shipped = corpus.shipped()
    part = corpus.Corpus("part", tuple(s for s in shipped.stories if s.emotion in EMOTIONS), shipped.neutral[:24])
    assert len(part.stories) >= 100
    found = extraction.extract(lm, part, denoise=denoise, progress=False)
    means, norms = hidden([s.text for s in part.stories])
    by_emotion = np.stack([means[[s.emotion == e for s in part.stories]].mean(0) for e in part.emotions])  # [E, L, D]
    want = by_emotion - by_emotion.mean(0)
    if denoise:
        neutral = hidden(part.neutral)[0]
        for layer in range(want.shape[1]):
            _, size, axes = np.linalg.svd(neutral[:, layer] - neutral[:, layer].mean(0), full_matrices=False)
            n = int(np.searchsorted(np.cumsum(size**2) / np.sum(size**2), denoise)) + 1
            want[:, layer] -= want[:, layer] @ axes[:n].T @ axes[:n]
    want /= np.linalg.norm(want, axis=-1, keepdims=True)
    error = np.linalg.norm(found.directions - want.transpose(1, 0, 2), axis=-1)
    print(
        f"\n{len(part.stories)} stories, denoise {denoise}: directions differ by {error.max():.1e} of their length (bound 1e-4)"
    )
    assert error.max() <= 1e-4
    assert np.abs(found.residual_norm / norms.mean(0) - 1).max() <= 1e-4


@pytest.fixture(scope="module")
def peer(gguf_path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def hidden(lm, peer):
    """Mean residual stream [n, L, D] and mean norm [n, L] over each text's tokens 50 to 160, by transformers."""
    kept = {}

    def of(text):
        ids = lm.tokenizer.encode(text)[: extraction.LONGEST]
        streams = []
        hooks = [block.register_forward_hook(lambda _m, _i, out: streams.append(out[0] if isinstance(out, tuple) else out))
                 for block in peer.model.layers]  # fmt: skip
        with torch.inference_mode():
            peer(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        x = torch.stack([s.reshape(-1, s.shape[-1]) for s in streams]).double().numpy()[:, extraction.SKIP :]
        return x.mean(1), np.linalg.norm(x, axis=-1).mean(1)

    def every(texts):
        for text in texts:
            if text not in kept:
                kept[text] = of(text)
        found = [kept[text] for text in texts]
        return np.stack([mean for mean, _ in found]), np.stack([norm for _, norm in found])

    return every
