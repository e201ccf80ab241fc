"""transformers with forward hooks. A user calls `generate` and loops over conditions; a skilled one writes the loop, keeps a static
cache, computes the last token's logits alone, scores inside the hooks and gives every row of a batch its own vector."""

import torch

from peers import torch_ as t
from peers.torch_ import device_peak, finish, prepare, reset_peak, start, to_numpy  # noqa: F401

PACKAGES = ("torch", "transformers")


def load(spec):
    return t.holder(spec, t.load_hf(spec))


def prefill(m, job):
    keep = {"logits_to_keep": 1} if m.how == "skilled" else {}
    return {"logits": m.model(job.ids, use_cache=False, **keep).logits[:, -1]}


def readout(m, job):
    kept = []
    if m.how == "skilled":
        pairs = [(block, t.score_last(kept, d)) for block, d in zip(t.blocks(m.model), job.directions, strict=True)]
        with t.Hooks(pairs):
            logits = prefill(m, job)["logits"]
        return {"logits": logits, "scores": torch.stack(kept)}
    with t.Hooks([(block, kept.append) for block in t.blocks(m.model)]):  # cache activations, then score them
        logits = prefill(m, job)["logits"]
    return {"logits": logits, "scores": torch.einsum("lbtd,led->lbte", torch.stack(kept), job.directions).float()}


def hooks(m, job, vectors, kept):
    """Steering first, so that what is read is what the next block sees. `vectors [B, D]` or None."""
    block = t.blocks(m.model)[job.layer]
    pairs = [] if vectors is None else [(block, lambda x: x + vectors[:, None])]
    return t.Hooks(pairs + ([(block, t.score_last(kept, job.directions[job.layer]))] if job.read else []))


def run(m, job, ids, vectors):
    kept = []
    with hooks(m, job, vectors, kept):
        if m.how == "skilled":
            tokens = t.greedy(m, ids, job.new, job.new if job.read else job.new - 1)
        else:  # `generate` does not feed its last token: to read that one, too, ask for one more
            tokens = m.model.generate(ids, max_new_tokens=job.new + job.read)[:, ids.shape[1] :][:, : job.new]
    return {"tokens": tokens} | ({"scores": t.generated(kept, job.new)} if job.read else {})


generate, sweep = t.works(run)


def follow(m, job):
    """Logits of the token after each of `job.ids`'s rows, steered: what a choice of tokens is judged by."""
    with hooks(m, job, job.vectors, []):
        return {"logits": m.model(job.ids, use_cache=False, logits_to_keep=1).logits[:, -1]}
