"""The command line: the library's verbs. Reads arguments, calls the library, prints; no logic of its own."""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

COMPILE_CACHE = "compiled"  # under the cache directory
MODEL = (
    "registered name (by default smollm2-135m), .gguf file, directory, or ORG/NAME[:FILE.gguf] on the Hugging Face hub"
)

READ = {
    "z": "standard deviations (of single neutral tokens) from neutral text",
    "projection": "projection on the direction",
    "cosine": "cosine with the direction",
    "centred": "cosine with the direction, centred on these texts",
}
CORPUS = (
    "stories: your own, JSONL with emotion and text, or 'shipped' (171 emotions, the default) or 'starter' (24 of them)"
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; a mistake of the user's is one line on stderr and exit status 2."""
    args = _parser().parse_args(argv)
    try:
        cache_compilations(not getattr(args, "no_compile_cache", False))
        return args.run(args) or 0
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("JAXEMO_DEBUG"):
            raise
        print(f"jaxemo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\njaxemo: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxemo", description="Read and steer emotion directions in language models.")
    parser.add_argument(
        "--no-compile-cache", action="store_true", help="compile afresh instead of keeping compiled programs"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    def model(sub):
        sub.add_argument("model", nargs="?", default="smollm2-135m", help=MODEL)
        sub.add_argument("--revision", help="branch, tag or commit of a repository")
        sub.add_argument("--dtype", help="float32 or bfloat16 (by default float32 on CPU, bfloat16 elsewhere)")

    def steering(sub):
        sub.add_argument("--vectors", help="file made by `jaxemo extract`")
        sub.add_argument("--steer", action="append", default=[], metavar="EMOTION=STRENGTH",
                         help="add a direction, as a fraction of the residual norm; may be given several times")  # fmt: skip
        sub.add_argument(
            "--ablate", action="append", default=[], metavar="EMOTION", help="project a direction out of all layers"
        )
        sub.add_argument(
            "--layers", type=_numbers, help="layers to steer, for example 24 or 20-24 (default: one, mid-late)"
        )
        sub.add_argument(
            "--tokens", choices=["all", "prompt", "generated", "last"], help="tokens to steer (default: all)"
        )

    sub = command("pull", _pull, "fetch a model")
    sub.add_argument("model", nargs="?", default="smollm2-135m", help=MODEL)
    sub.add_argument("--revision", help="branch, tag or commit of a repository")
    sub.add_argument("--accept-terms", action="store_true", help="accept the terms that a registered model comes under")

    sub = command("info", _info, "what a model is, and with --time how fast it is ready here")
    model(sub)
    sub.add_argument(
        "--time", action="store_true", help="time loading and the first token, with a cold and a warm compile cache"
    )

    sub.add_argument(
        "--quantise", action="store_true", help="measure what holding its weights in 8 or 4 bits does to logits"
    )

    sub = command("convert", _convert, "write a model in jaxemo's own layout, which loads in one pass by memory map")
    sub.add_argument("model", help=MODEL)
    sub.add_argument("--revision", help="branch, tag or commit of a repository")
    sub.add_argument("out", help="directory to write; it must not exist")
    sub.add_argument("--dtype", default="float32", help="float32 (nothing is lost) or bfloat16 (half the size)")

    sub = command("generate", _generate, "answer a prompt, or chat when none is given")
    model(sub)
    steering(sub)
    sub.add_argument("-p", "--prompt", help="one prompt; '-' reads it from standard input")
    sub.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    sub.add_argument("--system", help="system message")
    sub.add_argument("-n", "--max-new-tokens", type=_positive, default=256)
    for name, kind, default in (
        ("temperature", float, 0.0),
        ("top-k", int, 0),
        ("top-p", float, 1.0),
        ("min-p", float, 0.0),
    ):
        sub.add_argument(f"--{name}", type=kind, default=default)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--read", action="store_true", help="afterwards, print the emotions that stood out (needs --vectors)"
    )

    sub = command("sweep", _sweep, "generate from every prompt under every condition, beside controls, and score it")
    sub.add_argument("-m", "--model", default="smollm2-135m", help=MODEL)
    sub.add_argument("--revision", help="branch, tag or commit of a repository")
    sub.add_argument("--dtype", help="float32 or bfloat16 (by default float32 on CPU, bfloat16 elsewhere)")
    sub.add_argument("prompts", nargs="*", help="prompts, asked in the model's chat template")
    sub.add_argument("--input", metavar="FILE", help='.txt, a prompt a line, or .jsonl with "text" or "messages"')
    sub.add_argument("--raw", action="store_true", help="continue the texts as they are, without the chat template")
    sub.add_argument("--vectors", required=True, help="file made by `jaxemo extract`")
    sub.add_argument("--emotions", required=True, type=_words, help="comma-separated, or all")
    sub.add_argument(
        "--strengths", type=_floats, default=[0.1], help="comma-separated fractions of the residual norm (0.1)"
    )
    sub.add_argument("--layers", type=_numbers, action="append", metavar="LAYERS",
                     help="layers to steer at once, for example 24 or 20-24; several times for several conditions")  # fmt: skip
    sub.add_argument(
        "--tokens", type=_selection, action="append", metavar="TOKENS", help="tokens to steer (all), in the same way"
    )
    sub.add_argument("--operations", type=_words, default=["add"], help="of add, ablate, clamp and dampen (add)")
    sub.add_argument("--random", type=int, default=3, help="random directions in the emotions' place, as controls (3)")
    sub.add_argument("--samples", type=_positive, default=1, help="texts for each prompt and condition (1)")
    sub.add_argument("-n", "--max-new-tokens", type=int, default=64, help="at most; 0 reads the prompts only (64)")
    sub.add_argument("--temperature", type=float, default=0.0)
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--read", type=_selection, metavar="TOKENS",
                     help="score the texts on all of the vectors, over these tokens: generated, or some of the prompt's")  # fmt: skip
    sub.add_argument("--read-layer", type=int, help="after which layer (by default the vectors' own)")
    sub.add_argument("--kind", choices=READ, default="z", help="the score (z)")
    sub.add_argument(
        "--words", type=_words, default=[], help="comma-separated: the log-probability of each right after the prompt"
    )
    sub.add_argument("--rows", type=_positive, default=64, help="texts written at a time: the memory to spend (64)")
    sub.add_argument(
        "-o", "--out", default="sweep.jsonl", help="file to write, .jsonl or .parquet, or to go on with (sweep.jsonl)"
    )

    sub = command("extract", _extract, "find the emotion directions of a model")
    model(sub)
    sub.add_argument("-o", "--out", default="vectors.safetensors", help="file to write (vectors.safetensors)")
    sub.add_argument("--corpus", default="shipped", help=CORPUS)
    sub.add_argument(
        "--denoise", type=float, default=0.5, help="share of the neutral texts' variance to project out (0.5)"
    )
    sub.add_argument("--layers", type=_numbers, help="layers to extract at, for example 24 or 20-24 (all)")

    sub = command("corpus", _corpus, "check a corpus: leakage, length, repetition, balance")
    sub.add_argument("corpus", nargs="?", default="shipped", help=CORPUS + "; or 'heldout'")
    sub.add_argument("-m", "--model", default="smollm2-135m", help="whose tokens count: " + MODEL)
    sub.add_argument("--revision", help="branch, tag or commit of a repository")

    sub = command("stories", _stories, "have a model write its own stories, to extract from")
    model(sub)
    sub.add_argument("-o", "--out", default="stories.jsonl", help="file to write, or to go on with (stories.jsonl)")
    sub.add_argument("-n", "--per-topic", type=_positive, default=1, help="stories for each emotion on each topic (1)")
    sub.add_argument("--topics", type=_positive, default=12, help="how many of the 100 topics (12)")
    sub.add_argument("--emotions", help="comma-separated (all 171)")
    sub.add_argument("--rows", type=_positive, default=64, help="stories written at a time: the memory to spend (64)")
    sub.add_argument("--temperature", type=float, default=0.9)
    sub.add_argument("--top-p", type=float, default=0.95)
    sub.add_argument("--seed", type=int, default=0)

    sub = command("read", _read, "score texts on emotion directions")
    sub.add_argument("-m", "--model", default="smollm2-135m", help=MODEL)
    sub.add_argument("--revision", help="branch, tag or commit of a repository")
    sub.add_argument("--dtype", help="float32 or bfloat16 (by default float32 on CPU, bfloat16 elsewhere)")
    sub.add_argument("--vectors", required=True, help="file made by `jaxemo extract`")
    sub.add_argument("--layer", type=int)
    sub.add_argument("--top", type=_positive, default=5, help="emotions to print for each text, or passages to keep for each "
                     "emotion (5)")  # fmt: skip
    sub.add_argument("--kind", choices=READ, default="z", help="the score: standard deviations from neutral text (z), the "
                     "projection, its cosine, or the cosine centred on all the texts (of a dataset, the first 1,024)")  # fmt: skip
    sub.add_argument(
        "--tokens",
        type=_selection,
        default="all",
        help="tokens to average over: all, last, 5, 5:20 or -8:, or in chats user, before_answer, ... (all)",
    )
    sub.add_argument(
        "--input", metavar="FILE", help="a dataset: .txt, one text a line, or .jsonl with text or messages"
    )
    sub.add_argument(
        "-o", "--out", help="with --input: the .parquet or .safetensors file to write; resumes if interrupted"
    )
    sub.add_argument("text", nargs="*", help="texts; '-' reads one text a line from standard input")

    def tested(sub):
        model(sub)
        sub.add_argument("--corpus", help=CORPUS + "; with --vectors, what they were made from")
        sub.add_argument(
            "--stories", metavar="FILE", help="stories that the model wrote (see `jaxemo stories`), to test on as well"
        )

    sub = command("report", _report, "test the emotion directions of a model, and write it all on one page")
    tested(sub)
    sub.add_argument(
        "--vectors", help="file made by `jaxemo extract` (by default they are extracted, and kept beside the report)"
    )
    sub.add_argument("-o", "--out", default="report.html", help="page to write (report.html)")

    sub = command("validate", _validate, "make one test of emotion directions, or all, and print what it finds")
    sub.add_argument("test", help="self-cosine, stories, implicit, numbers, lens, steering, cosines, clusters, affect, similarity, "
                     "speakers, or all")  # fmt: skip
    tested(sub)
    sub.add_argument("--vectors", required=True, help="file made by `jaxemo extract`")
    sub.add_argument("-o", "--out", help="page to write its figures on")

    sub = command("study", _study, "ask what a model does when a direction is turned up and down, beside controls")
    sub.add_argument("study", help="one or several, separated by commas, of forced-choice, dilemma, sycophancy, harshness, preference, "
                     "prediction, text, post-training, impossible-code, or all (but the last, by far the longest)")  # fmt: skip
    model(sub)
    sub.add_argument("--vectors", required=True, help="file made by `jaxemo extract`")
    sub.add_argument("--layers", type=_numbers, help="layers to steer, for example 15-25 (a band past the middle)")
    sub.add_argument("--strength", type=float, help="fraction of the residual norm (by default the largest that costs a neutral "
                     "text at most 0.1 nats a token)")  # fmt: skip
    sub.add_argument("--base", help="for post-training: the model that MODEL was made from")
    sub.add_argument("--base-vectors", help="for post-training: the base's own directions, extracted in the same way")
    sub.add_argument("--samples", type=_positive, help="for impossible-code: rollouts of each task under each arm (10)")
    sub.add_argument("-o", "--out", default="studies", help="directory to write, or to go on with (studies)")

    sub = command("demo", _demo, "extract directions from SmolLM2-135M, test them, and write a report")
    sub.add_argument("-o", "--out", default="report.html")
    sub.add_argument("--vectors", help="use these instead of extracting")
    return parser


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        these = range(int(found[1]), int(found[2] or found[1]) + 1) if found else ()
        if not these:
            raise argparse.ArgumentTypeError(f"{text!r}: expected layers, for example 24, 20-24 or 3,9,20")
        numbers += these
    return numbers


