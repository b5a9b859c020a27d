"""The report: what programs read, what the terminal prints, and what the page holds before a browser opens it."""

import html
import json
import re
from html.parser import HTMLParser
from unittest.mock import ANY

import pytest
from pydantic import ValidationError

from stillhouse.pipeline.filters.rates import FilterRate
from stillhouse.pipeline.report import (
    FunnelStep,
    LossPoint,
    Report,
    Sample,
    Samples,
    funnel_line,
    read_report,
    summary_markdown,
    summary_table,
    write_report,
)
from stillhouse.pipeline.report_page import duration, line_chart, render_page
from stillhouse.pipeline.report_ticks import nice_ticks
from stillhouse.pipeline.tally import SourceRate
from tests.report_example import FAMILIES, MARKUP, make_report


def update(report, **changes):
    return Report.model_validate(report.model_dump() | changes)


def test_report_json_holds_what_programs_look_for(tmp_path):
    """Scripts that read ``report.json`` by these names would break."""
    json_path, html_path = write_report(make_report(), tmp_path)
    content = json.loads(json_path.read_text())
    assert (content["schema_version"], content["verdict"], content["exit_code"], content["checkpoint"]) == (
        1,
        "PASS",
        0,
        "checkpoint",
    )
    assert content["results"]["pass_at_1"]["checkpoint"] == {
        "value": pytest.approx(304 / 360),
        "low": pytest.approx(0.8034, abs=1e-4),
        "high": pytest.approx(0.8782, abs=1e-4),
        "n": 360,
    }
    assert set(content["results"]["pass_at_1"]) == {"teacher", "base", "student", "checkpoint", "checkpoint_kernels"}
    served = content["results"]["served"]
    assert served["train"] == served["checkpoint_kernels"] != served["checkpoint"]
    assert set(served["train"]) == {"path", "device"}
    assert served["agreement"] == {
        "num_completions": 360,
        "num_same_verdict": 359,
        "num_same_completion": 360,
        "difference": {"value": pytest.approx(-1 / 360), "low": ANY, "high": ANY, "n": 360},
    }
    assert set(content["results"]["pass_at_1_by_family"]) == set(FAMILIES)
    assert content["results"]["funnel"][3]["num_dropped"] == 402
    assert content["results"]["filtering"]["filters"][1]["num_against"] == 61
    sources = content["results"]["filtering"]["sources"]
    assert (sources[1]["source"], sources[1]["topic"], sources[1]["num_traces"]) == (FAMILIES[1], "sums", 598)
    assert content["results"]["verifiers"]["train: " + FAMILIES[0]]["gold_accepted"] == 1200
    assert content["results"]["seconds"]["train"] == 142.9
    assert content["gate"]["checks"][0]["name"] == "integrity"
    assert html_path.name == "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_report_json_reads_back_equal(tmp_path):
    """A report could not be shown again by ``stillhouse report``."""
    report = make_report()
    json_path, _ = write_report(report, tmp_path)
    assert read_report(json_path) == report
    json_path.write_text(json_path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ValidationError, match="schema_version"):
        read_report(json_path)


def test_a_loss_that_was_not_a_number_is_kept_and_shown(tmp_path):
    """A diverged training would end in invalid JSON, or in a smooth curve."""
    report = make_report()
    loss = [*report.results.loss[:10], LossPoint(step=11, loss=float("nan"), learning_rate=1e-3), *report.results.loss[11:]]
    report = update(report, results=report.results.model_dump() | {"loss": [point.model_dump() for point in loss]})
    json_path, html_path = write_report(report, tmp_path)
    points = json.loads(json_path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))["results"][
        "loss"
    ]
    assert points[10] == {"step": 11, "loss": None, "learning_rate": 0.001}
    assert read_report(json_path) == report
    page = html_path.read_text()
    assert "1 steps had no finite loss" in page
    assert len(re.findall(r'<polyline class="curve"', page)) == 3  # the loss in two pieces, the learning rate in one


def test_a_funnel_that_does_not_add_up_is_refused():
    """Rows would vanish between two stages and the report would not show it."""
    with pytest.raises(ValidationError, match="'verify' does not add up: 10 in, 3 dropped, 6 kept"):
        FunnelStep(stage="verify", reason="wrong", num_in=10, num_dropped=3, num_kept=6)


