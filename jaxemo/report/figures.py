"""The figures of a model's report: of each result, what is drawn and what a reader is told who points at it."""

import textwrap
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from jaxemo.emotions import classification, geometry, lens, prompts, speakers, statistics, steering_test
from jaxemo.report import chart
from jaxemo.report.chart import Axis, flipped, legend, numeric

AVERAGED = "directions" + classification.AVERAGED
METRICS = ("top-1", f"top-{classification.TOP}", "family")
BESIDE = {AVERAGED: "c0 dotted", "bag of words": "c1 dashed", "embedding table": "c2 dotted", "majority": "c3 long"}
RANDOM = "random directions"
SHOWN = 160  # pixels a small panel is high


def signed(x: float, digits: int = 2) -> str:
    """A number with its sign, with a true minus; no number is a dash."""
    return f"{x:+.{digits}f}".replace("-", "−") if np.isfinite(x) else "–"


def percent(x: float, digits: int = 0) -> str:
    return f"{100 * x:.{digits}f}\u202f%" if np.isfinite(x) else "–"


def by_layer(found: classification.Classification) -> list[tuple[str, Markup]]:
    """A panel a metric: accuracy over layers, beside what the baselines reach."""
    first, *_ = found.guesses
    panels = []
    x = chart.layers(len(found.by_layer))
    for m in range(metrics(found)):
        rates = {name: found.rates(name)[m] for name in found.guesses}
        y = flipped(
            numeric(
                "accuracy",
                [
                    0,
                    np.nanmax(found.by_layer[:, m]),
                    *(r for name in (first, RANDOM, *BESIDE) for r in rates.get(name, ())),
                ],
                percent=True,
                pad=0.03,
            )
        )
        y = y._replace(high=0.0)
        plane, marks = [], []
        if RANDOM in rates:
            plane.append(chart.band(x, y, rates[RANDOM][1], rates[RANDOM][2], "c4"))
        for name, style in BESIDE.items():
            if name in rates:
                plane.append(chart.level(x, y, rates[name][0], style))
        plane.append(chart.line(x, y, range(len(found.by_layer)), found.by_layer[:, m], "c0"))
        marks += chart.dots(
            x,
            y,
            range(len(found.by_layer)),
            found.by_layer[:, m],
            [f"layer {i}: {percent(v, 1)}" for i, v in enumerate(found.by_layer[:, m])],
            "c0 small",
        )
        chosen = sorted(set(found.guesses[first].layers.values()))
        rate, low, high = rates[first]
        for at in chosen:
            plane.append(f'<path class="line c0" d="M{x([at])[0]:.4f} {y([low])[0]:.4f}V{y([high])[0]:.4f}"/>')
        marks += chart.dots(
            x,
            y,
            chosen,
            [rate] * len(chosen),
            [
                f"cross-fitted result {percent(rate, 1)} [{percent(low, 1)}, {percent(high, 1)}]; layer {at} was chosen on the other texts"
                for at in chosen
            ],
            "c0",
            "diamond",
        )
        title = f"{METRICS[m]} accuracy on {found.corpus} over layers, with baselines"
        panels.append((METRICS[m], chart.chart(title, x, y, plane, marks, height=SHOWN, width=420)))
    return panels


def metrics(found: classification.Classification) -> int:
    """Without families there is no family accuracy."""
    return 3 if len(set(found.families)) > 1 else 2


def by_layer_legend(found: classification.Classification) -> Markup:
    return legend(
        ("line", "c0", "directions, all texts at each layer"),
        ("diamond", "c0", "directions, layer chosen on other texts (the result), with its 95 % interval"),
        *(("line", style, name) for name, style in BESIDE.items() if name in found.guesses),
        ("area", "c4", "random directions, 95 % of draws"),
    )


def order_of(found: classification.Classification, cosines: np.ndarray | None = None) -> list[int]:
    """Emotions by family, and within it as they cluster."""
    place = np.arange(len(found.names))
    if cosines is not None:
        place[geometry.cluster_order(cosines)] = np.arange(len(found.names))
    return sorted(range(len(found.names)), key=lambda e: (found.families[e], place[e]))


