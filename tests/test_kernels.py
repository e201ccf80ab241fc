"""The ops against float64: their references, and their TPU kernels under Pallas' interpreter, which also looks for races."""

import functools
import itertools
import json
import logging
import os
import pathlib
import subprocess
import sys
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jaxemo.kernels import choice

from jaxemo import kernels

INTERPRET = pltpu.InterpretParams(detect_races=True)
BOTH = [{"impl": "reference"}, {"impl": "kernel", "interpret": INTERPRET}]
TWO_CORES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
SPLIT = 2.0**-16  # what two bfloat16 parts leave of a float32 number, relative to it, at most


@pytest.fixture(autouse=True)
def no_races(capfd):
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def f64(x):
    return None if x is None else np.asarray(x).astype(np.float64)


def unit(rng, *shape):
    d = rng.standard_normal(shape)
    return d / np.linalg.norm(d, axis=-1, keepdims=True)


def operands(rows, T, E, D, dtypes, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, T, D)), dtypes[0])
    d = jnp.asarray(unit(rng, E, D), dtypes[1])
    return x, d, {"centre": rng.standard_normal(D).astype(np.float32), "offset": rng.standard_normal(E).astype(np.float32),
                  "scale": rng.uniform(0.5, 2, E).astype(np.float32)}  # fmt: skip


def project64(x, d, centre=None, offset=None, scale=None, cosine=False):
    """`project` in float64, and for each score the size of the terms that it is the sum of."""
    y, d = f64(x) - (0 if centre is None else f64(centre)), f64(d)
    s, size = y @ d.T, np.abs(y) @ np.abs(d).T
    if cosine:
        length = np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-300)
        s, size = s / length, size / length
    s = s - (0 if offset is None else f64(offset))
    size = size + (0 if offset is None else np.abs(f64(offset)))
    return (s, size) if scale is None else (s * f64(scale), size * f64(scale))


def inside(spans, T):
    at = np.arange(T)
    return ((np.asarray(spans)[:, :, :1] <= at) & (at < np.asarray(spans)[:, :, 1:])).any(1)  # [B, T]


def bound_of(size, D, dtypes, impl):
    """Roundings of a sum of D terms, and what splitting float32 directions of bfloat16 activations leaves out."""
    split = SPLIT if impl["impl"] == "kernel" and dtypes == ("bfloat16", "float32") else 0
    return np.finfo(np.float32).eps * (np.sqrt(D) + 4) * size + split * size + 1e-30


sizes = st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 20), st.sampled_from([64, 72, 128, 200]))
options = st.fixed_dictionaries({name: st.booleans() for name in ("centre", "offset", "scale", "cosine")})


def chosen(option, extra):
    return {name: extra[name] for name in ("centre", "offset", "scale") if option[name]} | {"cosine": option["cosine"]}


# ---- project ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", BOTH, ids=["reference", "kernel"])
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@hypothesis.settings(max_examples=6)
@hypothesis.given(size=sizes, option=options, seed=st.integers(0, 99))
def test_project_agrees_with_float64(impl, dtypes, size, option, seed):
    x, d, extra = operands(*size, dtypes, seed)
    how = chosen(option, extra)
    got = kernels.project(x, d, **how, **impl)
    want, terms = project64(x, d, **how)
    assert got.dtype == jnp.float32 and (np.abs(f64(got) - want) <= bound_of(terms, size[-1], dtypes, impl)).all()


@pytest.mark.parametrize("option", list(itertools.product((False, True), (False, True))), ids=str)
def test_the_bfloat16_kernel_is_no_worse_than_the_reference(option):
    """Mean error against float64, at most 1.5 times the reference's own."""
    x, d, extra = operands(2, 64, 40, 576, ("bfloat16", "bfloat16"))
    d = d.at[0].set(jnp.eye(576, dtype=d.dtype)[5])
    how = {"centre": extra["centre"]} if option[0] else {}
    want = project64(x, d, **how, cosine=option[1])[0]
    found = [f64(kernels.project(x, d, **how, cosine=option[1], **impl)) for impl in BOTH]
    errors = [np.abs(scores - want).mean() for scores in found]
    print(f"\nmean error {errors[1]:.1e} of the kernel, {errors[0]:.1e} of the reference")
    assert errors[1] <= 1.5 * errors[0]
    np.testing.assert_allclose(
        found[1][..., 0], want[..., 0], rtol=16 * np.finfo(np.float32).eps
    )  # one number's every bit