def test_an_unknown_field_is_refused():
    """A misspelt field would be dropped without a word."""
    with pytest.raises(ValidationError, match="verdikt"):
        update(make_report(), verdikt="PASS")


def test_summary_table_is_what_the_terminal_prints():
    """A user would read the wrong model's accuracy off the terminal."""
    lines = summary_table(make_report()).splitlines()
    assert lines[0].split() == ["pass@1", "[95", "%", "interval]", "chain_sum", "basic_arithmetic", "leg_counting", "n"]
    assert re.sub(r" +", " ", lines[2]) == "teacher 91.7 % [88.4, 94.1] 97.5 % 97.5 % 80.0 % 360"
    assert re.sub(r" +", " ", lines[3]) == "base 3.9 % [2.3, 6.4] 5.8 % 5.8 % 0.0 % 360"
    assert re.sub(r" +", " ", lines[4]) == "16-bit student 85.8 % [81.9, 89.1] 91.7 % 91.7 % 74.2 % 360"
    assert re.sub(r" +", " ", lines[5]) == "4-bit checkpoint 84.4 % [80.3, 87.8] 90.0 % 90.0 % 73.3 % 360"
    assert re.sub(r" +", " ", lines[6]) == "4-bit checkpoint, our kernels 84.2 % [80.0, 87.6] 90.0 % 90.0 % 72.5 % 360"
    assert len({len(line) for line in lines[1:7]}) == 1  # aligned
    assert max(map(len, lines[:7])) <= 104
    assert lines[8].startswith("funnel   3,600 problems → −12 same text in test → 3,588 traces → −61 think block not closed")
    assert lines[8].endswith("→ 2,965 examples (64 more lost in flight and made again)")
    assert lines[9].endswith("train 143, quantize 3, validate 61; 295 in all")
    assert lines[10] == "size     1.32 MB of weights, 2.98× smaller than 16-bit"
    ours = "42 × int4 on compiled kernels, AVX-512 VNNI/BF16; 1 × float32 in torch (CPU)"
    assert lines[11] == f"served   training; 4-bit checkpoint, our kernels: {ours}"
    assert lines[13] == "         base; 16-bit student: 43 × float32 in torch (CPU)"
    assert lines[15].startswith(
        "         our kernels and transformers: 359 of 360 verdicts and 360 whole completions the same,"
    )
    assert lines[15].endswith("difference -0.3 points [-1.2, +0.7]")
    assert lines[16:] == ["verdict  PASS (12 of 12 checks passed)"]


def test_a_report_from_before_the_second_path_is_still_read():
    """``stillhouse report`` would refuse the report of an earlier version, or invent what served it."""
    old = make_report().model_dump(mode="json")
    del old["results"]["served"], old["results"]["pass_at_1"]["checkpoint_kernels"]
    for family in old["results"]["pass_at_1_by_family"].values():
        del family["checkpoint_kernels"]
    report = Report.model_validate_json(json.dumps(old))
    assert "served" not in summary_table(report)
    assert "4-bit checkpoint, our kernels: not measured" in render_page(report)
    assert "Not noted." in render_page(report)
    assert "and once more" not in render_page(report)


def test_summary_names_each_check_that_did_not_pass():
    """A user would see INCONCLUSIVE without learning why, nor what would decide."""
    lines = summary_table(make_report(min_accuracy=0.83)).splitlines()
    assert lines[16] == "verdict  INCONCLUSIVE (11 of 12 checks passed)"
    assert lines[17].startswith("         INCONCLUSIVE accuracy: the floor is inside the 95 % interval")
    assert lines[17].endswith("items would decide")


def test_a_model_that_was_not_measured_is_said_to_be():
    """A missing teacher score would read as 0 %."""
    report = make_report(teacher_measured=False)
    row = summary_table(report).splitlines()[2]
    assert row.split() == ["teacher", "not", "measured", "–", "–", "–", "0"]
    assert "teacher: not measured" in render_page(report)


def test_families_of_the_same_short_name_keep_their_full_name():
    """Two columns would carry the same heading."""
    report = make_report()
    one = report.results.pass_at_1.model_dump()
    results = report.results.model_dump() | {"pass_at_1_by_family": {"a/sums": one, "b/sums": one}}
    assert "a/sums  b/sums" in summary_table(update(report, results=results))


