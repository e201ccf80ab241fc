"""Figures as inline SVG, which stand as they are and which `script.html` lets people zoom, pan and point at.

A chart has a plane, `[0, 1]²` with y down, whose lines and images stretch; dots that move with it and keep their size; and ticks.
Where two texts would overlap, the earlier one stays, so texts are given in order of importance: the script, which lays the same chart
out again at every size and zoom, follows the same rule. Colours are classes, c0 to c4, that the page's style fills in.
"""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

COOL, WARM, GREY = "#2a6fbb", "#c8600a", "#8a8a8a"  # below, above (told apart in all common colour blindness), no value
DIVERGING = ("#14488a", COOL, "#f4f4f4", WARM, "#7d3500")
SEQUENTIAL = ("#f4f4f4", "#9dc3e6", COOL, "#14488a", "#0a2547")
WIDTH = 640  # pixels, without the script
LETTER, LINE = 6.8, 14.0  # pixels that a letter of 11 px is wide on average, in a wide face, and a line high


class Axis(NamedTuple):
    """`ticks` are (where, text, apart) in the axis's own units, the most important first, which are shown where two that are `apart` from
    each other have `room` pixels each. The low end may be above the high one."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str, float], ...]
    room: float = LINE

    def __call__(self, values) -> np.ndarray:
        """Where `values` are on the axis, 0 to 1."""
        return (np.asarray(values, np.float64) - self.low) / (self.high - self.low)


class Dot(NamedTuple):
    """`body` drawn at (x, y) of the plane; `says` is shown to who points at it, `label` is written beside it where there is room."""

    x: float
    y: float
    body: str
    says: str
    label: str = ""


def number(value: float, digits: int = 2) -> str:
    """Plainly, with a true minus."""
    return f"{value:.{digits}f}".replace("-", "−")


def numeric(label: str, values, percent: bool = False, pad: float = 0.05) -> Axis:
    """An axis over finite `values`, with ticks for closer looks as well."""
    known = np.asarray(values, np.float64).ravel()
    known = known[np.isfinite(known)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    low, high = low - pad * (high - low), high + pad * (high - low)
    step, mantissa = next((m * 10.0**e, m) for e in range(-9, 12) for m in (1, 2, 5) if m * 10.0**e > (high - low) / 6)
    ticks: dict[float, tuple[str, float]] = {}
    for apart in (step, step / (5 if mantissa == 5 else 2), step / 10):
        digits = max(0, -math.floor(math.log10(apart * (100 if percent else 1)) + 1e-9))
        for i in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1):
            value = round(i * apart, 12)
            said = number(100 * value, digits) + "\u202f%" if percent else number(value, digits)
            ticks.setdefault(value, (said, apart))
    return Axis(label, low, high, tuple((value, *rest) for value, rest in ticks.items()), 2 * LINE)


def layers(count: int) -> Axis:
    """The layers of a model, 0 to `count` − 1."""
    return Axis("layer", -0.5, count - 0.5, _every(count, (10, 5, 1), str, 0))


def categories(names: Sequence[str], label: str = "") -> Axis:
    """A name each unit, the first at the top; where there is no room every second one is left out, or three of four, ..."""
    strides = [2**k for k in range(len(names).bit_length(), -1, -1)]
    return Axis(label, 0, len(names), _every(len(names), strides, names.__getitem__, 0.5))


def _every(count, strides, text, offset) -> tuple[tuple[float, str, float], ...]:
    """A tick for each of `range(count)`, those on the widest stride first."""
    order = {i: stride for stride in reversed(strides) for i in range(0, count, stride)}
    return tuple((i + offset, text(i), order[i]) for i in sorted(order, key=lambda i: (-order[i], i)))


def flipped(axis: Axis) -> Axis:
    """The same with its low end at the bottom: y goes down in the plane."""
    return axis._replace(low=axis.high, high=axis.low)


# ---- what is drawn in the plane -----------------------------------------------------------------------------------------


def line(x: Axis, y: Axis, xs, ys, style: str) -> str:
    """A line through the finite ones of the points; a gap where they are not."""
    at = np.stack([x(xs), y(ys)], axis=-1)
    path, pen = "", "M"
    for (u, v), there in zip(at.tolist(), np.isfinite(at).all(-1).tolist(), strict=True):
        path += f"{pen}{u:.4f} {v:.4f}" if there else ""
        pen = "L" if there else "M"
    return f'<path class="line {style}" d="{path}"/>'


def area(x: Axis, y: Axis, xs, low, high, style: str) -> str:
    """What lies between two lines, all finite."""
    edge = np.concatenate([np.stack([x(xs), y(high)], -1), np.stack([x(xs), y(low)], -1)[::-1]])
    return f'<path class="area {style}" d="M{"L".join(f"{u:.4f} {v:.4f}" for u, v in edge.tolist())}Z"/>'


def level(x: Axis, y: Axis, value: float, style: str, upright: bool = False) -> str:
    """A line across the whole plane, at one value of y, or of x where `upright`."""
    ends = [0, 1]
    at = float((x if upright else y)([value])[0])
    path = f"M{at:.4f} 0V1" if upright else f"M{ends[0]} {at:.4f}H{ends[1]}"
    return f'<path class="line {style}" d="{path}"/>'


def band(x: Axis, y: Axis, low: float, high: float, style: str) -> str:
    """What lies between two values of y, across the whole plane."""
    a, b = sorted(y([low, high]).tolist())
    return f'<rect class="area {style}" x="0" y="{a:.4f}" width="1" height="{b - a:.4f}"/>'


def image(values: np.ndarray, low: float, high: float, colours: Sequence[str] = DIVERGING) -> str:
    """The matrix as coloured cells that fill the plane; NaN is grey."""
    return (f'<image width="1" height="1" preserveAspectRatio="none" href="data:image/png;base64,'
            f'{base64.b64encode(png(rgb(values, low, high, colours))).decode()}"/>')  # fmt: skip


def rgb(values: np.ndarray, low: float, high: float, colours: Sequence[str] = DIVERGING) -> np.ndarray:
    """Values as colours `[..., 3]` uint8 between the given ones, NaN as grey."""
    stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in colours])
    at = (np.nan_to_num(np.asarray(values, np.float64)) - low) / ((high - low) or 1)
    found = np.stack([np.interp(at, np.linspace(0, 1, len(stops)), channel) for channel in stops.T], -1)
    found[~np.isfinite(values)] = [int(GREY[i : i + 2], 16) for i in (1, 3, 5)]
    return np.round(found).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """`pixels [height, width, 3]` uint8 as a PNG file."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