@pytest.mark.parametrize("impl", BOTH, ids=["reference", "kernel"])
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_project_of_difficult_activations(impl, dtypes):
    """One coordinate a thousand times the others, rows of zeros, and activations that lie close to the centre."""
    x, d, extra = operands(1, 24, 7, 128, dtypes)
    massive = x.at[..., 5].multiply(1000)
    for how in ({}, {"cosine": True}):
        want, terms = project64(massive, d, **how)
        assert (
            np.abs(f64(kernels.project(massive, d, **how, **impl)) - want) <= bound_of(terms, 128, dtypes, impl)
        ).all()
    zeros = kernels.project(jnp.zeros_like(x), d, cosine=True, offset=extra["offset"], **impl)
    assert np.array_equal(zeros, np.broadcast_to(-extra["offset"], zeros.shape))
    centre = np.asarray(x[0, 0], np.float32) * np.float32(1 + 1e-3)
    close = jnp.broadcast_to(x[:, :1], x.shape)
    want, terms = project64(close, d, centre=centre, cosine=True)
    got = kernels.project(close, d, centre=centre, cosine=True, **impl)
    assert (np.abs(f64(got) - want) <= bound_of(terms, 128, dtypes, impl)).all() and np.abs(want).max() > 0.02
    # Very short and very long: the cosine of what float32 can square, NaN for more, and nothing finite for infinity.
    for length in (1e-15, 1e18):
        sized = (length / 12 * x.astype(jnp.float32)).astype(x.dtype)
        want, terms = project64(sized, d, cosine=True)
        got = kernels.project(sized, d, cosine=True, **impl)
        assert (np.abs(f64(got) - want) <= bound_of(terms, 128, dtypes, impl)).all()
    odd = x.at[0, 1].multiply(1e25).at[0, 2, 3].set(jnp.inf)
    nan = np.isnan(kernels.project(odd, d, cosine=True, **impl)).all(-1)[0]
    assert np.flatnonzero(nan).tolist() == [1, 2]
    assert np.flatnonzero(~np.isfinite(kernels.project(odd, d, **impl)).all(-1)[0]).tolist() == [2]


def test_project_takes_any_leading_axes(close):
    x, d, _ = operands(2, 6, 3, 64, DTYPES[0])
    whole = np.asarray(kernels.project(x, d))
    for row in range(2):
        close(kernels.project(x[row], d), whole[row], 64, "a row alone")
    assert kernels.project(x[0, 0], d).shape == (3,)
    assert kernels.project(np.ones((2, 3, 4, 64), np.float32), d).shape == (2, 3, 4, 3)


