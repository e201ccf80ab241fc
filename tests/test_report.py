"""The demo's page, from made-up results: whole, escaped, self-contained, repeatable and never half-written."""

import dataclasses
import html.parser
import re

import numpy as np
import pytest
import scipy.stats

import jaxemo
from jaxemo.emotions import geometry, steering_test
from jaxemo.report import chart, demo, figures, page

VOID = {"meta", "br"}
LOADS = {"src", "srcset", "data", "poster", "background", "action", "xlink:href"}
NAMES = (*demo.SHOWN, "at ease", "fed up & <b>$x$</b>")
TOKENS = [
    "M",
    "ire",
    "la",
    " <script>alert(1)</script>",
    "\n",
    " a$b$",
    ' "quoted"',
    " &amp;",
    "  spaced",
    "\ufffd",
    " é",
]


def make(names=NAMES, tokens=TOKENS, seed=0) -> demo.Results:
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((len(names), 16))
    directions -= directions.mean(0)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = directions @ directions.T
    coordinates, size, _ = np.linalg.svd(directions, full_matrices=False)
    valence = rng.uniform(1, 9, len(names))
    valence[-1] = np.nan
    S, E, R = 3, 4, 5
    test = steering_test.TextTest(
        tuple(names[:E]), 7, (0.1, 0.25, 0.5),
        own=np.array([[0.1] * E, [0.5, 0.6, 0.7, 0.8], [-1.0] * E]), others=rng.normal(size=(S, E)),
        random=np.add.outer([-0.1, 0.3, 0.65], np.tile([[-0.35], [-0.05], [0.0], [0.05], [0.35]], E)), facts=-np.tile([[0.1], [0.2], [2.0]], E),
        random_facts=rng.normal(size=(S, R)), dose=rng.uniform(size=(S, E)),
    )  # fmt: skip
    assert test.best == 1

    def answer(emotion, strength, text, perplexity, repeated, tokens=9):
        return demo.Answer(emotion, strength, text, tokens, perplexity, repeated, dict.fromkeys(demo.SHOWN, strength))

    return demo.Results(
        about={"model": "tiny & <i>odd</i>", "machine": "2 cores"},
        layer=7,
        tokens=list(tokens),
        turn=5,
        z=rng.normal(size=(len(tokens), len(demo.SHOWN))) * 2,
        names=tuple(names),
        cosines=cosines,
        components=geometry.Components(coordinates[:, :2] * size[:2], size[:2] ** 2 / (size**2).sum()),
        valence=valence,
        correlations={"PC1 with human valence": (0.15, 23), "PC2 with human arousal": (0.9, 3)},
        test=test,
        question="Why <em>now</em>?",
        answers=[
            answer("", 0.0, "A plain\n\nanswer & no more.", 2.0, 0.0),
            answer("calm", 0.3, "It is <b>bold</b>.", 6.1, 0.3),
            answer("calm", -0.3, "Again again.", 1.5, 0.31),
            answer("random-0", 0.3, "Almost there.", 6.0, 0.3),
            answer("random-0", 0.15, "", float("inf"), 0.0, tokens=0),
            answer("random-1", 0.15, "Another.", 2.0, 0.0),
        ],
        seconds={"load": 1.25, "text test": 60.0},
    )


