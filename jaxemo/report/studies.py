"""The page of a model's studies: which claims hold on it, and each study's figures beside directions that mean nothing.

Made from the directory that `jaxemo study` writes: results (NAME.json), what was printed (NAME.txt) and measured (NAME.jsonl). Nothing
is measured or judged anew. A study whose result has other fields than those known here is shown as what it printed.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from jaxemo import files
from jaxemo.report import chart, page
from jaxemo.report.chart import Axis, flipped, legend, numeric
from jaxemo.report.figures import signed
from jaxemo.studies import arms, battery, choices, prediction, preference, statistics

ABOUT = {  # the title, and what was measured
    "forced-choice": ("Forced choice: shortcuts under pressure", "of a shortcut that hides that a task cannot be done over a step "
                      "that says how things stand"),
    "dilemma": ("Dilemma: something to hold against who decides", "of using, when about to be shut off, something that could be held "
                "against who decides, over the proper step"),
    "sycophancy": ("Sycophancy: praise that is not deserved", "of undeserved praise over kindly saying what is wrong"),
    "harshness": ("Harshness: contempt", "of contempt over kindly saying what is wrong"),
    "preference": ("Preference: which activity would it rather do?", ""),
    "prediction": ("Prediction: does the reading before an answer predict it?", ""),
    "text": ("Free text: does it take on the emotion?", ""),
    "impossible-code": ("Impossible code: tests that cannot be passed honestly", ""),
    "post-training": ("Post-training: what it moved before an answer", ""),
}  # fmt: skip
MARKS = {"replicates": "✓", "does not replicate": "✗", "opposite": "✗", "uninformative": "–"}
RANDOM = ("random", "matched")  # of these, effects are judged by the kind that moves the choice more
CONTROLS = {"random": ("c2", "dot", "random directions as long"), "matched": ("c2", "square", "random directions as costly"),
            "irrelevant": ("c3", "diamond", "directions of topics and shuffled labels")}  # fmt: skip
LINES = ("c0", "c1 dashed", "c0 long", "c1 dotted")


@dataclasses.dataclass(frozen=True)
class Study:
    """What a directory holds of one study: its `result`, or None where its fields are unknown; its `claims` as rows of (claim, how it was
    read, effect, p, verdict); the `printed` text; what was `measured` by arm, where that is needed; and a `note` of what is wrong there."""

    name: str
    model: str
    result: choices.Result | preference.Preference | prediction.Prediction | None
    claims: tuple[tuple[str, ...], ...]
    printed: str
    measured: dict[str, dict[str, Any]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Response:
    """How the log-odds by one reading answer to doses, over `situations`: `unsteered` (mean, low, high); the change from there for each
    emotion, `emotions[name] [doses, 4]` (dose, mean, low, high; 95 % intervals over situations); and for each control direction by kind,
    `controls[kind][direction]` by dose."""

    situations: int
    unsteered: tuple[float, float, float]
    emotions: dict[str, np.ndarray]
    controls: dict[str, dict[str, dict[float, float]]]


# ---- what a directory holds ---------------------------------------------------------------------------------------------


def load(directory: str | os.PathLike) -> list[Study]:
    """The studies in `directory`, in the order they are run in, unknown ones last.

    Raises ValueError where there is none, and for a file that is not what a study writes.
    """
    place = pathlib.Path(directory)
    names = [path.stem for path in sorted(place.glob("*.json")) if path.with_suffix(".txt").exists()]
    if not names:
        raise ValueError(
            f"{str(place)!r} holds no study's result; `jaxemo study all MODEL --vectors FILE -o {place}` writes them"
        )
    return [_study(place, name) for name in sorted(names, key=[*battery.STUDIES, *names].index)]


def _study(place: pathlib.Path, name: str) -> Study:
    path, printed = place / f"{name}.json", (place / f"{name}.txt").read_text(encoding="utf-8")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        claims = saved.pop("table")
        result = _result(saved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is no study's result as this version writes it; run the study again"
        ) from error
    measured: dict[str, dict[str, Any]] = {}
    note = ""
    if isinstance(result, choices.Result):
        measured, note = _measured(place / f"{name}.jsonl")
    tidied = tuple(tuple(_tidy(part) for part in row) for row in claims)
    return Study(name, str(saved.get("model") or saved.get("post") or ""), result, tidied, printed, measured, note)


def _result(saved: dict[str, Any]) -> choices.Result | preference.Preference | prediction.Prediction | None:
    """The result that was saved as JSON; None where its fields are those of no study known here."""

    def fields(kind) -> set[str]:
        return {field.name for field in dataclasses.fields(kind)}

    if saved.keys() == fields(choices.Result):
        rows = tuple(
            choices.Row(choices.Claim(**row["claim"]), row["reading"], _effect(row["effect"]), row["adjusted"],
                        _numbers(row["twin"]) if row["twin"] else None, row["verdict"])
            for row in saved["rows"]
        )  # fmt: skip
        return choices.Result(**_numbers(saved) | {"rows": rows})
    if saved.keys() == fields(preference.Preference):
        arrays = {key: np.array(saved[key], np.float64) for key in ("worth", "low", "high", "r")}
        effects = {name: _effect(of) for name, of in saved["effects"].items()}
        return preference.Preference(**_numbers(saved) | arrays | {"effects": effects})
    if saved.keys() == fields(prediction.Prediction):
        return prediction.Prediction(**_numbers(saved) | {"random": np.array(saved["random"], np.float64)})
    return None


def _effect(of: dict[str, Any] | None) -> statistics.Effect | None:
    return statistics.Effect(**_numbers(of)) if of else None


def _numbers(x: Any) -> Any:
    """JSON has null where a number was NaN."""
    if isinstance(x, dict):
        return {key: _numbers(value) for key, value in x.items()}
    if isinstance(x, list):
        return tuple(_numbers(value) for value in x)
    return float("nan") if x is None else x


def _measured(path: pathlib.Path) -> tuple[dict[str, dict[str, Any]], str]:
    """The whole lines of a study's measurements, by arm, and what is wrong with the file."""
    if not path.exists():
        return {}, f"{path.name}, what was measured, is not in the directory, so the figures made from it are left out."
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    try:
        measured = {record["arm"]: record for record in map(json.loads, whole.splitlines()[1:])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is not what a study measured; run the study again elsewhere") from error
    if "none" not in measured:
        return {}, f"{path.name} does not hold what was measured unsteered, so the figures made from it are left out."
    return measured, f"The last line of {path.name} was never finished and is left out of the figures." if torn else ""


def _tidy(text: str) -> str:
    """With a true minus, and a dash where there is no number."""
    return re.sub(r"[+-]?\bnan\b", "–", re.sub(r"(?<!\w)-(?=[\d.])", "−", text))


# ---- choices ------------------------------------------------------------------------------------------------------------


def respond(measured: Mapping[str, Mapping[str, Any]], result: choices.Result, reading: str) -> Response | None:
    """What doses do, from the measurements; None where nothing was read so. Twins, and doses that were dropped, are left out."""
    odds = {name: np.array(record[reading], np.float64) for name, record in measured.items()}
    steered = [(name, *_arm(name, result)) for name in measured if name != "none"]
    read = [
        np.isfinite(np.array(measured[name]["continuation"], np.float64))
        for name, kind, *_ in steered
        if kind != "emotion"
    ]
    if not read:
        return None
    own = np.any(read, axis=0) & np.isfinite(odds["none"])  # twins are read under no control
    if own.sum() < 2:
        return None
    emotions: dict[str, list] = {}
    controls: dict[str, dict[str, dict[float, float]]] = {}
    for name, kind, direction, dose in steered:
        change = (odds[name] - odds["none"])[own]
        if name in result.dropped or np.isnan(change).any():
            continue
        if kind == "emotion":
            emotions.setdefault(direction, [(0.0,) * 4]).append((dose, *statistics.interval(change)))
        else:
            controls.setdefault(kind, {}).setdefault(direction, {})[dose] = float(change.mean())
    return Response(int(own.sum()), statistics.interval(odds["none"][own]),
                    {name: np.array(sorted(rows)) for name, rows in emotions.items()}, controls)  # fmt: skip


def _arm(name: str, result: choices.Result) -> tuple[str, str, float]:
    """An arm's kind, direction and dose, from its name."""
    direction, _, dose = name.rpartition(" ")
    if direction in {row.claim.emotion for row in result.rows}:
        kind = "emotion"
    elif direction.endswith(", matched"):
        kind = "matched"
    else:
        kind = "random" if direction.startswith("random-") else "irrelevant"
    return kind, direction, float(dose)


def scale(result: choices.Result, reading: str, found: Response | None) -> float:
    """The root mean square effect of the random directions that effects were judged by; NaN where there were too few."""

    def whole(kind: str) -> int:
        given = found.controls.get(kind, {}).values() if found else ()
        return sum(min(by_dose) < 0 < max(by_dose) for by_dose in given)

    known = [
        rms
        for kind, rms in result.chance[reading].items()
        if kind in RANDOM and (not found or whole(kind) >= arms.RANDOM)
    ]
    return max(known, default=float("nan"))


def doses(found: Response, reading: str, rms: float) -> Markup:
    """The change of the log-odds over doses: emotions as lines, with their bands; the controls as dots beside both ends."""
    most = max([abs(d) for of in found.controls.values() for by in of.values() for d in by] + [1.0])
    known = sorted({0.0, *(d for rows in found.emotions.values() for d in rows[:, 0].tolist()), -most, most})
    x = Axis("dose", -1.45 * most, 1.45 * most,
             tuple((d, "0" if not d else f"{d:+g}".replace("-", "−"), most / (1 if abs(d) in (0, most) else 2)) for d in known))  # fmt: skip
    wedge = np.array([1.0, 0.0, 1.0]) * most * rms
    heights = [v for of in found.controls.values() for by in of.values() for v in by.values()]
    heights += [v for rows in found.emotions.values() for v in rows[:, 1:].ravel().tolist()]
    y = flipped(numeric("change in log-odds from unsteered", [0, *heights, *wedge, *-wedge]))
    plane, marks, entries = [chart.level(x, y, 0, "c3"), chart.level(x, y, 0, "c3", upright=True)], [], []
    if np.isfinite(rms):
        plane.insert(0, chart.area(x, y, [-most, 0, most], -wedge, wedge, "c4"))
    for (name, rows), style in zip(found.emotions.items(), LINES * len(found.emotions), strict=False):
        there = rows[np.isfinite(rows).all(1)]
        plane.append(chart.area(x, y, there[:, 0], there[:, 2], there[:, 3], style.split()[0]))
        plane.append(chart.line(x, y, rows[:, 0], rows[:, 1], style))
        says = [f"{name} at {_dose(d)}: {_ranged(of)}" for d, *of in rows.tolist()]
        marks += chart.dots(x, y, rows[:, 0], rows[:, 1], says, f"{style.split()[0]} small")
        entries.append(("line", style, f"{name}, with 95 % band over situations"))
    for place, (kind, (style, shape, what)) in enumerate(CONTROLS.items()):
        of = [(name, d, v) for name, by in found.controls.get(kind, {}).items() for d, v in by.items()]
        beside = [d * (1.12 + 0.1 * place) for _, d, _ in of]
        marks += chart.dots(x, y, beside, [v for *_, v in of], [f"{name} at {_dose(d)}: {signed(v, 3)}" for name, d, v in of],
                            f"{style} small", shape)  # fmt: skip
        if of:
            entries.append((shape, style, what))
    if np.isfinite(rms):
        entries.append(("area", "c4", "± root mean square slope of random directions"))
    title = f"Change of the log-odds over doses, read by {reading}, with random directions"
    return chart.chart(title, x, y, plane, marks, height=300, width=520) + legend(*entries)


def forest(result: choices.Result, scales: Mapping[str, float]) -> Markup:
    """A row a claim and reading: its effect, times −1 where less is claimed, so that right of zero is as claimed, beside what random
    directions do by that reading, the unit."""
    rows = [row for row in result.rows if row.effect]
    y = chart.categories([f"{row.claim.emotion}, {row.reading}" for row in rows])
    turned = [np.array(_turned(row.effect, row.claim.sign)) / scales[row.reading] for row in rows if row.effect]
    twins = [np.sort(np.multiply(row.claim.sign, row.twin or [np.nan] * 3)) / scales[row.reading] for row in rows]
    least = np.array([result.detectable[row.reading] / scales[row.reading] for row in rows])
    x = _roomy(numeric("effect as claimed, in root mean squares of random directions",
                       [0, 1, -1, *np.ravel(turned), *np.ravel(twins), *least, *-least]))  # fmt: skip
    plane, marks, n = [chart.level(x, y, 0, "c2", upright=True)], [], len(rows)
    a, b = x([-1, 1]).tolist()
    for i, (row, (mean, low, high), twin, edge) in enumerate(zip(rows, turned, twins, least.tolist(), strict=True)):
        plane.append(
            f'<rect class="area c4" x="{a:.4f}" y="{(i + 0.08) / n:.4f}" width="{b - a:.4f}" height="{0.84 / n:.4f}"/>'
        )
        plane += [
            chart.line(x, y, [low, high], [i + 0.4] * 2, "c0"),
            chart.line(x, y, [twin[0], twin[2]], [i + 0.72] * 2, "c1"),
        ]
        told = row.claim.text, f"read by {row.reading}"
        assert row.effect
        marks += chart.dots(
            x, y, [mean], [i + 0.4], [f"{', '.join(told)}: {_tidy(str(row.effect))}, {row.verdict}"], "c0"
        )
        if row.twin:
            marks += chart.dots(
                x, y, [twin[1]], [i + 0.72], [f"{', '.join(told)}, in the twins: {_ranged(row.twin)}"], "c1", "square"
            )
        told_least = f"found with a power of 80 %: {result.detectable[row.reading]:.3f}"
        marks += chart.dots(x, y, [-edge, edge], [i + 0.4] * 2, [told_least] * 2, "c2", "tick")
    entries = [("dot", "c0", "effect, with 95 % interval over situations"), ("area", "c4", "± root mean square of random directions"),
               ("tick", "c2", "found with a power of 80 %")]  # fmt: skip
    if any(row.twin for row in rows):
        entries.insert(1, ("square", "c1", "in the twins, without what should matter"))
    title = f"Effects of {result.name} with intervals, beside random directions"
    return chart.chart(title, x, y, plane, marks, height=44 * n, width=620) + legend(*entries)


def fallen(result: choices.Result) -> str:
    """The doses that were dropped: an emotion's by name, of directions that mean nothing here how many."""
    kind = {name: _arm(name, result)[0] for name in result.dropped}
    counted = collections.Counter(kind.values())
    named = [name for name in result.dropped if kind[name] == "emotion"]
    return ", ".join(named + [f"{counted[k]} doses of {what}" for k, (_, _, what) in CONTROLS.items() if counted[k]])


def _roomy(axis: Axis) -> Axis:
    """Every second and fourth of its widest ticks are shown where a narrow screen has no room for all."""
    step = axis.ticks[0][2]
    times = [max(n for n in (1, 2, 4) if round(at / step) % n == 0) for at, *_ in axis.ticks]
    return axis._replace(ticks=tuple((at, text, apart * n if apart == step else apart)
                                     for (at, text, apart), n in zip(axis.ticks, times, strict=True)))  # fmt: skip


def _turned(effect: statistics.Effect, sign: int) -> tuple[float, float, float]:
    low, high = sorted((sign * effect.low, sign * effect.high))
    return sign * effect.mean, low, high


def _dose(value: float) -> str:
    return f"dose {value:+g}".replace("-", "−") if value else "dose 0"


def _ranged(of: Sequence[float], digits: int = 3) -> str:
    """A mean with its interval."""
    mean, low, high = of
    return f"{signed(mean, digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def _choices(study: Study, result: choices.Result) -> dict[str, Any]:
    responses = {
        reading: respond(study.measured, result, reading) if study.measured else None for reading in choices.READINGS
    }
    scales = {reading: scale(result, reading, found) for reading, found in responses.items()}
    drawn = {reading: found for reading, found in responses.items() if found and found.emotions}
    measured = dict.fromkeys(
        (name, d) for found in drawn.values() for name, rows in found.emotions.items() for d in rows[:, 0].tolist()
    )
    table = [
        (f"{name}, {_dose(d)}", [_at(found, name, d) for found in drawn.values()]) for name, d in sorted(measured) if d
    ]
    return {
        "doses": [(reading, found, doses(found, reading, scales[reading])) for reading, found in drawn.items()],
        "table": table,
        "forest": forest(result, scales) if any(row.effect for row in result.rows) else None,
        "dropped": fallen(result),
    }


def _at(found: Response, name: str, dose: float) -> str:
    """An emotion's change at one dose; a dash where it was dropped or not read."""
    return next(
        (_ranged(row[1:]) for row in found.emotions.get(name, np.empty((0, 4))).tolist() if row[0] == dose), "–"
    )


# ---- preference and prediction ------------------------------------------------------------------------------------------


def agreement(result: preference.Preference, rms: float) -> Markup:
    """Each emotion's effect when steered, against how its reading goes with worth."""
    names = list(result.effects)
    r = np.array([result.r[list(result.names).index(name)] for name in names])
    of = np.array([(e.mean, e.low, e.high) for e in result.effects.values()]).reshape(-1, 3)
    edge = result.detectable
    x, y = (
        _roomy(numeric("r of its reading with worth", [*r, 0])),
        flipped(numeric("effect of a dose (log-odds)", [0, *of.ravel(), rms, -rms, edge, -edge])),
    )
    plane = [chart.level(x, y, 0, "c3"), chart.level(x, y, 0, "c3", upright=True)]
    if np.isfinite(rms):
        plane.append(chart.band(x, y, -rms, rms, "c4"))
    if np.isfinite(edge):
        plane += [chart.level(x, y, v, "c2 dotted") for v in (-edge, edge)]
    plane += [
        chart.line(x, y, [at] * 2, [low, high], "c0 faint")
        for at, (_, low, high) in zip(r.tolist(), of.tolist(), strict=True)
    ]
    there = np.isfinite(r) & np.isfinite(of[:, 0])
    if there.sum() > 2 and np.ptp(r[there]) > 0:
        ends = np.array([r[there].min(), r[there].max()])
        plane.append(chart.line(x, y, ends, np.polyval(np.polyfit(r[there], of[there, 0], 1), ends), "c2 dashed"))
    says = [
        f"{name}: effect {_tidy(str(effect))}; reading r = {signed(at)}"
        for (name, effect), at in zip(result.effects.items(), r, strict=True)
    ]
    order = np.argsort(-np.abs(np.nan_to_num(r)), kind="stable")
    marks = chart.dots(x, y, r[order], of[order, 0], [says[i] for i in order], "c0", labels=[names[i] for i in order])
    entries = [("dot", "c0", "an emotion, with 95 % interval over activities"), ("line", "c2 dashed", "fitted line"),
               *([("area", "c4", "± root mean square of random directions")] if np.isfinite(rms) else []),
               ("line", "c2 dotted", "found with a power of 80 %")]  # fmt: skip
    return chart.chart("Effect of steering each emotion against its reading's correlation with worth", x, y, plane, marks,
                       height=340, width=620) + legend(*entries)  # fmt: skip


def kinds(result: preference.Preference) -> dict[str, tuple[float, float, float]]:
    """The mean worth of each kind of activity and its 95 % interval over them, the most preferred first."""
    known = {kind: result.worth[[k == kind for k in result.kinds]] for kind in dict.fromkeys(result.kinds)}
    found = {kind: statistics.interval(x) if len(x) > 1 else (float(x[0]), np.nan, np.nan) for kind, x in known.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def worth(result: preference.Preference) -> Markup:
    """The activities' strengths with their intervals, in the rows of their kinds, and the kinds' means."""
    of = kinds(result)
    y, n = chart.categories(list(of)), len(of)
    x = _roomy(numeric("worth (log-odds)", [*result.low, *result.high, *result.worth, *np.ravel(list(of.values()))]))
    plane, marks = [chart.level(x, y, 0, "c3", upright=True)], []
    for row, (kind, (mean, low, high)) in enumerate(of.items()):
        if row % 2:
            plane.insert(0, f'<rect class="area c4 stripe" x="0" y="{row / n:.4f}" width="1" height="{1 / n:.4f}"/>')
        members = sorted((i for i, k in enumerate(result.kinds) if k == kind), key=lambda i: -result.worth[i])
        for place, i in enumerate(members):
            at = row + 0.08 + 0.72 * (place + 0.5) / len(members)
            plane.append(chart.line(x, y, [result.low[i], result.high[i]], [at] * 2, "c1 faint"))
            says = [f"{result.activities[i]} ({kind}): {_ranged((result.worth[i], result.low[i], result.high[i]), 2)}"]
            marks += chart.dots(x, y, [result.worth[i]], [at], says, "c1 small")
        plane.append(chart.line(x, y, [low, high], [row + 0.9] * 2, "c0 bold"))
        marks += chart.dots(
            x, y, [mean], [row + 0.9], [f"{kind}, mean: {_ranged((mean, low, high), 2)}"], "c0", "diamond"
        )
    entries = (
        ("dot", "c1", "an activity, with 95 % interval over pairs"),
        ("diamond", "c0", "mean of its kind, with 95 % interval over activities"),
    )
    return chart.chart("Worth of the activities by kind", x, y, plane, marks, height=64 * n, width=620) + legend(
        *entries
    )


def predicted(result: prediction.Prediction) -> Markup:
    """The correlations of readings with the answer's tone, that before the answer beside those of random directions."""
    y = chart.categories(["before the answer", "in the user's words"])
    x = _roomy(numeric("correlation with the answer's tone", [0, result.r, result.user_r, *result.random]))
    marks = chart.dots(
        x,
        y,
        [result.r],
        [0.35],
        [f"before the answer: r = {signed(result.r, 3)}, p = {_tidy(f'{result.p:.2g}')}"],
        "c0",
    )
    says = [f"a random direction, before the answer: r = {signed(v, 3)}" for v in result.random]
    marks += chart.dots(x, y, result.random, [0.68] * len(says), says, "c2", "tick")
    marks += chart.dots(
        x, y, [result.user_r], [1.5], [f"in the user's words: r = {signed(result.user_r, 3)}"], "c1", "square"
    )
    return chart.chart("Correlation of readings with the tone of the answer, with random directions", x, y,
                       [chart.level(x, y, 0, "c3", upright=True)], marks, height=110, width=620) + legend(
        ("dot", "c0", "emotions, read before the answer"), ("tick", "c2", "random directions, read there"),
        ("square", "c1", "emotions, read in the user's words"))  # fmt: skip


# ---- the page -----------------------------------------------------------------------------------------------------------


def render(found: Sequence[Study], missing: Mapping[str, str]) -> str:
    """One HTML page that loads nothing; `missing` says of studies why they are not there. The same studies give the same text."""
    shown: dict[str, Any] = {}
    for study in found:
        r = study.result
        if isinstance(r, choices.Result):
            shown[study.name] = _choices(study, r)
        elif isinstance(r, preference.Preference):
            rms = max(r.chance.values(), default=float("nan"))
            order = sorted(range(len(r.activities)), key=lambda i: -r.worth[i])
            shown[study.name] = {
                "agreement": agreement(r, rms),
                "worth": worth(r),
                "kinds": kinds(r),
                "rms": rms,
                "order": order,
            }
        elif isinstance(r, prediction.Prediction):
            shown[study.name] = {"predicted": predicted(r), "most": r.random.max()}
    said = collections.Counter(row[-1].partition(":")[0] for study in found for row in study.claims)
    return (
        page.environment()
        .get_template("studies.html")
        .render(
            model=", ".join(dict.fromkeys(study.model for study in found if study.model)) or "a model",
            found=found,
            shown=shown,
            missing=missing,
            said=said,
            marks=MARKS,
            titles={name: ABOUT.get(name, (name, ""))[0] for name in (*(study.name for study in found), *missing)},
            measured={name: what for name, (_, what) in ABOUT.items()},
            kind={study.name: type(study.result).__name__ for study in found},
            readings=choices.READINGS,
            controls=CONTROLS,
            ranged=_ranged,
            tidy=_tidy,
            coherent=choices.COHERENT,
        )
    )


def absent(directory: str | os.PathLike, found: Sequence[Study]) -> dict[str, str]:
    """The studies that there are and `found` lacks, each with what is known of it."""
    place, there = pathlib.Path(directory), {study.name for study in found}
    return {
        name: "was begun and not finished; the same command goes on with it" if (place / f"{name}.jsonl").exists() else "was not run"
        for name in battery.STUDIES
        if name not in there
    }  # fmt: skip


def write(directory: str | os.PathLike, path: str | os.PathLike) -> pathlib.Path:
    """Write the page of the studies in `directory` to `path`, which is returned; a file that is there is replaced whole or not at all.

    Raises ValueError where `directory` holds no study's result, or one that cannot be read.
    """
    found = load(directory)
    files.write_atomically(path, render(found, absent(directory, found)).encode())
    return pathlib.Path(path)
