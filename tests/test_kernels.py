"""`project` against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxemo import kernels


def operands(T, E, D, dtype, directions_dtype=None):
    rng = np.random.default_rng(T + E + D)
    x, d = jnp.asarray(rng.standard_normal((2, T, D)), dtype), rng.standard_normal((E, D))
    return x, jnp.asarray(d / np.linalg.norm(d, axis=1, keepdims=True), directions_dtype or dtype)


@pytest.mark.parametrize("sizes", [(1, 1, 8), (7, 5, 33), (16, 171, 576)], ids=str)
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids="-".join
)
def test_project_agrees_with_float64(close, sizes, dtypes):
    """Products are summed in float32 whatever the operands: D roundings of partial sums, which grow
    to the size of the scores.

    Two bfloat16 numbers have a product that is exact in float32, so the bound is float32's for all types.
    """
    x, directions = operands(*sizes, *dtypes)
    scores = kernels.project(x, directions)
    assert scores.dtype == jnp.float32
    x64, d64 = (np.asarray(a).astype(np.float64) for a in (x, directions))
    want = x64 @ d64.T
    close(scores, want, sizes[2], f"project {sizes} {dtypes}", scale=np.abs(want).max())


def test_project_takes_any_leading_axes(close):
    x, directions = operands(6, 3, 16, "float32")
    whole = np.asarray(kernels.project(x, directions))
    for row in range(2):
        close(kernels.project(x[row], directions), whole[row], 16, "a row alone")
    assert kernels.project(x[0, 0], directions).shape == (3,)
    assert kernels.project(np.ones((2, 3, 4, 16), np.float32), directions).shape == (2, 3, 4, 3)


@pytest.mark.parametrize(
    "shapes", [((4, 16), (16,)), ((4, 16), (3, 15)), ((4, 16), (2, 3, 16)), ((), (3, 16))], ids=str
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    x, directions = (np.ones(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match=r"project needs x \[..., D\] and directions \[E, D\], got"):
        kernels.project(x, directions)