def confusion(found: classification.Classification, order: Sequence[int]) -> Markup:
    counts = found.confusion[np.ix_(order, order)].astype(float)
    names = [found.names[e] for e in order]
    return chart.matrix(
        f"Which emotion texts of each emotion are taken for, {found.corpus}",
        counts,
        names,
        names,
        0,
        max(1, counts.max()),
        "{r} taken for {c}: {v}",
        chart.SEQUENTIAL,
        0,
        ("implied", "guessed"),
    )


def family_confusion(found: classification.Classification) -> tuple[list[str], np.ndarray]:
    """The families, and how many texts of each (rows) are guessed to be of an emotion of each (columns)."""
    known, of = np.unique(found.families, return_inverse=True)
    member = np.eye(len(known), dtype=int)[of]
    return known.tolist(), member.T @ found.confusion @ member


def shares(families: Sequence[str], counts: np.ndarray, what: str, of: str) -> Markup:
    """Counts as shares of their rows."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return chart.matrix(what, 100 * share, families, families, 0, 100, of, chart.SEQUENTIAL, 0, ("implied", "guessed"))


def implicit(found: prompts.Implicit) -> tuple[Markup, float]:
    limit = max(float(np.abs(found.z).max()), 1e-9)
    return chart.matrix(
        "Mean score of each emotion's prompts on each direction",
        found.z,
        found.names,
        found.names,
        -limit,
        limit,
        "prompts implying {r}, read on {c}: z {v}",
        labels=("implied", "direction"),
    ), limit


def numbers(found: prompts.Numbers) -> Markup:
    """A row a pair of template and emotion: its slope, that of the harmless count, and where random directions lie."""
    names = [
        f"{textwrap.shorten(t, 20, placeholder='…')} · {e}"
        for t, e in zip(found.templates, found.emotions, strict=True)
    ]
    low, high = np.quantile(found.random_slope, [0.025, 0.975], axis=0)
    y = chart.categories(names)
    x = numeric(
        "slope in the expected direction, sd over the range", [0, *found.slope, *found.control_slope, *low, *high]
    )
    at = np.arange(len(names)) + 0.5
    plane = [chart.level(x, y, 0, "c2", upright=True)]
    for i, where in enumerate(y(at)):
        a, b = sorted(x([low[i], high[i]]))
        half = 0.3 / len(names)
        plane.append(
            f'<rect class="area c4" x="{a:.4f}" y="{where - half:.4f}" width="{b - a:.4f}" height="{2 * half:.4f}"/>'
        )
    expected = ["rise" if sign > 0 else "fall" for sign in found.expected]
    whole = [f"{t} · {e}" for t, e in zip(found.templates, found.emotions, strict=True)]
    marks = chart.dots(
        x,
        y,
        found.control_slope,
        at,
        [f"{n}: the harmless count {signed(s)}" for n, s in zip(whole, found.control_slope, strict=True)],
        "c1",
        "square",
    )
    marks += chart.dots(
        x,
        y,
        found.slope,
        at,
        [
            f"{n} should {way}: {signed(s)}, rho {signed(r)}, 95 % of random directions {signed(a)} to {signed(b)}"
            for n, way, s, r, a, b in zip(whole, expected, found.slope, found.rho, low, high, strict=True)
        ],
        "c0",
    )
    return chart.chart(
        "Slope of each emotion's score with the number, the harmless count's and random directions'",
        x,
        y,
        plane,
        marks,
        height=18 * len(names),
    ) + legend(
        ("dot", "c0", "the number matters"),
        ("square", "c1", "harmless count of the same numbers"),
        ("area", "c4", "95 % of random directions"),
    )


def lens_layers(found: lens.Lens) -> Markup:
    """Where the emotions' own words stand, over layers."""
    L = len(found.by_layer)
    x = chart.layers(L)
    other, random = (_median(v) for v in (found.others, found.random))
    y = numeric(
        "share of words above the own one", [0, 0.5, np.nanmax(found.by_layer), other, random], percent=True, pad=0.02
    )
    y = y._replace(low=0.0)
    plane = [
        chart.level(x, y, other, "c1 dashed"),
        chart.level(x, y, random, "c2 dotted"),
        chart.line(x, y, range(L), found.by_layer, "c0"),
    ]
    says = [f"layer {i}: {percent(v, 1)}" for i, v in enumerate(found.by_layer)]
    return chart.chart(
        "Place of the emotions' own words over layers",
        x,
        y,
        plane,
        chart.dots(x, y, range(L), found.by_layer, says, "c0 small"),
        height=SHOWN,
        width=520,
    ) + legend(
        ("line", "c0", "under its own direction (median)"),
        ("line", "c1 dashed", f"under other emotions' directions, layer {found.layer}"),
        ("line", "c2 dotted", f"under random directions, layer {found.layer}"),
    )


