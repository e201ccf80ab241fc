"""The public ops: arguments checked, the implementation chosen, derivatives taken from the reference.

One program holds every platform's implementation until it is lowered, for one platform or several.
"""

import functools
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jaxemo.kernels import choice
from jaxemo.kernels.project.reference import project as project_reference
from jaxemo.kernels.project_pool.reference import HOW
from jaxemo.kernels.project_pool.reference import project_pool as project_pool_reference
from jaxemo.kernels.steer_project.reference import steer_project as steer_project_reference
from jaxemo.kernels.top_tokens.reference import top_tokens as top_tokens_reference

PLATFORMS = ("tpu", "cuda")
CHOSEN = """
    `impl` is "auto" (see `kernels.choose`), "reference", or "kernel": the kernel on every platform that has one for these
    shapes, the reference on others. `interpret` runs the TPU kernel in Pallas' interpreter. Kernels keep 16 bits of float32
    directions beside bfloat16 activations. Raises ValueError where shapes do not fit, and NotImplementedError for "kernel"
    where no platform has one.
    """


# An op in a program: the jaxprs of its reference and, for some `platforms`, of kernels. `lax.platform_dependent` would do, but
# lowers its branches for all platforms of an export at once, and a Pallas kernel can only be lowered for its own.
op_p = Primitive("jaxemo_op")
op_p.multiple_results = True


def _branch(platform, platforms, branches) -> Callable:
    return jaxpr_as_fun(branches[1 + platforms.index(platform) if platform in platforms else 0])


def _lower(platform, context, *arrays, **branches):
    return mlir.lower_fun(_branch(platform, **branches))(context, *arrays)


def _batch(arrays, axes, *, platforms, branches):
    mapped = (jax.make_jaxpr(jax.vmap(jaxpr_as_fun(branch), axes))(*arrays) for branch in branches)
    out = op_p.bind(*arrays, platforms=platforms, branches=tuple(mapped))
    return out, (0,) * len(out)


op_p.def_impl(lambda *arrays, **branches: _branch(choice.here(), **branches)(*arrays))
op_p.def_abstract_eval(lambda *_, branches, **__: branches[0].out_avals)
batching.primitive_batchers[op_p] = _batch
for _platform in (None, *PLATFORMS):
    mlir.register_lowering(op_p, functools.partial(_lower, _platform), platform=_platform)


def _dispatch(work: choice.Work, impl: str, interpret: Any, reference: Callable, kernel: Callable, *arrays):
    """`reference(*arrays)`, by `kernel(platform, *arrays, tile=, interpret=)` on the platforms where that is chosen.

    `interpret` runs the TPU kernel with Pallas' interpreter on whatever platform there is.
    """
    kernels, unable = {}, None
    for platform in PLATFORMS:
        try:
            chosen = choice.choose(work, platform, choice.device_kind(platform), impl)
        except NotImplementedError as error:
            unable = error
            continue
        if platform == choice.here() and impl == "auto" and choice.spread():
            chosen = choice.Choice(False, 0, "a kernel runs on several devices only inside shard_map")
        if platform == choice.here():
            choice.log.info("%s: %s, %s", work, "kernel" if chosen.kernel else "reference", chosen.why)
        if chosen.kernel:
            kernels[platform] = functools.partial(kernel, platform, tile=chosen.tile, interpret=False)
    if interpret is not False:
        run = functools.partial(kernel, "tpu", tile=choice.tiles(work, "tpu", None), interpret=interpret)
    elif kernels:

        def run(*arrays):
            flat, tree = jax.tree.flatten(arrays)
            traced = [jax.make_jaxpr(lambda *v, f=f: f(*tree.unflatten(v)), return_shape=True)(*flat)
                      for f in (reference, *kernels.values())]  # fmt: skip
            out = op_p.bind(*flat, platforms=tuple(kernels), branches=tuple(branch for branch, _ in traced))
            return jax.tree.unflatten(jax.tree.structure(traced[0][1]), out)

    elif unable:
        raise unable
    else:
        return reference(*arrays)

    differentiable = jax.custom_jvp(lambda *arrays: run(*arrays))

    @differentiable.defjvp
    def _(primals, tangents):
        return differentiable(*primals), jax.jvp(reference, primals, tangents)[1]

    return differentiable(*arrays)


def _kernel(op: str, platform: str, *arrays, tile: int, interpret, **options):
    """The op's kernel for `platform`."""
    module = import_module(f"jaxemo.kernels.{op}.{'gpu' if platform == 'cuda' else 'tpu'}")
    run = functools.partial(getattr(module, op), tile=tile, interpret=interpret, **options)
    return jax.custom_batching.sequential_vmap(run)(*arrays)  # under vmap, one call after another


def _work(op: str, x, directions, centre=None, cosine=False, bank=None) -> choice.Work:
    return choice.Work(
        op=op,
        rows=math.prod(x.shape[:-2]),
        T=x.shape[-2],
        D=x.shape[-1],
        E=0 if directions is None else directions.shape[0],
        x=str(x.dtype),
        directions=str((bank if directions is None else directions).dtype),
        M=0 if bank is None else bank.shape[0],
        centred=centre is not None,
        cosine=cosine,
    )


