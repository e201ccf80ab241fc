"""The same work done by jaxemo and by PyTorch's libraries for the same purpose: `python bench/compare.py [--device gpu]`.

Each library is set up twice, as its own users would ("user") and once as well as a skilled one could ("skilled"): what that means
stands at the top of its file in bench/peers/. The rules, enforced here and stored with the results:

- One process for each contender, kept alive, with the weights of the same directory in the same precision, matrix products
  included; the same token ids, directions and vectors; greedy decoding without early stop; the same number of threads, pinned.
- The first run of a work is its warm-up; "compile" is how much longer it took than the median of the timed ones. No compile cache
  is kept between runs of this program. Timed runs go round robin over the contenders, in an order that turns each round: 10 where
  they fit in the patience stated, else as many as do and at least one; "n" says how many. Where only a share of a work was timed,
  and multiplied, "share" says so.
- Timed is the call alone, up to when its results are there; inputs are made ready before. Loading is a work of its own.
- Nothing counts that is not right: the first run's outputs are held against the reference contender's. Logits and scores may differ
  by the bound, relative to the largest logit of the row or score of the token, and the likeliest token must be the same unless two
  are so near; generated tokens must be the same up to a near tie, where the reference's logits of both choices, after the tokens
  agreed on, differ by no more than twice the bound. Later runs must repeat the tokens, and the rest within the bound.
  Who fails is reported as WRONG with the difference, and not timed.
- Peak memory is the process's resident peak during the runs, with programs compiled for earlier works, but without what those left in
  the allocator; on GPUs the allocator's, for JAX since the process began.

Results go to bench/results/compare-DEVICE.json, a line to bench/LOG.md. What was interrupted goes on where it was: finished works with
the same code and settings lie in build/bench/parts. `--readme` writes the README's table from the results. It takes a quiet machine.
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import re
import sys
import time

import numpy as np
from peers import process
from peers.process import BUILD, PEERS, ROOT, Peer, failure, write
from peers.works import LENGTHS, LIBRARIES, MODELS, REFERENCE, Work, works
from tqdm import tqdm

RESULTS = ROOT / "bench" / "results"
RULES = [" ".join(rule.split()) for rule in re.findall(r"^- (.*?)\n(?=- |\n)", __doc__, re.M | re.S)]
BOUND = {"float32": 1e-4, "bfloat16": 5e-2}
RUNS, PATIENCE = 10, {"cpu": 5.0, "gpu": 4.0}  # timed runs at most, and their seconds, for each contender and work


# ---- what is right ---------------------------------------------------------------------------------------------------


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    q1, median, q3 = np.quantile(seconds, (0.25, 0.5, 0.75))
    return float(q1), float(median), float(q3)


def first_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where each row of tokens `[B, n]` first differs; n where it does not."""
    differ = a != b
    return np.where(differ.any(1), differ.argmax(1), a.shape[1])