def _words(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers, for example 0.1,-0.1") from None


def _selection(text: str):
    """A token selection: a position, a slice, or a name."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if found := re.fullmatch(r"(-?\d*):(-?\d*)", text):
        return slice(*(int(bound) if bound else None for bound in found.groups()))
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def cache_compilations(wanted: bool = True) -> None:
    """Keep compiled programs between runs: on for the command line, the caller's choice for the library."""
    import jax

    from jaxemo.checkpoints import cache_dir

    if wanted:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / COMPILE_CACHE))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _load(args):
    import jaxemo

    return jaxemo.load(args.model, dtype=args.dtype, revision=args.revision)


def _pull(args):
    from jaxemo import checkpoints

    print(checkpoints.pull(args.model, revision=args.revision, accept_terms=args.accept_terms))


def _info(args):
    import jax

    from jaxemo import params

    if args.time:
        return _time(args)
    lm = _load(args)
    c = lm.config
    print(lm)
    print(f"family {c.family}; {c.n_layers} layers, d_model {c.d_model}, {c.n_heads} heads ({c.n_kv_heads} key/value) of "
          f"{c.head_dim}, feed-forward {c.d_ff}, vocabulary {c.vocab_size}, up to {c.max_positions} positions")  # fmt: skip
    size = params.count(c) * lm.params["embed"].dtype.itemsize
    print(
        f"{params.count(c):,} weights, {size / 1e6:.0f} MB as {lm.params['embed'].dtype} on {jax.devices()[0].device_kind}"
    )
    try:
        template = "with" if lm.tokenizer.chat_template else "without"
        print(f"tokenizer of {lm.tokenizer.backend.get_vocab_size()} tokens, {template} chat template")
    except ValueError as error:
        print(error)

    if args.quantise:
        _quantised(args, lm)


