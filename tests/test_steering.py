"""Steering: its algebra, its exactness, its errors, and one program for every value."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import oracle
import pytest

import jaxemo
from jaxemo import Steering, TokenBatch, steering
from jaxemo.steering import ablate, add, clamp, dampen

L, D = 3, 32
LENGTHS = (5, 9, 12)
POOL = np.random.default_rng(0).standard_normal((6, L, D)).astype(np.float32)  # far from orthogonal, never parallel
BATCH = TokenBatch(np.zeros((3, 12), np.int32), np.array(LENGTHS, np.int32))
START = np.zeros(3, np.int32)


def unit(i, layer):
    return POOL[i, layer].astype(np.float64) / np.linalg.norm(POOL[i, layer].astype(np.float64))


def stream(seed=0):
    """A residual stream `[L, 3, 12, D]`, one for each layer."""
    return np.random.default_rng(seed).standard_normal((L, 3, 12, D)).astype(np.float32)


@functools.cache
def config():
    sizes = {"vocab_size": 97, "d_model": D, "n_layers": L, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 48}
    return jaxemo.ModelConfig(family="llama", max_positions=64, **sizes)


apply_layers = jax.jit(jax.vmap(steering.apply, in_axes=(None, 0, 0, None)))


def steer(rows, x):
    """`x [L, 3, 12, D]` after the steering of `rows`, every layer by itself."""
    interventions = steering.resolve(config(), rows, BATCH)
    return np.asarray(apply_layers(interventions.replace(layers=None), interventions.layers, x, START)[0])


def naive_positions(selection, length):
    """What a selection names in a prompt, by slicing a list."""
    names = {"all": slice(None), "prompt": slice(None), "last": slice(-1, None)}
    row = list(range(length))
    if isinstance(selection, list | int):
        return sorted({row[i] for i in np.atleast_1d(selection)})
    return row[names[selection] if isinstance(selection, str) else selection]


# ---- the formula against the oracle ----------------------------------------------------------------------------------

# Selections that name at least one token of each row; what names none is refused, see below.
selections = st.one_of(
    st.sampled_from(["all", "prompt", "last"]),
    st.integers(-5, 4),
    st.lists(st.integers(-5, 4), min_size=1, max_size=3),
    st.builds(slice, st.integers(0, 3) | st.none(), st.integers(4, 12) | st.just(-1) | st.none()),
    st.builds(slice, st.integers(-9, -2), st.sampled_from([None, -1])),
)
acts = st.tuples(
    st.sampled_from(["add", "set", "dampen"]),
    st.integers(0, len(POOL) - 1),
    st.floats(-3, 3, width=32),
    st.lists(st.integers(0, L - 1), min_size=1, max_size=L, unique=True),
    selections,
)
one_row = st.tuples(st.lists(acts, max_size=3, unique_by=lambda act: act[:2]), st.booleans())
MAKE = {"add": add, "set": clamp, "dampen": dampen}


def total(terms, keep_norm):
    """The sum of steerings for a list of acts."""
    parts = [MAKE[kind](POOL[i], value, layers, tokens) for kind, i, value, layers, tokens in terms]
    return sum(parts, Steering(keep_norm=keep_norm))


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.lists(one_row, min_size=3, max_size=3), st.integers(0, 5))
def test_mixed_rows_agree_with_the_oracle(close, rows, seed):
    """Each row by its own steering: kinds, layers, overlapping token spans; tokens not named keep every bit."""
    x = stream(seed)
    got = steer([total(*row) for row in rows], x)
    for row, (terms, keep_norm) in enumerate(rows):
        n = LENGTHS[row]
        acting = [(kind, i, value, layers, naive_positions(tokens, n)) for kind, i, value, layers, tokens in terms]
        want = x[:, row, :n].astype(np.float64)
        for layer, t in np.ndindex(L, n):
            here = [
                (kind, unit(i, layer), value) for kind, i, value, layers, at in acting if layer in layers and t in at
            ]
            want[layer, t] = oracle.intervene(want[layer, t], here, keep_norm)
            if not here:
                np.testing.assert_array_equal(got[layer, row, t], x[layer, row, t])
        # D roundings in a projection, one a term; each term is as long as its value and the projection together.
        scale = np.abs(x).max() + sum(abs(value) + np.linalg.norm(x, axis=-1).max() for _, _, value, *_ in terms)
        close(got[:, row, :n], want, D + len(terms), f"row {row}", scale=scale)


# ---- the algebra -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_norm", [False, True])
def test_nothing_is_exactly_nothing(keep_norm):
    x, v = stream(), add(POOL[0], 1.5, tokens=slice(1, 4), keep_norm=keep_norm)
    for nothing in (v * 0, 0.0 * v, v - v, -v + v, 3 * v - 3 * v, Steering(keep_norm=keep_norm), dampen(POOL[1], 0.0)):
        np.testing.assert_array_equal(steer(nothing, x), x)
    assert (steer(v, x) != x).any()


def test_positions_from_numpy_are_positions():
    x, at = stream(), np.array([0, 2])
    np.testing.assert_array_equal(steer(add(POOL[0], 1.0, tokens=at) - add(POOL[0], 1.0, tokens=at.copy()), x), x)
    np.testing.assert_array_equal(steer(add(POOL[0], 1.0, tokens=at), x), steer(add(POOL[0], 1.0, tokens=[0, 2]), x))


@hypothesis.given(st.integers(-8, 8), st.integers(-8, 8))
def test_strengths_scale_and_add(m, n):
    """Small whole numbers are exact in float32, so equal strengths are equal programs."""
    x, v = stream(1), add(POOL[0], 1.0, [0, 2])
    np.testing.assert_array_equal(steer(m * v, x), steer(add(POOL[0], m, [0, 2]), x))
    np.testing.assert_array_equal(steer(m * v + n * v, x), steer((m + n) * v, x))
    np.testing.assert_array_equal(steer(m * v - n * v, x), steer(v * (m - n), x))


def test_twenty_times_once_is_strength_twenty():
    x, v = stream(2), add(POOL[3], 1.0)
    np.testing.assert_array_equal(steer(20 * v, x), steer(add(POOL[3], 20.0), x))
    np.testing.assert_array_equal(steer(20 * v, x), steer(sum([v] * 20, Steering()), x))


@hypothesis.given(one_row, one_row)
def test_addition_commutes(close, a, b):
    hypothesis.assume(not {i for k, i, *_ in a[0] if k == "set"} & {i for k, i, *_ in b[0] if k == "set"})
    x, (a, b) = stream(3), (total(*a), total(*b))
    # The same terms summed in another order: D + 6 roundings, of projections no longer than x and changes up to 3 each.
    close(
        steer(a + b, x),
        steer(b + a, x),
        2 * (D + 6),
        "a + b against b + a",
        scale=np.abs(x).max() + 6 * (3 + np.sqrt(D)),
    )


def projection(x, i):
    return np.stack([x[layer].astype(np.float64) @ unit(i, layer) for layer in range(L)])


def test_ablate_removes_the_projection_and_twice_is_once(close):
    x = stream(4)
    once = steer(ablate(POOL[0]), x)
    close(projection(once, 0), np.zeros((L, 3, 12)), D, "what is left", scale=np.abs(projection(x, 0)).max())
    close(steer(ablate(POOL[0]), once), once, D, "ablated again")
    close(steer(ablate(POOL[0]) + ablate(POOL[0]), x), once, D, "ablated twice at once")
    close(steer(ablate(POOL[0]) + ablate(-3 * POOL[0]), x), once, D, "the same line, named otherwise")


def test_ablations_together_leave_nothing_of_their_span(close):
    """Directions that lean on one another undo each other's ablation unless they are made orthonormal first."""
    x = stream(5)
    got = steer(sum((ablate(POOL[i]) for i in range(4)), Steering()), x)
    for layer in range(L):
        span = np.linalg.svd([unit(i, layer) for i in range(4)], full_matrices=False)[2]
        close(got[layer] @ span.T, np.zeros((3, 12, 4)), D, f"left of the span at layer {layer}", scale=np.abs(x).max())
        rest = np.eye(D) - span.T @ span
        close(got[layer] @ rest, x[layer] @ rest, 2 * D, "outside the span")