def gaps(logits: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How far apart two choices are in each row of `logits [B, V]`, relative to its largest."""
    rows = np.arange(len(logits))
    return np.abs(logits[rows, one] - logits[rows, other]) / np.abs(logits).max(-1)


def gate(got: dict, want: dict, bound: float, follow, sweep: tuple[int, ...] = ()) -> tuple[str, dict[str, float]]:
    """What is wrong with outputs, "" if nothing is, and by how much they differ from the `want`ed.

    `sweep` says how many conditions and prompts there should be; those are compared that both have. `follow(places, agreed)` returns the reference's logits
    `[n, V]` after the tokens agreed on in n places: rows, or conditions and prompts.
    """
    if got.keys() != want.keys():
        return f"outputs {sorted(got)} instead of {sorted(want)}", {}
    wrong, found, same = [], {}, None
    if "tokens" in got:
        have, wanted = got["tokens"], want["tokens"]
        expected = (*sweep, wanted.shape[-1]) if sweep else wanted.shape
        if have.shape != expected:
            return f"tokens {have.shape} instead of {expected}", {}
        if sweep:
            both = tuple(slice(min(n)) for n in zip(have.shape, wanted.shape, strict=True))
            have, wanted = have[both], wanted[both]
        places = list(np.ndindex(have.shape[:-1]))
        have, wanted = (tokens.reshape(len(places), -1) for tokens in (have, wanted))
        same = first_differences(have, wanted)
        part = np.flatnonzero(same < have.shape[1])
        found["rows that part"] = len(part)
        if len(part):
            at = part, same[part]
            apart = gaps(follow([places[i] for i in part], [wanted[i, : same[i]] for i in part]), have[at], wanted[at])
            found["gap where they part"] = float(apart.max())
            if not (apart <= 2 * bound).all():
                wrong.append(f"tokens differ where the reference tells them apart by {apart.max():.1e}")
    for name in sorted(got.keys() & {"logits", "scores"}):
        have, wanted = got[name], want[name]
        if have.shape != wanted.shape:
            return f"{name} {have.shape} instead of {wanted.shape}", {}
        delta = np.abs(have.astype(np.float64) - wanted)
        if same is not None:
            delta[np.arange(have.shape[1]) >= same[:, None]] = 0  # other tokens have other scores
        relative = delta.max(-1) / np.abs(wanted).max(-1)
        found |= {name: float(delta.max()), f"{name}, relative": float(relative.max())}
        if not (relative <= bound).all():
            wrong.append(f"{name} differ by {delta.max():.1e}, {relative.max():.1e} of the largest")
    if "logits" in got:
        apart = gaps(want["logits"], got["logits"].argmax(-1), want["logits"].argmax(-1))
        found["rows with another top-1"] = int((apart > 0).sum())
        if not (apart <= 2 * bound).all():
            wrong.append(f"the likeliest token is another one, by {apart.max():.1e}")
    return "; ".join(wrong), found


# ---- what is told ----------------------------------------------------------------------------------------------------


def ratio(contenders: dict[str, dict]) -> float | None:
    """jaxemo's median over that of the best other; None where either is missing."""
    medians = {name: row["median"] for name, row in contenders.items() if "median" in row}
    ours = medians.pop("jaxemo", None)
    return ours / min(medians.values()) if ours and medians else None


def number(seconds: float) -> str:
    """Three digits."""
    return f"{seconds:.{max(0, 2 - math.floor(math.log10(seconds)))}f}" if seconds > 0 else "0"


def cell(row: dict | None, spread: bool) -> str:
    if row is None:
        return "–"
    if "median" not in row:
        return row["status"].partition(":")[0]  # WRONG, failed, not installed
    text = ("~" if "share" in row else "") + number(row["median"])
    return text + f" [{number(row['q1'])}, {number(row['q3'])}]" * spread


def table(entries: list[dict], markdown: bool) -> str:
    """Works × libraries: in Markdown "user / skilled" in one cell; in text a line for each of the two, with quartiles."""
    lines = []
    for entry in entries:
        found, best = entry["contenders"], ratio(entry["contenders"])
        share, ours = "–" if best is None else f"{best:.2f}", cell(found.get("jaxemo"), not markdown)
        user, skilled = ([cell(found.get(f"{library}, {how}"), not markdown) for library in LIBRARIES if library != "jaxemo"]
                         for how in ("user", "skilled"))  # fmt: skip
        if markdown:
            both = ["–" if a == b == "–" else f"{a} / {b}" for a, b in zip(user, skilled, strict=True)]
            lines.append([f"{entry['work']}: {entry['about']}", ours, *both, share])
        else:
            lines += [[f"{entry['work']}, user", ours, *user, share], ["  skilled", "", *skilled, ""]]
    head = ["seconds", *LIBRARIES, "jaxemo / best other"]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] + ["--:"] * (len(head) - 1), *lines))
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *lines)
    )