SAMPLE = (
    "The ferry left at ten past six, with eleven passengers and a crate of lemons. By noon the wind had turned, and the "
    "captain, who had made the crossing four hundred times, asked for the radio to be switched off.",
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('sizes are not negative')\n"
    "    return width * height\n",
    "Q: Which is heavier, a litre of water or a litre of oil?\nA: A litre of water, since oil floats on it.",
)


def _quantised(args, lm):
    import jax
    import numpy as np

    import jaxemo
    from jaxemo.language_model import compare
    from jaxemo.quantise import BITS

    try:
        batch = lm.tokenize(list(SAMPLE))
        what = f"{int(np.sum(batch.lengths))} tokens of {len(SAMPLE)} short texts"
    except ValueError:  # no tokenizer
        batch = np.random.default_rng(0).integers(0, lm.config.vocab_size, (2, 64))
        what = "128 random tokens"
    print(f"next-token predictions against {lm.params['embed'].dtype} weights, on {what}:")
    for kind in BITS:
        other = jaxemo.load(args.model, dtype=args.dtype, quantise=kind, revision=args.revision)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(other.params))
        d = compare(lm, other, batch)
        print(f"{kind}: {size / 1e6:.0f} MB, max |Δlogit| {d['max_logit']:.2f}, mean {d['mean_logit']:.3f}, "
              f"KL {d['kl']:.4f} nats, same top token {d['top1']:.1%}")  # fmt: skip