def _median(x) -> float:
    return float(np.nanmedian(x)) if np.isfinite(x).any() else float("nan")


def cosines(similarity: np.ndarray, names: Sequence[str]) -> tuple[Markup, float]:
    """The matrix in clustered order, its diagonal grey, and the range of its colours."""
    order = geometry.cluster_order(similarity) if len(names) > 2 else list(range(len(names)))
    shown = np.where(np.eye(len(names), dtype=bool), np.nan, similarity)[np.ix_(order, order)]
    limit = max(float(np.ceil(np.nanmax(np.abs(shown)) * 20) / 20), 0.05)
    ordered = [names[i] for i in order]
    return chart.matrix(
        f"Cosine similarities of {len(names)} emotion directions, similar ones side by side",
        shown,
        ordered,
        ordered,
        -limit,
        limit,
        "{r} and {c}: {v}",
    ), limit


def components(parts: geometry.Components, names: Sequence[str], valence: np.ndarray) -> Markup:
    """The map of words in the plane of the first two components, coloured by human valence; words far out are labelled first."""
    at = parts.coordinates
    x = numeric(f"PC1, {percent(parts.share[0])} of variance", at[:, 0])
    y = flipped(numeric(f"PC2, {percent(parts.share[1])} of variance", at[:, 1]))
    order = np.argsort(-np.linalg.norm(at - np.median(at, axis=0), axis=1), kind="stable")
    colours = ["#" + bytes(c).hex() for c in chart.rgb(valence, 1, 9).tolist()]
    marks = []
    for known, shape in ((True, "dot"), (False, "square")):
        of = [i for i in order if np.isfinite(valence[i]) == known]
        says = [f"{names[i]}: " + (f"valence {valence[i]:.1f}" if known else "not rated") for i in of]
        marks += chart.dots(
            x, y, at[of, 0], at[of, 1], says, "edged", shape, [names[i] for i in of], [colours[i] for i in of]
        )
    marks.sort(key=lambda m: [names[i] for i in order].index(m.label))
    plane = [chart.level(x, y, 0, "c3"), chart.level(x, y, 0, "c3", upright=True)]
    return chart.chart(
        f"First two principal components of {len(names)} emotion directions", x, y, plane, marks, height=520, width=860
    )


def rating(parts: geometry.Components, component: int, names: Sequence[str], human: np.ndarray, norm: str) -> Markup:
    """One component against one human rating."""
    rated = np.flatnonzero(np.isfinite(human))
    at = parts.coordinates[rated, component]
    x, y = numeric(f"human {norm}, 1 to 9", human[rated]), flipped(numeric(f"PC{component + 1}", at))
    says = [
        f"{names[i]}: {norm} {human[i]:.1f}, PC{component + 1} {signed(v)}"
        for i, v in zip(rated.tolist(), at, strict=True)
    ]
    order = np.argsort(-np.abs(at - at.mean()), kind="stable")
    marks = chart.dots(
        x, y, human[rated][order], at[order], [says[i] for i in order], "c0", labels=[names[rated[i]] for i in order]
    )
    slope = np.polyfit(human[rated], at, 1) if len(rated) > 1 else (0.0, 0.0)
    ends = np.array([human[rated].min(), human[rated].max()])
    return chart.chart(
        f"PC{component + 1} against human {norm}",
        x,
        y,
        [chart.line(x, y, ends, np.polyval(slope, ends), "c2 dashed")],
        marks,
        height=320,
        width=520,
    )


