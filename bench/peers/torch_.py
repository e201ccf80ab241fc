"""What the PyTorch contenders share: set-up, loading, inputs as tensors, hooks, and a greedy loop as a skilled user writes it."""

import inspect
import os
import pathlib
import types

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled",
               "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip

import numpy as np
import torch
import transformers


def start(spec) -> None:
    torch.set_num_threads(spec["threads"])
    torch.set_float32_matmul_precision("highest")
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    if hasattr(transformers.utils.logging, "disable_progress_bar"):
        transformers.utils.logging.disable_progress_bar()
    torch.ones(3, device=spec["device"]).sum().item()


def load_hf(spec):
    """The model as transformers loads it, every page of its weights read (they may be mapped), and its tokenizer, if any."""
    if (pathlib.Path(spec["model"]) / "tokenizer.json").exists():  # as jaxemo.load does
        transformers.AutoTokenizer.from_pretrained(spec["model"])
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    model = model.to(spec["device"]).eval()
    config = model.generation_config  # greedy, and no early stop
    config.do_sample, config.eos_token_id, config.pad_token_id = False, None, 0
    touch(model)
    return model


def touch(model) -> None:
    for p in model.parameters():
        p.view(-1)[::1024].sum()
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def holder(spec, model, **more):
    return types.SimpleNamespace(model=model, how=spec["how"], device=spec["device"], layer=spec["layer"], **more)


def prepare(m, job, inputs) -> types.SimpleNamespace:
    """The job with its inputs as tensors on the device."""
    kind = next(m.model.parameters()).dtype
    job = types.SimpleNamespace(**job)
    job.ids = torch.from_numpy(inputs[job.ids][: job.rows, : getattr(job, "length", None)].astype(np.int64)).to(
        m.device
    )
    job.directions = torch.from_numpy(inputs["directions"]).to(m.device, kind)  # [L, E, D]
    job.vectors = None
    if getattr(job, "steer", None):
        vectors = inputs["vectors"][: 1 if job.steer == "same" else job.conditions]
        job.vectors = torch.from_numpy(vectors).to(m.device, kind)
        if job.steer == "same":
            job.vectors = job.vectors.expand(job.rows, -1)
    job.layer = m.layer
    job.read = getattr(job, "read", False)
    return job


def finish(outputs):
    if next(iter(outputs.values())).is_cuda:
        torch.cuda.synchronize()
    return outputs


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def device_peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def to_numpy(array) -> np.ndarray:
    return (array.float() if array.is_floating_point() else array.to(torch.int32)).cpu().numpy()


def blocks(model):
    return model.model.layers


def first(output):
    """A block's residual stream: transformers 4 returned it in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output, x):
    return (x, *output[1:]) if isinstance(output, tuple) else x


class Hooks:
    """Forward hooks for as long as a `with` lasts. `pairs` are (block, function of its residual stream)."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __enter__(self):
        def hook(act):
            def run(module, inputs, output):
                changed = act(first(output))
                return None if changed is None else with_first(output, changed)

            return run

        self.handles = [block.register_forward_hook(hook(act)) for block, act in self.pairs]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def score_last(kept: list, directions):
    """A hook that keeps every token's scores `[B, T, E]` on `directions [E, D]` of the layer, in float32."""

    def act(x):
        kept.append((x @ directions.T).float())

    return act


def cache_key(model) -> str:
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def greedy(m, ids, n: int, feeds: int, decode=None, positions=False):
    """n tokens greedily, `[B, n]`: one prefill, then one token at a time through a cache of fixed size.

    `feeds` is how many of them pass through the model: all n where every token is to be read, else n - 1. `positions` says
    them to the model, row by row, instead of leaving them to it.
    """
    B, T = ids.shape
    place = torch.arange(T + n, device=ids.device).expand(B, -1)

    def at(begin, end):
        return {"position_ids": place[:, begin:end]} if positions else {}

    key = cache_key(m.model)
    cache = transformers.StaticCache(config=m.model.config, max_cache_len=T + n)
    out = m.model(ids, **{key: cache}, use_cache=True, logits_to_keep=1, **at(0, T))
    tokens = torch.empty((B, n), dtype=torch.long, device=ids.device)
    tokens[:, 0] = out.logits[:, -1].argmax(-1)
    for i in range(feeds):
        token = tokens[:, i : i + 1]
        logits = (decode or m.model)(
            token, **{key: cache}, use_cache=True, logits_to_keep=1, **at(T + i, T + i + 1)
        ).logits
        if i + 1 < n:
            tokens[:, i + 1] = logits[:, -1].argmax(-1)
    return tokens


def generated(kept: list, n: int):
    """Scores `[B, n, E]` of the generated tokens from what a hook kept: the prompt's first, then one token each time."""
    return torch.cat(kept[1 : n + 1], dim=1)


def flattened(job):
    """The rows of a sweep, conditions × prompts, in batches: (ids, vectors)."""
    C, P = len(job.vectors), len(job.ids)
    row = torch.arange(C * P, device=job.ids.device)
    for part in row.split(job.batch):
        yield job.ids[part % P], job.vectors[part // P]


def works(run):
    """`generate` and `sweep` of a contender from its `run(m, job, ids, vectors)`: a user's sweep is a loop over conditions and prompts,
    a skilled one's is in full batches of rows with a vector each."""

    def generate(m, job):
        return run(m, job, job.ids, job.vectors)

    def sweep(m, job):
        if m.how == "skilled":
            rows = [run(m, job, ids, vectors)["tokens"] for ids, vectors in flattened(job)]
        else:
            rows = [run(m, job, ids[None], vector[None])["tokens"] for vector in job.vectors for ids in job.ids]
        return {"tokens": torch.cat(rows).reshape(len(job.vectors), len(job.ids), job.new)}

    return generate, sweep