def _convert(args):
    from tqdm import tqdm

    from jaxemo import params
    from jaxemo.checkpoints import convert, loading, resolve, store

    dtype = convert.as_dtype(args.dtype)
    source, tokenizer = loading.open_model(resolve(args.model, revision=args.revision))
    size = params.count(source.config) * dtype.itemsize
    with tqdm(total=size, unit="B", unit_scale=True, desc="weights", mininterval=0.5) as bar:
        store.write(source, tokenizer, pathlib.Path(args.out), dtype, bar.update)
    print(f"{source.config.family}, {size / 1e6:.0f} MB as {dtype}, written to {args.out}; load it by that name")


_TIMED = """
import json, sys, time
import jaxemo, jaxemo.cli
name, dtype, revision, cache = json.loads(sys.argv[1])
if cache:
    import jax
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
begin = time.perf_counter()
lm = jaxemo.load(name, dtype=dtype, revision=revision)
loaded = time.perf_counter()
first = []
question = "What is the capital of France?"
chat = [{"role": "user", "content": question}]
lm.generate([chat if lm.tokenizer.chat_template else question], max_new_tokens=64, stop=[],
            stream=lambda pieces: first.append(time.perf_counter()))
print(json.dumps([loaded - begin, first[0] - begin, (len(first) - 1) / (first[-1] - first[0])]))
"""


def _time(args):
    """Each figure from a fresh process: once with an empty compile cache, then again with what that run left there."""
    import tempfile

    import jax

    from jaxemo import checkpoints

    checkpoints.resolve(args.model, revision=args.revision)
    print(f"{args.model} on {os.cpu_count()} cores, {jax.devices()[0].device_kind}, jax {jax.__version__}; seconds from the "
          "start of load, in a fresh process, imports left out")  # fmt: skip
    with tempfile.TemporaryDirectory() as cache:
        for label in ("cold", "warm"):
            given = json.dumps([args.model, args.dtype, args.revision, cache])
            done = subprocess.run([sys.executable, "-c", _TIMED, given], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the timed process failed:\n{done.stderr[-2000:]}")
            loaded, first, rate = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{label} compile cache: loaded and ready {loaded:.1f} s, first token {first:.1f} s, then {rate:.0f} tokens/s"
            )


