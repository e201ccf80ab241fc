"""bench/compare.py: what it lets through, what it tells, and that the README says what was measured. Needs no torch."""

import ast
import json
import pathlib
import statistics
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
try:
    import compare
    from peers import process, works
finally:
    sys.path.remove(str(ROOT / "bench"))  # bench/kernels.py must not pass for a library

BOUND = 1e-3
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((4, 50)).astype(np.float32)


def nobody(places, agreed):
    raise AssertionError("nothing needs to be followed")


@given(st.lists(st.floats(1e-4, 1e3), min_size=2, max_size=12))
def test_quartiles_are_the_standard_librarys(seconds):
    assert compare.quartiles(seconds) == pytest.approx(statistics.quantiles(seconds, n=4, method="inclusive"))


# ---- the gate --------------------------------------------------------------------------------------------------------


def test_outputs_within_the_bound_pass_and_are_measured():
    noise = RNG.uniform(-1, 1, LOGITS.shape) * 1e-5
    wrong, found = compare.gate({"logits": LOGITS + noise}, {"logits": LOGITS}, BOUND, nobody)
    assert wrong == "" and found["logits"] == pytest.approx(np.abs(noise).max(), rel=0.02)


@pytest.mark.parametrize("spoil", [
    lambda x: x + 0.1, lambda x: x * (1 + 3 * BOUND), lambda x: np.where(x == x.max(), np.nan, x), lambda x: x[:3], lambda x: x[:, ::-1],
    lambda x: np.concatenate([x[1:], x[:1]]),
])  # fmt: skip
def test_other_logits_and_scores_do_not_pass(spoil):
    assert compare.gate({"logits": spoil(LOGITS)}, {"logits": LOGITS}, BOUND, nobody)[0]
    assert compare.gate({"scores": spoil(LOGITS)}, {"scores": LOGITS}, BOUND, nobody)[0]


def test_one_token_far_off_is_not_hidden_by_tokens_that_are_larger():
    scores = np.stack([LOGITS, 1e4 * LOGITS])
    off = scores.copy()
    off[0, 2, 7] += 0.1
    assert compare.gate({"scores": off}, {"scores": scores}, BOUND, nobody)[0]


def test_outputs_that_are_missing_or_more_do_not_pass():
    tokens = np.zeros((4, 3), np.int32)
    for got in ({}, {"logits": LOGITS, "tokens": tokens}, {"tokens": tokens}):
        assert "instead of" in compare.gate(got, {"logits": LOGITS}, BOUND, nobody)[0]
    assert "instead of" in compare.gate({"tokens": tokens[:3]}, {"tokens": tokens}, BOUND, nobody)[0]
    assert "instead of" in compare.gate({"tokens": tokens[:, :2]}, {"tokens": tokens}, BOUND, nobody)[0]


def test_another_likeliest_token_passes_only_where_two_are_as_near_as_the_bound():
    for apart, passes in ((1.5 * BOUND, True), (2.5 * BOUND, False)):
        want, got = np.zeros((1, 5)), np.zeros((1, 5))
        want[0, :3] = -1, 1, 1 - apart
        got[0, :3] = -1, 1 - apart / 2 - 1e-6, 1 - apart / 2 + 1e-6
        wrong, found = compare.gate({"logits": got}, {"logits": want}, BOUND, nobody)
        assert found["rows with another top-1"] == 1 and (wrong == "") == passes


@pytest.mark.parametrize("apart, passes", [(1.9 * BOUND, True), (2.1 * BOUND, False), (np.nan, False)])
def test_tokens_that_differ_pass_only_from_a_near_tie_on(apart, passes):
    want = RNG.integers(0, 50, (3, 6))
    got = want.copy()
    got[1, 4:] = want[1, 4:] + 1
    scores = RNG.standard_normal((3, 6, 2))
    others = scores.copy()
    others[1, 4:] += 9  # those of other tokens

    def follow(places, agreed):
        assert places == [(1,)] and np.array_equal(agreed[0], want[1, :4])
        logits = np.zeros((1, 60))
        logits[0, [0, got[1, 4]]] = 2, 2 * apart
        return logits

    wrong, found = compare.gate({"tokens": got, "scores": others}, {"tokens": want, "scores": scores}, BOUND, follow)
    assert found["rows that part"] == 1 and found["scores"] == 0
    assert (wrong == "") == passes
    others[1, 3] += 9  # that of a token that is the same
    wrong, _ = compare.gate({"tokens": got, "scores": others}, {"tokens": want, "scores": scores}, BOUND, follow)
    assert "scores" in wrong


