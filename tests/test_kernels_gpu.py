"""The Hopper kernels, without a GPU: that they lower for CUDA, and what they compute under Pallas' interpreter.

The interpreter runs the copies, barriers and WGMMAs of a kernel as NumPy. It copies at once, so that a missing wait goes
unseen, and knows nothing of registers, nor of what PTX makes of the program.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jaxemo.kernels import choice, hopper
from jaxemo.kernels.project.gpu import project
from jaxemo.kernels.project.reference import project as project_reference
from jaxemo.kernels.project_pool.gpu import project_pool
from jaxemo.kernels.steer_project.gpu import steer_project
from jaxemo.kernels.steer_project.reference import steer_project as steer_project_reference
from jaxemo.kernels.top_tokens.gpu import top_tokens

# What is read beyond an array is NaN, and so is memory that nobody wrote.
PARAMS = InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="nan")
BF16, F32 = "bfloat16", "float32"


def normal(seed, shape, dtype=F32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def units(seed, shape, dtype=F32):
    d = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(d / np.linalg.norm(d, axis=-1, keepdims=True), dtype)


def oracle(x, directions, centre=None, offset=None, scale=None, cosine=False):
    x, directions, *rest = (
        None if v is None else np.asarray(v).astype(np.float64) for v in (x, directions, centre, offset, scale)
    )
    centre, offset, scale = rest
    y = x if centre is None else x - centre
    scores = y @ directions.T
    if cosine:
        length = np.linalg.norm(y, axis=-1, keepdims=True)
        scores = np.divide(scores, length, out=np.zeros_like(scores), where=length > 0)
    return (scores - (0 if offset is None else offset)) * (1 if scale is None else scale)


def bound(x, directions, centre=None, scale=None, cosine=False):
    """What the scores of the test may be off: float32 sums, and 16 bits of what is split in two parts."""
    y = np.asarray(x).astype(np.float64) - (0 if centre is None else np.asarray(centre))
    split = x.dtype == jnp.bfloat16 and directions.dtype == jnp.float32
    eps = np.finfo(np.float32).eps * y.shape[-1] ** 0.5 + (2.0**-15 if split else 0)
    length = np.ones(y.shape[:-1]) if cosine else np.linalg.norm(y, axis=-1)
    return eps * (length[..., None] + 1) * (1 if scale is None else np.maximum(abs(np.asarray(scale)), 1))


def interpreted(function, *arrays, **options):
    """What the kernel computes, as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.jit(functools.partial(function, interpret=PARAMS, **options))(*arrays))


def lowered(function, *arrays, **options) -> str:
    run = functools.partial(function, interpret=False, **options)
    return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def work(op, x, directions, M=0, centred=False, cosine=False):
    *rows, T, D = x.shape
    return choice.Work(
        op, int(np.prod(rows)), T, D, len(directions), str(x.dtype), str(directions.dtype), M, centred, cosine
    )


READOUTS = [
    ("project", project, {}),
    *(("project_pool", project_pool, {"how": how}) for how in ("mean", "max", "last")),
    ("top_tokens", top_tokens, {"k": 4}),
]


@pytest.mark.parametrize(
    ("op", "function", "options"), READOUTS, ids=lambda v: str(v) if isinstance(v, (str, dict)) else ""
)
def test_readouts_lower_for_cuda(op, function, options):
    B, T, D = 2, 70, 128
    for types, centred, cosine, E in [
        ((BF16, BF16), False, False, 171),
        ((BF16, F32), False, True, 24),
        ((BF16, F32), True, True, 171),
        ((F32, F32), False, False, 1024),
    ]:
        x, directions = normal(0, (B, T, D), types[0]), units(1, (E, D), types[1])
        extra = [normal(2, D) if centred else None, normal(3, E), normal(4, E)]
        tile = hopper.tile(work(op, x, directions, centred=centred, cosine=cosine))
        where = [] if op == "project" else [jnp.array([[[0, 9]], [[3, 70]]], jnp.int32)]
        text = lowered(
            function, x[0] if op == "project" else x, directions, *where, *extra, cosine=cosine, tile=tile, **options
        )
        assert "mosaic_gpu" in text, (op, types, centred, cosine, E)


