"""The page of an evaluated segmenter: numbers of its tables, nothing fetched, nothing taken for markup."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from medseg_ssl.analysis.evaluation_page import Evaluated, evaluation_page, evaluation_sections
from medseg_ssl.analysis.tables import IDENTITY, write_csv, write_json
from medseg_ssl.config import UserError


def case(name, of_class, dice):
    return {"case": name, "class": of_class, "dice": dice}


def change(of_class, difference, *, ends=(None, None), metric="dice", one_sided=0, **more):
    low, high = ends
    return {
        **more, "class": of_class, "metric": metric, "subjects": 9, "cases": 12, "one_sided": one_sided, "before": 0.8,
        "after": 0.8 + difference, "difference": difference, "ci_low": low, "ci_high": high,
        "p": None if low is None else 0.01, "p_holm": None if low is None else 0.0004,
    }  # fmt: skip


def setting(name, severity, amount, unit, *args, **more):
    return change(*args, corruption=name, severity=severity, amount=amount, unit=unit, **more)


def group(name, mean, *, small="", shared=0, p_groups=0.2):
    return {
        "by": "contrast", "group": name, "class": "mean over classes", "metric": "dice", "subjects": 6, "cases": 7,
        "mean": mean, "ci_low": mean - 0.1, "ci_high": mean + 0.1, "small": small, "shared": shared, "gap": -0.123,
        "p": 0.2, "p_holm": 0.4, "p_groups": p_groups,
    }  # fmt: skip


SCORE = {"mean": 0.8125, "std": 0.05, "cases": 3}
FOUND = Evaluated(
    title="<b>mine</b>",
    summary={
        "cases": 3, "conditions": ["One scan is <left> out."], "metrics": {"dice": SCORE},
        "classes": {"liver": {"dice": SCORE}, "a&b": {}},
    },
    cases=[case("k1", "liver", 0.9), case("k1", "a&b", 0.7), case("k2", "liver", 0.2), case("k2", "a&b", None),
           case("k3", "liver", None), case("k3", "a&b", None)],
    robustness=[
        setting("undisturbed", 0, 0.0, None, "mean over classes", 0.0, ends=(0.0, 0.0)) | {"p": None, "p_holm": None},
        setting("noise", 1, 0.05, "share", "mean over classes", -0.25, ends=(-0.3, -0.2), one_sided=2),
        setting("noise", 1, 0.05, "share", "a&b", 0.1, ends=(-0.1, 0.3)),
        setting("noise", 1, 0.05, "share", "mean over classes", -0.05, ends=(-0.1, 0.0), metric="nsd"),
    ],
    calibration=[
        {"class": "mean over classes", "measure": m, "subjects": 9, "cases": 12, "mean": v, "ci_low": v - 0.01,
         "ci_high": v + 0.01}
        for m, v in (("ece", 0.071), ("brier", 0.052), ("overconfidence", 0.033))
    ],
    reliability=[
        {"class": "a&b", "low": 0.0, "high": 0.5, "voxels": 40, "cases": 3, "confidence": 0.25, "frequency": 0.125}
    ],
    missing=[{"given": "CT", **change("mean over classes", -0.3, ends=(-0.4, -0.2))}],
    subgroups=[group("T1 <Gd>", 0.7), group("T2", 0.6, small="yes", shared=1)],
    forgetting=[{"earlier": "abc", **change("liver", -0.45, ends=(-0.5, -0.4))}],
    command="medseg-ssl evaluate",
    made={"split": "default"},
)  # fmt: skip


class Reader(HTMLParser):
    """Sections with the cells of their tables, and what a page would fetch."""

    def __init__(self, html):
        super().__init__()
        self.cells, self.fetched, self.at, self.inside = {}, [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.fetched += [
            v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("data:", "#"))
        ]
        self.inside = tag
        if tag == "td":
            self.cells.setdefault(self.at, []).append("")

    def handle_endtag(self, tag):
        self.inside = "" if tag in ("h2", "script") else self.inside

    def handle_data(self, data):
        if self.inside == "h2":
            self.at = data
        elif self.inside in ("td", "small", "span") and self.at in self.cells:
            self.cells[self.at][-1] += data + " "


@pytest.fixture(scope="module")
def html():
    return evaluation_page(FOUND)


def cells_of(html, title):
    return [" ".join(cell.split()) for cell in Reader(html).cells[title]]


def test_nothing_is_fetched_and_nothing_is_markup(html):
    assert not Reader(html).fetched
    assert "<b>mine" not in html
    assert "&lt;left&gt;" in html
    assert "T1 &lt;Gd&gt;" in html
    for data in re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL):
        json.loads(data, parse_constant=pytest.fail)


def test_tables_show_the_numbers(html):
    assert "0.812 ± 0.050, 3 cases" in cells_of(html, "Scores")
    noise = cells_of(html, "Robustness")[7:14]
    assert noise == [
        "noise 1 0.05 share", "0.800", "0.550", "-0.250 -0.300 to -0.200", "< 0.001", "9 subjects, 12 cases", "2"
    ]  # fmt: skip
    assert '<span class="worse">-0.250' in html
    assert cells_of(html, "Robustness")[:5] == ["undisturbed", "0.800", "0.800", "", ""], (
        "itself, so no difference"
    )
    assert "0.071 0.061 to 0.081" in cells_of(html, "Calibration")
    assert "+0.033 +0.023 to +0.043" in cells_of(html, "Calibration")
    assert cells_of(html, "Missing channels")[0] == "CT"
    groups = cells_of(html, "Subgroups")
    assert groups[:5] == ["T1 <Gd>", "0.700 0.600 to 0.800", "-0.123", "0.400", "6 subjects, 7 cases"]
    assert groups[9] == "6 subjects, 7 cases, few, 1 in other groups too"
    assert "contrast, all groups: p 0.200" in html
    assert cells_of(html, "Forgetting")[3] == "-0.450 -0.500 to -0.400"


def test_one_case_has_no_spread_and_one_subject_no_interval():
    alone = dict(FOUND.summary, classes={}, metrics={"dice": {"mean": 0.5, "std": 0.0, "cases": 1}})
    row = change("mean over classes", -0.1, given="CT") | {"subjects": 1, "cases": 1}
    html = evaluation_page(Evaluated(title="one", summary=alone, cases=FOUND.cases, missing=[row]))
    assert cells_of(html, "Scores")[1] == "0.500 1 case"
    assert cells_of(html, "Missing channels")[3:6] == ["-0.100", "", "1 subject, 1 case"]


def test_worst_cases_come_first_and_those_without_a_score_last(html):
    cells = cells_of(html, "Cases, worst first")
    assert cells == ["k2", "0.200", "0.200", "", "k1", "0.800", "0.900", "0.700", "k3", "", "", ""]


def test_figures_hold_what_the_tables_say():
    parts = "".join(evaluation_sections(FOUND))
    changes, reliability, missing = (
        json.loads(data)
        for data in re.findall(r'<script type="application/json">(.*?)</script>', parts, re.DOTALL)
    )
    assert list(changes) == ["mean over classes", "a&b"]
    [trace] = changes["mean over classes"]["data"]
    assert (trace["x"], trace["y"]) == (["noise 1"], [-0.25])
    assert trace["error_y"]["array"] == pytest.approx([0.05])
    assert trace["customdata"] == ["95 % interval -0.300 to -0.200"]
    assert reliability["reliability"]["data"][1]["x"] == [0.25]
    assert reliability["reliability"]["data"][1]["y"] == [0.125]
    assert missing["mean over classes"]["data"][0]["x"] == ["CT"]


def test_what_was_not_asked_for_has_no_section():
    html = evaluation_page(Evaluated(title="plain", summary=FOUND.summary, cases=FOUND.cases))
    assert set(Reader(html).cells) == {"Scores", "Cases, worst first"}
    assert "plotly" not in html.lower()


def test_a_folder_is_read_back_and_joins_a_report(tmp_path):
    from finetune.evaluated import is_evaluation, read_evaluation, write_page
    from finetune.report import main

    out = tmp_path / "evaluated"
    about = {
        "segmenter": "5e6", "archive": "a1b2", "split": "default", "subset": "test", "nsd_tolerance_mm": 2.0,
        "precision": "fp32", "flips": True, "task": "mine",
    }  # fmt: skip
    assert not is_evaluation(out)
    write_json(out / IDENTITY, about)
    assert not is_evaluation(out), "its scores are not there yet"
    write_csv(out / "cases.csv", FOUND.cases, columns=("case", "class", "dice"))
    write_csv(out / "robustness.csv", FOUND.robustness, columns=list(FOUND.robustness[0]))
    write_json(out / "summary.json", {**about, **FOUND.summary})
    assert is_evaluation(out)
    found = read_evaluation(out)
    assert found.robustness == [dict(row) for row in FOUND.robustness]
    assert [row["dice"] for row in found.cases] == [0.9, 0.7, 0.2, None, None, None]
    assert "--flips" in found.command
    assert not found.calibration
    assert "--robustness --by" not in found.command
    assert found.command.endswith("--flips --task mine --robustness")
    html = write_page(out).read_text()
    assert cells_of(html, "Robustness")[7] == "noise 1 0.05 share"
    alone = main([str(out), "--out", str(tmp_path / "one.html")])
    assert alone.read_text() == html
    page = main([str(out), str(out), "--out", str(tmp_path / "all.html")])
    assert page.read_text().count("<h2>Robustness</h2>") == 2
    assert {"evaluation0-robustness", "evaluation1-robustness"} <= set(
        re.findall(r'id="([^"]+)"', page.read_text())
    )


def test_folders_of_earlier_versions_and_broken_ones(tmp_path):
    """Tables that did not count subjects nor one-sided cases have a page; cells that are no numbers end in a line."""
    from finetune.evaluated import read_evaluation, write_page

    about = {
        "segmenter": "5e6", "archive": "a1b2", "split": "fold 1", "subset": "test", "nsd_tolerance_mm": 2.0,
        "precision": "fp32", "flips": False, "task": "mine",
    }  # fmt: skip
    rows = [{k: v for k, v in row.items() if k not in ("one_sided", "subjects")} for row in FOUND.robustness]
    groups = [{k: v for k, v in row.items() if k != "shared"} for row in FOUND.subgroups]
    write_csv(tmp_path / "cases.csv", FOUND.cases, columns=("case", "class", "dice"))
    write_csv(tmp_path / "robustness.csv", rows, columns=list(rows[0]))
    write_csv(tmp_path / "subgroups.csv", groups, columns=list(groups[0]))
    write_json(tmp_path / "summary.json", {**about, **FOUND.summary})
    html = write_page(tmp_path).read_text()
    assert cells_of(html, "Robustness")[11] == "12 cases"
    assert "--split 'fold 1'" in read_evaluation(tmp_path).command
    assert "--by contrast" in read_evaluation(tmp_path).command
    wrong = {"difference": "<img src=x>", "before": "many"}
    write_csv(tmp_path / "robustness.csv", [rows[1] | wrong], columns=list(rows[0]))
    with pytest.raises(UserError, match="does not hold what 'evaluate' writes: could not convert"):
        read_evaluation(tmp_path)
    write_json(tmp_path / "summary.json", about)
    with pytest.raises(UserError, match="does not hold what 'evaluate' writes: no 'cases'"):
        read_evaluation(tmp_path)


def test_numbers_of_empty_cells():
    from medseg_ssl.analysis.evaluation_page import number

    assert math.isnan(number(None))
    assert math.isnan(number(""))
    assert number("0.5") == 0.5
