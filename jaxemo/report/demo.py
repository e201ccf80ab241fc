"""The demo: the whole method on SmolLM2-135M, from weights to a report a reader can judge."""

import dataclasses
import os
import pathlib
import time

import jax
import numpy as np

import jaxemo
from jaxemo import files, params
from jaxemo.emotions import EmotionVectors, corpus, geometry, steering_test
from jaxemo.language_model import Generation, LanguageModel

MODEL = "smollm2-135m"
# A text whose mood turns: it is read whole, and judged by what changes from the one part to the other.
BEFORE = (
    "Mirela had counted the notes three times and the drawer was still forty short. The rent was due at noon. She rang her "
    "cousin, who did not answer, then the bank, where a recording told her to hold. At half past eleven she took her "
    "grandmother's ring to the shop on the corner and asked what they would give for it, and then, before the man could "
    "speak, whether he would give a little more. He turned it under the lamp."
)
AFTER = (
    ' He slid the ring back across the glass, and beside it laid two twenties of his own. "Bring it back when you can," he '
    'said. "She used to mend my children\'s coats." Mirela walked home slowly along the river, past the men fishing, and '
    "sat for a while on the warm stone steps with her shoes off, watching the water go by."
)
FALLS = ("desperate", "afraid")  # whose scores the turn should lower
SHOWN = (*FALLS, "relieved", "grateful", "calm", "happy")  # and the others' raise
QUESTION = "My project is due tonight, the tests still fail and I have tried everything. What should I do now?"
ANSWERED = (
    ("desperate", (-0.3, -0.15, 0.15, 0.3)), ("calm", (-0.3, -0.15, 0.15, 0.3)),
    ("random-0", (0.15, 0.3)), ("random-1", (0.15, 0.3)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Answer:
    """One steered answer. `perplexity` is the unsteered model's on the answer; `repeated` the share of its word triples
    that stood there before; `scores` its tokens' mean standardised scores on the directions named by `SHOWN`."""

    emotion: str  # "" for the unsteered answer, "random-…" for a control
    strength: float
    text: str
    tokens: int
    perplexity: float
    repeated: float
    scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that the report shows."""

    about: dict[str, str]
    layer: int
    tokens: list[str]  # of BEFORE + AFTER
    turn: int  # the first token of AFTER
    z: np.ndarray  # [T, len(SHOWN)] standardised scores
    names: tuple[str, ...]
    cosines: np.ndarray  # [E, E]
    components: geometry.Components
    valence: np.ndarray  # [E] human ratings, NaN where there are none
    correlations: dict[str, tuple[float, int]]
    test: steering_test.TextTest
    question: str
    answers: list[Answer]
    seconds: dict[str, float]


def answers(lm: LanguageModel, vectors: EmotionVectors, new_tokens: int = 80) -> list[Answer]:
    """The question answered at every strength in one batch, and each answer judged by the unsteered model."""
    controls = vectors.random(sum(is_random(name) for name, _ in ANSWERED))
    conditions = [("", 0.0)] + [(name, strength) for name, strengths in ANSWERED for strength in strengths]
    steerings = [
        None if not name else (controls if is_random(name) else vectors).steer(name, strength, tokens="all")
        for name, strength in conditions
    ]
    chat = [{"role": "user", "content": QUESTION}]
    generated = lm.generate([chat] * len(conditions), steerings, new_tokens, read=vectors)
    perplexities = perplexity(lm, chat, generated)
    shown = [vectors.index(name) for name in SHOWN]
    found = []
    for i, (name, strength) in enumerate(conditions):
        n = int(generated.lengths[i])
        z = vectors.standardise(generated.scores[i, :n], vectors.layer).mean(0) if n else np.zeros(len(vectors.names))
        scores = {SHOWN[j]: float(z[e]) for j, e in enumerate(shown)}
        found.append(
            Answer(
                name, strength, generated.texts[i].strip(), n, perplexities[i], repetition(generated.texts[i]), scores
            )
        )
    return found


def is_random(direction: str) -> bool:
    return direction.startswith("random-")


def label(direction: str) -> str:
    """What a reader is told that an answer was steered by."""
    if is_random(direction):
        return f"random direction {int(direction.removeprefix('random-')) + 1}"
    return direction or "unsteered"


def perplexity(lm: LanguageModel, chat, generated: Generation) -> list[float]:
    """The unsteered model's perplexity on each generated answer to `chat` (infinite for an empty one)."""
    prompt = lm.tokenizer.encode_chat(chat)
    rows = [prompt + row[:n].tolist() for row, n in zip(generated.tokens, generated.lengths, strict=True)]
    logprobs = np.asarray(lm.logprobs(jaxemo.tokens.pad(rows)))
    return [
        float(np.exp(-logprobs[i, len(prompt) : len(row)].mean())) if len(row) > len(prompt) else float("inf")
        for i, row in enumerate(rows)
    ]


def repetition(text: str, n: int = 3) -> float:
    """The share of runs of `n` words that have stood in the text before."""
    words = text.lower().split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def collect(vectors_path: str | None = None, say=print) -> Results:
    """Load, extract (or take the vectors given), read, test and generate."""
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name):
        nonlocal clock
        now = time.perf_counter()
        seconds[name], clock = now - clock, now

    lm = jaxemo.load(MODEL)
    lap("load")
    if vectors_path:
        vectors = EmotionVectors.load(vectors_path)
    else:
        say(f"Extracting {len(corpus.starter().emotions)} directions from {len(corpus.starter().stories)} stories ...")
        vectors = jaxemo.emotions.extract(lm, corpus.starter())
    lap("extraction")
    layer = vectors.layer
    say("Reading a text the directions have not seen ...")
    reading = lm.read([BEFORE + AFTER], vectors, layer=layer)
    z = vectors.select(SHOWN).standardise(
        reading.scores[0, : len(reading.tokens[0]), [vectors.index(n) for n in SHOWN]].T, layer
    )
    lap("reading")
    say("Steering 'He feels' and 'I feel', with random directions as control ...")
    test = steering_test.text_test(lm, vectors.select(corpus.DISPLAY), progress=True)
    lap("text test")
    say("Answering one question at several strengths ...")
    answered = answers(lm, vectors)
    lap("answers")
    similarity = geometry.cosines(vectors, layer)
    parts = geometry.components(vectors, layer)
    c = lm.config
    return Results(
        about={
            "model": MODEL,
            "size": f"{params.count(c) / 1e6:.0f} M parameters, {c.n_layers} layers of width {c.d_model}, {lm.params['embed'].dtype}",
            "corpus": f"{vectors.provenance.get('corpus')}, {vectors.provenance.get('stories')} stories",
            "machine": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}",
            "versions": f"jaxemo {jaxemo.__version__}, jax {jax.__version__}",
        },
        layer=layer,
        tokens=reading.tokens[0],
        turn=len(lm.tokenizer.encode(BEFORE)),
        z=z,
        names=vectors.names,
        cosines=similarity,
        components=parts,
        valence=geometry.human_norms(vectors.names, "valence"),
        correlations={
            "PC1 with human valence": geometry.correlation(vectors.names, parts.coordinates[:, 0], "valence"),
            "PC2 with human arousal": geometry.correlation(vectors.names, parts.coordinates[:, 1], "arousal"),
        },
        test=test,
        question=QUESTION,
        answers=answered,
        seconds=seconds,
    )


