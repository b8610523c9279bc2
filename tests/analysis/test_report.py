"""Reports are self-contained, escape what they are given, and draw what the tables say."""

import io
import json
import math
import re

import numpy as np
import pytest

from medseg_ssl.analysis import comparison_html, figures, page, pictures, report
from medseg_ssl.analysis.label_efficiency import curve_rows, summarise

from .test_label_efficiency import BETTER, LONG, SCRATCH, rows_of

EVIL = '<script>alert("x")</script>'


def comparison(**changes):
    rows = rows_of({"scratch": SCRATCH, "scratch_long": LONG, EVIL: BETTER})
    summary = summarise(rows, baselines=["scratch", "scratch_long"])
    given = {
        "title": f"Test {EVIL}",
        "curve": curve_rows(rows),
        "summary": summary,
        "finished": 12,
        "planned": 12,
    }
    return report.Comparison(**{**given, **changes})


@pytest.fixture(scope="module")
def html():
    rows = {"worst": [page.Picture(pictures.contour_png(disk()), f"caption {EVIL}")]}
    return report.comparison_page(
        comparison(
            notes=[f"note {EVIL}"],
            pictures=rows,
            losses={"pretraining": {EVIL: [(1, 2.0), (2, 1.0)]}},
            configs={EVIL: f"a: {EVIL}"},
            command=f"medseg-ssl compare {EVIL}",
            picture=b"\x89PNG",
        )
    )


def disk():
    y, x = np.mgrid[:40, :30]
    truth = ((y - 10) ** 2 + (x - 8) ** 2 < 49).astype(np.uint8)
    return pictures.Slice(
        "key", np.full((40, 30), 100, np.uint8), truth, np.roll(truth, 4, axis=0), (1.0, 2.0)
    )


def without_plotly(html):
    return re.sub(r"<script>/\*\*.*?</script>", "", html, flags=re.S)


def test_page_fetches_nothing_and_escapes_everything(html):
    own = without_plotly(html)
    assert len(own) < len(html) / 5, "plotly is inside"
    assert EVIL not in own
    assert "alert(" in own
    assert not re.search(r'(src|href)="(?!data:)', own)
    assert "http" not in re.sub(r"<script.*?</script>", "", own, flags=re.S)


def test_verdict_comes_first_and_every_part_is_there(html):
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        "Label-efficiency curve",
        "Mean Dice by labels",
        "Paired differences in Dice",
        "Labels saved",
        "Example slices",
        "Loss",
        "Conditions",
        "All metrics and classes",
        "Configs",
        "How to make this again",
    ]
    assert html.index('class="verdicts"') < html.index("<h2>")
    assert "Unfinished" not in html


def test_data_of_the_figures_is_strict_json(html):
    found = re.findall(r'<script type="application/json">(.*?)</script>', html, flags=re.S)
    curve, loss = (json.loads(text) for text in found)
    assert list(curve) == [
        *("Dice", "NSD", "HD95 (mm)", "IoU", "precision", "recall"),
        "Dice of a",
        "Dice of b",
    ]
    trace = next(t for t in curve["Dice"]["data"] if t["name"] == EVIL)
    assert trace["y"] == pytest.approx(list(BETTER.values()), abs=0.01)
    assert min(trace["error_y"]["array"]) > 0
    assert trace["customdata"][0][2] == "12 cases × 4 draws"
    assert loss["pretraining"]["data"][0]["y"] == [2.0, 1.0]


def test_tables_show_the_numbers():
    c = comparison()
    first = next(row for row in c.curve if row["metric"] == "dice")
    cell = f"{first['mean']:.3f}<small>{first['ci_low']:.3f} to {first['ci_high']:.3f}</small>"
    assert cell in comparison_html.means_table(c.curve, c.summary)
    differences = comparison_html.differences_table(c.summary)
    assert "pooled 1, 2, 4" in differences
    assert '<span class="better">+0.' in differences
    saved = comparison_html.savings_table(c.summary, c.curve)
    assert "<td>scratch</td>" in saved
    assert "<b>≥ " in saved