def test_arguments_that_do_not_fit_are_named():
    x, d, _ = operands(2, 4, 3, 64, DTYPES[0])
    spans, ones, where = np.zeros((2, 1, 2), np.int32), np.zeros((2, 3)), np.zeros((2, 3, 2), int)
    start, keep = np.zeros(2, int), np.zeros(2, bool)
    for call, message in (
        (lambda: kernels.project(x, np.ones(16)), r"project needs directions \[E, 64\], got \[16\]"),
        (lambda: kernels.project(x, np.ones((3, 15))), r"project needs directions \[E, 64\], got \[3, 15\]"),
        (lambda: kernels.project(x, np.ones((2, 3, 64))), r"project needs directions \[E, 64\], got \[2, 3, 64\]"),
        (lambda: kernels.project(1.0, d), r"project needs x \[..., D\], got \[\]"),
        (lambda: kernels.project(x, d[:0]), "project needs at least one direction"),
        (lambda: kernels.project(x, d, centre=np.ones(3)), r"project needs centre \[64\], got \[3\]"),
        (lambda: kernels.project(x, d, scale=np.ones(4)), r"project needs scale \[3\], got \[4\]"),
        (lambda: kernels.project(x, d, impl="fast"), r"impl='fast'"),
        (lambda: kernels.project_pool(x[0], d, spans), r"project_pool needs x \[B, T, D\], got \[4, 64\]"),
        (lambda: kernels.project_pool(x, d, spans[:1]), r"project_pool needs spans \[2, P, 2\], got \[1, 1, 2\]"),
        (lambda: kernels.project_pool(x, d, spans / 2), "project_pool needs integers for spans, got float64"),
        (lambda: kernels.project_pool(x, d, spans, how="sum"), r"how='sum'; expected one of mean, max, last"),
        (lambda: kernels.top_tokens(x, d, spans, k=0), "k=0"),
        (lambda: kernels.top_tokens(x, d, spans, k=2.0), "k=2.0; it must be a whole number"),
        (lambda: kernels.steer_project(x[0, 0], d, ones, ones, where, start, keep), r"steer_project needs x \[B, T, D\], got \[64\]"),
        (lambda: kernels.steer_project(x[0], d, ones, ones, where, start, keep), r"steer_project needs x \[B, T, D\], got \[4, 64\]"),
        (lambda: kernels.steer_project(x, d[None], ones, ones, where, start, keep), r"steer_project needs bank \[M, 64\], got \[1, 3, 64\]"),
        (lambda: kernels.steer_project(x, d, ones, ones, where[:, :2], start, keep), r"steer_project needs spans \[2, 3, 2\], got \[2, 2, 2\]"),
        (lambda: kernels.steer_project(x, d, ones, ones, where, start / 2, keep), "steer_project needs integers for start, got float64"),
        (lambda: kernels.steer_project(x, d, ones, ones, where, start, start), "steer_project needs bool for keep_norm, got int"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


# ---- project_pool and top_tokens -------------------------------------------------------------------------------------

SPANS = st.lists(st.tuples(st.integers(0, 45), st.integers(0, 12)), min_size=2, max_size=2)


def spans_of(drawn, rows):
    """Spans `[rows, 2, 2]` that do not overlap, some of them empty or beyond the row's end."""
    (a, n), (gap, m) = drawn
    one = [[a, a + n], [a + n + gap, a + n + gap + m]]
    return np.array([one, [[0, 3], [9, 99]]][:rows], np.int32)


@pytest.mark.parametrize("impl", BOTH, ids=["reference", "kernel"])
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@hypothesis.settings(max_examples=4)
@hypothesis.given(
    size=sizes, option=options, drawn=SPANS, pool=st.sampled_from(kernels.ops.HOW), seed=st.integers(0, 99)
)
def test_project_pool_agrees_with_float64(impl, dtypes, size, option, drawn, pool, seed):
    x, d, extra = operands(*size, dtypes, seed)
    spans, how = spans_of(drawn, size[0]), chosen(option, extra)
    here = inside(spans, size[1])
    x = jnp.where(here[..., None], x, jnp.nan)  # what is not selected is not read
    s, terms = project64(jnp.where(here[..., None], x, 0), d, **how)
    got = f64(kernels.project_pool(x, d, spans, **how, how=pool, **impl))
    for row, tokens in enumerate(here):
        chosen_scores, bound = s[row][tokens], bound_of(terms[row][tokens], size[-1], dtypes, impl)
        if not tokens.any():
            assert np.array_equal(got[row], np.full(size[2], -np.inf if pool == "max" else 0.0))
        elif pool == "mean":
            assert (np.abs(got[row] - chosen_scores.mean(0)) <= 2 * bound.max(0)).all()
        else:
            want = chosen_scores.max(0) if pool == "max" else chosen_scores[-1]
            assert (np.abs(got[row] - want) <= bound.max(0)).all()


@pytest.mark.parametrize("impl", BOTH, ids=["reference", "kernel"])
@hypothesis.settings(max_examples=4)
@hypothesis.given(size=sizes, option=options, drawn=SPANS, k=st.integers(1, 50), seed=st.integers(0, 99))
def test_top_tokens_are_the_highest(impl, size, option, drawn, k, seed):
    x, d, extra = operands(*size, DTYPES[1], seed)
    spans, how = spans_of(drawn, size[0]), chosen(option, extra)
    here = inside(spans, size[1])
    x = jnp.where(here[..., None], x, jnp.nan)
    s, terms = project64(jnp.where(here[..., None], x, 0), d, **how)
    best, place = kernels.top_tokens(x, d, spans, **how, k=k, **impl)
    assert best.shape == place.shape == (size[2], k)
    n = min(k, int(here.sum()))
    flat, bound = s.reshape(-1, size[2]), bound_of(terms, size[-1], DTYPES[1], impl).reshape(-1, size[2])
    for e in range(size[2]):
        at = np.asarray(place[e, :n])
        assert here.reshape(-1)[at].all() and len(set(at.tolist())) == n
        want = np.sort(flat[here.reshape(-1), e])[::-1][:n]
        assert (np.abs(f64(best[e, :n]) - want) <= bound.max()).all()
        assert (np.abs(f64(best[e, :n]) - flat[at, e]) <= bound.max()).all()
    assert (np.asarray(best[:, n:]) == -np.inf).all() and (np.asarray(place[:, n:]) == -1).all()


@pytest.mark.parametrize("impl", BOTH, ids=["reference", "kernel"])
def test_equal_tokens_are_named_in_order(impl):
    x, d, _ = operands(1, 1, 3, 64, DTYPES[0])
    if impl["impl"] == "kernel":  # memory beyond the rows holds zeros, of which some scores would be higher
        impl = {"impl": "kernel", "interpret": pltpu.InterpretParams(uninitialized_memory="zero")}
    x = jnp.broadcast_to(x, (2, 40, 64)).at[0, 4].set(jnp.nan).at[0, 6, 0].set(jnp.inf)
    best, place = kernels.top_tokens(x, d, np.array([[[3, 2**40]], [[0, 99]]]), k=4, **impl)
    assert np.isfinite(best).all() and np.array_equal(place, np.tile([3, 5, 7, 8], (3, 1))), (
        "what is not finite is left out"
    )
    highest = kernels.project_pool(x, d, np.array([[[3, 8]], [[0, 9]]]), how="max", **impl)
    assert np.isnan(highest).all(-1).tolist() == [True, False]


@pytest.mark.parametrize("impl", [{}, {"impl": "reference"}], ids=["auto", "reference"])
def test_empty_operands_have_empty_results(impl):
    d, spans = np.eye(3, 64, dtype=np.float32), np.zeros((2, 1, 2), np.int32)
    x = np.zeros((2, 0, 64), np.float32)
    assert kernels.project(x, d, **impl).shape == (2, 0, 3)
    for how, want in (("mean", 0), ("max", -np.inf), ("last", 0)):
        assert (kernels.project_pool(x, d, spans, how=how, **impl) == np.full((2, 3), want)).all()
        assert kernels.project_pool(x[:0], d, spans[:0], how=how, **impl).shape == (0, 3)
    best, place = kernels.top_tokens(x, d, spans, k=2, **impl)
    assert (best == np.full((3, 2), -np.inf)).all() and (place == np.full((3, 2), -1)).all()
    for rows, T, M in ((2, 0, 3), (0, 5, 3), (2, 5, 0)):
        x, none = np.ones((rows, T, 64), np.float32), np.zeros((rows, M), np.float32)
        start, where = np.zeros(rows, np.int32), np.zeros((rows, M, 2), np.int32)
        y, scores = kernels.steer_project(x, d[:M], none, none, where, start, start == 0, d, **impl)
        assert np.array_equal(y, x) and scores.shape == (rows, T, 3)


def test_64_bit_mode_changes_nothing():
    x, d, extra = operands(2, 16, 3, 64, DTYPES[0])
    bank, *given = interventions(2, 4, 64, 0)
    spans = np.array([[[2, 9]], [[0, 2**40]]])

    @functools.partial(jax.jit, static_argnames="impl")
    def every(x, impl):
        offset, centre = (extra[name].astype(np.float64) for name in ("offset", "centre"))
        how = {"impl": impl, "offset": offset, "centre": centre, "cosine": True}
        return (kernels.project(x, d, **how), [kernels.project_pool(x, d, spans, how=way, **how) for way in kernels.ops.HOW],
                kernels.top_tokens(x, d, spans, **how), kernels.steer_project(x, bank, *given, d, impl=impl))  # fmt: skip

    want = every(x, "reference")
    with jax.enable_x64(True):
        got = every(x, "reference")
        traced = every.trace(x.astype(jnp.bfloat16), "kernel")
        for platform in kernels.ops.PLATFORMS:
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert text.count("@tpu_custom_call" if platform == "tpu" else "@mosaic_gpu_v2") == 6
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.dtype == theirs.dtype and np.allclose(mine, theirs, rtol=1e-5, atol=1e-5)


# ---- steer_project ---------------------------------------------------------------------------------------------------


def steer64(x, bank, a, b, spans, start, keep_norm, d):
    x, bank, a, b = f64(x), f64(bank), f64(a), f64(b)
    positions = np.asarray(start)[:, None] + np.arange(x.shape[1])
    here = (np.asarray(spans)[:, None, :, 0] <= positions[..., None]) & (
        positions[..., None] < np.asarray(spans)[:, None, :, 1]
    )
    c = np.where(here, a[:, None] - b[:, None] * (x @ bank.T), 0)
    y = x + c @ bank
    rescale = (np.asarray(keep_norm)[:, None] & (c != 0).any(-1))[..., None]
    y = np.where(rescale, y * np.linalg.norm(x, axis=-1, keepdims=True) / np.linalg.norm(y, axis=-1, keepdims=True), y)
    return y, y @ f64(d).T


def interventions(rows, M, D, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, rows, M)) * rng.integers(0, 2, (2, rows, M))
    first = rng.integers(0, 20, (rows, M))
    spans = np.stack([first, first + rng.integers(0, 30, (rows, M))], -1)
    return (unit(rng, M, D).astype(np.float32), (4 * a).astype(np.float32), b.astype(np.float32), spans.astype(np.int32),
            rng.integers(0, 9, rows).astype(np.int32), rng.integers(0, 2, rows).astype(bool))  # fmt: skip


@pytest.mark.parametrize("impl", BOTH, ids=["reference", "kernel"])
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@hypothesis.settings(max_examples=4)
@hypothesis.given(size=sizes, M=st.sampled_from([1, 4, 8]), seed=st.integers(0, 99))
def test_steer_project_agrees_with_float64(impl, dtypes, size, M, seed):
    x, d, _ = operands(*size, dtypes, seed)
    given = interventions(size[0], M, size[-1], seed)
    want, _ = steer64(x, *given, d)
    got, scores = kernels.steer_project(x, *given, d, **impl)
    assert got.dtype == x.dtype and scores.shape == (*x.shape[:2], size[2])
    length = np.linalg.norm(want, axis=-1, keepdims=True) + np.linalg.norm(f64(x), axis=-1, keepdims=True)
    kept = float(jnp.finfo(dtypes[0]).eps) / 2 * np.abs(want)  # rounded once
    assert (
        np.abs(f64(got) - want)
        <= 1.01 * kept + 40 * np.finfo(np.float32).eps * length + SPLIT * length * (dtypes[0] == "bfloat16")
    ).all()
    read, terms = project64(got, d)  # the scores are those of what is returned
    assert (np.abs(f64(scores) - read) <= bound_of(terms, size[-1], dtypes, impl)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bfloat16_steering_kernel_is_no_worse_than_the_reference(dtype):
    x, d, _ = operands(2, 48, 8, 576, (dtype, dtype))
    given = interventions(2, 8, 576, 1)
    want, read = steer64(x, *given, d)
    errors = []
    for impl in BOTH:
        got, scores = kernels.steer_project(x, *given, d, **impl)
        errors.append((np.abs(f64(got) - want).mean(), np.abs(f64(scores) - read).mean()))
    print(f"\nmean errors of stream and scores: kernel {errors[1]}, reference {errors[0]}")
    assert (np.array(errors[1]) <= 1.5 * np.array(errors[0])).all()


@pytest.mark.parametrize("impl", BOTH, ids=["reference", "kernel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_steered_keeps_every_bit(impl, dtype):
    x, d, _ = operands(4, 37, 5, 72, (dtype, dtype))
    bank, a, b, spans, start, keep = interventions(4, 4, 72, 2)
    a[0], b[0], spans[1], start[:] = 0, 0, 0, 0
    a[2:], spans[2:], keep[:] = 9, [[5, 20]] * 4, [True, True, True, False]
    got, _ = kernels.steer_project(x, bank, a, b, spans, start, keep, d, **impl)
    alone, none = kernels.steer_project(x, bank, a, b, spans, start, keep, **impl)
    assert none is None and np.array_equal(alone, got)
    same = np.asarray(got == x).all(-1)
    assert same[:2].all() and same[2, :5].all() and same[2, 20:].all() and not same[2, 5:20].any()
    length, before = (np.linalg.norm(f64(v[2:, 5:20]), axis=-1) for v in (got, x))
    assert (
        np.allclose(length[0], before[0], rtol=4 * float(jnp.finfo(dtype).eps)) and (length[1] > 1.2 * before[1]).all()
    )


def test_rows_of_several_tiles_agree_with_the_reference():
    """Tiles of 16 tokens in rows of 45, every op: what is selected, steered, counted and kept lies in the tile it should."""
    x, d, extra = operands(2, 45, 5, 64, DTYPES[0])
    spans = np.array([[[2, 5], [30, 45]], [[20, 21], [0, 0]]], np.int32)
    bank, a, b, *_ = interventions(2, 4, 64, 5)
    a, b = a + 1, b + np.float32(0.5)
    where = np.array([[[0, 60], [20, 40], [3, 4], [33, 50]], [[17, 18], [5, 30], [0, 0], [40, 41]]], np.int32)

    def every(impl):
        return (
            kernels.project(x, d, extra["centre"], extra["offset"], extra["scale"], cosine=True, **impl),
            [kernels.project_pool(x, d, spans, how=how, **impl) for how in kernels.ops.HOW],
            kernels.top_tokens(x, d, spans, k=40, **impl),
            kernels.steer_project(x, bank, a, b, where, np.array([0, 4], np.int32), np.array([True, False]), d, **impl),
        )

    jax.clear_caches()  # of programs with other tiles
    with mock.patch.object(choice, "tiles", lambda *_: 16):
        got = every(BOTH[1])
    jax.clear_caches()
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(every(BOTH[0])), strict=True):
        assert np.allclose(mine, theirs, atol=1e-4)


def test_a_row_that_is_steered_to_nothing_and_a_single_direction(close):
    d = np.asarray(unit(np.random.default_rng(0), 1, 64), np.float32)
    x = jnp.asarray(3 * d[None])  # [1, 1, D], along the direction that is ablated
    where, one = np.array([[[0, 9]]], np.int32), np.ones((1, 1), np.float32)
    for impl in BOTH:
        y, _ = kernels.steer_project(x, d, 0 * one, one, where, np.zeros(1, np.int32), np.ones(1, bool), **impl)
        assert np.isfinite(y).all()
        for dtypes in DTYPES:
            x1, d1, _ = operands(1, 20, 1, 64, dtypes)
            want, terms = project64(x1, d1, cosine=True)
            got = kernels.project(x1, d1, cosine=True, **impl)
            assert (np.abs(f64(got) - want) <= bound_of(terms, 64, dtypes, impl)).all()


# ---- transformations -------------------------------------------------------------------------------------------------


def every_op(x, d, bank, extra, spans, given, impl):
    """A number that depends on all arrays through all ops."""
    a, b, *rest = given
    total = kernels.project(x, d, extra["centre"], extra["offset"], extra["scale"], cosine=True, **impl).sum()
    for how in kernels.ops.HOW:
        total += (kernels.project_pool(x, d, spans, extra["centre"], how=how, **impl) ** 2).sum()
    total += kernels.top_tokens(x, d, spans, k=3, **impl)[0].sum()
    y, scores = kernels.steer_project(x, bank, a, b, *rest, d, **impl)
    return total + (y**2).sum() + (scores**2).sum()


def test_derivatives_are_those_of_the_reference():
    x, d, extra = operands(2, 20, 5, 64, DTYPES[0])
    bank, a, b, *rest = interventions(2, 4, 64, 3)
    rest[0] = np.minimum(rest[0], 20)
    spans = np.array([[[2, 9]], [[0, 20]]], np.int32)

    def run(impl):
        return lambda x, d, bank, a, b: every_op(x, d, bank, extra, spans, (a, b, *rest), impl)

    arguments = (x, d, jnp.asarray(bank), jnp.asarray(a), jnp.asarray(b))
    want, got = (jax.jit(jax.grad(run(impl), argnums=(0, 1, 2, 3, 4)))(*arguments) for impl in BOTH)
    for mine, theirs in zip(got, want, strict=True):
        assert np.allclose(mine, theirs, rtol=1e-4, atol=1e-4) and np.abs(theirs).max() > 0.1
    forward = jax.jit(lambda *v: jax.jvp(run(BOTH[1]), v, v)[1])(*arguments)
    assert np.allclose(forward, sum((g * v).sum() for g, v in zip(want, arguments, strict=True)), rtol=1e-4)


def test_gradients_are_finite_beside_padding_of_nan_and_at_zero():
    """Zero rows are scored and steered; NaN lies outside all spans, and its cotangents are zero."""
    x, d, _ = operands(2, 9, 4, 64, DTYPES[0])
    bank, a, b, _, start, _ = interventions(2, 4, 64, 4)
    tokens = np.array([[[2, 6]], [[0, 5]]], np.int32)
    where = start[:, None, None] + np.tile(tokens, (1, 4, 1))
    x, read = x.at[:, 2].set(0).at[:, 7:].set(jnp.nan), d

    def run(x, d, bank, a, b):
        y, scores = kernels.steer_project(x, bank, a, b, where, start, np.array([True, False]), read, impl="reference")
        pooled = [kernels.project_pool(x, d, tokens, cosine=True, how=how, impl="reference") for how in kernels.ops.HOW]
        top = kernels.top_tokens(x, d, tokens, cosine=True, k=3, impl="reference")[0]
        return (y[:, :7] ** 2).sum() + scores[:, :7].sum() + sum(map(jnp.sum, pooled)) + top.sum()

    for gradient in jax.jit(jax.grad(run, argnums=(0, 1, 2, 3, 4)))(x, d, bank, a + 1, b):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_the_gradient_of_the_reference_is_that_of_the_formulas_in_float64():
    x, d, extra = operands(2, 9, 4, 64, DTYPES[0])
    bank, a, b, spans, start, _ = interventions(2, 4, 64, 4)
    tokens, centre = np.array([[[2, 9]], [[0, 5]]], np.int32), extra["centre"]
    positions = start[:, None] + np.arange(9)
    here = (spans[:, None, :, 0] <= positions[..., None]) & (positions[..., None] < spans[:, None, :, 1])
    assert here.any() and not here.all()

    def run(x, d, bank, a, b):
        impl = {"impl": "reference"}
        y, scores = kernels.steer_project(x, bank, a, b, spans, start, np.array([True, False]), d, **impl)
        cosines = kernels.project(x, d, centre, cosine=True, **impl)
        return (scores**2).sum() + (cosines**3).sum() + (kernels.project_pool(y, d, tokens, **impl) ** 2).sum()

    def formulas(x, d, bank, a, b):
        c = jnp.where(here, a[:, None] - b[:, None] * (x @ bank.T), 0)
        y = x + c @ bank
        length = jnp.linalg.norm(x, axis=-1, keepdims=True) / jnp.linalg.norm(y, axis=-1, keepdims=True)
        y = y * jnp.where(here.any(-1, keepdims=True) & np.array([True, False])[:, None, None], length, 1)
        centred = x - centre
        cosines = (centred / jnp.linalg.norm(centred, axis=-1, keepdims=True)) @ d.T
        pooled = jnp.stack([y[row, first:last].mean(0) for row, ((first, last),) in enumerate(tokens)]) @ d.T
        return ((y @ d.T) ** 2).sum() + (cosines**3).sum() + (pooled**2).sum()

    arguments = (x, d, bank, a, b)
    got = jax.grad(run, argnums=(0, 1, 2, 3, 4))(*(jnp.asarray(v) for v in arguments))
    with jax.enable_x64(True):
        want = jax.grad(formulas, argnums=(0, 1, 2, 3, 4))(*(jnp.asarray(f64(v)) for v in arguments))
        for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            error, size = np.abs(f64(mine) - f64(theirs)).max(), np.abs(f64(theirs)).max()
            print(f"gradient {i}: error {error:.1e}, of {size:.1e}")
            assert error <= 64 * np.finfo(np.float32).eps * size and size > 0.1


@pytest.mark.parametrize("impl", BOTH, ids=["reference", "kernel"])
def test_ops_are_mapped_over_rows(impl):
    x, d, _ = operands(3, 18, 5, 64, DTYPES[0])
    x = x[:, None]  # three batches of one row
    spans = np.array([[[2, 9]], [[0, 18]], [[4, 5]]], np.int32)[:, None]
    bank, *given = (v if i == 0 else v[:, None] for i, v in enumerate(interventions(3, 4, 64, 3)))

    def project(x):
        return kernels.project(x, d, cosine=True, **impl)

    def others(x, spans, *given):
        return kernels.project_pool(x, d, spans, **impl), kernels.steer_project(x, bank, *given, d, **impl)

    for run, arrays in ((project, (x,)), (others, (x, spans, *given))):
        one = jax.tree.map(lambda *v: jnp.stack(v), *[run(*(v[i] for v in arrays)) for i in range(3)])
        for a, b in zip(jax.tree.leaves(jax.vmap(run)(*arrays)), jax.tree.leaves(one), strict=True):
            assert np.allclose(a, b, rtol=1e-5, atol=1e-5)
    both = jax.vmap(lambda d: kernels.project(x[0], d, **impl))(jnp.stack([d, -d]))
    assert np.allclose(both[0], -both[1]) and np.allclose(both[0], kernels.project(x[0], d, **impl), atol=1e-5)


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from jaxemo import kernels
mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
x, d = rng.standard_normal((8, 20, 64)).astype("f"), rng.standard_normal((5, 64)).astype("f")
bank, a, b = d[:4], rng.standard_normal((8, 4)).astype("f"), np.zeros((8, 4), "f")
spans, start, keep = np.tile(np.array([[0, 9]] * 4, np.int32), (8, 1, 1)), np.zeros(8, np.int32), np.ones(8, bool)
def run(x, a, b, spans, start, keep, d, bank):
    return (kernels.project(x, d, cosine=True), kernels.project_pool(x, d, spans),
            kernels.steer_project(x, bank, a, b, spans, start, keep, d))
rows = P("rows")
given = (x, a, b, spans, start, keep, d, bank)
split = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 6 + (P(), P()), out_specs=rows))(*given)
for got, want in zip(jax.tree.leaves(split), jax.tree.leaves(run(*given)), strict=True):
    assert len(got.sharding.device_set) == 4 and np.allclose(got, want, atol=1e-5)
print("sharded", len(jax.devices()))
"""


def test_ops_run_on_a_mesh():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.stdout.strip() == "sharded 4", done.stderr[-2000:]


def test_one_program_is_exported_for_all_platforms_at_once():
    """What is chosen is lowered for its own platform: the kernels for TPUs and GPUs, the reference for CPUs, which runs here."""
    x, d, extra = operands(2, 64, 5, 128, DTYPES[2])
    bank, *given = interventions(2, 4, 128, 0)
    spans = np.array([[[2, 9]], [[0, 64]]], np.int32)
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(impl, x, spans, *given):
        def one(x):
            return kernels.project(x, d, extra["centre"], cosine=True, impl=impl)

        return (jax.vmap(one)(x), jax.grad(lambda x: one(x)[..., 0].sum())(x), kernels.project_pool(x, d, spans, impl=impl),
                kernels.top_tokens(x, d, spans, impl=impl)[0].T, kernels.steer_project(x, bank, *given, d, impl=impl))  # fmt: skip

    def jitted(impl):
        rows = jax.P("rows")
        return jax.jit(jax.shard_map(functools.partial(run, impl), mesh=mesh, in_specs=rows, out_specs=rows))

    exported = jax.export.export(jitted("kernel"), platforms=("cpu", "cuda", "tpu"))(x, spans, *given)
    text = exported.mlir_module()
    assert [text.count(name) for name in ("custom_call @tpu_custom_call", "custom_call @mosaic_gpu_v2")] == [4, 4]
    got, want = jax.jit(exported.call)(x, spans, *given), jitted("reference")(x, spans, *given)
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))


def test_a_program_is_lowered_with_what_was_chosen_for_its_platform():
    x, d, _ = operands(2, 2048, 171, 576, DTYPES[2])
    run = jax.jit(functools.partial(kernels.project, cosine=True))
    for_tpu, here = (run.trace(x, d).lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu"))
    assert "tpu_custom_call" in for_tpu and "custom_call" not in here
    with jax.disable_jit():
        assert np.allclose(run(x[:, :9], d), run(x, d)[:, :9], atol=1e-5)


# ---- choice ----------------------------------------------------------------------------------------------------------

HOME = choice.Work("project", 1, 65536, 2048, 171, "bfloat16", "bfloat16")


def test_the_choice_is_what_was_measured_else_the_roofline(tmp_path):
    kind = "TPU v5e"
    plain, cosine = choice.choose(HOME, "tpu", kind), choice.choose(HOME._replace(cosine=True), "tpu", kind)
    assert (
        not plain.kernel and "1.00x the reference by the roofline of TPU v5e" in plain.why
    )  # XLA reads x once as well
    assert cosine.kernel and cosine.tile >= 256
    path = tmp_path / "tuned.json"
    near = HOME._replace(cosine=True, D=2304, E=200)
    entry = near._asdict() | {"tile": 64, "speedup": 0.9}
    path.write_text(json.dumps({kind: [entry], "NVIDIA H100 80GB HBM3": [entry]}))
    with mock.patch.object(choice, "TUNED", path):
        choice.tuned.cache_clear(), choice.choose.cache_clear()
        slow = choice.choose(HOME._replace(cosine=True), "tpu", kind)
        assert not slow.kernel and "measured on TPU v5e: 0.90x" in slow.why
        for change, speaks in (({"D": 1700}, True), ({"D": 1400}, False), ({"E": 290}, True), ({"E": 301}, False),
                               ({"T": 16384}, True), ({"T": 16000}, False), ({"T": 1 << 22}, True)):  # fmt: skip
            assert ("measured" in choice.choose(near._replace(**change), "tpu", kind).why) == speaks, change
        assert choice.choose(HOME._replace(cosine=True, D=8192), "tpu", kind).kernel, "far from what was measured"
        assert choice.choose(HOME._replace(cosine=True), "tpu", "TPU v6e").kernel, "another device"
        assert "measured" not in choice.choose(HOME._replace(cosine=True, x="float32"), "tpu", kind).why, "another type"
        # The nearest counts, and of those that are as near the slowest.
        steer = entry | {"op": "steer_project", "cosine": False, "M": 8, "D": 960, "E": 0, "rows": 64, "T": 1024}
        rows = [
            entry,
            entry | {"D": 2048, "speedup": 1.7},
            entry | {"D": 2048, "speedup": 1.5},
            steer | {"speedup": 3.0},
        ]
        path.write_text(json.dumps({kind: rows, "NVIDIA H100 80GB HBM3": rows}))
        choice.tuned.cache_clear(), choice.choose.cache_clear()
        fast = choice.choose(HOME._replace(cosine=True), "tpu", kind)
        assert fast.kernel and fast.tile == 64 and "1.50x" in fast.why
        silent = HOME._replace(op="steer_project", rows=64, T=1024, D=1024, E=0, M=3)  # scores nothing
        for work in (silent, silent._replace(M=65), silent._replace(E=1)):
            assert ("measured" in choice.choose(work, "tpu", kind).why) == (work == silent)
        assert choice.choose(silent, "cuda", "NVIDIA H100 80GB HBM3") == choice.Choice(
            True, 64, "measured on NVIDIA H100 80GB HBM3: 3.00x the reference"
        )
        assert "would be copied" in choice.choose(silent._replace(T=1021), "cuda", "NVIDIA H100 80GB HBM3").why
    choice.tuned.cache_clear(), choice.choose.cache_clear()


def test_what_a_kernel_cannot_take_falls_back_and_only_that():
    huge = HOME._replace(D=65536, E=1024)
    assert "do not fit the chip's memory" in choice.choose(huge, "tpu", "TPU v5p").why
    with pytest.raises(NotImplementedError, match="1024 directions of width 65536 do not fit"):
        choice.choose(huge, "tpu", "TPU v5p", "kernel")
    assert not choice.choose(HOME._replace(x="float16"), "tpu", "TPU v5e").kernel
    assert not choice.choose(HOME._replace(cosine=True), "cpu", "cpu").kernel
    assert not choice.choose(HOME._replace(cosine=True), "cuda", "NVIDIA H100 80GB HBM3").kernel, "not timed there"
    short = HOME._replace(op="steer_project", T=1, rows=64, M=4)
    assert "too short" in choice.choose(short, "tpu", "TPU v5e").why
    assert "too short" in choice.choose(short._replace(op="project_pool", M=0), "tpu", "TPU v5e").why
    for nothing in ({"M": 0}, {"T": 0}, {"rows": 0}, {"D": 0}):
        assert "nothing to multiply" in choice.choose(short._replace(T=64)._replace(**nothing), "tpu", "TPU v5e").why
    many = HOME._replace(op="project_pool", rows=9999, T=64, cosine=True)
    assert "9999 rows" in choice.choose(many, "tpu", "TPU v5e").why
    assert choice.tiles(HOME._replace(op="top_tokens", E=1024), "tpu", choice.device("TPU v5e")) == 128
    assert choice.tiles(HOME._replace(D=8192, cosine=True), "tpu", choice.device("TPU v5e")) == 512, (
        "1024 take 100 of 134 MB"
    )
    x, d, _ = operands(1, 4, 2, 64, DTYPES[0])
    for impl in ("auto", "kernel"):
        with mock.patch.object(choice, "tiles", side_effect=KeyError("a mistake")), pytest.raises(KeyError):
            choice.choose.cache_clear()
            kernels.project(x[:, :3], d, impl=impl)
    choice.choose.cache_clear()


def test_several_devices_are_left_to_xla_but_inside_shard_map():
    """XLA cannot partition a kernel, so a program over a mesh would not compile."""
    x, d, _ = operands(1, 4096, 171, 576, DTYPES[1])

    def lowered():
        jax.clear_caches()
        run = jax.jit(lambda x, d: kernels.project(x, d, cosine=True))
        return run.trace(x, d).lower(lowering_platforms=("tpu",)).as_text()

    assert "tpu_custom_call" in lowered()
    with (
        mock.patch.object(choice, "here", lambda: "tpu"),
        mock.patch.object(choice, "device_kind", lambda platform: "TPU v5e"),
        mock.patch.object(jax, "device_count", lambda: 4),
    ):
        assert "tpu_custom_call" not in lowered()
        mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
        with jax.set_mesh(mesh):
            assert choice.spread()
        inside = []
        jax.eval_shape(jax.shard_map(lambda x: (inside.append(choice.spread()), x)[1], mesh=mesh, in_specs=jax.P(), out_specs=jax.P()), x)  # fmt: skip
        assert inside == [False]
    jax.clear_caches()


def test_what_runs_is_logged_once(caplog):
    x, d, _ = operands(1, 5, 2, 64, DTYPES[0])
    choice.told.clear()

    def run():
        for _ in range(2):
            jax.clear_caches()
            jax.jit(lambda x: kernels.project(x, d, cosine=True)).lower(x)
        return [r.getMessage() for r in caplog.records]

    assert not run(), "nobody asked"
    with caplog.at_level(logging.INFO, "jaxemo.kernels"):
        (here,) = run()
        assert "op='project'" in here and here.endswith("on cpu: reference, there is no kernel for cpu")
        with mock.patch.multiple(choice, here=lambda: "tpu", device_kind=lambda platform: "TPU v5e"):
            assert "by the roofline of TPU v5e" in run()[1] and len(run()) == 2


CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.skipif(
    CPUS < 2, reason="the interpreter's two cores wait for each other, which takes two threads of XLA's"
)
def test_kernels_do_not_race_on_two_cores_and_a_race_would_be_found(capfd):
    """The second time with `project_pool`'s sequential axis, along which it accumulates, declared parallel."""
    from jaxemo.kernels.project import tpu as project_tpu
    from jaxemo.kernels.project_pool import tpu as pool_tpu

    x, d, _ = operands(1, 64, 3, 64, DTYPES[0])
    spans, impl = np.array([[[3, 60]]], np.int32), {"impl": "kernel", "interpret": TWO_CORES}

    def pool():
        return kernels.project_pool(x, d, spans, **impl)

    def every():
        return (kernels.project(x, d, **impl), pool(), kernels.top_tokens(x, d, spans, **impl),
                kernels.steer_project(x, *interventions(1, 4, 64, 0), d, **impl))  # fmt: skip

    def races(run) -> bool:
        jax.clear_caches()
        with mock.patch.object(choice, "tiles", lambda *_: 16):
            try:
                jax.block_until_ready(run())
            except RuntimeError as error:  # newer JAX raises, older prints
                if "RACE DETECTED" not in str(error):
                    raise
                pltpu.reset_tpu_interpret_mode_state()
                capfd.readouterr()
                return True
        return "RACE DETECTED" in capfd.readouterr().out

    assert not races(every)
    parallel = project_tpu.params(2)
    with mock.patch.object(pool_tpu, "params", lambda *_: parallel):
        assert races(pool)
    jax.clear_caches()


def test_the_pages_table_is_what_the_command_prints():
    root = pathlib.Path(__file__).parent.parent
    printed = subprocess.check_output([sys.executable, root / "bench" / "kernels.py", "--table"], text=True).strip()
    page = (root / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert page.partition("<!-- table -->\n")[2].partition("\n<!-- end of table -->")[0] == printed