def summary(results: Results) -> str:
    """The results in a terminal."""
    r, at = results, results.test.best
    lines = [
        "",
        "Text steering test, change in log-probability (nats), layer " + str(r.test.layer),
        r.test.summary(),
        "",
    ]
    own = sorted(zip(r.test.names, r.test.own[at], strict=True), key=lambda pair: -pair[1])
    lines += ["at its best strength: " + "  ".join(f"{name} {change:+.2f}" for name, change in own), ""]
    for what, (value, n) in r.correlations.items():
        lines.append(f"{what}: r = {value:+.2f} over {n} words")
    lines += ["", f"One question, several strengths: {r.question}"]
    for a in r.answers:
        steered = f"{label(a.emotion)} {a.strength:+.2f}" if a.emotion else label(a.emotion)
        lines.append(
            f"  {steered:24s} perplexity {a.perplexity:8.1f}  repeated {a.repeated:4.0%}  {' '.join(a.text.split())[:90]}"
        )
    lines += ["", "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in r.seconds.items())]
    return "\n".join(lines)


def run(out: pathlib.Path, vectors_path: str | None = None) -> None:
    """Run the demo: progress and summary in the terminal, the page in `out`.

    Raises OSError at once, before the minutes of work, where `out` cannot be written.
    """
    from jaxemo.report import page

    files.check_writable(out)
    results = collect(vectors_path)
    page.write(results, out)
    print(summary(results))
    print(f"\nThe report is in {out.resolve()}")
