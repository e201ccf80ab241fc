"""nnsight. A user saves activations in a trace and scores them after, and steers inside `generate`, one condition at a time; a skilled
one scores inside the trace and gives every row of a batch its own vector."""

import nnsight
import torch

from peers import torch_ as t
from peers.torch_ import device_peak, finish, prepare, reset_peak, start, to_numpy  # noqa: F401

PACKAGES = ("torch", "transformers", "nnsight")


def load(spec):
    model = t.load_hf(spec)
    tokenizer = t.transformers.AutoTokenizer.from_pretrained(spec["model"])
    return t.holder(spec, model, traced=nnsight.TransformersModel(model, tokenizer=tokenizer, task="text-generation"))


def prefill(m, job):
    traced, keep = m.traced, {"logits_to_keep": 1} if m.how == "skilled" else {}
    with traced.trace(job.ids, use_cache=False, **keep):
        logits = traced.output.logits[:, -1].save()
    return {"logits": logits}


def readout(m, job):
    traced, L = m.traced, len(job.directions)
    if m.how == "skilled":
        with traced.trace(job.ids, use_cache=False, logits_to_keep=1):
            kept = nnsight.save([])
            for i in range(L):
                kept.append((t.first(traced.model.layers[i].output) @ job.directions[i].T).float())
            logits = traced.output.logits[:, -1].save()
        return {"logits": logits, "scores": torch.stack(list(kept))}
    with traced.trace(job.ids, use_cache=False):
        kept = nnsight.save([])
        for i in range(L):
            kept.append(t.first(traced.model.layers[i].output))
        logits = traced.output.logits[:, -1].save()
    return {"logits": logits,
            "scores": torch.einsum("lbtd,led->lbte", torch.stack(list(kept)), job.directions).float()}  # fmt: skip


def run(m, job, ids, vectors):
    traced, new, T = m.traced, job.new + job.read, ids.shape[1]
    block, directions = traced.model.layers[job.layer], job.directions[job.layer]
    steps = new  # forward passes: the prompt's, and one for each token but the last
    read = job.read
    if vectors is None:
        with traced.generate(ids, max_new_tokens=new) as tracer:
            tokens = tracer.result.save()
        return {"tokens": tokens[:, T:]}
    with traced.generate(ids, max_new_tokens=new) as tracer:
        kept = nnsight.save([])
        for _ in tracer.iter[:steps]:
            block.output[:] = block.output + vectors[:, None]
            if read:
                kept.append((block.output @ directions.T).float())
        tokens = tracer.result.save()
    tokens = tokens[:, T:][:, : job.new]
    return {"tokens": tokens} | ({"scores": t.generated(list(kept), job.new)} if read else {})


generate, sweep = t.works(run)