def readme_block(results=RESULTS) -> str:
    """What the README says between its markers, from the results there are."""
    parts = []
    for device, how in (("cpu", "make bench"), ("gpu", "python bench/compare.py --device gpu")):
        path = results / f"compare-{device}.json"
        if not path.exists():
            parts.append(f"Not measured yet on a {device.upper()}: `{how}` does.")
            continue
        about = json.loads(path.read_text(encoding="utf-8"))
        versions = sorted(
            {f"{name} {version}" for library in about["versions"].values() for name, version in library.items()}
        )
        for model in dict.fromkeys(entry["model"] for entry in about["entries"]):
            parts.append(f"`{how}`, {about['date']}, commit {about['commit']}, {about['machine']}: {model} in {about['dtype']}. Medians in "
                         "seconds. Of two numbers the first is the library as its own users set it up, the second as well as a skilled "
                         "one could; ~ is a share of the work, multiplied; every output was held against the others' "
                         f"([quartiles, memory, compile times, differences, rules](bench/results/{path.name}); {', '.join(versions)}).")  # fmt: skip
            parts.append(table([entry for entry in about["entries"] if entry["model"] == model], True))
    return "\n\n".join(parts)


def with_block(text: str, block: str) -> str:
    """README's text with `block` between its markers."""
    begin, end = "<!-- bench -->\n", "\n<!-- /bench -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"the README needs one {begin.strip()} and one {end.strip()}")
    return text[: text.index(begin) + len(begin)] + block + text[text.index(end) :]