def test_savings_cells_name_their_open_ends():
    item = {"savings": 2.0, "ci_low": None, "ci_high": None, "censored": True, "at_most": False, "budget": 2}
    cell = comparison_html.savings_cell(item, [1, 2, 4])
    assert cell == "≥ 2.00×<small>below 0.50 to above 2.00</small>"


def test_unfinished_and_empty_comparisons_have_a_page():
    assert "Unfinished: 3 of 12 fits are done" in report.comparison_page(comparison(finished=3))
    empty = report.Comparison(title="t", curve=[], summary=summarise([], baselines=["scratch"]), planned=4)
    page = report.comparison_page(empty)
    assert "No verdict yet" in page
    assert "Plotly" not in page


def test_missing_intervals_are_left_blank():
    row = {"init": "a", "budget": 1, "metric": "dice", "mean": 0.5, "ci_low": math.nan, "ci_high": math.nan}
    figure = figures.curve_figure(
        [{**row, "draws": 1, "cases": 1}], metric="dice", baselines=[], label="Dice"
    )
    assert figure["data"][0]["error_y"]["array"] == [0]
    assert figure["data"][0]["customdata"][0][1] == "no interval"
    assert comparison_html.interval_cell(0.5, math.nan, math.nan) == "0.500"
    assert comparison_html.interval_cell(math.nan, math.nan, math.nan) == ""


def test_curve_png_is_a_picture_and_the_same_each_time():
    from PIL import Image

    curve = comparison().curve
    png = figures.curve_png(curve, baselines=["scratch"], title="t")
    assert Image.open(io.BytesIO(png)).size == (1500, 960)
    assert png == figures.curve_png(curve, baselines=["scratch"], title="t")


def test_contours_lie_where_the_labels_are_in_radiological_orientation():
    from PIL import Image

    image = np.asarray(Image.open(io.BytesIO(pictures.contour_png(disk(), longest=300))))
    assert image.shape == (200, 300, 3), "pixels are square millimetres"
    white = np.argwhere((image == 255).all(axis=-1))
    # the disk is low in y and x: posterior is down, the patient's left is at the right
    assert white[:, 0].mean() == pytest.approx(200 * (1 - 10.5 / 40), abs=4)
    assert white[:, 1].mean() == pytest.approx(300 * (1 - 8.5 / 30), abs=4)
    red = np.argwhere((image == (0xFF, 0x5A, 0x5F)).all(axis=-1))
    assert red[:, 0].mean() < white[:, 0].mean()


def test_slices_read_back(tmp_path):
    path = tmp_path / "slices.npz"
    pictures.write_slices(path, [disk()])
    found = pictures.read_slices(path)["key"]
    np.testing.assert_array_equal(found.truth_HW, disk().truth_HW)
    assert found.spacing_mm == (1.0, 2.0)


def test_runs_page():
    run = report.Run(
        name=EVIL,
        kind="pretraining",
        losses=[(1, 1.0)],
        last={"x": 0.5},
        config=EVIL,
        environment={"cpus": 2},
    )
    page = without_plotly(report.runs_page("Runs", runs=[run], comparisons=[comparison()]))
    assert EVIL not in page
    assert page.count('class="figure"') == 2
    assert len(set(re.findall(r'class="figure" id="(.*?)"', page))) == 2


def test_axis_of_a_share_stays_a_share():
    from medseg_ssl.analysis.figures import _limits

    row = {"mean": 0.5, "ci_low": -0.9, "ci_high": 2.1}
    assert _limits({"scratch": [row]}, "dice") == (0.0, 1.0)
    low, high = _limits({"scratch": [{"mean": 0.8, "ci_low": 0.78, "ci_high": 0.82}]}, "dice")
    assert 0.7 < low < 0.78
    assert 0.82 < high < 0.9
    assert _limits({"scratch": [row]}, "hd95_mm") is None


