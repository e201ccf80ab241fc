"""The public ops: arguments checked, the implementation chosen, derivatives taken from the reference.

One program holds every platform's implementation until it is lowered, for one platform or several.
"""

import functools
import math
from collections.abc import Callable, Mapping
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jaxemo.kernels import choice
from jaxemo.kernels.project.reference import project as project_reference
from jaxemo.kernels.project_pool.reference import HOW
from jaxemo.kernels.project_pool.reference import project_pool as project_pool_reference
from jaxemo.kernels.steer_project.reference import steer_project as steer_project_reference
from jaxemo.kernels.top_tokens.reference import top_tokens as top_tokens_reference

PLATFORMS = ("tpu", "cuda")
REFERENCES: dict[str, Callable] = {
    "project": project_reference,
    "project_pool": project_pool_reference,
    "top_tokens": top_tokens_reference,
    "steer_project": steer_project_reference,
}
CHOSEN = """
    `impl` is "auto" (see `kernels.choose`), "reference", or "kernel": the kernel on every platform that has one for these
    shapes, the reference on others. `interpret` runs the TPU kernel in Pallas' interpreter. Kernels keep 16 bits of float32
    directions beside bfloat16 activations. Raises ValueError where shapes or types do not fit, and NotImplementedError for
    "kernel" where no platform has one.
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


def _kernel(platform: str, *arrays, work: choice.Work, tile: int, interpret, **options):
    """The op by its kernel for `platform`."""
    module = import_module(f"jaxemo.kernels.{work.op}.{'gpu' if platform == 'cuda' else 'tpu'}")
    run = functools.partial(getattr(module, work.op), tile=tile, interpret=interpret, **options)
    with jax.enable_x64(False):  # whose indices the kernels count with
        return jax.custom_batching.sequential_vmap(run)(*arrays)  # under vmap, one call after another


@functools.partial(jax.jit, static_argnames=("work", "impl", "interpret", "cosine", "how", "k"))
def _run(*arrays, work: choice.Work, impl: str, interpret, **options):
    """The op of `work`, by its kernel on the platforms where that is chosen, differentiated as its reference."""
    reference = functools.partial(REFERENCES[work.op], **options)
    kernel = functools.partial(_kernel, work=work, **options)
    here, kernels, unable = choice.here(), {}, None
    for platform in dict.fromkeys((*PLATFORMS, here)):
        try:
            chosen = choice.choose(work, platform, choice.device_kind(platform), impl)
        except NotImplementedError as error:
            unable = error
            continue
        if platform == here and impl == "auto" and choice.spread():
            chosen = choice.Choice(False, 0, "a kernel runs on several devices only inside shard_map")
        if platform == here and interpret is False:
            choice.tell(work, platform, "kernel" if chosen.kernel else "reference", chosen.why)
        if chosen.kernel:
            kernels[platform] = functools.partial(kernel, platform, tile=chosen.tile, interpret=False)
    if interpret is not False:
        choice.tell(work, here, "the TPU kernel in Pallas' interpreter", "asked for")
        run = functools.partial(kernel, "tpu", tile=choice.tiles(work, "tpu", None), interpret=interpret)
    elif kernels:
        run = functools.partial(_for_each_platform, reference, kernels)
    elif unable:
        raise unable
    else:
        return reference(*arrays)

    differentiable = jax.custom_jvp(lambda *arrays: run(*arrays))

    @differentiable.defjvp
    def _(primals, tangents):
        return differentiable(*primals), jax.jvp(reference, primals, tangents)[1]

    return differentiable(*arrays)


def _for_each_platform(reference: Callable, kernels: Mapping[str, Callable], *arrays):
    flat, tree = jax.tree.flatten(arrays)

    def branch(run):
        return jax.make_jaxpr(lambda *flat: run(*jax.tree.unflatten(tree, flat)))(*flat)

    branches = tuple(map(branch, (reference, *kernels.values())))
    out = op_p.bind(*flat, platforms=tuple(kernels), branches=branches)
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(reference, *arrays)), out)


def _work(op: str, x, directions, centre=None, cosine=False, bank=None) -> choice.Work:
    rows, T = (1, math.prod(x.shape[:-1])) if op == "project" else x.shape[:-1]
    return choice.Work(
        op=op,
        rows=rows,
        T=T,
        D=x.shape[-1],
        E=0 if directions is None else directions.shape[0],
        x=str(x.dtype),
        directions=str((bank if directions is None else directions).dtype),
        M=0 if bank is None else bank.shape[0],
        centred=centre is not None,
        cosine=cosine,
    )


def _fit(op: str, **given) -> None:
    """Raises ValueError for the first array whose axes are not those of its letters, which are the same size everywhere."""
    sizes: dict[str, int] = {"2": 2}
    for name, (array, letters) in given.items():
        if array is None:
            continue
        axes = letters.split()
        shape = array.shape[-1:] if axes[0] == "..." else array.shape
        known = [letter for letter in axes if letter != "..."]
        want = ", ".join(str(sizes.get(letter, letter)) for letter in axes)
        if len(shape) != len(known) or any(
            sizes.setdefault(letter, n) != n for letter, n in zip(known, shape, strict=True)
        ):
            raise ValueError(f"{op} needs {name} [{want}], got {list(array.shape)}")
    if sizes.get("E") == 0:
        raise ValueError(f"{op} needs at least one direction")


def _arrays(x, *given):
    """As arrays, float64 but for x as float32."""
    given = (None if array is None else jnp.asarray(array) for array in given)
    narrow = (
        array.astype(jnp.float32) if array is not None and array.dtype == jnp.float64 else array for array in given
    )
    return jnp.asarray(x), *narrow


def _positions(op: str, **given) -> list[jax.Array]:
    """As int32, to which larger integers are clipped: no token lies there."""
    found = []
    for name, array in given.items():
        array = array if isinstance(array, jax.Array) else np.asarray(array)
        if array.dtype.kind not in "iu":
            raise ValueError(f"{op} needs integers for {name}, got {array.dtype}")
        if not np.can_cast(array.dtype, np.int32):
            array = array.clip(-(2**31) if array.dtype.kind == "i" else 0, 2**31 - 1)
        found.append(jnp.asarray(array, jnp.int32))
    return found


def _documented(reference: Callable) -> Callable[[Callable], Callable]:
    """The op says what its reference says, and what is the same for all."""

    def document(op):
        op.__doc__ = reference.__doc__ + CHOSEN
        return op

    return document


@_documented(project_reference)
def project(x, directions, centre=None, offset=None, scale=None, *, cosine=False, impl="auto", interpret=False):
    x, directions, centre, offset, scale = arrays = _arrays(x, directions, centre, offset, scale)
    _fit("project", x=(x, "... D"), directions=(directions, "E D"), centre=(centre, "D"), offset=(offset, "E"), scale=(scale, "E"))  # fmt: skip
    work = _work("project", x, directions, centre, cosine)
    return _run(*arrays, work=work, impl=impl, interpret=interpret, cosine=cosine)


def _reduce(op, x, directions, spans, centre, offset, scale, cosine, impl, interpret, **option):
    """`project_pool` or `top_tokens`."""
    (spans,) = _positions(op, spans=spans)
    x, directions, centre, offset, scale = _arrays(x, directions, centre, offset, scale)
    _fit(op, x=(x, "B T D"), directions=(directions, "E D"), spans=(spans, "B P 2"), centre=(centre, "D"),
         offset=(offset, "E"), scale=(scale, "E"))  # fmt: skip
    work = _work(op, x, directions, centre, cosine)
    arrays = x, directions, spans, centre, offset, scale
    return _run(*arrays, work=work, impl=impl, interpret=interpret, cosine=cosine, **option)


@_documented(project_pool_reference)
def project_pool(x, directions, spans, centre=None, offset=None, scale=None, *, cosine=False, how="mean", impl="auto",
                 interpret=False):  # fmt: skip
    if how not in HOW:
        raise ValueError(f"how={how!r}; expected one of {', '.join(HOW)}")
    return _reduce("project_pool", x, directions, spans, centre, offset, scale, cosine, impl, interpret, how=how)


@_documented(top_tokens_reference)
def top_tokens(x, directions, spans, centre=None, offset=None, scale=None, *, cosine=False, k=8, impl="auto",
               interpret=False):  # fmt: skip
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k={k!r}; it must be a whole number of at least 1")
    return _reduce("top_tokens", x, directions, spans, centre, offset, scale, cosine, impl, interpret, k=int(k))


@_documented(steer_project_reference)
def steer_project(x, bank, a, b, spans, start, keep_norm, directions=None, *, impl="auto", interpret=False):
    op = "steer_project"
    spans, start = _positions(op, spans=spans, start=start)
    x, bank, a, b, keep_norm, directions = _arrays(x, bank, a, b, keep_norm, directions)
    _fit(op, x=(x, "B T D"), bank=(bank, "M D"), a=(a, "B M"), b=(b, "B M"), spans=(spans, "B M 2"), start=(start, "B"),
         keep_norm=(keep_norm, "B"), directions=(directions, "E D"))  # fmt: skip
    if keep_norm.dtype != bool:
        raise ValueError(f"{op} needs bool for keep_norm, got {keep_norm.dtype}")
    arrays = x, bank, a, b, spans, start, keep_norm, directions
    return _run(*arrays, work=_work(op, x, directions, bank=bank), impl=impl, interpret=interpret)