def test_of_a_sweep_the_conditions_and_prompts_are_compared_that_both_have():
    want = RNG.integers(0, 50, (4, 3, 5))
    assert compare.gate({"tokens": want[:2, :2]}, {"tokens": want}, BOUND, nobody, (2, 2))[0] == ""
    assert compare.gate({"tokens": want}, {"tokens": want[:2]}, BOUND, nobody, (4, 3))[0] == ""
    assert "instead of" in compare.gate({"tokens": want[:1]}, {"tokens": want}, BOUND, nobody, (2, 3))[0]
    got = want[:2].copy()
    got[1, 2, 0] += 1
    places = []
    wrong, _ = compare.gate({"tokens": got}, {"tokens": want}, BOUND, lambda *at: places.append(at) or np.eye(1, 60, got[1, 2, 0]), (2, 3))  # fmt: skip
    assert wrong and places[0][0] == [(1, 2)] and len(places[0][1][0]) == 0


# ---- measuring -------------------------------------------------------------------------------------------------------


class Peer:
    """Answers as a contender's process does, with seconds that are given."""

    def __init__(self, logits, seconds=1.0, drift=0.0, fails=False):
        self.logits, self.seconds, self.drift, self.fails, self.asked = logits, seconds, drift, fails, 0

    def ask(self, job, outputs=False):
        self.asked += 1
        if self.fails:
            return {"ok": False, "error": "Traceback\nModuleNotFoundError: No module named 'x'"}, {}
        seconds = self.seconds + 7 * (self.asked == 1)
        drift = {"logits": self.drift * (self.asked > 2)}
        return {"ok": True, "seconds": seconds, "peak": self.asked, "drift": drift}, {"logits": self.logits}


def measured(**peers):
    bench = object.__new__(compare.Bench)
    bench.args = types.SimpleNamespace(libraries=list(works.LIBRARIES), quick=False, device="cpu")
    bench.dtype, bench.peers = "float32", {compare.REFERENCE: Peer(LOGITS, 0.1), **peers}
    bench.peer = lambda name, needed: bench.peers[name]
    work = types.SimpleNamespace(contenders=lambda: list(bench.peers), part={}, job={"do": "prefill", "rows": 4})
    return bench.measure("prefill", work), bench.peers


def test_who_is_wrong_is_not_timed_and_who_is_right_is_timed_in_full():
    rows, peers = measured(jaxemo=Peer(LOGITS, 2.0), repeng=Peer(LOGITS + 1), nnsight=Peer(LOGITS, fails=True))
    assert rows["repeng"]["status"].startswith("WRONG: logits") and peers["repeng"].asked == 1
    assert "median" not in rows["repeng"] and "median" not in rows["nnsight"]
    assert rows["nnsight"]["status"].startswith("not installed") and peers["nnsight"].asked == 1
    reference, ours = rows[compare.REFERENCE], rows["jaxemo"]
    assert (reference["n"], reference["median"]) == (compare.RUNS, 0.1)
    assert reference["peak"] == compare.RUNS + 1 and reference["compile"] == pytest.approx(7)
    assert (ours["n"], ours["median"]) == (3, 2.0)  # as many as the patience of 5 s takes


def test_who_does_not_repeat_itself_is_wrong():
    rows, _ = measured(jaxemo=Peer(LOGITS, drift=0.1))
    assert rows["jaxemo"]["status"].startswith("WRONG: a later run") and "median" not in rows["jaxemo"]
    rows, _ = measured(jaxemo=Peer(LOGITS, drift=1e-6))
    assert rows["jaxemo"]["status"] == "ok"


