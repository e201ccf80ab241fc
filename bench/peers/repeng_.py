"""repeng's ControlModel. A user sets one control and generates, prompt by prompt; a skilled one sets a control with a vector for every
row (`set_raw_control`) and writes the loop. The library reads nothing: both read with a forward hook."""

import numpy as np
from repeng import ControlModel, ControlVector

from peers import torch_ as t
from peers.torch_ import device_peak, finish, prepare, reset_peak, start, to_numpy  # noqa: F401

PACKAGES = ("torch", "transformers", "repeng")


def load(spec):
    model = t.load_hf(spec)
    m = t.holder(spec, model, control=ControlModel(model, [spec["layer"]]))
    m.model.config.use_cache = True
    return m


def run(m, job, ids, vectors):
    kept = []
    if m.how == "user":
        one = ControlVector(
            model_type="llama", directions={job.layer: vectors[0].float().cpu().numpy().astype(np.float32)}
        )
        m.control.set_control(one, 1.0)
    else:
        m.control.set_raw_control({job.layer: vectors[:, None]}, operator=lambda x, control: x + control[:, :1])
    read = [(t.blocks(m.model)[job.layer], t.score_last(kept, job.directions[job.layer]))] if job.read else []
    with t.Hooks(read):
        if m.how == "skilled":
            tokens = t.greedy(
                m, ids, job.new, job.new if job.read else job.new - 1, positions=True
            )  # it tells padding by them
        else:
            tokens = m.control.generate(ids, max_new_tokens=job.new + job.read)[:, ids.shape[1] :][:, : job.new]
    m.control.reset()
    return {"tokens": tokens} | ({"scores": t.generated(kept, job.new)} if job.read else {})


def prefill(m, job):
    m.control.reset()
    return {"logits": m.control(job.ids, use_cache=False).logits[:, -1]}


generate, sweep = t.works(run)