@pytest.mark.parametrize(
    ("D", "E", "M", "dtype"), [(576, 171, 3, F32), (1024, 1024, 1, BF16), (128, 0, 70, BF16)], ids=str
)
def test_steering_lowers_for_cuda(D, E, M, dtype):
    x, bank, directions = normal(0, (2, 70, D), BF16), units(1, (M, D)), units(2, (E, D), dtype) if E else None
    how = (
        normal(3, (2, M)),
        normal(4, (2, M)),
        jnp.zeros((2, M, 2), jnp.int32),
        jnp.zeros(2, jnp.int32),
        jnp.ones(2, bool),
    )
    tile = hopper.tile(work("steer_project", x, directions if E else bank[:0], M))
    assert "mosaic_gpu" in lowered(steer_project, x, bank, *how, directions, tile=tile)


@pytest.mark.parametrize(
    ("types", "N", "D", "E", "centred", "cosine", "tile"),
    [
        ((BF16, BF16), 200, 128, 70, False, False, 256),  # ragged in tokens and directions
        ((BF16, F32), 7, 64, 1, False, True, 128),
        ((BF16, BF16), 130, 128, 24, True, True, 128),
        ((F32, F32), 16, 192, 130, False, False, 128),  # two blocks of directions
    ],
    ids=str,
)
def test_project_agrees_with_float64(types, N, D, E, centred, cosine, tile):
    centre = 100 * normal(2, D) if centred else None
    x = normal(0, (N, D)).at[0].set(0)
    # Close to the centre, so that subtracting it after the product would leave nothing.
    x = (x if centre is None else centre + x).at[1, 5].mul(1000).astype(types[0])
    directions, offset, scale = units(1, (E, D), types[1]), normal(3, E).at[0].set(0), normal(4, E).at[0].set(1)
    directions = directions.at[0].set(jnp.eye(D, dtype=types[1])[5])
    got = interpreted(project, x, directions, centre, offset, scale, cosine=cosine, tile=tile)
    want = oracle(x, directions, centre, offset, scale, cosine)
    assert got.shape == (N, E) and got.dtype == np.float32
    assert (abs(got - want) <= bound(x, directions, centre, scale, cosine)).all()
    np.testing.assert_allclose(
        got[:, 0], want[:, 0], rtol=8 * np.finfo(np.float32).eps
    )  # one number: all its bits are kept


ROWS = 3
SPANS = jnp.array(
    [[[2, 5], [66, 69]], [[0, 200], [0, 0]], [[4, 4], [0, 0]]], jnp.int32
)  # two runs, more than all, none


def marked(x, spans):
    """`x [B, T, D]` with NaN wherever it is not selected, and what is selected."""
    at = np.arange(x.shape[1])[None, :, None]
    here = ((np.asarray(spans)[:, None, :, 0] <= at) & (at < np.asarray(spans)[:, None, :, 1])).any(-1)
    return jnp.where(here[..., None], x, jnp.nan), here


@pytest.mark.parametrize(("how", "E"), [("mean", 5), ("max", 200), ("last", 5)])
def test_project_pool_agrees_with_float64(how, E):
    T, D = 72, 64
    x, here = marked(normal(0, (ROWS, T, D), BF16), SPANS)
    directions, offset, scale = units(1, (E, D), BF16), normal(3, E), normal(4, E)
    got = interpreted(project_pool, x, directions, SPANS, None, offset, scale, cosine=True, how=how, tile=128)
    scores = oracle(np.nan_to_num(np.asarray(x).astype(np.float64)), directions, None, offset, scale, True)
    for row, chosen in zip(range(ROWS), here, strict=True):
        rows = scores[row][chosen]
        if not len(rows):
            assert (got[row] == (-np.inf if how == "max" else 0)).all()
            continue
        want = {"mean": rows.mean(0), "max": rows.max(0), "last": rows[-1]}[how]
        np.testing.assert_allclose(got[row], want, rtol=0, atol=8 * np.finfo(np.float32).eps * D**0.5)


