"""Which implementation of an op runs on a platform, and why: what was measured on a kind of device, else its roofline.

The roofline's figures of TPUs are those that Pallas knows (`pltpu.get_tpu_info_for_chip`). A GPU kernel is only chosen
where it was measured to win.
"""

import functools
import json
import logging
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

log = logging.getLogger("jaxemo.kernels")
TUNED = pathlib.Path(__file__).with_name("tuned.json")
FEW = 16  # tokens: a kernel that works row by row wastes its time on rows shorter than this
ROWS = 4096  # a kernel that works row by row keeps every row's spans at hand
GAIN = 1.1  # a kernel that was not timed must be this many times faster than the reference by the roofline
UNKNOWN = "TPU v5p"  # what a program that is compiled with no device at hand is planned for


class Work(NamedTuple):
    """One call of an op: `rows` of `T` activations of width `D` on `E` directions, and `M` steered directions."""

    op: str
    rows: int
    T: int
    D: int
    E: int
    x: str  # dtype
    directions: str  # dtype
    M: int = 0
    centred: bool = False
    cosine: bool = False


class Choice(NamedTuple):
    kernel: bool
    tile: int  # tokens a program of the kernel takes at a time
    why: str


class Device(NamedTuple):
    bandwidth: float  # bytes/s
    flops: float  # bfloat16
    on_chip: int  # bytes of VMEM or shared memory


KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
         "TPU v6e": "v6e", "TPU7x": "7x"}  # fmt: skip  # device_kind → pltpu.ChipVersion
GPUS = {"NVIDIA H100": Device(3.35e12, 989e12, 227 << 10), "NVIDIA H200": Device(4.8e12, 989e12, 227 << 10)}


told: set[str] = set()


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def tell(work: Work, platform: str, implementation: str, why: str) -> None:
    """Logs once, at the level INFO, what runs for `work` on a platform."""
    line = f"{work} on {platform}: {implementation}, {why}"
    if log.isEnabledFor(logging.INFO) and line not in told:
        told.add(line)
        log.info(line)


def here() -> str:
    """The platform of this process's devices: "cpu", "tpu" or "cuda"."""
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def spread() -> bool:
    """Whether arrays may lie on several of this process's devices: there are several, and this is not inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 and not (mesh.axis_names and set(mesh.manual_axes) == set(mesh.axis_names))


def device_kind(platform: str) -> str:
    """The kind of the device that programs of `platform` are compiled for, as far as this process knows."""
    if here() == platform:
        return jax.devices()[0].device_kind
    return UNKNOWN if platform == "tpu" else "unknown GPU"


@functools.cache
def device(kind: str) -> Device | None:
    if kind.startswith("TPU"):
        from jax.experimental.pallas import tpu as pltpu

        if kind not in KINDS:
            return None
        found = next(chip for chip in pltpu.ChipVersion if str(chip) == KINDS[kind])
        info = pltpu.get_tpu_info_for_chip(found, 1)
        return Device(info.mem_bw_bytes_per_second, info.bf16_ops_per_second, info.vmem_capacity_bytes)
    return next((figures for name, figures in GPUS.items() if kind.startswith(name)), None)


def passes(work: Work) -> tuple[int, int]:
    """bfloat16 matrix products that one product takes, in the kernel (float32 operands are split) and in XLA."""
    if work.x == "float32":
        return 6, 6
    if work.centred:
        return 3, 6
    return (2, 6) if work.directions == "float32" else (1, 1)


def cost(work: Work, kernel: bool) -> tuple[int, int]:
    """Bytes to and from memory, and bfloat16 FLOPs. The kernels read the activations once.

    What XLA moves is what its compiler for TPUs says (`make test-tpu` compares the two): within a quarter where D is a
    multiple of 128, and no more than it says where it is not, as XLA then makes copies. Matrix units work on whole blocks of
    128 columns, whatever the number of directions.
    """
    N, D, E, M = work.rows * work.T, work.D, work.E, work.M
    x = N * D * jnp.dtype(work.x).itemsize
    count = passes(work)[not kernel]
    constants = E * D * jnp.dtype(work.directions).itemsize + 2 * M * D * 4
    if kernel and work.x == "bfloat16":  # the parts of what is float32 are written, and read again
        constants += 2 * (E * D * 4 * (work.directions == "float32") + M * D * 4)
    flops = 2 * N * D * up(E, 128) * count
    scores = N * E * 4
    if work.op == "steer_project":
        exact = work.x == "float32" or not kernel
        flops += 2 * N * D * up(M, 128) * (6 + 6 if exact else 2 + 3)  # the projections, and the update
    if kernel:
        steered, scored = work.op == "steer_project", work.op in ("project", "steer_project")
        return constants + (1 + steered) * x + scored * scores, flops
    float32 = 2 * N * D * 4  # activations that are written as float32, and read
    if work.op == "steer_project":  # projections, update, lengths, scores
        return constants + (3 + (E > 0)) * x + float32 + scores, flops
    moved = constants + (1 + work.cosine) * x  # once for the products, once for the length
    if work.op == "project":
        moved += (1 + 2 * work.cosine * (E % 8 > 0)) * scores
    if work.op == "top_tokens":  # they are transposed and sorted
        moved += (8 if E % 8 else 4) * scores
    return moved, flops


def seconds(work: Work, figures: Device, kernel: bool) -> float:
    """The roofline's time: of memory traffic or arithmetic, whichever takes longer."""
    moved, flops = cost(work, kernel)
    return max(moved / figures.bandwidth, flops / figures.flops)


