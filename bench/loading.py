"""How long loading takes and how much memory: `python bench/loading.py [--peer] [MODEL ...]`.

Every figure is from a fresh process. Memory is the most that the process held resident while loading, mapped files
included, above what it held after its imports and a first small computation, as a multiple of the finished parameters;
Linux keeps that record, so no peak is missed.
`--peer` also loads GGUF models with transformers (`make parity` makes an environment that has it). Without models:
SmolLM2-135M, Gemma 3 270M where it has been pulled, and a made-up Llama of 1 GB in bfloat16 as safetensors and as
jaxemo's store. Writes bench/results/loading.json.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

RUNS = 3
MEASURE = """
import json, sys, time
def held(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(what))
def watched(load):
    base = held("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the kernel's record of the peak begins again
    begin = time.perf_counter()
    kept = load()
    seconds = time.perf_counter() - begin
    return kept, seconds, held("VmHWM") - base
"""
OURS = (
    MEASURE
    + """
import jax, jax.numpy as jnp, jaxemo, jaxemo.checkpoints.loading, jaxemo.checkpoints.gguf
from jaxemo.checkpoints import huggingface
name, dtype, stacked = json.loads(sys.argv[1])
jnp.ones(3).block_until_ready()
lm, seconds, peak = watched(lambda: jaxemo.load(name, dtype=dtype, stacked=stacked))
size = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
print(json.dumps({"seconds": seconds, "peak": peak / size, "megabytes": size / 1e6}))
"""
)
PEER = (
    MEASURE
    + """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
import pathlib, torch, transformers
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
path = pathlib.Path(json.loads(sys.argv[1]))
torch.ones(3).sum()
def load():
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
(model, _), seconds, peak = watched(load)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"seconds": seconds, "peak": peak / size, "megabytes": size / 1e6}))
"""
)


def run(script: str, *given) -> dict:
    done = subprocess.run([sys.executable, "-c", script, json.dumps(given[0] if len(given) == 1 else given)],
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def median(script: str, *given) -> dict:
    found = [run(script, *given) for _ in range(RUNS)]
    return {key: statistics.median(one[key] for one in found) for key in found[0]} | {
        "fastest": min(one["seconds"] for one in found), "slowest": max(one["seconds"] for one in found)}  # fmt: skip


def make_models(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """A Llama of 0.5 billion random weights, in both forms."""
    import ml_dtypes
    import numpy as np
    import safetensors.numpy
    from jaxemo.checkpoints import loading, store

    D, L, F, V, N, K = 2048, 8, 5632, 32000, 16, 4
    config = {"model_type": "llama", "hidden_size": D, "num_hidden_layers": L, "intermediate_size": F, "vocab_size": V,
              "num_attention_heads": N, "num_key_value_heads": K, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
              "tie_word_embeddings": False}  # fmt: skip
    shapes = {"model.embed_tokens": (V, D), "lm_head": (V, D), "model.norm": (D,)}
    for i in range(L):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm": (D,), layer + "post_attention_layernorm": (D,),
                   layer + "self_attn.q_proj": (D, D), layer + "self_attn.o_proj": (D, D),
                   layer + "self_attn.k_proj": (D * K // N, D), layer + "self_attn.v_proj": (D * K // N, D),
                   layer + "mlp.gate_proj": (F, D), layer + "mlp.up_proj": (F, D), layer + "mlp.down_proj": (D, F)}  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
               for name, shape in shapes.items()}  # fmt: skip
    plain = folder / "safetensors"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, plain / "model.safetensors")
    source, tokenizer = loading.open_model(plain)
    store.write(source, tokenizer, folder / "store", np.dtype(ml_dtypes.bfloat16))
    return {"made-up Llama, safetensors": plain, "made-up Llama, store": folder / "store"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("model", nargs="*")
    args = parser.parse_args()
    from jaxemo.checkpoints import registry

    known = {name: registry.path_of(name) for name in registry.REGISTRY if registry.path_of(name).exists()}
    with tempfile.TemporaryDirectory() as folder:
        models = {name: known.get(name, pathlib.Path(name)) for name in args.model}
        models = models or known | make_models(pathlib.Path(folder))
        print(f"medians of {RUNS} fresh processes on {os.cpu_count()} cores")
        rows = []
        for name, path in models.items():
            for dtype in ("float32", "bfloat16"):
                for stacked in (False, True):
                    rows.append({"model": name, "by": "jaxemo", "dtype": dtype, "stacked": stacked}
                                | median(OURS, str(path), dtype, stacked))  # fmt: skip
                    show(rows[-1])
            if args.peer and path.suffix == ".gguf":
                rows.append({"model": name, "by": "transformers", "dtype": "float32"} | median(PEER, str(path)))
                show(rows[-1])
    versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy", "gguf")}
    if args.peer:
        versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    about = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "python": platform.python_version(),
             "versions": versions, "rows": rows}  # fmt: skip
    target = pathlib.Path(__file__).parent / "results" / "loading.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(about, indent=1) + "\n")
    print(f"written to {target}")


def show(row: dict) -> None:
    layout = {True: "stacked", False: "separate"}.get(row.get("stacked"), "")
    print(f"{row['model']:28} {row['by']:12} {row['dtype']:9} {layout:9} {row['seconds']:6.2f} s "
          f"({row['fastest']:.2f} to {row['slowest']:.2f})  memory {row['peak']:.2f} x {row['megabytes']:.0f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