SHAPES = {
    "dot": '<circle r="4.5"/>',
    "square": '<rect x="-4" y="-4" width="8" height="8"/>',
    "diamond": '<path d="M0 -5.5L5.5 0L0 5.5L-5.5 0Z"/>',
    "tick": '<path d="M-1 -6H1V6H-1Z"/>',
}


def dots(
    x: Axis, y: Axis, xs, ys, says: Sequence[str], style: str, shape: str = "dot", labels=None, fills=None
) -> list[Dot]:
    """Dots at the finite ones of the points, in the order of importance of their labels."""
    found = []
    at = np.stack([x(xs), y(ys)], axis=-1)
    for i in np.flatnonzero(np.isfinite(at).all(-1)).tolist():
        fill = f' style="fill:{fills[i]}"' if fills is not None else ""
        body = f'<g class="dot {style}"{fill}>{SHAPES[shape]}</g>'
        found.append(Dot(float(at[i, 0]), float(at[i, 1]), body, says[i], labels[i] if labels is not None else ""))
    return found


# ---- the whole ----------------------------------------------------------------------------------------------------------


def fitting(boxes, taken) -> list[bool]:
    """Which boxes (x0, y0, x1, y1) stay where none may overlap those `taken`, nor an earlier one that stays."""
    taken = np.reshape(taken, (-1, 4))
    stays = []
    for box in boxes:
        free = not ((taken[:, :2] < box[2:]) & (taken[:, 2:] > box[:2])).all(1).any()
        stays.append(free)
        if free:
            taken = np.vstack([taken, box])
    return stays


