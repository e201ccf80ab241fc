"""transformers under torch.compile with a static cache. A user compiles `forward` and calls `generate`; a skilled one runs the prompt
eagerly, compiles the step for each shape and computes the last token's logits alone. For both, the vectors to add and the scores
to keep are buffers, so that no condition recompiles."""

import types

import torch

from peers import torch_ as t
from peers.torch_ import device_peak, finish, prepare, reset_peak, start, to_numpy  # noqa: F401

PACKAGES = ("torch", "transformers")


def load(spec):
    torch._dynamo.config.recompile_limit = 64
    model = t.load_hf(spec)
    mode = "reduce-overhead" if spec["device"] == "cuda" else None
    # The hooks are there before anything is compiled and look at `cell.mode`, a constant of each graph.
    cell = types.SimpleNamespace(mode="plain", vectors=None, directions=None, scores=None)

    def hook(index):
        def run(module, inputs, output):
            x = t.first(output)
            if cell.mode == "steer" and index == spec["layer"]:
                x = x + cell.vectors[:, None]
                cell.scores.copy_((x[:, -1] @ cell.directions[index].T).float())
            elif cell.mode == "readout":
                cell.scores[index].copy_((x @ cell.directions[index].T).float())
            return t.with_first(output, x)

        return run

    for i, block in enumerate(t.blocks(model)):
        block.register_forward_hook(hook(i))
    m = t.holder(spec, model, cell=cell, buffers={})
    shapes = {"mode": mode, "dynamic": False if spec["how"] == "skilled" else None}  # None: what changes is left open
    m.whole = torch.compile(lambda ids, **how: model(ids, use_cache=False, **how).logits, **shapes)
    m.step = torch.compile(model.forward, **shapes)
    return m


def buffer(m, name, like):
    """The same memory each time, so that a graph finds it where it was."""
    key = (name, tuple(like.shape))
    if key not in m.buffers:
        m.buffers[key] = torch.empty_like(like)
        torch._dynamo.mark_static_address(m.buffers[key])  # or CUDA graphs would refuse to write into it
    return m.buffers[key].copy_(like)


def set_mode(m, job, mode, vectors=None):
    E = job.directions.shape[1]
    m.cell.mode, m.cell.directions = mode, buffer(m, "directions", job.directions)
    if mode == "steer":
        m.cell.vectors = buffer(m, "vectors", vectors)
        m.cell.scores = buffer(m, "scores", torch.zeros(len(vectors), E, device=m.device))
    if mode == "readout":
        m.cell.scores = buffer(m, "scores", torch.zeros(len(job.directions), *job.ids.shape, E, device=m.device))


def keep(m):
    return {"logits_to_keep": 1} if m.how == "skilled" else {}


def prefill(m, job):
    set_mode(m, job, "plain")
    return {"logits": m.whole(job.ids, **keep(m))[:, -1].clone()}


def readout(m, job):
    set_mode(m, job, "readout")
    return {"logits": m.whole(job.ids, **keep(m))[:, -1].clone(), "scores": m.cell.scores.clone()}


def run(m, job, ids, vectors):
    set_mode(m, job, "plain" if vectors is None else "steer", vectors)
    kept = []

    def step(*args, **kwargs):
        if m.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        out = m.step(*args, **kwargs)
        if job.read:
            kept.append(m.cell.scores.clone()[:, None])
        return out

    if m.how == "skilled":
        tokens = t.greedy(m, ids, job.new, job.new if job.read else job.new - 1, step)
    else:
        eager = m.model.forward
        m.model.forward = step
        try:
            tokens = m.model.generate(ids, max_new_tokens=job.new + job.read, cache_implementation="static")
        finally:
            m.model.forward = eager
        tokens, kept = tokens[:, ids.shape[1] :][:, : job.new], kept[1:]
    return {"tokens": tokens} | ({"scores": torch.cat(kept[: job.new], dim=1)} if job.read else {})


generate, sweep = t.works(run)
