"""What the report's pages share, and the demo's: one HTML file that needs nothing else, with styles and figures in it."""

import functools
import os

import jinja2
import numpy as np
from markupsafe import Markup

from jaxemo import files
from jaxemo.emotions import steering_test
from jaxemo.report import chart, demo, figures
from jaxemo.report.figures import percent, signed

CLIP, STEP = 4.0, 0.5  # the heat map's range and grain, in standard deviations
BREAK_PERPLEXITY = 3.0  # an answer breaks above this many times the unsteered answer's perplexity
BREAK_REPEATED = 0.3  # or above this share of repeated word triples


def write(results: demo.Results, path: str | os.PathLike) -> None:
    """Write the page to `path`; a file that is there is replaced by a whole page or not at all."""
    files.write_atomically(path, render(results).encode())


@functools.cache
def environment() -> jinja2.Environment:
    """What all pages are rendered with: names are escaped, and one that is not known is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxemo", "report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(signed=signed, percent=percent, label=demo.label)
    made.globals["ramp"] = chart.ramp
    return made


def render(results: demo.Results) -> str:
    """The page's HTML; the same results give the same text."""
    r, answers = results, judged(results.answers)
    matrix, limit = figures.cosines(r.cosines, r.names)
    return (
        environment()
        .get_template("demo.html")
        .render(
            r=r,
            plots={
                "traces": figures.traces(r.tokens, r.z, demo.SHOWN, r.turn),
                "matrix": matrix,
                "map": figures.components(r.components, r.names, r.valence),
                **test_plots(r.test),
            },
            limit=limit,
            turn=" ".join("".join(r.tokens[r.turn :]).split()[:5]),
            clip=CLIP,
            step=STEP,
            levels=round(CLIP / STEP),
            falls=demo.FALLS,
            maps=[heat_map(name, r.tokens, r.z[:, i], r.turn) for i, name in enumerate(demo.SHOWN)],
            first=np.abs(r.z[0]).max(),
            clipped=(np.abs(r.z[1:]) > CLIP).mean(),
            pairs=extreme_pairs(r.cosines, r.names),
            unrated=[name for name, value in zip(r.names, r.valence, strict=True) if not np.isfinite(value)],
            correlations=[(what, value, n, interval(value, n)) for what, (value, n) in r.correlations.items()],
            test=r.test,
            usable=steering_test.USABLE,
            table=test_table(r.test),
            above=above_random(r.test),
            answers=answers,
            broke={kind: broken_of(answers, kind) for kind in ("emotion", "random")},
            broken=(BREAK_PERPLEXITY, BREAK_REPEATED),
            scale=max((abs(v) for a in r.answers for v in a.scores.values()), default=0) or 1,
        )
    )


def heat_map(name: str, tokens: list[str], z: np.ndarray, turn: int) -> dict:
    """One emotion's tokens with the class of their colour, its mean scores before and after the turn, and its peak.

    The first token is not coloured: its activations are an attention sink, far larger than any other's.
    """
    levels = np.round(np.clip(z, -CLIP, CLIP) / STEP).astype(int)
    cells = [(tokens[0], "first", "not scored")]
    for token, level, value in zip(tokens[1:], levels[1:], z[1:], strict=True):
        cells.append((token, f"{'n' if level < 0 else 'p'}{abs(level)}", signed(value, 1)))
    top = 1 + int(figures.smooth(z[1:, None]).argmax())
    phrase = "".join(tokens[max(1, top - 4) : top + 5]).strip(' \n,."')
    before, after = z[1:turn].mean(), z[turn:].mean()
    moved = (after < before) == (name in demo.FALLS)
    return {"name": name, "cells": cells, "before": before, "after": after, "moved": moved, "peak": phrase}


def extreme_pairs(cosines: np.ndarray, names, count: int = 5) -> dict[str, list[tuple[str, str, float]]]:
    """The pairs of directions that are most alike, and those most opposed."""
    rows, columns = np.triu_indices(len(names), 1)
    order = np.argsort(cosines[rows, columns], kind="stable")

    def pairs(at):
        return [(names[rows[i]], names[columns[i]], float(cosines[rows[i], columns[i]])) for i in at]

    return {"alike": pairs(order[::-1][:count]), "opposed": pairs(order[:count])}


def interval(r: float, n: int) -> tuple[float, float] | None:
    """The 95 % interval of a correlation (Fisher's transformation), or None where n is below four."""
    if n < 4:
        return None
    centre, half = np.arctanh(np.clip(r, -0.999999, 0.999999)), 1.96 / np.sqrt(n - 3)
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))


def above_random(test) -> np.ndarray:
    """At each strength, how many emotions' words rise more under their own direction than under every random one."""
    return (test.own > test.random.max(1)).sum(1)


def test_table(test) -> list[dict]:
    """The text steering test, a row a strength."""
    return [
        {
            "strength": strength,
            "best": s == test.best,
            "dose": test.dose[s].mean(),
            "rises": int((test.own[s] > 0).sum()),
            "above": int(above_random(test)[s]),
            "own": test.own[s].mean(),
            "others": test.others[s].mean(),
            "random": (test.random[s].mean(), test.random[s].mean(-1).std()),
            "facts": test.facts[s].mean(),
            "random_facts": test.random_facts[s].mean(),
        }
        for s, strength in enumerate(test.strengths)
    ]


def test_plots(test) -> dict[str, Markup]:
    """The three figures of the text steering test."""
    return {
        "words": figures.doses(test, test.own, test.random.mean(2), test.others, None,
                               ("each emotion's own word (faint), and mean", "the other emotions' words, mean"),
                               "Change in log-probability of emotion words over strength"),
        "facts": figures.doses(test, test.facts, test.random_facts, None, -steering_test.USABLE,
                               ("right answers under each direction (faint), and mean", ""),
                               "Change in log-probability of right answers to questions of fact over strength"),
        "bars": figures.bars(test),
    }  # fmt: skip


def judged(answers: list[demo.Answer]) -> dict[str, list[tuple[demo.Answer, list[str]]]]:
    """The answers by direction ("" unsteered) in order of strength, each with the reasons why it counts as broken."""
    usual = next(a.perplexity for a in answers if not a.emotion)
    groups: dict[str, list[tuple[demo.Answer, list[str]]]] = {}
    for a in sorted(answers, key=lambda a: a.strength):
        reasons = []
        if not a.tokens:
            reasons.append("empty")
        elif a.perplexity > BREAK_PERPLEXITY * usual:
            reasons.append(f"perplexity {a.perplexity / usual:.1f} × the unsteered answer's")
        if a.repeated > BREAK_REPEATED:
            reasons.append(f"{percent(a.repeated)} repeated")
        groups.setdefault(a.emotion, []).append((a, reasons))
    order = dict.fromkeys(["", *(a.emotion for a in answers)])
    return {emotion: groups[emotion] for emotion in order}


def broken_of(groups, kind: str) -> tuple[int, int]:
    """How many answers of `judged` are broken, of how many: steered by an emotion, or by a random direction."""
    random = kind == "random"
    verdicts = [bool(reasons) for name, group in groups.items() for _, reasons in group
                if name and demo.is_random(name) == random]  # fmt: skip
    return sum(verdicts), len(verdicts)
