"""What may be concluded from a model's tests, each by a fixed rule that its text names."""

import dataclasses

import numpy as np
import scipy.stats

from jaxemo.emotions import classification, geometry, speakers, statistics, steering_test
from jaxemo.emotions.classification import AVERAGED, Classification
from jaxemo.emotions.validation import Validation
from jaxemo.report import figures
from jaxemo.report.figures import percent, signed

LEARNT = {
    "bag of words": "a bag of words",
    "embedding table": "the embedding table",
}  # baselines, as a sentence has them
STABLE = 0.9  # a median bootstrap self-cosine from which directions count as stable


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One conclusion: `holds` is True, False, or None for in part; `test` is what it is of."""

    test: str
    holds: bool | None
    text: str

    @property
    def mark(self) -> str:
        return {True: "✓ holds:", False: "✗ does not hold:", None: "~ in part:"}[self.holds]


def verdicts(tested: Validation) -> list[Verdict]:
    """The page's conclusions, each from the numbers by the rule that its text names.

    A p counts where it is below 0.05 divided by the number of results with a p on the page (Bonferroni).
    """
    found = tested.found
    classified = [*found.get("stories", ()), *([found["implicit"].guesses] if "implicit" in found else ())]
    results = sum(name in c.guesses for c in classified for name in LEARNT) + 2 * ("affect" in found)
    results += sum(name in found for name in ("implicit", "numbers", "clusters"))
    level = 0.05 / max(1, results)
    out: list[Verdict] = []
    if "self-cosine" in found:
        middle = float(np.median(found["self-cosine"]))
        out.append(
            Verdict(
                "self-cosine",
                middle >= STABLE,
                f"The directions are {'stable' if middle >= STABLE else 'noisy'}: from a bootstrap "
                f"sample of the topics the median cosine with themselves is {middle:.3f} (stable from {STABLE}).",
            )
        )
    for one in found.get("stories", ()):
        out.append(_told(one, level))
    if "implicit" in found:
        i = found["implicit"]
        most = int(i.random_hits.max())
        beyond = i.p < level, i.hits > most
        learnt, said = _beside(i.guesses, 1, level)
        rate = i.guesses.rates(next(iter(i.guesses.guesses)))[0]
        out.append(
            Verdict(
                "implicit",
                learnt or None if all(beyond) else (None if any(beyond) else False),
                f"Before the answer, {i.hits} of {len(i.names)} emotions are largest on their own prompts ({_than(i.hits, i.random_hits)}); "
                f"own scores {'are' if beyond[0] else 'cannot be told from chance: they are'} above permuted ones at {p_of(i.p)}. "
                f"Single prompts are told for {percent(rate[0], 1)} [{percent(rate[1], 1)}, {percent(rate[2], 1)}]{said}.",
            )
        )
    if "numbers" in found:
        n = found["numbers"]
        beyond = int((n.excess > 0).sum()), n.p < level
        out.append(
            Verdict(
                "numbers",
                bool(beyond[1]),
                f"With a number that should matter, {beyond[0]} of {len(n.rho)} scores move the expected way beyond a "
                f"harmless count; the mean excess of {signed(n.excess.mean())} sd is {'beyond' if beyond[1] else 'not told from'} that of random "
                f"directions ({p_of(n.p)}).",
            )
        )
    if "lens" in found and np.isfinite(found["lens"].share).any():
        v = found["lens"]
        own, other, draws = np.nanmedian(v.share), np.nanmedian(v.others), np.nanmedian(v.random, axis=1)
        better = own < draws.min(), own < other
        out.append(
            Verdict(
                "lens",
                all(better) or (None if any(better) else False),
                f"A direction puts its emotion's own word behind {percent(own, 1)} of the vocabulary (median): "
                f"{'higher than every' if better[0] else 'not higher than every'} one of {len(draws)} random directions "
                f"(median {percent(float(np.median(draws)), 1)}), {'and ' if all(better) else ''}{'higher' if better[1] else 'not higher'} than other "
                f"emotions' directions ({percent(other, 1)}).",
            )
        )
    if "steering" in found:
        t = found["steering"]
        own, draws = t.own[t.best].mean(), t.random[t.best].mean(-1)
        costs = t.facts[t.best].mean()
        beyond = own > max(0.0, draws.max()), costs > -steering_test.USABLE
        out.append(
            Verdict(
                "steering",
                all(beyond) or (None if beyond[0] else False),
                f"At strength {t.strengths[t.best]:g}, adding a direction changes its own word by {signed(own)} nats on average, "
                f"{'more than every' if beyond[0] else 'not more than every'} one of {len(draws)} random directions (at most {signed(draws.max())}); "
                f"facts change by {signed(costs)}.",
            )
        )
    if "affect" in found:
        out += _affect(found["affect"], level)
    if "clusters" in found and len(set(found["clusters"].families)) > 1:
        c = found["clusters"]
        out.append(
            Verdict(
                "clusters",
                c.p < level,
                f"k-means groups the directions {'more' if c.p < level else 'no more'} like the families of words than "
                f"shuffled families: adjusted Rand index {c.rand:.2f}, 95 % of shuffled below {c.shuffled:.2f}, {p_of(c.p)}.",
            )
        )
    if "similarity" in found:
        own, draws = found["similarity"].overall
        out.append(
            Verdict(
                "similarity",
                bool(own > draws.max()),
                f"Layers arrange the emotions {'more' if own > draws.max() else 'no more'} alike than random directions that turn as "
                f"much from layer to layer: mean rho {signed(own)}, {_than(own, draws)} (at most {signed(draws.max())}).",
            )
        )
    if "speakers" in found:
        out += _speakers(found["speakers"])
    return out


def p_of(p: float) -> str:
    return f"p = {p:.4f}" if p >= 0.0001 else "p < 0.0001"


def _than(value, draws) -> str:
    above = int((np.asarray(draws) < value).sum())
    return (
        f"above every one of {len(draws)} random draws"
        if above == len(draws)
        else f"above {above} of {len(draws)} random draws"
    )


def _told(found: Classification, level: float = 0.05) -> Verdict:
    """Holds above every random draw, above what is commonest, and better than the baselines that learn; in part without the last."""
    tested, n = next(iter(found.guesses)), len(found.labels)
    rate, low, high = found.rates(tested)[1]
    random, common = (found.guesses[name].rank < classification.TOP for name in ("random directions", "majority"))
    above = rate > random.mean(1).max() and low > common.mean()
    text = (
        f"On {n} texts of {found.corpus}, the emotion is among the first {classification.TOP} of {len(found.names)} for {percent(rate, 1)} "
        f"[{percent(low, 1)}, {percent(high, 1)}]: {_than(rate, random.mean(1))}, "
        f"{'above' if low > common.mean() else 'not told from'} always guessing the commonest ({percent(common.mean(), 1)})"
    )
    better, said = _beside(found, classification.TOP, level)
    text += said
    if figures.metrics(found) == 3:
        ways = {name: found.rates(name)[2] for name in (tested, tested + AVERAGED) if name in found.guesses}
        text += "; the family is right for " + ", ".join(
            f"{percent(r[0], 1)}{' with layers averaged' if name != tested else ''}" for name, r in ways.items()
        )
        text += f" (always guessing the commonest {percent(found.rates('majority')[2][0], 1)})"
    return Verdict("stories", (True if better else None) if above else False, text + ".")


def _beside(found: Classification, top: int, level: float) -> tuple[bool, str]:
    """Whether the tested directions have the right answer among the first `top` for more texts than each baseline that learns, by an
    exact sign test over texts, and the end of a sentence that says so."""
    own = next(iter(found.guesses.values())).rank[0] < top
    better, text = True, ""
    for name in (name for name in LEARNT if name in found.guesses):
        other = found.guesses[name].rank[0] < top
        p, more = sign_test(own, other), bool(own.mean() > other.mean())
        better = better and p < level and more
        than = ("better than" if more else "worse than") if p < level else "not told from"
        text += f", {than} {LEARNT[name]} ({percent(other.mean(), 1)}, {p_of(p)})"
    return better, text


def sign_test(a: np.ndarray, b: np.ndarray) -> float:
    """The exact p that two ways of guessing the same texts, right or not, are equally good (McNemar)."""
    only, both = int((a & ~b).sum()), int((a ^ b).sum())
    return float(scipy.stats.binomtest(only, both).pvalue) if both else 1.0


def _affect(a: geometry.Affect, level: float) -> list[Verdict]:
    out = []
    for i, norm in enumerate(a.norms):
        low, high = a.interval[i]
        there = a.p[i] < level and low * high > 0
        elsewhere = a.best_p[i] < level and a.best[i] != a.expected[i]
        decoded, d_low, d_high = a.decoded[i]
        in_all = d_low > 0 and decoded > a.random_decoded[i]
        out.append(
            Verdict(
                "affect",
                bool(there) or (None if elsewhere or in_all else False),
                f"Human {norm} {'is' if there else 'is not told from chance'} in the component where it is expected: PC{a.expected[i] + 1}, r = {signed(a.r[i])} "
                f"[{signed(low)}, {signed(high)}] over {a.rated} words, {p_of(a.p[i])}"
                + (
                    f"; it is in PC{a.best[i] + 1}, |r| = {abs(a.matrix[i, a.best[i]]):.2f}, {p_of(a.best_p[i])} for the best of {len(a.share)}"
                    if elsewhere
                    else ""
                )
                + f". From the whole directions it can{'' if in_all else 'not'} be decoded: r = {signed(decoded)} [{signed(d_low)}, {signed(d_high)}] "
                f"(random directions {signed(a.random_decoded[i])}).",
            )
        )
    return out


def _speakers(s: speakers.Speakers) -> list[Verdict]:
    out, n = [], s.hits.shape[1]
    for i, kind in enumerate(("present", "other")):
        low, high = statistics.wilson(int(s.hits[i].sum()), n)
        rate = s.hits[i].mean()
        beyond = rate > s.shuffled[i].max(), low > s.chance[i]
        out.append(
            Verdict(
                "speakers",
                all(beyond) or (None if any(beyond) else False),
                f"The emotion of the {kind} speaker is told for {percent(rate, 1)} [{percent(low, 1)}, {percent(high, 1)}] of {n} readings: "
                f"{_than(rate, s.shuffled[i]).replace('random draws', 'draws of permuted emotions')}, {'above' if beyond[1] else 'not told from'} "
                f"always guessing the commonest ({percent(s.chance[i], 1)}).",
            )
        )
    return out