@functools.cache
def tuned() -> dict:
    return json.loads(TUNED.read_text()) if TUNED.exists() else {}


def distance(entry: dict, work: Work) -> float:
    """How far what was measured lies from `work`, on a logarithmic scale; inf where it does not speak for it.

    It does where what the kernel is compiled for is the same, D and E are within a factor of 1.5, and there are not many
    fewer tokens, which would leave parts of the chip idle. Steered directions are multiplied 64 at a time.
    """
    same = ("op", "x", "directions", "centred", "cosine")
    timed = work._replace(**{name: entry[name] for name in Work._fields})
    if any(getattr(timed, name) != getattr(work, name) for name in same) or bool(timed.E) != bool(work.E):
        return math.inf
    tokens, D, E, M = (
        math.log(mine / its)
        for mine, its in (
            (work.rows * work.T, timed.rows * timed.T),
            (work.D, timed.D),
            (max(work.E, 1), max(timed.E, 1)),
            (max(work.M, 1), max(timed.M, 1)),
        )
    )
    if max(abs(D), abs(E)) > math.log(1.5) or tokens < -math.log(4) or up(work.M, 64) != up(timed.M, 64):
        return math.inf
    return abs(tokens) + abs(D) + abs(E) + abs(M)


@functools.cache
def choose(work: Work, platform: str, kind: str, impl: str = "auto") -> Choice:
    """The implementation of `work` on `platform` ("tpu", "cuda" or "cpu"). `impl` may insist on "kernel" or "reference".

    Raises NotImplementedError where the kernel is insisted on and cannot take the shape.
    """
    if impl not in ("auto", "kernel", "reference"):
        raise ValueError(f"impl={impl!r}; expected 'auto', 'kernel' or 'reference'")
    if impl == "reference" or platform not in ("tpu", "cuda"):
        return Choice(False, 0, "asked for" if impl == "reference" else f"there is no kernel for {platform}")
    figures = device(kind)
    ranked = [(distance(entry, work), entry["speedup"], entry["tile"]) for entry in tuned().get(kind, ())]
    _, speedup, timed = min((found for found in ranked if found[0] < math.inf), default=(0, 0, 0))
    if impl == "auto" and not timed and (platform == "cuda" or figures is None):
        return Choice(False, 0, f"the kernel was not timed on {kind}")
    try:
        tile = tiles(work, platform, figures)
    except NotImplementedError as error:
        if impl == "kernel":
            raise
        return Choice(False, 0, str(error))
    if impl == "kernel":
        return Choice(True, tile, "asked for")
    if work.op != "project" and work.T < FEW:
        return Choice(False, 0, f"rows of {work.T} tokens are too short for the kernel")
    if platform == "cuda" and work.op != "project" and work.T % 8:
        return Choice(False, 0, f"rows of {work.T} tokens would be copied first, to make them a multiple of 8")
    if timed:
        # The tile is of the shape that was timed, which may be the smaller.
        return Choice(speedup > 1, min(tile, timed), f"measured on {kind}: {speedup:.2f}x the reference")
    assert figures is not None
    gain = seconds(work, figures, False) / seconds(work, figures, True)
    return Choice(gain >= GAIN, tile, f"{gain:.2f}x the reference by the roofline of {kind}")


def tiles(work: Work, platform: str, figures: Device | None) -> int:
    """Tokens a program takes at a time: the largest power of two whose operands fit. Raises NotImplementedError for none."""
    if work.x not in ("float32", "bfloat16"):
        raise NotImplementedError(f"activations are {work.x}, not float32 or bfloat16")
    if 0 in (work.rows, work.T, work.D, work.M if work.op == "steer_project" else work.E):
        raise NotImplementedError("there is nothing to multiply")
    if work.rows > ROWS and work.op != "project":
        raise NotImplementedError(f"what is to be known of {work.rows} rows does not fit a chip's scalar memory")
    if platform == "cuda":
        try:
            from jaxemo.kernels import hopper  # here: it imports this module
        except ImportError as error:
            raise NotImplementedError("this JAX has no Mosaic GPU") from error
        return hopper.tile(work)
    room = int(0.7 * (figures.on_chip if figures else 64 << 20))
    lanes = up(work.E, 128)
    parts = 1 + (work.directions == "float32") if work.x == "bfloat16" else 2  # float32 counts double
    constants = 2 * work.D * (parts * up(work.E, 16) + 2 * up(work.M, 16))
    wide = 3 if work.op == "steer_project" else 1 + work.cosine + 4 * work.centred  # float32 copies of a tile
    moved = jnp.dtype(work.x).itemsize * 2 * (2 if work.op == "steer_project" else 1)  # read (and written), two buffers
    for tile in (1024, 512, 256, 128, 64, 32, 16):
        if work.op == "top_tokens" and tile * lanes > 1 << 17:
            continue  # the scores of a tile are gone through k times
        if constants + tile * (work.D * (moved + 4 * wide) + lanes * 4 * 4) <= room:
            return min(tile, up(work.T, 16))
    raise NotImplementedError(
        f"{work.E} directions of width {work.D} do not fit the chip's memory beside a tile of activations"
    )