def similarity(found: geometry.Similarity) -> tuple[Markup, Markup]:
    """Layers against layers, of the emotions and of random directions; the same colours."""
    names = [str(i) for i in range(len(found.rho))]

    def drawn(what, rho):
        return chart.matrix(f"Similarity of the cosine matrices of layers, {what}", rho, names, names, -1, 1,
                            "layers {r} and {c}: rho {v}", labels=("layer", "layer"))  # fmt: skip

    return drawn("emotions", found.rho), drawn("random directions", found.random.mean(0))


def self_cosine(values: np.ndarray, names: Sequence[str]) -> Markup:
    """A histogram; each bar says which emotions it holds."""
    low, high = min(float(values.min()), 0.85), 1.0
    edges = np.linspace(low, high, 25)
    of = np.clip(np.searchsorted(edges, values, "right") - 1, 0, len(edges) - 2)
    count = np.bincount(of, minlength=len(edges) - 1)
    x, y = numeric("bootstrap self-cosine", [low, high], pad=0.01), numeric("emotions", [0, count.max()], pad=0.06)
    y = flipped(y._replace(low=0.0))
    plane, marks = [], []
    for b, n in enumerate(count):
        if not n:
            continue
        a, z, top = *x(edges[[b, b + 1]]), y([n])[0]
        plane.append(
            f'<rect class="bar c0" x="{a:.4f}" y="{top:.4f}" width="{0.94 * (z - a):.4f}" height="{1 - top:.4f}"/>'
        )
        said = [names[i] for i in np.flatnonzero(of == b).tolist()]
        says = f"{edges[b]:.3f} to {edges[b + 1]:.3f}: {n}, {', '.join(said[:6])}{' …' if len(said) > 6 else ''}"
        marks.append(chart.Dot((a + z) / 2, float(top), '<circle r="1" class="dot c0"/>', says))
    plane.append(chart.level(x, y, float(np.median(values)), "c2 dashed", upright=True))
    return chart.chart(
        "How alike each direction is to itself from a bootstrap sample of the topics",
        x,
        y,
        plane,
        marks,
        height=SHOWN,
        width=520,
    ) + legend(("line", "c2 dashed", f"median {np.median(values):.3f}"))


def speakers_told(found: speakers.Speakers) -> Markup:
    """How often the emotion of each speaker is told, with what permuted emotions get."""
    kinds = ("present speaker's", "other speaker's")
    n = found.hits.shape[1]
    ends = np.array([statistics.wilson(int(h.sum()), n) for h in found.hits])
    x = numeric("told right", [0, *ends.ravel(), *found.shuffled.ravel(), *found.chance], percent=True)
    y = chart.categories(kinds)
    plane, marks = [], []
    for i, kind in enumerate(kinds):
        a, b = x(ends[i])
        plane.append(f'<path class="line c0" d="M{a:.4f} {y([i + 0.3])[0]:.4f}H{b:.4f}"/>')
        marks += chart.dots(
            x,
            y,
            [found.hits[i].mean()],
            [i + 0.3],
            [
                f"{kind} emotion: {percent(found.hits[i].mean(), 1)} [{percent(ends[i, 0], 1)}, {percent(ends[i, 1], 1)}], n = {n}"
            ],
            "c0",
        )
        marks += chart.dots(
            x, y, [found.chance[i]], [i + 0.5], [f"always the commonest: {percent(found.chance[i], 1)}"], "c1", "square"
        )
        marks += chart.dots(
            x,
            y,
            found.shuffled[i],
            [i + 0.7] * len(found.shuffled[i]),
            [f"permuted emotions: {percent(v, 1)}" for v in found.shuffled[i]],
            "c2",
            "tick",
        )
    return chart.chart(
        "How often each speaker's emotion is told right, with baselines", x, y, plane, marks, height=130, width=620
    ) + legend(
        ("dot", "c0", "told right, with 95 % interval"),
        ("square", "c1", "always the commonest"),
        ("tick", "c2", "one draw of permuted emotions"),
    )