def chart(
    title: str,
    x: Axis,
    y: Axis,
    plane: Sequence[str] = (),
    marks: Sequence[Dot] = (),
    *,
    height: int | None = None,
    upright: bool = False,
    cells: dict | None = None,
    width: int = WIDTH,
    plain: bool = False,
) -> Markup:
    """One figure. `height` is the plane's in pixels, by default as much as its width; `upright` turns the ticks of x by 90°.

    `cells`, of a matrix drawn as an image, is what `matrix_cells` gives. A `plain` figure has no buttons.
    """
    tall = max([len(text) for _, text, _ in x.ticks], default=0) * LETTER if upright else LINE
    wide = max([len(text) for _, text, _ in y.ticks], default=0) * LETTER
    left, right, top = math.ceil(min(wide, 210) + 12), 10, 8 if plain else 32
    bottom = math.ceil(min(tall, 170) + 12) + (LINE if x.label else 0)
    w = width - left - right
    h = height or w
    marks_at = [(left + m.x * w, top + m.y * h) for m in marks]
    parts = [
        f'<svg class="chart" role="img" tabindex="0" aria-label="{escape(title)}" width="{width}" height="{top + h + bottom:g}" '
        f'viewBox="0 0 {width} {top + h + bottom:g}" data-box="{left} {right} {top} {bottom:g}" data-width="{width}" '
        f'data-height="{height or 0}"{" data-upright" if upright else ""}{" data-plain" if plain else ""}>'
    ]
    parts.append(f'<svg class="plot" x="{left}" y="{top}" width="{w}" height="{h:g}">'
                 f'<g class="plane" transform="scale({w} {h:g})">{"".join(plane)}</g></svg>')  # fmt: skip
    wide_at = [7 + len(m.label) * LETTER for m in marks]
    back = [px + long > width for (px, _), long in zip(marks_at, wide_at, strict=True)]  # written before its dot
    boxes = [(px - long, py - 6, px - 6, py + 6) if turned else (px + 6, py - 6, px + long, py + 6)
             for (px, py), long, turned in zip(marks_at, wide_at, back, strict=True)]  # fmt: skip
    room = fitting(boxes, [(px - 5, py - 5, px + 5, py + 5) for px, py in marks_at])
    parts.append('<g class="marks">')
    for m, (px, py), shown, turned in zip(marks, marks_at, room, back, strict=True):
        where = 'x="-7" text-anchor="end"' if turned else 'x="7"'
        label = f'<text {where} y="4"{"" if shown else " hidden"}>{escape(m.label)}</text>' if m.label else ""
        parts.append(f'<g transform="translate({px:.1f} {py:.1f})" data-x="{m.x:.4f}" data-y="{m.y:.4f}">{m.body}{label}'
                     f"<title>{escape(m.says)}</title></g>")  # fmt: skip
    parts.append("</g>")
    for axis, name, long in ((x, "xt", w), (y, "yt", h)):
        at = axis([where for where, *_ in axis.ticks])
        apart = np.array([apart for *_, apart in axis.ticks]) / abs(axis.high - axis.low)
        turned = upright or name == "yt"
        size = axis.room if turned else 10 + LETTER * max([len(t) for _, t, _ in axis.ticks], default=0)
        there = (apart * long >= size) & (at > -1e-6) & (at < 1 + 1e-6)
        parts.append(f'<g class="{name}" data-size="{size:g}">')
        for (_, text, _), a, d, shown in zip(axis.ticks, at.tolist(), apart.tolist(), there.tolist(), strict=True):
            if name == "xt":
                place, edge = f"{left + a * w:.1f} {top + h:g}", "M0 0V4"
                how = (
                    'transform="rotate(-90)" x="-7" y="4" text-anchor="end"'
                    if upright
                    else 'y="16" text-anchor="middle"'
                )
            else:
                place, edge, how = f"{left} {top + a * h:.1f}", "M0 0H-4", 'x="-7" y="4" text-anchor="end"'
            parts.append(f'<g transform="translate({place})" data-at="{a:.4f}" data-apart="{d:.4f}"{"" if shown else " hidden"}>'
                         f'<path d="{edge}"/><text {how}>{escape(text)}</text></g>')  # fmt: skip
        parts.append("</g>")
    parts.append(f'<path class="frame" d="M{left} {top}V{top + h:g}H{width - right}"/>')
    parts.append(
        f'<text class="xl" x="{left + w / 2:.0f}" y="{top + h + bottom - 4:g}" text-anchor="middle">{escape(x.label)}</text>'
    )
    parts.append(f'<text class="yl" x="4" y="{top - 8}">{escape(y.label)}</text></svg>')
    data = Markup('<script type="application/json">{}</script>').format(htmlsafe_json_dumps(cells)) if cells else ""
    return Markup('<div class="zoom" style="max-width:{}px"><div class="scroll" tabindex="-1">{}</div>{}</div>').format(
        width, Markup("".join(parts)), data
    )