def test_clamp_reaches_its_value(close):
    x = stream(6)
    close(projection(steer(clamp(POOL[0], 1.25), x), 0), np.full((L, 3, 12), 1.25), D, "clamped", scale=np.abs(x).max())
    both = steer(clamp(POOL[0], 2.0) + clamp(POOL[1], -1.0, [0, 1]), x)
    close(projection(both, 0), np.full((L, 3, 12), 2.0), D, "first of two", scale=2 * np.abs(x).max())
    close(projection(both, 1)[:2], np.full((2, 3, 12), -1.0), D, "second of two", scale=2 * np.abs(x).max())
    twice = steer(clamp(POOL[0], 2.0) + clamp(-POOL[0], -2.0), x)
    close(twice, steer(clamp(POOL[0], 2.0), x), D, "the same demand twice", scale=2 * np.abs(x).max())


def test_contradictory_clamps_are_refused(close):
    with pytest.raises(ValueError, match=r"at layer 1 the same direction is set to different values: \[1.0, 2.0\]"):
        steer(clamp(POOL[0], 1.0, [0, 1]) + clamp(POOL[0], 2.0, [1, 2]), stream())
    third = np.array([unit(0, layer) + unit(1, layer) for layer in range(L)])  # ablated with the other two, not 1
    with pytest.raises(ValueError, match="at layer 0 the same direction is set"):
        steer(ablate(POOL[0]) + ablate(POOL[1]) + clamp(third, 1.0), stream())
    apart = clamp(POOL[0], 1.0, tokens=[0, 1]) + clamp(POOL[0], 2.0, tokens=[2, 3])
    got = projection(steer(apart, stream()), 0)
    close(got[:, :, [0, 2]], np.tile([1.0, 2.0], (L, 3, 1)), D, "apart", scale=2 * np.abs(stream()).max())