def test_markdown_table_survives_pipes_and_markup():
    """A CI summary would fall apart over a family's or a recipe's name."""
    report = update(make_report(), recipe_name="a|b<img>")
    lines = summary_markdown(report).splitlines()
    assert lines[0] == "### Stillhouse: a\\|b&lt;img>: PASS"
    tables = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables[:7]} == {7}
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables[7:]} == {5}
    assert "| 4-bit checkpoint | 84.4 % [80.3, 87.8] | 90.0 % | 90.0 % | 73.3 % | 360 |" in lines


class Page(HTMLParser):
    """Collects what a page could do: tags, attributes, text by nesting."""

    VOID = frozenset({"meta", "link", "br", "img", "wbr", "line", "circle", "polyline"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_markup_in_a_trace_is_text_on_the_page():
    """A teacher's completion, or a recipe from the net, could run a script in the reader's browser."""
    report = make_report()
    hostile = Sample(prompt=MARKUP, completion=MARKUP, answer=MARKUP, reasons=[MARKUP], source=MARKUP, trace_key=MARKUP)
    report = update(
        report,
        recipe_name=MARKUP,
        run_id=MARKUP,
        checkpoint=MARKUP,
        recipe=MARKUP,
        environment={MARKUP: MARKUP},
        samples=Samples(kept=[hostile], dropped=[hostile]).model_dump(),
        results=report.results.model_dump()
        | {
            "pass_at_1_by_family": {MARKUP: report.results.pass_at_1.model_dump()},
            "seconds": {MARKUP: 1.0},
            "tokens": {MARKUP: 1},
            "behaviour": {MARKUP: report.results.model_dump()["behaviour"]["base"]},
            "verifiers": {MARKUP: report.results.model_dump()["verifiers"]["test: " + FAMILIES[0]] | {"failures": [MARKUP]}},
            "filtering": report.results.filtering.model_dump()
            | {"filters": [FilterRate(MARKUP, "drop", 1, 1)], "sources": [SourceRate(MARKUP, 1, 0, 1, 1, 1)]},
            "funnel": [{"stage": MARKUP, "reason": MARKUP, "num_in": 1, "num_dropped": 0, "num_kept": 1, "unit": MARKUP}],
        },
        gate={
            "checks": [report.model_dump()["gate"]["checks"][0] | {"name": MARKUP, "expected": MARKUP, "explanation": MARKUP}]
        },
    )
    text = render_page(report)
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "form", "a", "button"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.open == []
    assert html.escape(MARKUP, quote=False).split("'")[0] in text
    assert "".join(page.text).count("<script>document.title = 'taken over'") >= 12


def test_the_page_asks_for_nothing_and_forbids_the_rest():
    """Opening a report would tell a third party about it."""
    text = render_page(make_report())
    page = Page(text)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    addresses = [
        value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "data", "srcset")
    ]
    assert addresses == ["data:,"]
    assert not re.search(r"url\(|@import|https?://", text)


def test_the_page_shows_every_number_it_is_there_for():
    """The page would look well and leave out the numbers."""
    report = make_report()
    text = "".join(Page(render_page(report)).text)
    for step in report.results.funnel:
        assert f"{step.num_kept:,} kept" in text
        assert step.num_dropped == 0 or f"{step.num_dropped:,} dropped" in text
        assert step.reason in text
    for check in report.gate.checks:
        assert check.explanation in text
    for name in ("teacher", "base", "16-bit student", "4-bit checkpoint", "chain_sum", "basic_arithmetic", "leg_counting"):
        assert name in text
    assert "42 × int4 on compiled kernels, AVX-512 VNNI/BF16; 1 × float32 in torch" in text
    assert "42 × int4 that compressed-tensors decoded to float32, in torch" in text
    assert "The 4-bit checkpoint on our kernels and transformers: 359 of 360 verdicts" in text
    assert "2 min 23 s" in text
    assert "1,228,800" in text
    assert "3,652 traces were generated in all, of which 64 were lost in flight" in text
    assert "wrong answer: expected -7, found 7" in text
    for rate in report.results.filtering.filters:
        assert rate.name.replace("_", " ") in text
        assert f"{rate.num_in:,}" in text
    assert "88.5 % of 61" in text, "right answers that a filter costs"
    assert "16.7 % of 12" in text, "what a filter in shadow mode would cost"
    assert "1,195 of 1,200" in text, "golds that the verifier accepted"
    assert report.recipe.strip() in text
    assert "5.23.0" in text


def test_dots_and_bars_stand_where_their_numbers_are():
    """A chart would show another value than the number beside it."""
    text = render_page(make_report())
    assert '<circle class="dot" cx="84.44%"' in text
    assert '<line class="whisker" x1="80.34%" x2="87.82%"' in text
    assert f'<rect class="lost" x="{100 * 3125 / 3588:.3f}%" y="0" width="{100 * 402 / 3588:.3f}%"' in text
    assert f'<rect class="kept" x="0" y="0" width="{100 * 3588 / 3600:.3f}%"' in text


def test_the_loss_curve_goes_through_its_points():
    """The curve would end at another loss than the training did."""
    points = [LossPoint(step=step, loss=loss, learning_rate=None) for step, loss in ((0, 2.0), (50, 1.0), (100, 0.5))]
    chart = line_chart(points, "loss")
    assert chart["pieces"] == [["0.000,0.000", "50.000,50.000", "100.000,75.000"]]
    assert [tick["label"] for tick in chart["y"]] == ["0", "0.5", "1", "1.5", "2"]
    assert [tick["label"] for tick in chart["x"]] == ["0", "20", "40", "60", "80", "100"]
    assert line_chart(points, "learning_rate") is None
    assert line_chart([], "loss") is None
    assert line_chart(points[:1], "loss")["pieces"] == [["0.000,0.000"] * 2]


def test_a_long_training_keeps_its_last_step():
    """The last, and most important, point would be thinned away."""
    points = [LossPoint(step=step, loss=step / 7000, learning_rate=0.1) for step in range(7001)]
    chart = line_chart(points, "loss")
    assert len(chart["pieces"][0]) <= 601
    assert chart["pieces"][0][-1] == "100.000,0.000"
    assert chart["last"] == 1.0


@pytest.mark.parametrize(
    ("low", "high", "about", "ticks"),
    [
        (0, 2.3, 5, [0, 0.5, 1, 1.5, 2, 2.5]),
        (1, 300, 6, [0, 50, 100, 150, 200, 250, 300]),
        (0, 0, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 4, 5, [-4, -2, 0, 2, 4]),
        (0, 4e-5, 4, [0, 1e-5, 2e-5, 3e-5, 4e-5]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low, high, about, ticks):
    """An axis would be labelled 0.4137, or cut the curve off."""
    assert nice_ticks(low, high, about) == pytest.approx(ticks)


def test_durations_read_as_people_say_them():
    """Two hours would be shown as 7,507.3 s, or 59.6 minutes as 60 min of the wrong hour."""
    assert [duration(s) for s in (None, 8.44, 59.96, 200, 3599.7, 7507.3)] == [
        "–",
        "8.4 s",
        "60.0 s",
        "3 min 20 s",
        "1 h 00 min",
        "2 h 05 min",
    ]


def test_an_empty_run_still_gets_its_page():
    """A run that kept nothing, which is when a report is needed most, would end in a traceback."""
    report = make_report()
    nothing = dict.fromkeys(("teacher", "base", "student", "checkpoint"))
    results = {
        "pass_at_1": nothing,
        "pass_at_1_by_family": {},
        "funnel": [],
        "seconds": {},
        "tokens": {},
        "num_generated": 0,
        "loss": [],
        "behaviour": {},
    }
    empty = {"size_bytes": {"checkpoint": 0, "float16": 0}, "samples": {"kept": [], "dropped": []}, "gate": {"checks": []}}
    report = update(report, verdict="FAIL", exit_code=1, results=results, environment={}, recipe="", **empty)
    page = Page(render_page(report))
    assert page.open == []
    assert "No training step with a finite loss was logged." in "".join(page.text)
    assert "verdict  FAIL (0 of 0 checks passed)" in summary_table(report)
    assert funnel_line(report) == "nothing counted"
    assert summary_markdown(report).startswith("### Stillhouse: demo: FAIL")