class Page(html.parser.HTMLParser):
    """Elements with their text; a tag that does not match fails."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in <{tag}> {attributes}"
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> at {self.getpos()} closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, cls=None):
        return [e for e in self.elements if e["tag"] == tag and (cls is None or cls in (e.get("class") or "").split())]


@pytest.fixture(scope="module")
def results():
    return make()


@pytest.fixture(scope="module")
def text(results):
    return page.render(results)


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


def check_whole(parsed, text):
    """One page, whose links lead somewhere."""
    assert text.startswith("<!DOCTYPE html>")
    assert [len(parsed.all(tag)) for tag in ("html", "head", "body", "h1", "main")] == [1] * 5
    ids = [e["id"] for e in parsed.elements if e.get("id")]
    assert len(ids) == len(set(ids)) and len(ids) > 2
    links = [e["href"] for e in parsed.all("a") if e["href"].startswith("#")]
    assert links and {link[1:] for link in links} <= set(ids)
    for e in parsed.all("th"):
        assert e.get("scope") in ("row", "col", "rowgroup"), e


def check_loads_nothing(parsed, text, addresses=frozenset()):
    """No element fetches anything, no attribute runs anything, and the browser is told to allow neither."""
    for element in parsed.elements:
        assert element["tag"] not in {"link", "iframe", "object", "embed", "img", "base", "form"}
        assert not LOADS & element.keys(), element
        assert not any(name.startswith("on") for name in element), element
        if element.get("href") and element["tag"] != "a":
            assert element["href"].startswith("data:image/png;base64,")
    (policy,) = (e["content"] for e in parsed.all("meta") if e.get("http-equiv"))
    assert policy.startswith("default-src 'none';") and "data:" in policy and "*" not in policy
    assert not re.search(r"@import|@font-face|url\(|fetch\(|XMLHttp|innerHTML|eval\(", text)
    without = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert set(re.findall(r"(?:https?:)?//\w[\w.]*\.\w[^\s\"'<>]*", without)) == set(addresses)


def test_the_page_is_well_formed_and_loads_nothing(parsed, text):
    check_whole(parsed, text)
    check_loads_nothing(parsed, text, {"https://arxiv.org/abs/2604.07729"})


def test_every_name_token_and_answer_is_there_as_it_was(parsed, results):
    drawn = {e["aria-label"]: e["text"] for e in parsed.all("svg", "chart")}
    matrix = next(text for label, text in drawn.items() if label.startswith("Cosine"))
    scatter = next(text for label, text in drawn.items() if label.startswith("First two"))
    for name in results.names:
        assert matrix.count(name) >= 2 and name in scatter, name
    maps = parsed.all("p", "tokens")
    assert len(maps) == len(demo.SHOWN) and {m["text"] for m in maps} == {"".join(results.tokens)}
    cells = [e for e in parsed.all("span") if re.fullmatch(r"([np]\d+|first)( turn)?", e.get("class") or "")]
    assert [e["text"] for e in cells] == results.tokens * len(demo.SHOWN)
    assert [i % len(TOKENS) for i, e in enumerate(cells) if "turn" in e["class"]] == [results.turn] * len(demo.SHOWN)
    assert [e["text"] for e in parsed.all("blockquote")] == [
        "A plain\n\nanswer & no more.", "Again again.", "It is <b>bold</b>.", "(nothing)", "Almost there.", "Another."
    ]  # fmt: skip
    assert re.search(r"\.tokens \{[^}]*white-space: pre-wrap", parsed.all("style")[0]["text"])
    whole = parsed.all("html")[0]["text"]
    for part in (results.question, *results.about.values(), "r = +0.15", "n = 23", "load 1.2, text test 60.0"):
        assert part in whole, part


def test_an_answer_is_broken_by_perplexity_or_repetition_only(parsed, results):
    verdicts = {(a.emotion, a.strength): why for group in page.judged(results.answers).values() for a, why in group}
    assert {key for key, why in verdicts.items() if why} == {("calm", 0.3), ("calm", -0.3), ("random-0", 0.15)}
    cards = parsed.all("article")
    assert ["broken" in card["class"].split() for card in cards] == [False, True, True, True, False, False]
    assert "perplexity 3.0 ×" in cards[2]["text"] and "31\u202f% repeated" in cards[1]["text"]
    assert "broken: empty" in cards[3]["text"] and "perplexity inf" in cards[3]["text"]
    assert "2 of 2 answers steered by an emotion and 1 of 3 steered by a random" in parsed.all("header")[0]["text"]
    groups = [e["text"] for e in parsed.all("th") if e.get("scope") == "rowgroup"]
    assert groups == ["calm", "random direction 1", "random direction 2"]
    assert [e["text"] for e in parsed.all("h4")] == [
        "calm at −0.30", "calm at +0.30", "random direction 1 at +0.15", "random direction 1 at +0.30", "random direction 2 at +0.15"
    ]  # fmt: skip


def test_a_reader_meets_no_names_of_the_programs(parsed, text):
    assert "random-" not in text.split("<body>")[1] and "LanguageModel(" not in text
    assert parsed.all("title")[0]["text"] == "Emotion directions in tiny & <i>odd</i>"
    assert "random direction 2 +0.15" in demo.summary(make()) and "unsteered" in demo.summary(make())


def test_the_text_turns_where_the_page_says_it_does(parsed, results):
    """On the demo's own tokenizer: what comes before the turn are the same tokens read alone."""
    tokenizer = jaxemo.load("smollm2-135m").tokenizer
    whole, before = tokenizer.encode(demo.BEFORE + demo.AFTER), tokenizer.encode(demo.BEFORE)
    assert whole[: len(before)] == before and tokenizer.decode(whole[len(before) :]) == demo.AFTER
    assert demo.AFTER.startswith(" He slid the ring back")
    reading = next(e["text"] for e in parsed.all("section") if e["id"] == "reading")
    words = " ".join("".join(results.tokens[results.turn :]).split()[:5])
    assert (
        f"begins “{words}”" in reading
        and "before the turn" in reading
        and "half" not in reading.split("half of them")[0]
    )


