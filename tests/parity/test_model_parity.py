"""Logits and greedy continuations of the real models against transformers, both in float32."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from jaxemo.checkpoints import registry
from parity_texts import MAX_TOKENS, PROMPTS, TEXTS

import jaxemo
from jaxemo import params as params_lib
from jaxemo import tokens as tokens_lib

# 30 layers of float32 matrix products, added in different orders by the two libraries: 10 to 30 times what is measured.
LOGIT_BOUND = 2e-3
NEW_TOKENS = 64
LONG = 700  # tokens, more than the 512 that Gemma's sliding layers look back


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def path(request):
    if request.param == "gemma-3-270m" and not registry.path_of(request.param).exists():
        pytest.skip("Gemma's terms are not accepted here: `jaxemo pull gemma-3-270m --accept-terms`")
    return registry.pull(request.param)


@pytest.fixture(scope="module")
def lm(path):
    return jaxemo.load(path, dtype="float32")


@pytest.fixture(scope="module")
def peer(path):
    """The model; "eager" is transformers' plainest attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def reference(lm, peer):
    """name → (ids, logits [T, V]), each text alone in transformers."""
    found = {}
    for name, text in TEXTS.items():
        ids = lm.tokenizer.encode(text)[:MAX_TOKENS]
        with torch.inference_mode():
            found[name] = ids, peer(torch.tensor([ids])).logits[0].numpy()
    lengths = [len(ids) for ids, _ in found.values()]
    assert len(lengths) >= 8 and min(lengths) in (16, 17) and max(lengths) == MAX_TOKENS  # 17 with a first token
    return found


def compare(label, ours, theirs) -> float:
    """Print and check one row's logits `[T, V]`."""
    ours = np.asarray(ours)
    error = float(np.abs(ours - theirs).max())
    best = np.sort(theirs, axis=-1)[:, -2:]
    gap = float((best[:, 1] - best[:, 0]).min())  # how close the closest call between the two best tokens was
    flips = int((ours.argmax(-1) != theirs.argmax(-1)).sum())
    print(f"  {label:32s} {len(theirs):4d} tokens  max |Δlogit| {error:.2e} (bound {LOGIT_BOUND:g})  "
          f"top-1 differs at {flips}, closest call {gap:.1e}")  # fmt: skip
    assert error <= LOGIT_BOUND, label
    assert flips == 0, label
    return error


def test_logits_alone(lm, reference):
    print()
    worst = max(
        compare(name, lm.forward(tokens_lib.pad([ids])).logits[0, : len(ids)], logits)
        for name, (ids, logits) in reference.items()
    )
    print(f"  alone, worst: {worst:.2e}")


@pytest.mark.parametrize("stacked", [False, True], ids=["separate", "stacked"])
def test_logits_in_a_ragged_batch(lm, reference, stacked):
    """All texts as one right-padded batch; each row as transformers has it alone."""
    if stacked:
        lm = jaxemo.LanguageModel(lm.config, params_lib.stack(lm.params), lm.tokenizer)
    batch = tokens_lib.pad([ids for ids, _ in reference.values()])
    out = np.asarray(lm.forward(batch).logits)
    print()
    rows = enumerate(reference.items())
    worst = max(compare(name, out[i, : len(ids)], logits) for i, (name, (ids, logits)) in rows)
    print(f"  in a batch {list(batch.ids.shape)}, worst: {worst:.2e}")


def test_logits_beyond_the_window(lm, peer):
    """A text that a sliding window does not hold; without the window, the model would say something else."""
    ids = lm.tokenizer.encode(TEXTS["licence"])[:LONG]
    windows = [kind.window for kind in lm.config.attention if kind.window]
    assert len(ids) == LONG > max(windows, default=0)
    with torch.inference_mode():
        theirs = peer(torch.tensor([ids])).logits[0].numpy()
    print()
    compare("licence", lm.forward(tokens_lib.pad([ids])).logits[0, :LONG], theirs)
    if windows:
        kinds = tuple(dataclasses.replace(kind, window=0) for kind in lm.config.attention)
        wide = jaxemo.LanguageModel(dataclasses.replace(lm.config, attention=kinds), lm.params, lm.tokenizer)
        got = np.asarray(wide.forward(tokens_lib.pad([ids])).logits[0, :LONG])
        within, beyond = (float(np.abs(got - theirs)[part].max()) for part in np.split(np.arange(LONG), windows[:1]))
        print(f"  without the window of {windows[0]}: max |Δlogit| {within:.2e} up to it, {beyond:.2e} beyond")
        assert within <= LOGIT_BOUND < beyond


@pytest.fixture(scope="module")
def continuations(lm, peer):
    """Each prompt's ids and transformers' greedy continuation, up to the first stop token. A model without a chat template
    gets the chats' last turns."""
    found = []
    for prompt in PROMPTS:
        if not isinstance(prompt, str) and not lm.tokenizer.chat_template:
            prompt = prompt[-1]["content"]
        ids = tokens_lib.encode(lm.tokenizer, prompt if isinstance(prompt, str) else [prompt])[0]
        stop = list(lm.tokenizer.stop_ids)
        with torch.inference_mode():
            whole = peer.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                  do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=stop)  # fmt: skip
        found.append((ids, until_stop(whole[0, len(ids) :].tolist(), stop)))
    assert len(found) >= 8
    return found


def until_stop(ids, stop):
    return ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))]


def kept(generation, row):
    return generation.tokens[row, : generation.lengths[row]].tolist()


def test_greedy_alone(lm, continuations):
    print()
    for ids, expected in continuations:
        got = lm.generate(tokens_lib.pad([ids]), max_new_tokens=NEW_TOKENS)
        print(f"  {len(ids):3d} + {len(expected):2d} tokens: {lm.tokenizer.decode(expected)[:70]!r}")
        assert kept(got, 0) == expected


def test_greedy_in_a_ragged_batch(lm, continuations):
    got = lm.generate(tokens_lib.pad([ids for ids, _ in continuations]), max_new_tokens=NEW_TOKENS)
    ended = 0
    for row, (_, expected) in enumerate(continuations):
        assert kept(got, row) == expected, row
        ended += len(expected) < NEW_TOKENS
    print(f"\n  {len(continuations)} rows alike, {ended} of them ended by a stop token")
    if lm.tokenizer.chat_template:  # a model that only continues texts may never stop
        assert 0 < ended < len(continuations), "the prompts should show both a stop and the limit"


def test_greedy_uncached(lm, continuations):
    """Without a cache: the growing texts read from their beginning for every token."""
    chosen = [continuations[0], continuations[5]]
    texts = [list(ids) for ids, _ in chosen]
    room = max(len(ids) for ids in texts) + NEW_TOKENS
    for _ in range(NEW_TOKENS):
        best = np.asarray(lm.forward(tokens_lib.pad(texts, room), logits="last").logits).argmax(-1)
        for text, token in zip(texts, best.tolist(), strict=True):
            text.append(token)
    for text, (ids, expected) in zip(texts, chosen, strict=True):
        assert until_stop(text[len(ids) :], lm.tokenizer.stop_ids) == expected