# ---- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """The contenders' processes for one model."""

    def __init__(self, model: str, args):
        self.args, self.peers, self.versions = args, {}, {}
        self.folder = BUILD / re.sub(r"[^\w.]+", "-", model).strip("-")
        self.dtype, self.device = ("float32", "cpu") if args.device == "cpu" else ("bfloat16", "cuda")
        spec = {"dtype": self.dtype, "device": self.device, "lengths": LENGTHS[args.device]}
        if config := MODELS[args.device][model]:
            spec["config"] = config
        else:
            from jaxemo import checkpoints

            stories = ROOT / "jaxemo" / "emotions" / "data" / "stories.jsonl"
            spec |= {"gguf": str(checkpoints.pull("smollm2-135m")), "stories": str(stories)}
        self.layer, self.path = process.make_model(self.folder, spec, args.device)["layer"], process.search_path()

    def peer(self, name: str, needed: list[str]) -> Peer:
        """The contender's process, begun if it is not there; where memory is short, at the cost of those not needed."""
        if name not in self.peers:
            if process.available() < 5 << 30:
                self.close([other for other in self.peers if other not in needed])
            library, _, how = name.partition(", ")
            script, env = LIBRARIES[library]
            spec = {"script": script, "how": how or "skilled", "device": self.device, "dtype": self.dtype, "threads": self.args.threads,
                    "model": str(self.folder), "inputs": str(self.folder / "inputs.npz"), "layer": self.layer}  # fmt: skip
            path = self.path if library == "jaxemo" else {}
            self.peers[name] = Peer(name, process.environment(env, self.args.device), spec, dict(path))
            self.versions[library] = self.peers[name].about.get("versions", {})
        return self.peers[name]

    def close(self, names: list[str]) -> None:
        for name in names:
            self.peers.pop(name).close()

    def follow(self, job: dict, places: list[tuple[int, ...]], agreed: list[np.ndarray]) -> np.ndarray:
        """The reference's logits `[n, V]` after the tokens agreed on in n places (see `gate`), as they were steered."""
        inputs = dict(np.load(self.folder / "inputs.npz"))
        path, logits = BUILD / "outputs" / "follow.npz", [np.empty(0)] * len(places)
        for length in {len(tokens) for tokens in agreed}:
            some = [i for i, tokens in enumerate(agreed) if len(tokens) == length]
            ids = [np.append(inputs[job["ids"]][places[i][-1], : job["length"]], agreed[i]) for i in some]
            vectors = inputs["vectors"][[places[i][0] if job.get("steer") == "own" else 0 for i in some]]
            np.savez(path, ids=np.array(ids), vectors=vectors, directions=inputs["directions"])
            asked = {"do": "follow", "name": f"follow {os.urandom(8).hex()}", "inputs": str(path), "ids": "ids", "rows": len(some),
                     "conditions": len(some), "steer": "own" if job.get("steer") else ""}  # fmt: skip
            answer, outputs = self.peers[REFERENCE].ask(asked, outputs=True)
            if not answer["ok"]:
                raise SystemExit(f"the reference cannot follow: {answer['error']}")
            for i, row in zip(some, outputs["logits"], strict=True):
                logits[i] = row
        return np.stack(logits)

    def measure(self, name: str, work: Work) -> dict[str, dict]:
        """All contenders at one work: first each alone, held against the reference, then those that are right in turns."""
        names = [n for n in work.contenders() if n == REFERENCE or n.partition(",")[0] in self.args.libraries]
        bound, rows, jobs, samples, allowed, want = BOUND[self.dtype], {}, {}, {}, {}, {}
        for contender in (bar := tqdm(names, desc=f"{name}, first runs", leave=False)):
            bar.set_postfix_str(contender)
            part = work.part.get(contender.partition(", ")[2], ())
            job = jobs[contender] = work.job | {"name": name} | dict(zip(("conditions", "rows"), part, strict=False))
            answer, got = self.peer(contender, names).ask(job, outputs=True)
            want = want or got
            if not answer["ok"]:
                rows[contender] = {"status": failure(answer)}
                if contender == REFERENCE:
                    raise SystemExit(f"{name}: the reference, {REFERENCE}: {failure(answer)}")
                continue
            sweep = (job["conditions"], job["rows"]) if job["do"] == "sweep" else ()
            wrong, differences = gate(got, want, bound, lambda *at, job=job: self.follow(job, *at), sweep)
            rows[contender] = {"status": f"WRONG: {wrong}" if wrong else "ok", "first": answer["seconds"], "peak": answer["peak"],
                               "difference": differences}  # fmt: skip
            if part:
                rows[contender]["share"] = math.prod(part) / (work.job["conditions"] * work.job["rows"])
            if not wrong:
                samples[contender] = []
                allowed[contender] = {k: bound * float(np.abs(v).max()) * (k != "tokens") for k, v in got.items()}
        self.time(name, rows, jobs, samples, allowed)
        return rows

    def time(self, name: str, rows, jobs, samples, allowed) -> None:
        """Timed runs in turns, into `rows`."""
        going, turn, most = list(samples), 0, 2 if self.args.quick else RUNS
        bar = tqdm(desc=f"{name}, timed runs", leave=False)
        while going:
            for contender in going[turn % len(going) :] + going[: turn % len(going)]:
                answer, _ = self.peers[contender].ask(jobs[contender])
                row, seconds = rows[contender], samples[contender]
                if not answer["ok"]:
                    row["status"] = failure(answer)
                elif not all(drift <= allowed[contender][k] for k, drift in answer["drift"].items()):  # NaN is not
                    row["status"] = f"WRONG: a later run differs from the first by {answer['drift']}"
                else:
                    seconds.append(answer["seconds"])
                    row["peak"] = max(row["peak"], answer["peak"])
                if row["status"] != "ok" or len(seconds) >= most or sum(seconds) >= PATIENCE[self.args.device]:
                    going.remove(contender)
                bar.update()
            turn += 1
        bar.close()
        for contender, row in rows.items():
            if row["status"] == "ok":
                whole, told = 1 / row.get("share", 1), quartiles(samples[contender])
                row |= dict(zip(("q1", "median", "q3"), (q * whole for q in told), strict=True))
                row |= {"n": len(samples[contender]), "compile": max(0.0, row["first"] - told[1])}