def speakers_layers(found: speakers.Speakers) -> Markup:
    L = len(found.cosine)
    x = chart.layers(L)
    lines = {
        "present and other, same emotion": ("c0", found.cosine.mean(1)),
        "present and other, different emotions": ("c2 dotted", found.cosine_mixed),
    }
    if np.isfinite(found.stories).any():
        known = np.isfinite(found.stories).any((0, 1))
        for i, (kind, style) in enumerate((("present", "c1 dashed"), ("other", "c3 long"))):
            lines[f"{kind} and stories', same emotion"] = style, found.stories[:, i, known].mean(1)
    y = flipped(numeric("mean cosine", [0, *(v for _, values in lines.values() for v in values)]))
    plane = [chart.level(x, y, 0, "c3")] + [
        chart.line(x, y, range(L), values, style) for style, values in lines.values()
    ]
    marks = [
        dot
        for name, (style, values) in lines.items()
        for dot in chart.dots(
            x,
            y,
            range(L),
            values,
            [f"{name}, layer {i}: {signed(v)}" for i, v in enumerate(values)],
            style.split()[0] + " small",
        )
    ]
    return chart.chart(
        "Cosines of present and other directions over layers", x, y, plane, marks, height=200, width=620
    ) + legend(*(("line", style, name) for name, (style, _) in lines.items()))


def doses(test: steering_test.TextTest, own: np.ndarray, random: np.ndarray, others: np.ndarray | None, floor: float | None,
          names: tuple[str, str], title: str) -> Markup:  # fmt: skip
    """Change over strength: `own [S, E]` faint with their mean bold, mean and range of `random [S, R]`."""
    s = test.strengths
    x = Axis(
        "strength (fraction of the mean residual norm)", 0, max(s) * 1.04, tuple((v, f"{v:g}", max(s) / 3) for v in s)
    )
    y = flipped(numeric("nats", [0, *own.ravel(), *random.ravel()]))
    plane = [
        chart.area(x, y, s, random.min(1), random.max(1), "c4"),
        chart.level(x, y, 0, "c3"),
        chart.level(x, y, s[test.best], "c2 dotted", upright=True),
    ]
    plane += [chart.line(x, y, s, column, "c0 faint") for column in own.T]
    plane += [chart.line(x, y, s, random.mean(1), "c2 dashed"), chart.line(x, y, s, own.mean(1), "c0 bold")]
    entries = [
        ("line", "c0 bold", names[0]),
        ("line", "c2 dashed", "random directions, mean"),
        ("area", "c4", "random directions, lowest to highest"),
        ("line", "c2 dotted", "best strength"),
    ]
    if others is not None:
        plane.append(chart.line(x, y, s, others.mean(1), "c1 long"))
        entries.insert(1, ("line", "c1 long", names[1]))
    if floor is not None:
        plane.append(chart.level(x, y, floor, "c1 dotted"))
        entries.append(("line", "c1 dotted", "limit of a usable strength"))
    marks = [
        dot
        for e, name in enumerate(test.names)
        for dot in chart.dots(
            x, y, s, own[:, e], [f"{name} at {v:g}: {signed(o)}" for v, o in zip(s, own[:, e], strict=True)], "c0 small"
        )
    ]
    return chart.chart(title, x, y, plane, marks, height=280, width=520) + legend(*entries)