def test_dampen_scales_the_projection(close):
    x = stream(7)
    for beta in (0.25, 1.0, -1.0, 2.0):
        got = projection(steer(dampen(POOL[2], beta), x), 2)
        close(got, (1 - beta) * projection(x, 2), D, f"dampened by {beta}", scale=2 * np.abs(x).max())


def test_keep_norm_keeps_the_norm_and_touches_nothing_else(close):
    x, tokens = stream(8), slice(2, 4)
    for act in (add(POOL[0], 5.0, [0, 1], tokens, True), ablate(POOL[0], [0, 1], tokens, True)):
        got = steer([act, None, act], x)
        close(np.linalg.norm(got, axis=-1), np.linalg.norm(x.astype(np.float64), axis=-1), D, "norms")
        free = steer([Steering(act.terms), None, None], x)[:2, 0, 2:4]
        direction = free / np.linalg.norm(free, axis=-1, keepdims=True)
        close(got[:2, 0, 2:4] / np.linalg.norm(got[:2, 0, 2:4], axis=-1, keepdims=True), direction, D, "directions")
        moved = (got != x).any(-1)
        assert moved[:2, [0, 2], 2:4].all() and moved.sum() == 2 * 2 * 2


def test_keep_norm_with_nothing_left_is_finite():
    """A vector along the ablated direction becomes zero, a zero vector stays zero: neither has a norm to divide by."""
    axis = np.tile(np.eye(1, D, dtype=np.float32), (L, 1))
    x = np.zeros((L, 3, 12, D), np.float32)
    x[..., 1:, 0] = 7.0
    got = steer(ablate(axis, keep_norm=True), x)
    np.testing.assert_array_equal(got, 0)
    assert not steer(add(axis, 3.0, keep_norm=True), np.zeros_like(x)).any()

    interventions = steering.resolve(config(), ablate(axis, keep_norm=True), BATCH)
    layer = jax.tree.map(lambda leaf: leaf[0], interventions.layers)
    gradient = jax.grad(lambda x: steering.apply(interventions, layer, x, START)[0].sum())(x[0])
    assert np.isfinite(gradient).all()