def fingerprint() -> str:
    """Of all the code that is measured: nothing of the emotions, studies and reports is."""
    folders = (ROOT / "jaxemo", ROOT / "kernels", ROOT / "checkpoints", PEERS)
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".json", ".txt")
                   and not {"emotions", "studies", "report"} & set(path.relative_to(ROOT).parts))  # fmt: skip
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    for name, what in (
        ("only", "works"),
        ("libraries", "libraries, besides the reference"),
        ("models", "words in the names of models"),
    ):
        parser.add_argument(f"--{name}", default="", help=f"only these {what}, separated by commas")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no work later than this")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and two runs, to see that it works; written to build/bench"
    )
    parser.add_argument("--readme", action="store_true", help="only write the README's table from the results")
    args = parser.parse_args()
    if args.readme:
        write(ROOT / "README.md", with_block((ROOT / "README.md").read_text(encoding="utf-8"), readme_block()))
        return
    todo = works(args.device, args.quick)
    only, args.libraries = (
        args.only.split(",") if args.only else list(todo),
        args.libraries.split(",") if args.libraries else list(LIBRARIES),
    )
    if unknown := set(only) - set(todo) | set(args.libraries) - set(LIBRARIES):
        parser.error(
            f"unknown {', '.join(sorted(unknown))}; works are {', '.join(todo)}, libraries {', '.join(LIBRARIES)}"
        )
    begun, load, here, code = time.time(), os.getloadavg()[0], process.machine(args.device), fingerprint()
    if load > 0.5:
        print(f"this machine is busy (load {load:.1f}): what is measured now means little", file=sys.stderr)
    entries, left, versions = [], [], {}
    for model in (model for model in MODELS[args.device] if any(word in model for word in args.models.split(","))):
        bench = Bench(model, args)
        try:
            for name, work in tqdm(todo.items(), desc=model):
                key = json.loads(json.dumps([code, here, work, args.libraries, args.threads, args.quick]))
                path = BUILD / "parts" / f"{bench.folder.name}-{args.device}-{name}{'-quick' * args.quick}.json"
                part = json.loads(path.read_text()) if path.exists() else {}
                if part.get("key") != key:
                    if name not in only:
                        continue
                    if time.time() - begun > 60 * args.minutes:
                        left.append((model, name))
                        continue
                    entry = {"model": model, "work": name, "about": work.about, "contenders": bench.measure(name, work)}
                    part = {"key": key, "entry": entry, "versions": bench.versions}
                    write(path, json.dumps(part))
                entries.append(part["entry"])
                versions |= part["versions"]
        finally:
            bench.close(list(bench.peers))
    about = {"date": f"{datetime.date.today()}", "commit": process.commit(), "code": code, "machine": here, "threads": args.threads, "load before": load,
             "dtype": bench.dtype, "bound": BOUND[bench.dtype], "patience": PATIENCE[args.device], "rules": RULES, "versions": versions,
             "entries": entries}  # fmt: skip
    path = BUILD / f"quick-{args.device}.json" if args.quick else RESULTS / f"compare-{args.device}.json"
    write(path, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(f"- {rule}" for rule in RULES))
    for model in dict.fromkeys(entry["model"] for entry in entries):
        print(f"\n{model}\n" + table([entry for entry in entries if entry["model"] == model], False))
    failed = [
        f"{entry['work']}, {name}: {row['status']}"
        for entry in entries
        for name, row in entry["contenders"].items()
        if row["status"] != "ok"
    ]
    left = [f"{model}, {name}: not done, run it again to go on" for model, name in left]
    print("\n".join(["", *failed, *left, f"written to {path} after {(time.time() - begun) / 60:.0f} minutes"]))
    if not args.quick:
        ratios = ", ".join(
            f"{entry['work']} {best:.2f}" for entry in entries if (best := ratio(entry["contenders"])) is not None
        )
        with open(RESULTS.parent / "LOG.md", "a", encoding="utf-8") as log:
            log.write(f"| {about['date']} | {about['commit']} | {here} | {ratios} |\n")


if __name__ == "__main__":
    main()
