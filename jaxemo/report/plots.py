"""The report's plots, as inline SVG.

Each function returns one `<svg>`: text stays text, lines and letters take the page's colours (light or dark), ids are
unique to the plot, and the same numbers give the same string. Nothing here uses pyplot or any other global state.
"""

import html
import io
import re
import textwrap
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

GREY = "#8a8a8a"  # for what has no value, and for chance
# Stand-ins that `svg` replaces with the page's own colours.
INK, FAINT = "#010203", "#040506"
COOL, WARM = "#2a6fbb", "#c8600a"  # below and above; told apart in all common forms of colour blindness
DIVERGING = LinearSegmentedColormap.from_list("", ["#14488a", COOL, "#f4f4f4", WARM, "#7d3500"]).with_extremes(bad=GREY)
WIDTH = 4.6  # inches; at 0.75 of it a plot fits a phone, and 9 units of type are 9 pixels there
TYPE = 9
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "jaxemo", "text.parse_math": False, "font.family": ["DejaVu Sans"],
    "font.size": TYPE, "axes.titlesize": TYPE, "axes.labelsize": TYPE, "xtick.labelsize": TYPE, "ytick.labelsize": TYPE,
    "legend.fontsize": TYPE, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "grid.color": FAINT, "grid.linewidth": 0.6, "axes.axisbelow": True,
}  # fmt: skip