def test_overlapping_spans_add_where_they_overlap(close):
    x = stream(9)
    v = functools.partial(add, POOL[0])
    got = steer(v(1.0, tokens=slice(0, 3)) + v(2.0, tokens=slice(2, 5)) + v(4.0, tokens=[0, 4]), x)
    amount = np.array([5.0, 1.0, 3.0, 2.0, 6.0])[:, None]
    for layer in range(L):
        want = x[layer, :, :5].astype(np.float64) + amount * unit(0, layer)
        close(got[layer, :, :5], want, 4, f"layer {layer}", scale=np.abs(want).max() + 6)
    np.testing.assert_array_equal(got[:, :, 5:], x[:, :, 5:])


# ---- through the model -----------------------------------------------------------------------------------------------

IDS = np.random.default_rng(1).integers(1, 256, (4, 12)).astype(np.int32)
MIXED = TokenBatch(IDS, np.array([12, 5, 9, 12], np.int32))
ROWS = [  # (Steering, the same for the oracle as (kind, direction, value, layers, tokens), keep_norm)
    (add(POOL[0], 2.0) + dampen(POOL[1], 0.5, [1], "last"),
     [("add", 0, 2.0, range(L), "all"), ("dampen", 1, 0.5, [1], "last")], False),
    (ablate(POOL[0], [0, 1], [0, 2, 4]) + clamp(POOL[2], 3.0, [1], slice(1, None)),
     [("set", 0, 0.0, [0, 1], [0, 2, 4]), ("set", 2, 3.0, [1], slice(1, None))], False),
    (add(POOL[0], -4.0, [1], slice(-3, None), keep_norm=True), [("add", 0, -4.0, [1], slice(-3, None))], True),
    (None, [], False),
]  # fmt: skip


def logits(lm, batch, steering):
    return np.asarray(lm.forward(batch, steering).logits)


def test_steered_model_agrees_with_the_oracle(either, weights, close, k_of):
    got = logits(either, MIXED, [row[0] for row in ROWS])
    plain = logits(either, MIXED, None)
    for row, (spec, terms, keep_norm) in enumerate(ROWS):
        n = MIXED.lengths[row]
        given = [oracle.Act(k, POOL[i].astype(float), v, layers, naive_positions(s, n)) for k, i, v, layers, s in terms]
        want = oracle.forward(either.config, weights, IDS[row, :n], given, keep_norm).logits
        close(got[row, :n], want, k_of(either.config, n), f"row {row}")
        assert (
            spec is None or np.abs(got[row, :n] - plain[row, :n]).max() > 0.1
        )  # what is proved is not that nothing happens


def test_mixed_rows_equal_each_row_alone(either, close, k_of):
    together = logits(either, MIXED, [row[0] for row in ROWS])
    for row, (spec, _, _) in enumerate(ROWS):
        n = MIXED.lengths[row]
        alone = logits(either, TokenBatch(IDS[row : row + 1], MIXED.lengths[row : row + 1]), [spec])
        close(together[row, :n], alone[0, :n], 2 * k_of(either.config, n), f"row {row}")


def test_strength_zero_is_empty_steering_to_the_bit_and_no_steering_to_rounding(either, close, k_of):
    empty = logits(either, MIXED, Steering())
    for nothing in (add(POOL[0], 0.0), 0 * add(POOL[0], 5.0, [1], "last"), add(POOL[0], 2.0) - add(POOL[0], 2.0),
                    add(POOL[0], 0.0, keep_norm=True), dampen(POOL[3], 0.0), [None] * 4):  # fmt: skip
        np.testing.assert_array_equal(logits(either, MIXED, nothing), empty)
    close(
        empty,
        logits(either, MIXED, None),
        k_of(either.config, 12),
        "empty steering against the program without steering",
    )


def test_steering_a_row_leaves_the_others_as_they_were(either):
    untouched = logits(either, MIXED, [None] * 4)
    for row in range(4):
        for act in (add(POOL[0], 30.0, tokens="last"), ablate(POOL[1], 0, "last", keep_norm=True)):
            got = logits(either, MIXED, [act if i == row else None for i in range(4)])
            same = (got == untouched).all(-1)
            first = MIXED.lengths[row] - 1
            assert same[np.arange(4) != row].all()
            assert same[row, :first].all() and not same[row, first]  # nor is anything before the steered token