def matrix_cells(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], digits: int, says: str) -> dict:
    """What the script says of a cell: `says` with {r}, {c} and {v} filled in. Whole numbers of 10^-digits; None for NaN."""
    whole = np.round(np.nan_to_num(values) * 10**digits).astype(int)
    cells = [
        None if not there else v
        for v, there in zip(whole.ravel().tolist(), np.isfinite(values).ravel().tolist(), strict=True)
    ]
    return {"rows": list(rows), "columns": list(columns) if list(columns) != list(rows) else None, "values": cells,
            "digits": digits, "says": says}  # fmt: skip


def matrix(
    title: str, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], low: float, high: float, says: str,
    colours: Sequence[str] = DIVERGING, digits: int = 2, labels: tuple[str, str] = ("", ""),
) -> Markup:  # fmt: skip
    """A matrix as coloured cells, each to be pointed at."""
    x, y = categories(columns, labels[1]), categories(rows, labels[0])
    return chart(title, x, y, [image(values, low, high, colours)], upright=True,
                 cells=matrix_cells(values, rows, columns, digits, says))  # fmt: skip


def ramp(low: str, middle: str, high: str, label: str, kind: str) -> Markup:
    """The legend of an image's colours, "diverging" or "sequential"."""
    colours = {"diverging": DIVERGING, "sequential": SEQUENTIAL}[kind]
    return Markup(
        '<p class="ramp"><span>{}:</span> <b>{} <i style="background:linear-gradient(90deg,{})"></i> {}</b>{}</p>'
    ).format(label, low, ",".join(colours), high, Markup(" <span>(middle {})</span>").format(middle) if middle else "")


def legend(*entries: tuple[str, str, str]) -> Markup:
    """Entries of (kind, style, text), where the kind is "line", "area" or a shape of `SHAPES`."""
    out = []
    for kind, style, text in entries:
        if kind == "line":
            key = f'<path class="line {style}" d="M0 6H26"/>'
        elif kind == "area":
            key = f'<rect class="area {style}" x="1" y="1" width="24" height="10"/>'
        else:
            key = f'<g class="dot {style}" transform="translate(13 6)">{SHAPES[kind]}</g>'
        out.append(
            Markup('<li><svg width="26" height="12" aria-hidden="true">{}</svg> {}</li>').format(Markup(key), text)
        )
    return Markup('<ul class="keys">{}</ul>').format(Markup("").join(out))