def _vectors(args, needed_for: str):
    from jaxemo.emotions import EmotionVectors

    if not args.vectors:
        raise ValueError(f"{needed_for} needs --vectors FILE; `jaxemo extract` makes one")
    return EmotionVectors.load(args.vectors)


def _steering(args):
    from jaxemo.steering import Steering

    if not (args.steer or args.ablate):
        for option in ("layers", "tokens") + (() if args.read else ("vectors",)):
            if getattr(args, option):
                use = " or --read" if option == "vectors" else ""
                raise ValueError(f"--{option} does nothing here: give --steer or --ablate{use}, too")
        return None
    vectors = _vectors(args, "steering")
    total = Steering()
    for item in args.steer:
        name, _equals, strength = item.partition("=")
        try:
            amount = float(strength)
        except ValueError:
            raise ValueError(f"--steer {item!r}: expected EMOTION=STRENGTH, for example desperate=0.25") from None
        total += vectors.steer(name, amount, args.layers, args.tokens or "all")
    for name in args.ablate:
        total += vectors.ablate(name, args.layers or "all", args.tokens or "all")
    return total


def _generate(args):
    steering = _steering(args)
    read = _vectors(args, "--read") if args.read else None
    lm = _load(args)
    history = [{"role": "system", "content": args.system}] if args.system else []

    def answer(prompt):
        result = lm.generate(
            [prompt], steering, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p, args.seed,
            read=read, stream=lambda pieces: print(pieces[0], end="", flush=True),
        )  # fmt: skip
        print()
        if read is not None and result.lengths[0]:
            scores = read.standardise(result.scores[0, : result.lengths[0]], read.layer).mean(0)
            print("  " + _ranking(read.names, scores, 5))
        return result.texts[0]

    if args.prompt is not None:
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
        answer(text if args.raw else [*history, {"role": "user", "content": text}])
        return
    print(f"{lm!r}\nAn empty line or Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        history.append({"role": "user", "content": text})
        history.append({"role": "assistant", "content": answer(list(history))})


def _extract(args):
    from jaxemo import files
    from jaxemo.emotions import corpus, extract

    files.check_writable(args.out)
    begin = time.perf_counter()
    chosen = corpus.named(args.corpus)
    if not chosen.neutral:
        name = f"{chosen.name}, with jaxemo's neutral texts"
        chosen = dataclasses.replace(chosen, name=name, neutral=corpus.shipped().neutral)
    checkpoint = pathlib.Path(f"{args.out}.part")  # killed at any moment, the same command goes on from where it was
    vectors = extract(_load(args), chosen, layers=args.layers or "all", denoise=args.denoise, checkpoint=checkpoint)
    vectors.save(args.out)
    checkpoint.unlink(missing_ok=True)
    print(f"{len(vectors.names)} directions at {len(vectors.layers)} layers from {len(chosen.stories)} stories "
          f"({chosen.name}) in {time.perf_counter() - begin:.0f} s, written to {args.out}")  # fmt: skip
    cosine = sorted((c, name) for c, name in zip(vectors.measured["half_cosine"], vectors.names, strict=True) if c == c)
    if cosine:
        print(f"directions from two halves of the topics, layer {vectors.layer}: cosine {sum(c for c, _ in cosine) / len(cosine):.2f} on "
              f"average, from {cosine[0][0]:.2f} ({cosine[0][1]}) to {cosine[-1][0]:.2f} ({cosine[-1][1]})")  # fmt: skip


def _sweep(args):
    import jaxemo
    from jaxemo import files
    from jaxemo.emotions import conditions
    from jaxemo.emotions.dataset import texts_of

    if bool(args.prompts) == bool(args.input):
        raise ValueError("give prompts, or --input FILE")
    files.check_writable(args.out)
    vectors = _vectors(args, "steering")
    emotions = vectors.names if args.emotions == ["all"] else args.emotions
    made = conditions(vectors, emotions, args.strengths, args.layers or (None,), args.tokens or ("all",), args.operations,
                      args.random, args.seed)  # fmt: skip
    lm = _load(args)
    prompts = texts_of(args.input) if args.input else args.prompts
    if not args.raw and lm.tokenizer.chat_template:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    reading = (
        {} if args.read is None else {"read": vectors, "layer": args.read_layer, "kind": args.kind, "tokens": args.read}
    )
    grid = jaxemo.sweep(
        lm, prompts, made, samples=args.samples, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
        top_p=args.top_p, seed=args.seed, words=args.words, rows=args.rows, out=args.out, **reading,
    )  # fmt: skip
    print(grid)
    print(f"\nEvery text is in {pathlib.Path(args.out).resolve()}")


def _study(args):
    import jaxemo
    from jaxemo.report import studies as report
    from jaxemo.studies import battery, impossible_code

    begin = time.monotonic()
    names = None if args.study == "all" else args.study.split(",")
    if args.samples and "impossible-code" not in (names or ()):
        raise ValueError("--samples does nothing here: it is of the study impossible-code")
    vectors, lm = _vectors(args, "steering"), _load(args)
    base = args.base and jaxemo.load(args.base, dtype=args.dtype)
    base_vectors = args.base_vectors and jaxemo.EmotionVectors.load(args.base_vectors)
    place = pathlib.Path(args.out)
    for result in battery.run(
        lm,
        vectors,
        place,
        names,
        args.layers,
        args.strength,
        base or None,
        base_vectors or None,
        args.samples or impossible_code.SAMPLES,
    ):
        print(f"\n{result}")
    page = report.write(place, place / "report.html").resolve()
    minutes = (time.monotonic() - begin) / 60
    print(
        f"\n{(place / 'summary.txt').read_text()}\nAll of it, in {minutes:.0f} minutes, is in {page.parent}; {page} shows it"
    )


def _corpus(args):
    from jaxemo.emotions import corpus, quality

    found = quality.check(corpus.named(args.corpus).stories, _tokenizer(args).encode)
    print(found)
    return 1 if found.problems else 0


def _tokenizer(args):
    from jaxemo.checkpoints import loading, resolve

    _, tokenizer = loading.open_model(resolve(args.model, revision=args.revision))
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer")
    return tokenizer


def _stories(args):
    from jaxemo.emotions import stories

    emotions = args.emotions.split(",") if args.emotions else None
    print(
        stories.write(
            _load(args), args.out, emotions=emotions, topics=args.topics, per_topic=args.per_topic, rows=args.rows,
            temperature=args.temperature, top_p=args.top_p, seed=args.seed,
        )
    )  # fmt: skip


def _ranking(names, scores, top: int) -> str:
    order = sorted(range(len(names)), key=lambda e: -scores[e])[:top]
    return "  ".join(f"{names[e]} {scores[e]:+.1f}" for e in order)


def _read(args):
    vectors = _vectors(args, "reading")
    layer = vectors.layer if args.layer is None else args.layer
    if bool(args.input) == bool(args.text) or bool(args.input) != bool(args.out):
        raise ValueError("give texts to read, or --input FILE and --out FILE for a dataset")
    if args.input:
        from jaxemo.emotions.dataset import read_dataset

        print(
            read_dataset(
                _load(args),
                args.input,
                vectors,
                args.out,
                layer=layer,
                kind=args.kind,
                tokens=args.tokens,
                top=args.top,
            )
        )
        return
    texts = [line.rstrip("\n") for line in sys.stdin if line.strip()] if args.text == ["-"] else args.text
    reading = _load(args).read(texts, vectors, layer=layer, tokens=args.tokens, kind=args.kind)
    print(f"{READ[args.kind]}, mean over tokens, after layer {layer}")
    for text, scores in zip(texts, reading.pooled, strict=True):
        print(f"{_ranking(vectors.names, scores, args.top)}   | {text[:60]}")


def _report(args):
    from jaxemo import files
    from jaxemo.report import model

    files.check_writable(args.out)  # before the model is loaded
    print(model.summary(model.run(_load(args), args.out, args.vectors, args.corpus, args.stories)))
    print(f"\nThe report is in {pathlib.Path(args.out).resolve()}")


def _validate(args):
    from jaxemo import files
    from jaxemo.emotions import validation
    from jaxemo.report import model

    if args.out:
        files.check_writable(args.out)
    names = tuple(validation.TESTS) if args.test == "all" else (args.test,)
    validation.check(names)
    print(model.summary(model.run(_load(args), args.out, args.vectors, args.corpus, args.stories, names)))


def _demo(args):
    from jaxemo.report import demo

    demo.run(pathlib.Path(args.out), args.vectors)


if __name__ == "__main__":
    sys.exit(main())
