"""Short runs of the harnesses in tests/harness; the long ones are `python -m tests.harness.<name>`."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.harness import conformance, filter_speed, hostile, minhash, perturbed, verdict_speed
from tests.harness.decontamination import missed_targets
from tests.harness.long_traces import long_traces
from tests.harness.side_by_side import Cost, interleaved, missing, table

HARNESS = Path(minhash.__file__).parent
RUNNABLE = sorted(path.stem for path in HARNESS.glob("*.py") if '__name__ == "__main__"' in path.read_text())


def test_no_perturbed_answer_of_a_sample_is_accepted():
    """A verifier that accepts wrong answers teaches them."""
    report = perturbed.run(num=1_500, seed=11)
    assert report["num_negatives"] >= 1_500
    assert report["num_kinds_of_negatives"] >= 40
    assert report["mistakes"] == []


def test_perturbed_cases_do_not_depend_on_anything_but_the_seed():
    """Two runs could otherwise not be compared."""
    assert perturbed.cases(300, seed=5) == perturbed.cases(300, seed=5)
    assert perturbed.cases(300, seed=5) != perturbed.cases(300, seed=6)


@pytest.mark.slow
def test_no_hostile_answer_of_a_sample_hangs_executes_or_is_accepted():
    """One such answer in a data set would stall the stage, run code, or be learnt."""
    report = hostile.run(deadline_s=1.0, answers_of=slice(None, None, 4))
    assert report["num_answers"] >= 30
    assert (report["accepted"], report["executed"], report["next_item_spoiled"]) == ([], False, [])
    assert report["undecided"] > 0  # some did hang, and were killed


@pytest.mark.slow
def test_the_speed_harness_states_the_slow_share():
    """A rate without the share that left the fast path says nothing about the next data set."""
    report = verdict_speed.run(num_rounds=1)
    assert report["num_rows"] == 530
    assert 0 < report["num_slow"] < 0.05 * report["num_rows"]
    assert report["num_as_expected"] > report["num_as_expected_peer"] > 400
    assert set(report["costs"]) == {"ours", "math-verify"}


def test_a_row_judged_otherwise_fails_the_conformance_harness(tmp_path, monkeypatch, capsys):
    """A harness that ends with 0 whatever it finds would let a worse verifier through."""
    tables = tmp_path / "conformance"
    shutil.copytree(conformance.FOLDER, tables)
    for name in conformance.TABLES:  # a few rows of each table are enough
        rows = conformance.rows(name)[:3]
        (tables / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(conformance, "FOLDER", tables)
    monkeypatch.setattr(sys, "argv", ["conformance"])
    assert conformance.main() == 0
    row = rows[0] | {"expected": 1 - rows[0]["expected"]}
    (tables / f"{conformance.BARE}.jsonl").write_text(json.dumps(row))
    assert conformance.main() == 1
    assert f"otherwise: gold {row['gold']!r}" in capsys.readouterr().out


def test_an_accepted_negative_fails_the_perturbed_harness(monkeypatch, capsys):
    """The exit code is what a job looks at."""
    monkeypatch.setattr(sys, "argv", ["perturbed", "--num", "50"])
    assert perturbed.main() == 0
    # What is the same value in another writing, counted as a negative: the verifier accepts it, rightly.
    monkeypatch.setattr(perturbed, "cases", lambda num, seed: [("integer: same", "42", "42.0")] * num)
    assert perturbed.main() == 1
    assert '"false_accepts": 50' in capsys.readouterr().out


def test_each_target_of_decontamination_can_be_missed():
    """A harness that ends with 0 whatever it finds would let a worse decontamination through."""
    counts = {
        "verbatim prompt": Counter(num=200, wanted=200, ours=199),
        "embedded in the trace": Counter(num=200, wanted=200, ours=198),
        "short, embedded in the prompt": Counter(num=200, wanted=200, ours=197),
        "number-swapped": Counter(num=200, wanted=0, ours=3),
        "fresh, of the same templates": Counter(num=200, wanted=0, ours=2),
        "one word changed (no target)": Counter(num=200, wanted=200, ours=0),
    }
    assert missed_targets(counts) == ["verbatim prompt", "short, embedded in the prompt", "number-swapped"]


def test_the_filters_let_the_traces_pass_that_their_speed_is_measured_on():
    """A trace that the first filter drops costs the others nothing, and the rate would be of work not done."""
    traces = long_traces(4, num_chars=3_000)
    assert {name: against for name, (_, against) in filter_speed.each_filter(traces, 1).items() if against} == {}


def found_by(route, num):
    line = next(line for line in minhash.what_was_found(num, {"route": route(minhash.TimedTexts(num))}) if "0.90 and" in line)
    num_copies, num_found = map(int, line.split()[-2:])
    return num_copies, num_found


def test_our_minhash_finds_the_copies_that_are_planted():
    """Time and memory of a search that finds nothing are worth nothing."""
    num_copies, num_found = found_by(minhash.ours, 3_000)
    assert num_copies > 40
    assert num_found >= 0.98 * num_copies
    lines = minhash.what_was_found(3_000, {"ours": minhash.ours(minhash.TimedTexts(3_000))})
    assert lines[-1].split()[-1] == "0"  # of what is no copy


def test_the_peers_find_the_same_copies():
    """A peer that is set up wrongly would make us look good."""
    pytest.importorskip("datasketch")
    num_copies, num_found = found_by(minhash.datasketch_route, 1_000)
    assert num_found >= 0.95 * num_copies > 0


@pytest.mark.slow
def test_datatrove_is_set_up_as_its_pipeline_is(tmp_path):
    """A peer that is set up wrongly would make us look good."""
    if why := missing("datatrove", "spacy"):
        pytest.skip(why)
    from tests.harness.datatrove_routes import Contamination

    num_copies, num_found = found_by(minhash.datatrove_route, 1_000)
    assert num_found >= 0.95 * num_copies > 0
    item = "If 3 trains leave the old station at 8 and 5 more at noon, how many trains have left by 1?"
    other = item.replace("8", "7").replace("5", "6")
    as_shipped, near_ours = tmp_path / "12", tmp_path / "8"
    as_shipped.mkdir()
    near_ours.mkdir()
    shipped = Contamination([item], as_shipped)
    kept = Contamination([item], near_ours, num_words=8, numbers_as_zero=False)
    assert shipped.check("?", f"We read: {item} So 8.")
    assert kept.check("?", f"We read: {item} So 8.")
    assert shipped.check("?", other)  # every number is 0 to it
    assert not kept.check("?", "If 4 trains leave the new harbour at 9, how many trains have left by 10?")


def test_routes_take_turns_and_are_compared_by_medians():
    """A route that always ran first, or a mean with one hiccup in it, would decide the ratio."""
    calls = []
    costs = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "abbaab"
    assert list(costs) == ["a", "b"]
    lines = table({"ours": Cost(2.0, 1.0), "peer": Cost(30.0, 20.0)}, 60.0, "MB")
    assert lines[1].split() == ["ours", "60.0", "30.0"]
    assert lines[2].split() == ["peer", "3.0", "2.0", "20.0", "×,", "15.0", "×"]
    assert "go by the CPU" in lines[3]
    assert len(table({"ours": Cost(1.1, 1.0), "peer": Cost(20.0, 20.0)}, 60.0, "MB")) == 3


def test_a_missing_peer_is_named_with_what_to_do():
    """A comparison that is left out in silence reads as if there were none to make."""
    assert missing("json") == ""
    assert "no_such_peer" in missing("json", "no_such_peer")
    assert "[peers]" in missing("no_such_peer")


def test_the_page_and_the_target_name_every_harness():
    """A figure without its command cannot be measured again."""
    page = (HARNESS / "README.md").read_text()
    assert [name for name in RUNNABLE if f"`{name}`" not in page] == []
    makefile = (HARNESS.parents[1] / "Makefile").read_text()
    recipe = makefile[makefile.index("\nharness:") :].partition("\n\n")[0]
    measured_only = {"verdict_speed", "filter_speed", "minhash", "decontamination_speed"}
    assert [name for name in RUNNABLE if name not in measured_only and f"harness {name}" not in recipe] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNABLE)
def test_every_harness_says_what_it_does(name):
    """Somebody who wants one figure should not have to read its source."""
    said = subprocess.run(
        [sys.executable, "-m", f"tests.harness.{name}", "--help"], capture_output=True, text=True, cwd=HARNESS.parents[1]
    )
    assert said.returncode == 0, said.stderr
    assert f"python -m tests.harness.{name}" in " ".join(said.stdout.split())