def test_every_size_of_answer_has_two_random_directions():
    controls = [sizes for name, sizes in demo.ANSWERED if demo.is_random(name)]
    emotional = {abs(s) for name, sizes in demo.ANSWERED if not demo.is_random(name) for s in sizes}
    assert len(controls) == 2 and all({abs(s) for s in sizes} == emotional for sizes in controls)


def test_the_heat_map_clips_and_leaves_the_first_token_out():
    z = np.array([127.0, -0.2, 0.26, 1.0, -9.0, 99.0])
    found = page.heat_map("calm", list("abcdef"), z, 4)
    assert [cell[:2] for cell in found["cells"]] == [
        ("a", "first"), ("b", "p0"), ("c", "p1"), ("d", "p2"), ("e", "n8"), ("f", "p8")
    ]  # fmt: skip
    assert np.allclose((found["before"], found["after"]), (1.06 / 3, 45)) and found["moved"]
    assert not page.heat_map("desperate", list("abcdef"), z, 4)["moved"]
    assert page.heat_map("desperate", list("abcde"), z[:5], 4)["moved"]


def test_the_table_holds_the_numbers_of_the_test(parsed, results):
    t = results.test
    assert page.above_random(t).tolist() == [0, 2, 0]
    (best,) = parsed.all("tr", "best")
    for part in ("0.25 (best)", "4 of 4", "2 of 4", "+0.65", "+0.30 ± 0.22", page.signed(t.others[1].mean())):
        assert part in best["text"], part
    # The control stands next to what it is the control of, where a narrow screen shows both.
    assert "(best)+0.65+0.30 ± 0.22" in best["text"] and best["text"].endswith(f"{t.dose[1].mean():.2f}")
    titles = [e["text"] for e in parsed.all("th") if e.get("scope") == "col"]
    assert titles[5:11] == ["strength", "own word, mean", "random ± sd", "above every random", "facts", "facts, random"]


def test_the_type_of_figures_is_readable_on_a_phone(parsed, text):
    """Figures are as wide as their own units, so that 11 units of type are 11 pixels; the script keeps to that."""
    charts = parsed.all("svg", "chart")
    assert len(charts) == 11 and all(e["viewbox"].split()[2:] == [e["width"], e["height"]] for e in charts)
    assert re.search(r"svg text \{ font: 11px", text) and "${room} ${tall}" in text


def test_every_plot_of_the_test_shows_the_random_directions(results):
    t = results.test
    whole = page.test_plots(t)
    without = page.test_plots(dataclasses.replace(t, random=0 * t.random - 9, random_facts=0 * t.random_facts - 9))
    assert all(whole[name] != without[name] for name in ("words", "facts", "bars"))


def test_the_interval_is_that_of_scipy():
    x, y = np.random.default_rng(0).normal(size=(2, 23))
    want = scipy.stats.pearsonr(x, y)
    error = np.abs(np.subtract(page.interval(want.statistic, 23), want.confidence_interval(0.95))).max()
    print(f"interval: error {error:.1e}, bound 1e-4")  # 1.96 stands for 1.95996
    assert error < 1e-4
    assert page.interval(0.9, 3) is None and page.interval(1.0, 9)[1] <= 1


def test_extreme_pairs_are_the_largest_and_smallest_cosines(results):
    c, found = results.cosines, page.extreme_pairs(results.cosines, results.names, 3)
    above = np.sort(c[np.triu_indices(len(c), 1)])
    assert [v for _, _, v in found["alike"]] == above[::-1][:3].tolist()
    assert [v for _, _, v in found["opposed"]] == above[:3].tolist()
    for a, b, value in found["alike"] + found["opposed"]:
        assert c[results.names.index(a), results.names.index(b)] == value


def test_labels_never_cover_one_another_or_a_dot():
    rng = np.random.default_rng(0)
    names = [f"emotion {i}" for i in range(120)]
    parts = geometry.Components(rng.normal(size=(120, 2)), np.array([0.2, 0.1]))
    parsed = Page(figures.components(parts, names, np.full(120, 5.0)))
    drawn = [e for e in parsed.elements if e["tag"] == "g" and "data-x" in e]
    at = np.array([[float(v) for v in re.findall(r"[\d.]+", e["transform"])] for e in drawn])
    labels = [e for e in parsed.all("text") if e["text"].startswith("emotion")]
    shown = np.array(["hidden" not in e for e in labels])
    assert len(labels) == 120 and [e["text"] for e in labels] == [
        e["text"][: e["text"].index(":")].removesuffix(label["text"]) for e, label in zip(drawn, labels, strict=True)
    ]
    assert 30 < shown.sum() < 120
    back = np.array([e["x"] == "-7" for e in labels])
    left = at[:, 0] + np.where(back, -60, 6)
    box = np.stack([left, at[:, 1] - 6, left + 54, at[:, 1] + 6], 1)[shown]
    over = (box[:, None, :2] < box[None, :, 2:]).all(2) & (box[:, None, 2:] > box[None, :, :2]).all(2)
    assert over.sum() == len(box), "a label covers another"
    inside = (box[:, None, :2] < at[None] + 4).all(2) & (box[:, None, 2:] > at[None] - 4).all(2)
    assert not inside.any(), "a label covers a dot"