def test_one_compilation_for_every_value(either, compiles):
    """60 changes of kind, strength, direction, layers, tokens, prompt and its length: not one program more."""
    rng = np.random.default_rng(2)

    def random_steering():
        i, value, layers = rng.integers(4), rng.normal(), rng.permutation(L)[: rng.integers(1, L + 1)].tolist()
        tokens = ["all", "prompt", "last", slice(2, None), slice(-4, -1), 3, -2, [0, 1, 2]][rng.integers(8)]
        kind = [add, clamp, dampen][rng.integers(3)]
        return kind(POOL[i], value, layers, tokens, keep_norm=bool(rng.integers(2)))

    def random_batch():
        # A width of its own: no other test has compiled a program that this one should not need.
        return TokenBatch(rng.integers(1, 256, (4, 13)).astype(np.int32), rng.integers(5, 14, 4).astype(np.int32))

    either.forward(random_batch(), random_steering())
    before, seen = compiles.count, set()
    for _ in range(60):
        spec = [random_steering() if rng.integers(3) else None for _ in range(4)]
        seen.add(np.asarray(either.forward(random_batch(), spec).logits).tobytes())
    assert len(seen) == 60
    assert compiles.count == before, f"{compiles.count - before} programs compiled"


def test_turns_are_steered_by_name(tiny, make_tokenizer):
    """As the positions that the names stand for, bit for bit; and a name that a row does not have is refused."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<>' if add_generation_prompt }}"
    lm = jaxemo.LanguageModel(tiny.config, tiny.params, make_tokenizer(chat_template=template))
    talk = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}]
    batch = lm.tokenize([talk, talk[:1]])
    text = lm.tokenizer.render(talk)
    a, d, e = text.index("abc"), text.index(">d<") + 1, text.index(">e<") + 1

    def same(names, positions):
        got, want = (np.asarray(lm.forward(batch, [None if t is None else add(POOL[0], 30.0, tokens=t) for t in each]).logits)
                     for each in (names, positions))  # fmt: skip
        return np.array_equal(got, want) and not np.array_equal(got, np.asarray(lm.forward(batch).logits))

    assert same(["user", None], [[a, a + 1, a + 2, e], None])
    assert same(["user", "user"], [[a, a + 1, a + 2, e], [a, a + 1, a + 2]])
    assert same(["user:-1", "turn:0"], [[e], [a, a + 1, a + 2]])
    assert same(["assistant", "before_answer"], [[d], "last"])
    batch = lm.tokenize([talk, [talk[2], talk[1], talk[0]]])  # as long as each other, with turns elsewhere
    assert batch.lengths[0] == batch.lengths[1]
    one = np.asarray(lm.forward(batch, add(POOL[0], 30.0, tokens="user:0")).logits)
    two = np.asarray(lm.forward(batch, [add(POOL[0], 30.0, tokens=at) for at in ([a, a + 1, a + 2], [a])]).logits)
    assert np.array_equal(one, two)
    with pytest.raises(ValueError, match=r"'assistant' \(row 1\); .*; this row has the turns user \(turn:0\)"):
        lm.forward([talk, talk[:1]], add(POOL[0], 1.0, tokens="assistant"))


# ---- rule 3: what would not happen is an error -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: add(POOL[0], 1.0, 3), "layer 3 does not exist: the model's 3 layers are 0 to 2"),
        (lambda: add(POOL[0], 1.0, [0, -4]), "layer -4 does not exist"),
        (lambda: add(POOL[0], 1.0, []), "no layers given"),
        (lambda: add(POOL[0], 1.0, [2, -1]), "name a layer twice"),
        (lambda: add(POOL[0], 1.0, "some"), "layers='some'"),
        (lambda: add(POOL[0, 0], 1.0), r"must be \[L, D\], one a layer, not \[32\]"),
        (lambda: add(POOL[0], np.nan), "add has a value that is not finite"),
        (lambda: clamp(POOL[0], [1.0, np.inf, 0.0]), "set has a value that is not finite"),
        (lambda: add(POOL[0] * [[1], [0], [1]], 1.0), r"the direction at layers \[1\] is zero"),
        (lambda: ablate(POOL[0] * [[1], [1], [np.nan]], [0, 1]), r"the direction at layers \[2\] is zero or not finite"),
    ],
)  # fmt: skip
def test_impossible_steering_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([None, add(POOL[0], 1.0)], "2 steerings for 4 rows"),
        ([], "0 steerings for 4 rows"),
        (add(POOL[0][:2], 1.0), r"shape \[2, 32\] do not fit a model with 3 layers of width 32 \(row 0\)"),
        ([None, None, add(POOL[0][:, :8], 1.0), None], r"shape \[3, 8\] do not fit .* \(row 2\)"),
        (add(POOL[0], 1.0, tokens=[]), r"\[\] is empty for a row of 12 prompt tokens and none to be generated"),
        (
            add(POOL[0], 1.0, tokens=slice(5, None)),
            "is empty for a row of 5 prompt tokens",
        ),  # row 1
        (add(POOL[0], 1.0, tokens="generated"), "'generated' is empty"),
        (add(POOL[0], 1.0, tokens=7), "position 7 is outside this row's 5 tokens"),
        (add(POOL[0], 1.0, tokens="everything"), "unknown token selection 'everything'"),
    ],
)
def test_steering_that_does_not_fit_the_batch_is_refused(tiny, spec, message):
    with pytest.raises(ValueError, match=message):
        tiny.forward(MIXED, spec)


def test_other_misuse_is_refused(tiny):
    with pytest.raises(TypeError, match="steering of row 1 is ndarray"):
        tiny.forward(MIXED, [None, POOL[0], None, None])
    for kind, act in (("set", ablate(POOL[0])), ("dampen", dampen(POOL[0], 0.5))):
        with pytest.raises(TypeError, match=f"a term of kind '{kind}'"):
            2 * act


def test_a_direction_may_be_zero_where_it_does_not_act():
    x, v = stream(), POOL[0] * np.array([[1], [0], [1]], np.float32)
    got = steer(add(v, 1.0, [0, 2]), x)
    assert (got[[0, 2]] != x[[0, 2]]).any()
    np.testing.assert_array_equal(got[1], x[1])


def test_equal_directions_share_a_slot_and_slots_come_in_powers_of_two():
    def slots(rows):
        return steering.resolve(config(), rows, BATCH).layers.bank.shape[1]

    assert slots([add(POOL[0], 1.0), add(POOL[0], 2.0, [1]), ablate(POOL[0])]) == 4
    assert slots([sum((add(v, 1.0) for v in POOL), Steering()), None, None]) == 8


def test_what_would_do_nothing_or_something_else_is_refused(tiny):
    """Each of these once went through: as the wrong layer, as two texts, or as if it had not been said."""
    ids = np.arange(6)[None]
    with pytest.raises(ValueError, match=r"20\.5"):
        steering.add(np.ones((30, 8)), 1.0, [20.5])
    for wrong in ("desperate", 3):
        with pytest.raises(TypeError, match=f"steering is {type(wrong).__name__}"):
            tiny.forward(ids, steering=wrong)
    with pytest.raises(TypeError, match="dict is neither a text"):
        jaxemo.tokens.encode(None, {"role": "user", "content": "hi"})
    with pytest.raises(ValueError, match="logits='none'"):
        tiny.forward(ids, logits="none")
    with pytest.raises(ValueError, match="nothing to read"):
        tiny.generate(ids, layer=1, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"max_new_tokens is 4\.0"):
        tiny.generate(ids, max_new_tokens=4.0)
    with pytest.raises(TypeError, match=r"5\.5 is neither"):
        tiny.generate(ids, stop=[5.5], max_new_tokens=2)
    with pytest.raises(ValueError, match="asks for no scores"):
        tiny.forward(ids, capture=jaxemo.Capture(raw={"resid_post": [0]}, directions=np.ones((3, 1, 32), np.float32)))
