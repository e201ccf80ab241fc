"""Damaged GGUF files without end: `python tests/fuzz_gguf.py [COUNT] [SEED]` tries COUNT of them (100,000).

Every one must be read as it stands or refused with a CheckpointError that names the file. The tests run some hundreds.
"""

import random
import struct
import sys
import time
import tracemalloc

import gguf
import numpy as np
from jaxemo.checkpoints import CheckpointError
from jaxemo.checkpoints import gguf as gguf_lib
from jaxemo.checkpoints.gguf_tokenizer import build_tokenizer

FORMS = {"u8": (0, "<B"), "u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q")}
STRING, ARRAY = 8, 9


def build(meta, tensors, version=3, alignment=32):
    """The bytes of a GGUF, and (offset, width) of every number that says how to read it.

    `meta` maps keys to (type, value), where the type is one of FORMS, "str" or ("array", element type); `tensors` maps
    names to (shape, kind, bytes).
    """
    out, numbers = bytearray(), []

    def put(form, value):
        numbers.append((len(out), struct.calcsize(form)))
        out.extend(struct.pack(form, value))

    def text(value):
        raw = value if isinstance(value, bytes) else value.encode()
        put("<Q", len(raw))
        out.extend(raw)

    def element(kind, value):
        text(value) if kind == "str" else out.extend(struct.pack(FORMS[kind][1], value))

    out.extend(b"GGUF")
    put("<I", version)
    put("<Q", len(tensors))
    put("<Q", len(meta))
    for key, (kind, value) in meta.items():
        text(key)
        if isinstance(kind, tuple):
            put("<I", ARRAY)
            put("<I", STRING if kind[1] == "str" else FORMS[kind[1]][0])
            put("<Q", len(value))
            for one in value:
                element(kind[1], one)
        else:
            put("<I", STRING if kind == "str" else FORMS[kind][0])
            element(kind, value)
    at = 0
    for name, (shape, kind, raw) in tensors.items():
        text(name)
        put("<I", len(shape))
        for n in reversed(shape):
            put("<Q", n)
        put("<I", kind)
        put("<Q", at)
        at += -(-len(raw) // alignment) * alignment
    for _, _, raw in tensors.values():
        out.extend(bytes(-len(out) % alignment) + raw)
    return bytes(out), numbers


def sample(style: str = "gpt2", rows: int = 12):
    """A small whole file, as `build` returns it: a tokenizer of the model `style` and tensors of five kinds.

    `rows` are those of the largest tensor, of 68 bytes each.
    """
    letters = "abcdefgh"
    if style == "gpt2":
        tokens = [*letters, "Ġ", "ab", "cd", "abcd", "<|end|>"]
        more = {"tokenizer.ggml.pre": ("str", "smollm"),
                "tokenizer.ggml.merges": (("array", "str"), ["a b", "c d", "ab cd"])}  # fmt: skip
        kinds = [1] * (len(tokens) - 1) + [3]
    else:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(8)), *letters, "▁", "ab", "▁ab"]
        more = {"tokenizer.ggml.scores": (("array", "f32"), [-float(i) for i in range(len(tokens))])}
        kinds = [2, 3, 3, *[6] * 8, *[1] * 11]
    meta = {
        "general.architecture": ("str", "llama"),
        "general.alignment": ("u32", 32),
        "llama.block_count": ("u32", 2),
        "llama.rope.freq_base": ("f32", 1e4),
        "llama.widths": (("array", "u64"), [16, 32, 48]),
        "tokenizer.ggml.model": ("str", style),
        "tokenizer.ggml.tokens": (("array", "str"), tokens),
        "tokenizer.ggml.token_type": (("array", "i32"), kinds),
        **more,
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.add_bos_token": ("bool", True),
        "tokenizer.chat_template": ("str", "{{ messages }}"),
    }
    rng, tensors = np.random.default_rng(0), {}
    for name, shape, kind in [("token_embd.weight", (rows, 64), "Q8_0"), ("output_norm.weight", (64,), "F32"),
                              ("blk.0.attn_q.weight", (2, 256), "Q4_K"), ("blk.0.attn_k.weight", (3, 5, 7), "F16"),
                              ("blk.1.ffn_up.weight", (2, 32), "BF16")]:  # fmt: skip
        number = gguf.GGMLQuantizationType[kind]
        block, width = gguf.GGML_QUANT_SIZES[number]
        raw = rng.integers(0, 256, int(np.prod(shape)) // block * width, np.uint8).tobytes()
        tensors[name] = (shape, int(number), raw)
    return build(meta, tensors)


ODD = [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
       (1 << 40) + 1, (1 << 61) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip


def mutate(rng: random.Random, data: bytes, numbers) -> bytes:
    """One to three of: bits flipped, bytes set, a count or length or offset changed, a part cut, doubled or moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        how = rng.randrange(8)
        at = rng.randrange(len(out)) if out else 0
        if how <= 2 and len(out) >= len(data) // 2:
            offset, width = rng.choice(numbers)
            old = int.from_bytes(out[offset : offset + width], "little")
            near = old + rng.choice((-33, -32, -8, -2, -1, 1, 2, 8, 32, 33))
            new = rng.choice((near, near, rng.choice(ODD), old << rng.randrange(64), rng.getrandbits(8 * width)))
            out[offset : offset + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
        elif how == 3 and out:
            for _ in range(rng.choice((1, 1, 4))):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif how == 4:
            part = rng.choice((b"\0", b"\xff", rng.randbytes(8), bytes(8), b"\xff" * 8))
            out[at : at + len(part)] = part
        elif how == 5:
            del out[at:]
        elif how == 6:
            out.extend(rng.randbytes(rng.choice((1, 8, 100))))
        else:
            end = min(len(out), at + rng.randrange(64))
            other = rng.randrange(len(out)) if out else 0
            out[other:other] = out[at:end]
            if rng.random() < 0.5:
                del out[at:end]
    return bytes(out)


def attempt(data: bytes):
    """The GGUF if the bytes are read, None if refused by the project's own error. Anything else comes through."""
    try:
        found = gguf_lib.parse("damaged.gguf", data)
        for name, shape in found.shapes.items():
            assert found.read(name).shape == shape
        build_tokenizer("damaged.gguf", found.meta)
        return found
    except CheckpointError as error:
        assert str(error).startswith("damaged.gguf: ") and str(error).isprintable(), str(error)
        return None


def main(count: int, seed: int) -> None:
    samples = [sample("gpt2"), sample("llama")]
    rng, read, slowest, begin = random.Random(seed), 0, 0.0, time.perf_counter()
    for i in range(count):
        data = mutate(rng, *samples[i % 2])
        start = time.perf_counter()
        read += attempt(data) is not None
        slowest = max(slowest, time.perf_counter() - start)
    took = time.perf_counter() - begin
    print(f"{count} damaged files: {read} read, {count - read} refused; {1e3 * took / count:.2f} ms each, "
          f"the slowest {1e3 * slowest:.1f} ms")  # fmt: skip
    large = sample("llama", rows=50_000)
    worst = max(peak(mutate(rng, *large)) for _ in range(count // 20))
    print(f"of {count // 20} more, opening takes at most {worst / len(large[0]):.2f}x the file's {len(large[0])} bytes")


def peak(data: bytes) -> int:
    """The most memory in bytes that opening a file takes, beside the file itself."""
    tracemalloc.start()
    try:
        gguf_lib.parse("damaged.gguf", data)
    except CheckpointError:
        pass
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return most


if __name__ == "__main__":
    main(*[int(given) for given in (sys.argv[1:] + ["100000", "0"][len(sys.argv) - 1 :])])
