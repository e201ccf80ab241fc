"""steering-vectors on a transformers model. A user applies one vector and generates, prompt by prompt; a skilled one generates all
prompts of a condition together, and gives every row its own vector through the library's `operator`. The library reads nothing: both
read with a forward hook."""

from steering_vectors import SteeringVector

from peers import torch_ as t
from peers.torch_ import device_peak, finish, prepare, reset_peak, start, to_numpy  # noqa: F401

PACKAGES = ("torch", "transformers", "steering-vectors")


def load(spec):
    return t.holder(spec, t.load_hf(spec))


def run(m, job, ids, vectors):
    rows = len(vectors) > 1
    vector = SteeringVector({job.layer: vectors[0]}, "decoder_block")
    own = {"operator": lambda x, _: vectors[:, None]} if rows else {}
    kept = []
    with vector.apply(m.model, **own):
        read = [(t.blocks(m.model)[job.layer], t.score_last(kept, job.directions[job.layer]))] if job.read else []
        with t.Hooks(read):
            if m.how == "skilled":
                tokens = t.greedy(m, ids, job.new, job.new if job.read else job.new - 1)
            else:
                tokens = m.model.generate(ids, max_new_tokens=job.new + job.read)[:, ids.shape[1] :][:, : job.new]
    return {"tokens": tokens} | ({"scores": t.generated(kept, job.new)} if job.read else {})


def prefill(m, job):
    return {"logits": m.model(job.ids, use_cache=False).logits[:, -1]}


generate, sweep = t.works(run)
