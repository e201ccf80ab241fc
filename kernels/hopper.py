"""What the ops' kernels for Hopper GPUs (Pallas' Mosaic GPU) share. They were lowered and interpreted, and have not run on a GPU yet.

A program takes a tile of tokens and a block of directions. One warpgroup streams both through shared memory, 64 of the D
numbers at a time, and two warpgroups multiply their halves of the tile's tokens into registers (WGMMA), where the scores
stay until the op reduces or writes them. The tensor cores multiply bfloat16, so float32 operands are split into bfloat16
parts: directions beforehand, activations (float32, or centred) on their way from one place in shared memory to another.
Where the directions take more than one block, the programs of a tile follow each other, so that its activations come from
memory once and from the L2 cache after that.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxemo.kernels import choice
from jaxemo.kernels.choice import up
from jaxemo.kernels.project.reference import inverse
from jaxemo.kernels.split import split

K = 64  # of the D numbers a step: one swizzled line of 128 bytes of bfloat16
PIECE = 64  # tokens that leave a warpgroup's registers at a time; also the rows of one WGMMA
WORKERS = 2  # warpgroups that multiply
# JAX without plgpu.store: the compiler searches long for a swizzle of what is written one way and read another, unless there can be none.
GAP = 0 if hasattr(plgpu, "store") else 4
SHARED = 227 << 10  # bytes of shared memory a program may have
TILED = (plgpu.TilingTransform((8, K)), plgpu.SwizzleTransform(128))
TILED_FLOAT32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
UNIT = {"project": 64, "project_pool": 128, "top_tokens": 128}  # columns that leave the registers at a time


def columns(E: int, unit: int, widest: int = 256) -> int:
    """Directions a program takes: E in as few blocks as there can be, of about the same size, a multiple of `unit`."""
    return up(-(-E // -(-E // widest)), unit)


def parts(x: str, directions: str, centred: bool) -> tuple[int, int]:
    """In how many bfloat16 parts the activations and the directions are multiplied; activations as they are count 0."""
    if x == "float32":
        return 3, 3 if directions == "float32" else 1
    count = 2 if directions == "float32" else 1
    return 4 - count if centred else 0, count


def pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """`x` with zeros at the end of an axis, or as it is."""
    return jnp.pad(x, [(0, size - n if i == axis % x.ndim else 0) for i, n in enumerate(x.shape)])


def fit(work: choice.Work, tile: int) -> tuple[int, int]:
    """Directions a program takes, and steps in shared memory at a time. Raises NotImplementedError where none fit."""
    unit = UNIT[work.op]
    of_x, of_directions = parts(work.x, work.directions, work.centred)
    for widest, least in ((256, 2), (128, 2), (128, 1)):
        C = columns(work.E, unit, widest)
        # Parts of x, pieces, offset and scale; then tiles of x and of directions, and the centre.
        fixed = 2 * of_x * tile * K + 4 * WORKERS * (PIECE * (unit + GAP) + 2 * C) + 4096  # and barriers, alignment
        step = tile * K * (4 if work.x == "float32" else 2) + of_directions * K * C * 2 + 4 * K * work.centred
        steps = min((SHARED - fixed) // step, 4, work.D // K)
        # A warpgroup's registers hold 64 x 256 numbers with what else it needs, or 128 x 192 with next to nothing.
        held = tile // WORKERS * C <= (128 * 128 if of_x or work.cosine else 128 * 192)
        if steps >= min(least, work.D // K) and held:
            return C, steps
    raise NotImplementedError(f"tiles of {tile} tokens of {work.op} do not fit a GPU's registers or shared memory")


def tile(work: choice.Work) -> int:
    """Tokens a program takes. Raises NotImplementedError, naming why, for what the kernels do not take."""
    for name, dtype in (("activations", work.x), ("directions", work.directions)):
        if dtype not in ("bfloat16", "float32"):
            raise NotImplementedError(f"the GPU kernels take bfloat16 and float32, not {dtype} {name}")
    if max((work.rows * work.T // 128,) if work.op == "project" else (work.rows, work.T // PIECE)) > 65534:
        raise NotImplementedError(f"{work.rows} rows of {work.T} tokens are more programs than a GPU starts at once")
    if work.D % K:
        raise NotImplementedError(f"the GPU kernels take a width that is a multiple of {K}, not {work.D}")
    if work.op == "steer_project":
        if work.x != "bfloat16":
            raise NotImplementedError(f"the GPU kernel of steer_project takes bfloat16 activations, not {work.x}")
        if work.M > 256:
            raise NotImplementedError(
                f"the GPU kernel of steer_project takes up to 256 steered directions, not {work.M}"
            )
        if steer_shared(work) > SHARED:
            raise NotImplementedError(
                f"{PIECE} activations of width {work.D} do not fit a GPU's shared memory beside what steers them"
            )
        return PIECE
    fit(work, 128)
    # More tokens for the same directions, where that takes no more blocks of them, and the compiler can cope.
    if work.op != "top_tokens" and not parts(work.x, work.directions, work.centred)[0]:
        with contextlib.suppress(NotImplementedError):
            if fit(work, 256)[0] == columns(work.E, UNIT[work.op]):
                return 256
    return 128


def steer_shared(work: choice.Work) -> int:
    """Bytes of shared memory of `steer_project`: its tokens, and two steps of the bank or the directions at a time."""
    M = up(max(work.M, 1), 64)
    passing = max(2 * M, (1 + (work.directions == "float32")) * columns(work.E, 64, 128) if work.E else 0)
    return 2 * PIECE * work.D + 4 * PIECE * M + 16 * M + 2 * K * 2 * passing + 4 * PIECE * 64 * bool(work.E) + 4096


def sweep(x, directions, centre, offset, scale, finish, out_types, *, op, cosine, tile, interpret, scalars=()):
    """Scores of `x [B, T, D]` tile by tile, each piece `[64, unit]` of them handed to `finish`, and what that wrote.

    `finish(scores, refs, stage, place)` gets the scores of 64 tokens in registers, the refs of `scalars` and outputs, a
    float32 array of its warpgroup `[64, unit]` in shared memory, and where it is: row, first token, and first direction.
    """
    B, T, D = x.shape
    E, unit = directions.shape[0], UNIT[op]
    work = choice.Work(op, B, T, D, E, str(x.dtype), str(directions.dtype), 0, centre is not None, cosine)
    of_x, of_directions = parts(work.x, work.directions, work.centred)
    rows, (C, steps) = tile // WORKERS, fit(work, tile)
    width = up(E, C)
    banks = [pad(part.T, 1, width) for part in split(directions, of_directions)]
    affine = jnp.stack([jnp.zeros(E) if offset is None else offset, jnp.ones(E) if scale is None else scale])
    affine = pad(affine.astype(jnp.float32), 1, width)
    centres = [] if centre is None else [centre.astype(jnp.float32)]
    x = pad(x, 1, up(T, 8))  # what the copy engine's view of a swizzled array needs

    def kernel(x_ref, bank_refs, centre_refs, affine_ref, scalar_refs, *refs):
        *out_refs, stage, affines, ready, split_refs = refs
        row, i, block, worker = (lax.axis_index(name) for name in ("row", "tile", "block", "worker"))
        mine = pl.ds(worker * rows, rows)

        def multiply(_, x_ref, bank_refs, centre_refs, carry):
            total, square = carry
            if not of_x:
                for bank in bank_refs:
                    plgpu.wgmma(total, x_ref.at[mine], bank)
            if cosine or of_x:
                y = x_ref[mine].astype(jnp.float32)
                for centre in centre_refs:
                    y = y - lax.broadcast_in_dim(centre[...], y.shape, (1,))
                if cosine:
                    square = square + jnp.sum(y * y, axis=1)
            for p in range(of_x):
                part = y.astype(jnp.bfloat16)
                split_refs[0][worker, p] = part
                y = y - part.astype(jnp.float32)
            if of_x:
                plgpu.commit_smem()
            for p in range(of_x):
                for bank in bank_refs[: max(of_x, of_directions) - p]:  # without products of low parts
                    plgpu.wgmma(total, split_refs[0].at[worker, p], bank)
            plgpu.wgmma_wait(0)
            return total, square

        def compute(pipeline):
            @functools.partial(pl.run_scoped, total=plgpu.ACC((rows, C), jnp.float32))
            def _(total):
                plgpu.copy_gmem_to_smem(affine_ref.at[:, pl.ds(block * C, C)], affines.at[worker], ready.at[worker])
                _, square = pipeline((total, jnp.zeros((rows,), jnp.float32)))
                scores = total[...]
                if cosine:
                    scores = scores * lax.broadcast_in_dim(inverse(square), scores.shape, (0,))
                plgpu.barrier_wait(ready.at[worker])
                for down in range(0, rows, PIECE):
                    for right in range(0, C, unit):
                        piece = scores[down : down + PIECE, right : right + unit]
                        shift, stretch = (
                            lax.broadcast_in_dim(affines[worker, n, right : right + unit], piece.shape, (1,))
                            for n in range(2)
                        )
                        place = row, i * tile + worker * rows + down, block * C + right
                        finish((piece - shift) * stretch, (*scalar_refs, *out_refs), stage.at[worker, :, :unit], place)
                plgpu.wait_smem_to_gmem(0)

        float32 = work.x == "float32"
        plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(D // K,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec((tile, K), lambda k: (0, k), transforms=TILED_FLOAT32 if float32 else TILED),
                [plgpu.BlockSpec((K, C), lambda k: (k, 0), transforms=TILED)] * of_directions,
                [plgpu.BlockSpec((K,), lambda k: (k,))] * len(centres),
            ],
            wg_axis="worker",
            num_compute_wgs=WORKERS,
            max_concurrent_steps=steps,
            compute_context=compute,
        )(x_ref.at[row, pl.ds(i * tile, tile)], [bank.at[:, pl.ds(block * C, C)] for bank in bank_refs], centre_refs)

    return plgpu.kernel(
        kernel,
        out_type=out_types(up(T, 8), width),
        grid=(B, pl.cdiv(T, tile), width // C),
        grid_names=("row", "tile", "block"),
        num_threads=WORKERS + 1,
        thread_name="worker",
        scratch_types=[
            plgpu.SMEM(
                (WORKERS, PIECE, unit if op == "project" else unit + GAP),
                jnp.float32,
                transforms=TILED_FLOAT32 if op == "project" else (),
            ),
            plgpu.SMEM((WORKERS, 2, C), jnp.float32),
            plgpu.Barrier(num_barriers=WORKERS),
            [plgpu.SMEM((WORKERS, of_x, rows, K), jnp.bfloat16, transforms=TILED)] * bool(of_x),
        ],
        compiler_params=PARAMS,
        interpret=interpret,
        kernel_name=op,
    )(x, banks, centres, affine, list(scalars))


def put(ref, value) -> None:
    """Stores in shared memory in the order of `ref`, for reading it back otherwise than it was written."""
    if hasattr(plgpu, "store"):  # before there was one, any store was taken
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
    wait()


def wait() -> None:
    """Waits for all of the warpgroup: nobody reads what is not written yet, or overwrites what another still reads."""
    plgpu.commit_smem()