def _check(op: str, x, directions, centre, offset, scale) -> None:
    if directions.ndim != 2 or x.ndim < 1 or x.shape[-1] != directions.shape[-1]:
        raise ValueError(f"{op} needs x [..., D] and directions [E, D], got {x.shape} and {directions.shape}")
    E, D = directions.shape
    if not E:
        raise ValueError(f"{op} needs at least one direction")
    for name, array, shape in (("centre", centre, (D,)), ("offset", offset, (E,)), ("scale", scale, (E,))):
        if array is not None and array.shape != shape:
            raise ValueError(f"{op} needs {name} {list(shape)}, got {list(array.shape)}")


def _check_spans(op: str, x, spans) -> None:
    if x.ndim != 3 or spans.ndim != 3 or spans.shape[::2] != (x.shape[0], 2):
        raise ValueError(f"{op} needs x [B, T, D] and spans [B, P, 2], got {x.shape} and {spans.shape}")


def _documented(reference: Callable) -> Callable[[Callable], Callable]:
    """The op says what its reference says, and what is the same for all."""

    def document(op):
        op.__doc__ = reference.__doc__ + CHOSEN
        return op

    return document


def _arrays(*given):
    return tuple(None if array is None else jnp.asarray(array) for array in given)


@functools.partial(jax.jit, static_argnames=("cosine", "impl", "interpret"))
def _project(x, directions, centre, offset, scale, cosine, impl, interpret):
    flat = x.reshape(-1, x.shape[-1])
    scores = _dispatch(
        _work("project", flat, directions, centre, cosine),
        impl,
        interpret,
        functools.partial(project_reference, cosine=cosine),
        functools.partial(_kernel, "project", cosine=cosine),
        *(flat, directions, centre, offset, scale),
    )
    return scores.reshape(*x.shape[:-1], directions.shape[0])


@_documented(project_reference)
def project(x, directions, centre=None, offset=None, scale=None, *, cosine=False, impl="auto", interpret=False):
    x, directions, centre, offset, scale = _arrays(x, directions, centre, offset, scale)
    _check("project", x, directions, centre, offset, scale)
    return _project(x, directions, centre, offset, scale, cosine, impl, interpret)


@functools.partial(jax.jit, static_argnames=("cosine", "how", "impl", "interpret"))
def _project_pool(x, directions, spans, centre, offset, scale, cosine, how, impl, interpret):
    return _dispatch(
        _work("project_pool", x, directions, centre, cosine),
        impl,
        interpret,
        functools.partial(project_pool_reference, cosine=cosine, how=how),
        functools.partial(_kernel, "project_pool", cosine=cosine, how=how),
        *(x, directions, spans, centre, offset, scale),
    )


@_documented(project_pool_reference)
def project_pool(
    x,
    directions,
    spans,
    centre=None,
    offset=None,
    scale=None,
    *,
    cosine=False,
    how="mean",
    impl="auto",
    interpret=False,
):
    x, directions, spans, centre, offset, scale = _arrays(x, directions, spans, centre, offset, scale)
    _check("project_pool", x, directions, centre, offset, scale)
    _check_spans("project_pool", x, spans)
    if how not in HOW:
        raise ValueError(f"how={how!r}; expected one of {', '.join(HOW)}")
    return _project_pool(x, directions, spans, centre, offset, scale, cosine, how, impl, interpret)


@functools.partial(jax.jit, static_argnames=("cosine", "k", "impl", "interpret"))
def _top_tokens(x, directions, spans, centre, offset, scale, cosine, k, impl, interpret):
    return _dispatch(
        _work("top_tokens", x, directions, centre, cosine),
        impl,
        interpret,
        functools.partial(top_tokens_reference, cosine=cosine, k=k),
        functools.partial(_kernel, "top_tokens", cosine=cosine, k=k),
        *(x, directions, spans, centre, offset, scale),
    )


@_documented(top_tokens_reference)
def top_tokens(
    x, directions, spans, centre=None, offset=None, scale=None, *, cosine=False, k=8, impl="auto", interpret=False
):
    x, directions, spans, centre, offset, scale = _arrays(x, directions, spans, centre, offset, scale)
    _check("top_tokens", x, directions, centre, offset, scale)
    _check_spans("top_tokens", x, spans)
    if k < 1:
        raise ValueError(f"k={k}; it must be at least 1")
    return _top_tokens(x, directions, spans, centre, offset, scale, cosine, k, impl, interpret)


@functools.partial(jax.jit, static_argnames=("impl", "interpret"))
def _steer_project(x, bank, a, b, spans, start, keep_norm, directions, impl, interpret):
    return _dispatch(
        _work("steer_project", x, directions, bank=bank),
        impl,
        interpret,
        steer_project_reference,
        functools.partial(_kernel, "steer_project"),
        *(x, bank, a, b, spans, start, keep_norm, directions),
    )


@_documented(steer_project_reference)
def steer_project(x, bank, a, b, spans, start, keep_norm, directions=None, *, impl="auto", interpret=False):
    x, bank, a, b, spans, start, keep_norm, directions = _arrays(x, bank, a, b, spans, start, keep_norm, directions)
    B, M, D = x.shape[0], bank.shape[0], bank.shape[-1]
    for name, array, shape in (("a", a, (B, M)), ("b", b, (B, M)), ("spans", spans, (B, M, 2)), ("start", start, (B,)),
                               ("keep_norm", keep_norm, (B,)), ("x", x, (B, x.shape[1], D))):  # fmt: skip
        if array.shape != shape:
            raise ValueError(f"steer_project needs {name} {list(shape)}, got {list(array.shape)}")
    if directions is not None:
        _check("steer_project", x, directions, None, None, None)
    return _steer_project(x, bank, a, b, spans, start, keep_norm, directions, impl, interpret)