def test_heat_map_has_targets_down_and_stars_what_is_found():
    clear = {"mean": 0.05, "low": 0.04, "high": 0.06, "covers": "cases and draws", "p_holm": 0.01}
    shared = {"kind": "same data", "baseline": "scratch"}
    cells = {
        ("organs", "CT"): clear | shared,
        ("organs", EVIL): clear | shared | {"mean": -0.02, "low": -0.5, "high": 0.4, "p_holm": 0.8},
        ("lesions", "CT"): clear | shared | {"mean": 0.07, "covers": "cases", "low": math.nan},
    }
    shown = figures.heat_map(cells, columns=["CT", EVIL], targets=["organs", "lesions"], gain=True)
    (trace,) = shown["data"]
    assert (trace["x"], trace["y"]) == (["CT", EVIL], ["organs", "lesions"])
    assert trace["z"] == [[0.05, -0.02], [0.07, None]]
    assert trace["text"] == [["+0.050*", "-0.020"], ["+0.070", ""]]
    assert (
        trace["customdata"][0][0] == "+0.050, 95 % interval +0.040 to +0.060<br>same data<br>against scratch"
    )
    assert trace["customdata"][1] == ["+0.070, no interval<br>same data<br>against scratch", "not there"]
    plain = {key: {"mean": 0.5, "low": 0.4, "high": 0.6} for key in cells}
    (dice,) = figures.heat_map(plain, columns=["CT"], targets=["organs"], gain=False)["data"]
    assert dice["text"] == [["0.500"]]
    parts = [page.section("Transfer matrix", page.figure("transfer0", {"gain": shown}))]
    html = without_plotly(report.runs_page("Runs", transfers=[(f"Transfer {EVIL}", parts)]))
    assert EVIL not in html
    assert html.count("<h2>Transfer matrix</h2>") == 1


def test_smallest_detectable_difference_stands_in_its_cell():
    summary = comparison().summary
    assert "Detectable" not in comparison_html.differences_table(
        {"comparisons": [{**c, "detectable": math.nan} for c in summary["comparisons"]]}
    )
    found = [{**c, "detectable": 0.0123} for c in summary["comparisons"]]
    html = comparison_html.differences_table({"comparisons": found})
    assert html.count("<small>detectable 0.012</small>") == len(found)
    assert "Detectable: the smallest true difference" in html


def test_a_single_draw_gets_no_colour_and_no_p():
    found = summarise(
        rows_of({"scratch": {1: 0.5}, "mae": {1: 0.9}}, cases=6, draws=1), baselines=["scratch"]
    )
    html = comparison_html.differences_table(found)
    assert 'class="better"' not in html
    assert "judges nothing: no colour" in html
    cells = html[html.index("p, Wilcoxon (Holm)") :]
    assert cells.count("<td>–</td>") + cells.count(">–<") >= 5


def test_more_inits_than_colours_get_another_marker():
    names = [f"init{i}" for i in range(9)]
    seen = figures.marks(["scratch", *names], ["scratch"])
    assert [seen[n] for n in ("scratch", "init6", "init7")] == ["circle", "circle", "diamond"]


def test_saliency_lies_where_the_map_is_in_radiological_orientation():
    from PIL import Image

    heat = np.zeros((40, 30), np.uint8)
    heat[5:9, 4:8] = 255
    png = pictures.saliency_png(disk(), heat, longest=300)
    image = np.asarray(Image.open(io.BytesIO(png))).astype(int)
    warm = np.argwhere(image[..., 0] - image[..., 2] > 100)
    assert warm[:, 0].mean() == pytest.approx(200 * (1 - 7 / 40), abs=5)
    assert warm[:, 1].mean() == pytest.approx(300 * (1 - 6 / 30), abs=5)
