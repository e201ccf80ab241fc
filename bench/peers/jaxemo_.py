"""jaxemo, through its public entry points alone."""

import types

import jax
import numpy as np

import jaxemo

PACKAGES = ("jax", "jaxlib")


def start(spec) -> None:
    jax.numpy.ones(3).block_until_ready()


def load(spec):
    lm = jaxemo.load(spec["model"], dtype=spec["dtype"])
    jax.block_until_ready(lm.params)
    return types.SimpleNamespace(lm=lm, layer=spec["layer"])


def prepare(m, job, inputs):
    job = types.SimpleNamespace(**job)
    job.ids = inputs[job.ids][: job.rows, : getattr(job, "length", None)]
    job.directions, job.layer = inputs["directions"], m.layer
    job.steering = None
    if getattr(job, "steer", None):
        vectors = inputs["vectors"][: 1 if job.steer == "same" else job.conditions]
        L, D = m.lm.config.n_layers, vectors.shape[1]
        job.steering = [jaxemo.steering.add(np.broadcast_to(v, (L, D)), np.linalg.norm(v), [m.layer]) for v in vectors]
        if job.steer == "same":
            job.steering = job.steering[0]
    job.read = types.SimpleNamespace(names=[str(i) for i in range(job.directions.shape[1])], directions=job.directions,
                                     layer=m.layer) if getattr(job, "read", False) else None  # fmt: skip
    job.capture = jaxemo.Capture(scores={"resid_post": "all"}, directions=job.directions)
    return job


def prefill(m, job):
    return {"logits": m.lm.forward(job.ids, logits="last").logits}


def readout(m, job):
    out = m.lm.forward(job.ids, capture=job.capture, logits="last")
    return {"logits": out.logits, "scores": out.captured.scores["resid_post"]}


def generate(m, job):
    read = {"read": job.read, "layer": job.layer} if job.read else {}
    done = m.lm.generate(job.ids, job.steering, job.new, stop=[], **read)
    return {"tokens": done.tokens} | ({"scores": done.scores} if job.read else {})


def sweep(m, job):
    conditions = {str(c): steering for c, steering in enumerate(job.steering)}
    grid = jaxemo.sweep(m.lm, job.ids, conditions, max_new_tokens=job.new, stop=[], rows=job.batch, progress=False)
    return {"tokens": grid.tokens[:, :, 0]}


def finish(outputs):
    return jax.block_until_ready(outputs)


def reset_peak() -> None:
    pass


def device_peak() -> int:
    device = jax.local_devices()[0]
    return 0 if device.platform == "cpu" else device.memory_stats()["peak_bytes_in_use"]  # of the process so far


def to_numpy(array) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.kind not in "iu" else array