def test_a_contender_in_its_process_gives_what_transformers_gave(tmp_path):
    """The golden model's logits, residual streams and greedy tokens were made by transformers."""
    golden = dict(np.load(ROOT / "tests" / "golden" / "gqa_tied.npz"))
    n = int(golden["lengths"][0])
    directions = RNG.standard_normal((3, 5, 32)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", prompts=golden["ids"][None, :n].astype(np.int32), directions=directions)
    spec = {"script": "jaxemo_", "how": "skilled", "device": "cpu", "dtype": "float32", "threads": 1, "layer": 1,
            "model": str(ROOT / "tests" / "golden" / "gqa_tied.gguf"), "inputs": str(tmp_path / "inputs.npz")}  # fmt: skip
    peer = process.Peer("test", sys.executable, spec, {}, tmp_path)
    try:
        assert peer.about["ok"], peer.about
        assert set(peer.about["versions"]) == {"jax", "jaxlib"}
        answer, got = peer.ask({"do": "readout", "name": "a", "ids": "prompts", "rows": 1}, outputs=True)
        want = {"logits": golden["logits"][None, n - 1], "scores": np.einsum("ltd,led->lte", golden["resid_post"][:, :n], directions)[:, None]}  # fmt: skip
        assert compare.gate(got, want, 1e-4, nobody)[0] == ""
        assert answer["seconds"] > 0 and answer["peak"] > 1e7 and set(answer["drift"].values()) == {0.0}
        job = {"do": "generate", "name": "b", "ids": "prompts", "rows": 1, "new": golden["greedy"].shape[1]}
        assert compare.gate(peer.ask(job, outputs=True)[1], {"tokens": golden["greedy"][:1]}, 1e-4, nobody)[0] == ""
        failed, _ = peer.ask({"do": "dance", "name": "c", "ids": "prompts", "rows": 1})
        assert compare.failure(failed).startswith("failed: AttributeError")
        assert peer.ask({"do": "load", "name": "d", "ids": "prompts", "rows": 1})[0]["ok"]  # and goes on
    finally:
        peer.close()
    assert not peer.ask(job)[0]["ok"]


# ---- what is told ----------------------------------------------------------------------------------------------------

ENTRY = {"model": "M", "work": "sweep", "about": "4 vectors", "contenders": {
    "jaxemo": {"status": "ok", "median": 1.5, "q1": 1.25, "q3": 2.0},
    "transformers, user": {"status": "ok", "median": 123.456, "q1": 100.0, "q3": 200.0, "share": 0.1},
    "transformers, skilled": {"status": "ok", "median": 3.0, "q1": 3.0, "q3": 3.0},
    "repeng, user": {"status": "WRONG: tokens differ"}, "repeng, skilled": {"status": "not installed: No module"},
}}  # fmt: skip


def test_a_table_holds_every_contender_and_counts_only_who_is_right():
    head, rule, line = (row.strip("| ").split(" | ") for row in compare.table([ENTRY], True).splitlines())
    assert len(head) == len(line) and rule[0].startswith("---")
    told = dict(zip(head, line, strict=True))
    assert told["seconds"] == "sweep: 4 vectors" and told["jaxemo"] == "1.50"
    assert (
        told["transformers"] == "~123 / 3.00" and told["repeng"] == "WRONG / not installed" and told["nnsight"] == "–"
    )
    assert told["jaxemo / best other"] == "0.50"
    text = compare.table([ENTRY], False)
    assert "1.50 [1.25, 2.00]" in text and "~123 [100, 200]" in text and len(text.splitlines()) == 3


def test_there_is_no_ratio_without_both_sides():
    ours = {"jaxemo": {"median": 1.0}}
    assert compare.ratio(ours) is None
    assert compare.ratio({"repeng, user": {"median": 1.0}, "jaxemo": {"status": "WRONG: x"}}) is None
    assert compare.ratio(ours | {"a": {"median": 4.0}, "b": {"median": 2.0}, "c": {"status": "WRONG: x"}}) == 0.5


@given(st.floats(1e-6, 1e5))
def test_numbers_keep_three_digits(seconds):
    assert float(compare.number(seconds)) == pytest.approx(seconds, rel=0.0051)


def test_the_rules_are_those_of_the_docstring():
    assert len(compare.RULES) == compare.__doc__.count("\n- ") == 5
    assert compare.RULES[0].endswith("pinned.") and compare.RULES[-1].endswith("began.")


def test_every_work_is_one_that_its_contenders_can_do():
    for device in works.SIZES:
        for quick in (False, True):
            for name, work in works.works(device, quick).items():
                names = work.contenders()
                assert len(set(names)) == len(names) and names[:2] == [works.REFERENCE, "jaxemo"]
                if "ids" in work.job:
                    assert work.job["length"] <= works.LENGTHS[device][work.job["ids"]] and work.job["rows"] <= 256
                for library in work.libraries:
                    code = ast.parse((ROOT / "bench" / "peers" / f"{works.LIBRARIES[library][0]}.py").read_text())
                    made = {node.name for node in code.body if isinstance(node, ast.FunctionDef)}
                    made |= {node.id for at in code.body if isinstance(at, ast.Assign) for node in ast.walk(at.targets[0])
                             if isinstance(node, ast.Name)}  # fmt: skip
                    wanted = "prefill" if name == "load" else work.job["do"]
                    assert wanted in made, (name, library)


def test_the_readme_says_what_the_results_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert compare.with_block(readme, compare.readme_block()) == readme, "run `python bench/compare.py --readme`"


def test_the_block_tells_what_there_is_and_what_is_not(tmp_path):
    assert compare.readme_block(tmp_path).count("Not measured yet") == 2
    about = {"date": "2026-01-01", "commit": "abc", "machine": "a machine", "dtype": "float32", "versions": {"jaxemo": {"jax": "1.2"}},
             "entries": [ENTRY]}  # fmt: skip
    (tmp_path / "compare-cpu.json").write_text(json.dumps(about))
    block = compare.readme_block(tmp_path)
    assert compare.table([ENTRY], True) in block and "jax 1.2" in block and block.count("Not measured yet") == 1
    text = f"before\n<!-- bench -->\nold\n<!-- /bench -->\nafter {block}"
    assert compare.with_block(text, block) == f"before\n<!-- bench -->\n{block}\n<!-- /bench -->\nafter {block}"
    with pytest.raises(SystemExit):
        compare.with_block("no markers", block)