def test_ticks_are_the_numbers_where_they_stand():
    for values in ([0, 1], [-0.63, 0.91], [3.1, 3.4], [0, 1234], [2, 2], [0.18, 0.79]):
        axis = chart.numeric("x", values)
        for where, text, _ in axis.ticks:
            assert abs(float(text.replace("−", "-")) - where) < 1e-9 and axis.low <= where <= axis.high
        coarse = sorted(where for where, _, apart in axis.ticks if apart == axis.ticks[0][2])
        assert 2 <= len(coarse) <= 7 and np.allclose(np.diff(coarse), axis.ticks[0][2])
    assert [text for _, text, _ in chart.numeric("x", [0, 0.4], percent=True).ticks[:2]] == ["0\u202f%", "10\u202f%"]
    known = chart.categories([f"n{i}" for i in range(171)])
    for stride in (1, 2, 4, 8):
        assert [t for _, t, apart in sorted(known.ticks) if apart >= stride] == [f"n{i}" for i in range(0, 171, stride)]


def test_an_image_holds_each_cell_as_its_colour():
    import base64
    import struct
    import zlib

    values = np.array([[-1.0, 0.0, np.nan], [0.5, 1.0, 9.0]])
    data = base64.b64decode(re.search(r"base64,([^\"]+)", chart.image(values, -1, 1))[1])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (3, 2)
    at = data.index(b"IDAT")
    pixels = np.frombuffer(zlib.decompress(data[at + 4 : at + 4 + struct.unpack(">I", data[at - 4 : at])[0]]), np.uint8)
    cells = pixels.reshape(2, 10)[:, 1:].reshape(2, 3, 3)
    want = [["#14488a", "#f4f4f4", "#8a8a8a"], ["#c8600a", "#7d3500", "#7d3500"]]
    assert [["#" + bytes(c).hex() for c in row.tolist()] for row in cells] == want


def test_a_figure_carries_its_title_whatever_it_is():
    name = '"odd" & <b>'
    drawn = Page(figures.traces(TOKENS, np.ones((len(TOKENS), 1)), [name], 5))
    (found,) = drawn.all("svg", "chart")
    assert found["role"] == "img" and name in found["aria-label"] and drawn.all("div", "small")[0]["text"] == name


def test_every_figure_shows_at_least_two_numbers_or_names_on_each_axis(results):
    """Without the script, as with it, an axis without ticks cannot be read; panels as low as those of the text are no exception."""
    for svg in re.findall(r'<svg class="chart".*?</svg>\s*(?=</div>)', page.render(results), flags=re.DOTALL):
        for name in ("xt", "yt"):
            (axis,) = re.findall(rf'<g class="{name}".*?(?=<g class="yt"|<path class="frame")', svg, flags=re.DOTALL)
            shown = [g for g in re.findall(r"<g transform[^>]*>", axis) if "hidden" not in g]
            assert len(shown) >= 2, re.search(r'aria-label="([^"]*)"', svg)[1]


def test_the_same_results_give_the_same_page(text):
    assert page.render(make()) == text
    assert page.render(make(seed=1)) != text


def test_a_run_of_all_emotions_renders():
    names = tuple(f"emotion {i}" for i in range(171))
    parsed = Page(page.render(make(names)))
    (matrix,) = (
        e for e in parsed.all("svg", "chart") if "171" in e["aria-label"] and e["aria-label"].startswith("Cosine")
    )
    assert all(name in matrix["text"] for name in names)


def test_a_failing_render_or_write_leaves_the_old_page(tmp_path, results, monkeypatch):
    path = tmp_path / "report.html"
    page.write(results, path)
    assert path.read_text(encoding="utf-8") == page.render(results)
    path.write_text("old")
    with pytest.raises(ValueError):
        page.write(dataclasses.replace(results, z=results.z[:-1]), path)
    assert path.read_text() == "old"

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(page.files.os, "replace", refuse)
    with pytest.raises(OSError, match=r"report\.html': disk full"):
        page.write(results, str(path))
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("name", ["missing/report.html", "folder"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(demo, "collect", lambda *_: pytest.fail("the work was begun"))
    with pytest.raises(OSError, match="cannot write to") as caught:
        demo.run(tmp_path / name)
    assert repr(str(tmp_path / name)) in str(caught.value) and ".part" not in str(caught.value)