def test_top_tokens_agree_with_float64():
    T, D, E, k = 72, 64, 200, 4
    spans = jnp.array([[[66, 68], [70, 71]], [[7, 8], [40, 41]], [[4, 4], [0, 0]]], jnp.int32)
    x, here = marked(normal(0, (ROWS, T, D), BF16).at[1, 40].set(normal(0, (ROWS, T, D), BF16)[1, 7]), spans)  # a tie
    x = x.at[0, 67].set(jnp.nan).at[0, 70, 3].set(jnp.inf)  # which are left out
    here[0, [67, 70]] = False
    directions = units(1, (E, D), BF16)
    best, place = interpreted(top_tokens, x, directions, spans, None, None, None, cosine=False, k=k, tile=128)
    scores = oracle(np.nan_to_num(np.asarray(x).astype(np.float64)), directions).reshape(-1, E)
    chosen = np.flatnonzero(here)
    assert len(chosen) < k
    for e in range(E):
        order = chosen[np.argsort(-scores[chosen, e], kind="stable")]
        assert place[e].tolist() == order.tolist() + [-1] * (k - len(order))
        np.testing.assert_allclose(best[e, : len(order)], scores[order, e], rtol=0, atol=1e-5)
        assert (best[e, len(order) :] == -np.inf).all()


@pytest.mark.parametrize(("T", "D", "E", "M"), [(70, 128, 70, 3), (9, 64, 0, 66)], ids=str)
def test_steering_agrees_with_the_reference(T, D, E, M):
    B = 2
    x, bank = normal(0, (B, T, D), BF16).at[0, 6].set(0), units(1, (M, D))
    directions = units(2, (E, D), BF16) if E else None
    a, b = 4 * normal(3, (B, M)), normal(4, (B, M))
    start = jnp.array([5, 0], jnp.int32)
    spans = jnp.stack([start + 3, start + T - 2], -1)[:, None] * jnp.ones((1, M, 1), jnp.int32)
    x = x.at[1, 1].set(jnp.nan)  # outside the spans
    arrays = x, bank, a, b, spans, start, jnp.array([True, False])
    got, scores = interpreted(steer_project, *arrays, directions, tile=64)
    want, _ = steer_project_reference(*arrays)
    inside = np.zeros((B, T), bool)
    inside[:, 3 : T - 2] = True
    assert np.array_equal(got[~inside], np.asarray(x)[~inside], equal_nan=True)  # no bit of what is not steered
    u, v = (np.asarray(y)[inside].astype(np.float32) for y in (got, want))
    assert (
        abs(u - v) <= 2.0**-7 * abs(v) + 2.0**-14 * np.linalg.norm(v, axis=-1, keepdims=True)
    ).all()  # one rounding apart
    assert (u == v).mean() > 0.99
    if directions is None:
        assert scores is None
    else:
        own = project_reference(got, directions)  # of the result as it was returned
        np.testing.assert_allclose(scores[inside], np.asarray(own)[inside], rtol=0, atol=1e-5 * D**0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": "float16"}, "not float16 activations"),
        ({"directions": "float16"}, "not float16 directions"),
        ({"D": 96}, "a multiple of 64, not 96"),
        ({"rows": 1 << 16, "op": "top_tokens"}, "65536 rows of 128 tokens are more programs"),
        ({"op": "steer_project", "x": F32, "M": 1}, "takes bfloat16 activations, not float32"),
        ({"op": "steer_project", "M": 300}, "up to 256 steered directions, not 300"),
        ({"op": "steer_project", "M": 1, "D": 2048}, "width 2048 do not fit a GPU's shared memory"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take_is_refused(change, message):
    given = choice.Work("project", 1, 128, 576, 171, BF16, BF16)
    assert hopper.tile(given) == 256
    with pytest.raises(NotImplementedError, match=message):
        hopper.tile(given._replace(**change))


def test_every_size_of_the_grid_has_a_tile():
    for op, D, E, types, centred, cosine in itertools.product(
        hopper.UNIT,
        (64, 576, 8192),
        (1, 24, 171, 342, 1024),
        itertools.product((BF16, F32), (BF16, F32)),
        (False, True),
        (False, True),
    ):
        assert hopper.tile(choice.Work(op, 2, 128, D, E, *types, 0, centred, cosine)) in (128, 256)