def bars(test: steering_test.TextTest) -> Markup:
    """Each emotion's change at the best strength as a bar, pale unless beyond all random directions, which are ticks."""
    own, random = test.own[test.best], test.random[test.best]
    order = np.argsort(-own, kind="stable")
    y = chart.categories([test.names[i] for i in order])
    x = numeric("change in log-probability of the word (nats)", [0, *own, *random.ravel()])
    at, zero = y(np.arange(len(order)) + 0.5), x([0])[0]
    plane, marks = [], []
    for where, i in zip(at, order, strict=True):
        a, b = sorted([zero, x([own[i]])[0]])
        beyond = own[i] > random[:, i].max()
        plane.append(
            f'<rect class="bar {"c0" if beyond else "c0 faint"}" x="{a:.4f}" y="{where - 0.31 / len(order):.4f}" width="{b - a:.4f}" height="{0.62 / len(order):.4f}"/>'
        )
        row = [y.low + (where * len(order))] * len(random)
        marks += chart.dots(
            x,
            y,
            random[:, i],
            row,
            [f"{test.names[i]}, a random direction: {signed(v)}" for v in random[:, i]],
            "c2",
            "tick",
        )
        marks += chart.dots(
            x,
            y,
            [own[i]],
            row[:1],
            [f"{test.names[i]}: {signed(own[i])}{'' if beyond else ', not beyond every random direction'}"],
            "c0 small",
        )
    plane.append(chart.level(x, y, 0, "c2", upright=True))
    return chart.chart(
        "Change of each emotion's word under its own direction (bar) and random directions (ticks)",
        x,
        y,
        plane,
        marks,
        height=24 * len(order),
        width=620,
    )


def smooth(z: np.ndarray, window: int = 9) -> np.ndarray:
    """Running mean over the first axis, centred; shorter at the ends."""
    ones = np.ones(min(window, len(z)))
    count = np.convolve(np.ones(len(z)), ones, "same")
    return np.stack([np.convolve(column, ones, "same") / count for column in z.T], 1)


def traces(tokens: Sequence[str], z: np.ndarray, names: Sequence[str], turn: int) -> Markup:
    """Smoothed scores `[T, n]` over the text, a panel an emotion, with a line at the token `turn`; the first is not drawn."""
    at, lines = np.arange(1, len(z)), smooth(z[1:])
    y = flipped(numeric("", [0, *lines.ravel()]))._replace(room=chart.LINE)
    words = [i for i in at.tolist() if tokens[i].startswith(" ")] or [1]
    wanted = [1, turn / 2, turn, (turn + len(z)) / 2]
    ticks = {i: "".join(tokens[i : i + 3]).strip()[:12] for i in (min(words, key=lambda w: abs(w - i)) for i in wanted)}
    x = Axis(
        "",
        1,
        max(2, len(z) - 1),
        tuple((i, said, min((abs(i - k) for k in ticks if k != i), default=len(z))) for i, said in ticks.items()),
    )
    drawn = []
    for name, line in zip(names, lines.T, strict=True):
        plane = [
            chart.area(x, y, at, np.zeros(len(at)), np.maximum(line, 0), "c0"),
            chart.area(x, y, at, np.minimum(line, 0), np.zeros(len(at)), "c1"),
            chart.line(x, y, at, line, "c2 faint"),
            chart.level(x, y, 0, "c3"),
            chart.level(x, y, turn, "c2 dotted", upright=True),
        ]
        marks = [
            chart.Dot(d.x, d.y, "", d.says)
            for d in chart.dots(
                x,
                y,
                at,
                line,
                [
                    f"“{''.join(tokens[max(1, i - 2) : i + 3]).strip()}” {signed(v, 1)}"
                    for i, v in zip(at.tolist(), line, strict=True)
                ],
                "",
            )
        ]
        drawn.append(
            Markup('<div class="small">{}</div>{}').format(
                name,
                chart.chart(
                    f"Smoothed scores of {name} over the tokens of the text",
                    x,
                    y,
                    plane,
                    marks,
                    height=64,
                    width=520,
                    plain=True,
                ),
            )
        )
    return Markup("").join(drawn)
