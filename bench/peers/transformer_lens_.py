"""TransformerLens 4's TransformerBridge. A user runs with a cache of the residual stream and scores it after, and generates inside
`hooks`; a skilled one scores in hooks, gives every row of a batch its own vector and lets transformers' fast attention run."""

import torch
from transformer_lens.model_bridge import TransformerBridge

from peers import torch_ as t
from peers.torch_ import device_peak, finish, prepare, reset_peak, start, to_numpy  # noqa: F401

PACKAGES = ("torch", "transformers", "transformer-lens")


def load(spec):
    made = {}
    if spec["how"] == "skilled":
        made["hf_model"] = t.load_hf(spec)
    model = TransformerBridge.boot_transformers(
        spec["model"], device=spec["device"], dtype=getattr(torch, spec["dtype"]), **made
    )
    t.touch(model)
    return t.holder(spec, model)


def name(layer):
    return f"blocks.{layer}.hook_out"


def prefill(m, job):
    return {"logits": m.model(job.ids)[:, -1]}


def score_hook(kept, directions):
    def act(x, hook):
        kept.append((x @ directions.T).float())

    return act


def readout(m, job):
    L = len(job.directions)
    if m.how == "skilled":
        kept: list = []
        hooks = [(name(i), score_hook(kept, job.directions[i])) for i in range(L)]
        logits = m.model.run_with_hooks(job.ids, fwd_hooks=hooks)
        return {"logits": logits[:, -1], "scores": torch.stack(kept)}
    wanted = {name(i) for i in range(L)}
    logits, cache = m.model.run_with_cache(job.ids, names_filter=lambda n: n in wanted)
    stream = torch.stack([cache[name(i)] for i in range(L)])
    return {"logits": logits[:, -1], "scores": torch.einsum("lbtd,led->lbte", stream, job.directions).float()}


def run(m, job, ids, vectors):
    kept: list = []
    hooks = [] if vectors is None else [(name(job.layer), lambda x, hook: x + vectors[:, None])]
    if job.read:
        hooks.append((name(job.layer), score_hook(kept, job.directions[job.layer])))
    with m.model.hooks(fwd_hooks=hooks):
        tokens = m.model.generate(
            ids,
            max_new_tokens=job.new + job.read,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            return_type="tokens",
        )
    tokens = tokens[:, ids.shape[1] :][:, : job.new]
    return {"tokens": tokens} | ({"scores": t.generated(kept, job.new)} if job.read else {})


generate, sweep = t.works(run)