def svg(fig: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` that scales with the page between 0.75 and 1.15 times its own size."""
    out = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    fig.savefig(out, format="svg", transparent=True, metadata=metadata)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, flags=re.DOTALL)  # would apply to the whole page
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)
    for stand_in, colour in ((INK, "currentColor"), (FAINT, "var(--rule)"), ("'DejaVu Sans'", "var(--font)")):
        text = text.replace(stand_in, colour)
    width = fig.get_figwidth() * 96
    title = html.escape(title)
    opening = (
        f'<svg role="img" aria-label="{title}" viewBox="0 0 {fig.get_figwidth() * 72:g} {fig.get_figheight() * 72:g}" '
        f'style="min-width:{0.75 * width:.0f}px;max-width:{1.15 * width:.0f}px" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return re.sub(r"^<svg[^>]*>", lambda _: f"{opening}<title>{title}</title>", text)


def smooth(z: np.ndarray, window: int = 9) -> np.ndarray:
    """Running mean over the first axis, centred; shorter at the ends."""
    ones = np.ones(min(window, len(z)))
    count = np.convolve(np.ones(len(z)), ones, "same")
    return np.stack([np.convolve(column, ones, "same") / count for column in z.T], 1)


@matplotlib.rc_context(STYLE)
def traces(tokens: list[str], z: np.ndarray, names, turn: int) -> str:
    """Smoothed scores `[T, n]` over the text, a panel an emotion, with a line at the token `turn`; the first is not drawn."""
    x, y = np.arange(1, len(z)), smooth(z[1:])
    fig = Figure((WIDTH, 0.3 + 0.66 * len(names)), layout="constrained")
    panels = fig.subplots(len(names), sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, name, line in zip(panels, names, y.T, strict=True):
        ax.fill_between(x, line, 0, where=line >= 0, color=WARM, lw=0, interpolate=True)
        ax.fill_between(x, line, 0, where=line <= 0, color=COOL, lw=0, interpolate=True)
        ax.axhline(0, color=INK, lw=0.6)
        ax.set_title(name, loc="left", pad=1)
        ax.axvline(turn, color=INK, lw=0.8, ls=":")
        ax.tick_params(length=0)
        ax.spines[["bottom", "left"]].set_visible(False)
    words = [i for i in range(1, len(tokens)) if tokens[i].startswith(" ")] or [1]
    at = [min(words, key=lambda i: abs(i - want)) for want in (1, turn / 2, turn, (turn + len(z)) / 2)]
    panels[-1].set_xticks(at, [textwrap.shorten("".join(tokens[i : i + 6]), 14, placeholder="") for i in at], ha="left")
    panels[-1].set_xlim(1, len(z))
    panels[-1].yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return svg(fig, "traces", "Smoothed scores of " + ", ".join(names) + " over the tokens of the text")


@matplotlib.rc_context(STYLE)
def matrix(cosines: np.ndarray, names, order) -> str:
    """The cosine matrix in the given order; the diagonal, which is 1, is left grey."""
    n = len(names)
    shown = np.where(np.eye(n, dtype=bool), np.nan, cosines)[np.ix_(order, order)]
    limit = np.ceil(np.nanmax(np.abs(shown)) * 20) / 20
    side = max(WIDTH - 0.8, 0.15 * n)
    fig = Figure((side + 0.8, side + 1.3), layout="constrained")
    ax = fig.subplots()
    image = ax.imshow(shown, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="none")
    labels = [names[i] for i in order]
    ax.set_xticks(range(n), labels, rotation=90, rotation_mode="anchor", ha="right", va="center")
    ax.set_yticks(range(n), labels)
    ax.tick_params(length=0, labelsize=min(TYPE, 72 * side / n * 0.9))
    ax.spines[:].set_visible(False)
    bar = fig.colorbar(image, ax=ax, location="top", anchor=(0, 0), pad=0.1 / side, shrink=3 / side, aspect=25,
                       label="cosine")  # fmt: skip
    bar.outline.set_visible(False)  # type: ignore[operator]
    return svg(fig, "matrix", f"Cosine similarities of {n} emotion directions, similar ones side by side")


@matplotlib.rc_context(STYLE)
def scatter(coordinates: np.ndarray, share: np.ndarray, names, valence: np.ndarray) -> tuple[str, int]:
    """The first two components, coloured by human valence, and how many points found no room for their label."""
    side = WIDTH if len(names) <= 40 else 2.4 * WIDTH
    fig = Figure((side, side), layout="constrained", dpi=72)
    ax = fig.subplots()
    rated = np.isfinite(valence)
    x, y = coordinates[:, 0], coordinates[:, 1]
    ax.scatter(x[~rated], y[~rated], s=22, marker="s", color=GREY, lw=0)
    dots = ax.scatter(x[rated], y[rated], s=26, c=valence[rated], cmap=DIVERGING, norm=Normalize(1, 9),
                      edgecolors=INK, lw=0.5)  # fmt: skip
    ax.set(xlabel=f"PC1 ({share[0]:.0%} of variance)", ylabel=f"PC2 ({share[1]:.0%} of variance)")
    ax.margins(0.12)
    ax.set_xticks([])
    ax.set_yticks([])
    bar = fig.colorbar(dots, ax=ax, location="top", anchor=(0, 0), pad=0.1 / side, shrink=3 / side, aspect=25,
                       label="human valence, 1 to 9")  # fmt: skip
    bar.outline.set_visible(False)  # type: ignore[operator]
    missing = label(ax, coordinates, names)
    return svg(fig, "scatter", f"First two principal components of {len(names)} emotion directions"), missing


def label(ax, points: np.ndarray, names) -> int:
    """Write each name at the nearest free place round its point, with a thin line where that is not beside it.

    Returns how many found no place; those are not written.
    """
    fig = ax.figure
    fig.draw_without_rendering()  # settles the layout
    fig.set_layout_engine("none")
    at = ax.transData.transform(points)
    taken = np.concatenate([at - 4, at + 4], axis=1)  # boxes x0, y0, x1, y1 in points of 1/72 inch: first the dots
    angles = np.radians([0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240])
    towards = np.tile(np.stack([np.cos(angles), np.sin(angles)], 1), (6, 1))
    reach = np.repeat([5, 9, 14, 20, 27, 35], len(angles))[:, None]
    missing = 0
    for i in np.argsort(-np.linalg.norm(at - np.median(at, axis=0), axis=1), kind="stable"):  # from the outside in
        text = ax.text(0, 0, names[i], ha="center", va="center", transform=None)
        half = text.get_window_extent().size / 2 + 0.5
        centres = at[i] + towards * (reach + np.abs(towards) * half)
        low, high = centres - half, centres + half
        free = ((low > ax.bbox.min) & (high < ax.bbox.max)).all(1)
        free &= ~((taken[:, None, :2] < high) & (taken[:, None, 2:] > low)).all(2).any(0)
        if not free.any():
            text.remove()
            missing += 1
            continue
        k = free.argmax()
        text.set_position(centres[k])
        taken = np.vstack([taken, [*low[k], *high[k]]])
        if reach[k] > 9:
            end = np.clip(at[i], low[k], high[k])
            ax.plot(*np.stack([at[i], end]).T, color=INK, lw=0.4, alpha=0.6, transform=None, zorder=0)
    return missing


@matplotlib.rc_context(STYLE)
def doses(strengths, best: int, lines: np.ndarray, lines_name: str, random: np.ndarray, others, floor: float | None,
          name: str, title: str) -> str:  # fmt: skip
    """Change over strength: `lines [S, E]` faint with their mean bold, and mean and range of `random [S, R]`.

    `floor` is the change below which a strength is not usable.
    """
    fig = Figure((WIDTH, 4.2), layout="constrained")
    ax = fig.subplots()
    ax.axhline(0, color=INK, lw=0.6)
    ax.axvline(strengths[best], color=INK, lw=0.8, ls=":", label="best strength")
    ax.plot(strengths, lines, color=WARM, lw=0.7, alpha=0.55)
    ax.plot(strengths, lines.mean(1), color=WARM, lw=2.6, marker="o", ms=4, label=lines_name, zorder=3)
    if others is not None:
        ax.plot(strengths, others.mean(1), color=COOL, lw=2, ls="-.", label="the other emotions' words, mean")
    ax.plot(strengths, random.mean(1), color=INK, lw=1.6, ls="--", label="random directions, mean")
    ax.fill_between(strengths, random.min(1), random.max(1), color=GREY, alpha=0.3, lw=0,
                    label="random directions, lowest to highest")  # fmt: skip
    if floor is not None:
        ax.axhline(floor, color=COOL, lw=1.2, ls=":", label="limit of a usable strength")
    ax.set(xlabel="strength (fraction of the mean residual norm)", ylabel="change in log-probability (nats)")
    ax.set_xticks(strengths, [f"{s:g}".replace("-", "−") for s in strengths])
    ax.grid(axis="y")
    fig.legend(loc="outside upper left", ncols=1)
    return svg(fig, name, title)


@matplotlib.rc_context(STYLE)
def bars(names, own: np.ndarray, random: np.ndarray) -> str:
    """Each emotion's change `own [E]` as a bar, with that of its word under every random direction, `random [R, E]`.

    Bars beyond every random direction are full, the others pale.
    """
    order = np.argsort(own, kind="stable")
    fig = Figure((WIDTH, 0.7 + 0.24 * len(names)), layout="constrained")
    ax = fig.subplots()
    y = np.arange(len(names))
    ax.axvline(0, color=INK, lw=0.6)
    beyond = own > random.max(0)
    colours = [to_rgba(WARM if own[i] > 0 else COOL, 1 if beyond[i] else 0.45) for i in order]
    ax.barh(y, own[order], height=0.62, color=colours)
    for dots in random[:, order]:
        ax.plot(dots, y, "|", color=INK, ms=8, mew=0.9, alpha=0.75)
    ax.set_yticks(y, [names[i] for i in order])
    ax.set_ylim(-0.7, len(names) - 0.3)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("change in log-probability of the word (nats)")
    ax.grid(axis="x")
    return svg(fig, "bars", "Change of each emotion's word under its own direction (bar) and random directions (ticks)")
