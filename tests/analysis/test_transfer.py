"""The matrix against numbers by hand; controls, asymmetry and mixtures on scores whose answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from medseg_ssl.analysis.figures import heat_map_png
from medseg_ssl.analysis.label_efficiency import curve_rows
from medseg_ssl.analysis.scores import Table
from medseg_ssl.analysis.statistics import crossed_interval, paired_interval
from medseg_ssl.analysis.transfer import (
    OTHER,
    SAME_ARCHIVE,
    SAME_DATA,
    SAME_MODALITY,
    SOME_MODALITIES,
    UNKNOWN,
    Source,
    Target,
    difference_table,
    independent_difference,
    kind_of,
    matrix_rows,
    transfer_summary,
)
from medseg_ssl.analysis.transfer_page import Transfer, gain_cells, transfer_page
from medseg_ssl.analysis.transfer_verdicts import ONE_PRETRAINING, transfer_verdicts

SOURCES = [
    Source("CT", {"a": ("CT",)}, ("CT",)),
    Source("MR", {"b": ("MR",)}, ("MR",)),
    Source("CT+MR", {"a": ("CT",), "b": ("MR",)}, ("CT", "MR")),
    Source("far", {"c": ("CT",)}, ("CT",)),
]
GAINS = {
    "organs": {"CT": 0.05, "MR": 0.01, "CT+MR": 0.06, "far": 0.03},
    "lesions": {"CT": 0.04, "MR": 0.05, "CT+MR": 0.02, "far": 0.0},
}


def targets(**changes):
    plain = {"low_budgets": (1, 2), "baselines": ("scratch", "scratch_long")}
    return [
        Target("organs", "a", ("CT",), **plain, **changes),
        Target("lesions", "b", ("MR",), **plain, **changes),
    ]


def rows(*, noise=0.004, gains=GAINS, cases=6, draws=3):
    """Dice of every init: crossed effects of case and draw, a gain per cell, and noise of its own."""
    generator = np.random.default_rng(0)
    out = []
    for target, of_target in gains.items():
        case_N, draw_D = 0.05 * generator.standard_normal(cases), 0.02 * generator.standard_normal(draws)
        for init, gain in {"scratch": 0.0, "scratch_long": 0.02, **of_target}.items():
            for budget in (1, 2, 4):
                for n in range(cases):
                    for d in range(draws):
                        dice = (
                            0.5
                            + 0.05 * budget
                            + gain
                            + case_N[n]
                            + draw_D[d]
                            + noise * generator.standard_normal()
                        )
                        row = {"task": "t", "source": "", "target": target, "init": init, "budget": budget}
                        row |= {"draw": d, "seed": 0, "case": f"{target}{n}", "class": "x", "dice": dice}
                        out.append(row | dict.fromkeys(("iou", "nsd", "precision", "recall"), dice / 2))
                        out[-1]["hd95_mm"] = math.nan
    return out


def dice_of(found, target, init, budgets):
    """(cases, draws), by hand."""
    table = np.full((6, 3, len(budgets)), np.nan)
    for row in found:
        if row["target"] == target and row["init"] == init and row["budget"] in budgets:
            table[int(row["case"][-1]), row["draw"], budgets.index(row["budget"])] = row["dice"]
    return table.mean(axis=2)


def test_matrix_rows_are_means_and_paired_differences_to_the_better_baseline():
    found = rows()
    matrix = matrix_rows("t", found, SOURCES, targets())
    assert len(matrix) == 4 * 2 * 3 * 6
    (cell,) = [
        r
        for r in matrix
        if (r["source"], r["target"], r["budget"], r["metric"]) == ("MR", "organs", 2, "dice")
    ]
    own, better = dice_of(found, "organs", "MR", [2]), dice_of(found, "organs", "scratch_long", [2])
    interval, gain = crossed_interval(own), paired_interval(own, better)
    assert (cell["mean"], cell["ci_low"], cell["ci_high"]) == (interval.mean, interval.low, interval.high)
    assert cell["gain"] == pytest.approx(own.mean() - better.mean())
    assert (cell["gain_ci_low"], cell["gain_ci_high"]) == pytest.approx((gain.low, gain.high))
    assert gain.mean == pytest.approx(-0.01, abs=0.005), "scratch_long is the better baseline"


def test_cells_are_pooled_over_few_labels():
    found = rows()
    summary = transfer_summary(found, SOURCES, targets())
    assert len(summary["cells"]) == 8
    cell = next(c for c in summary["cells"] if (c["source"], c["target"]) == ("CT", "lesions"))
    by_hand = paired_interval(
        dice_of(found, "lesions", "CT", [1, 2]), dice_of(found, "lesions", "scratch_long", [1, 2])
    )
    assert (cell["budgets"], cell["baseline"]) == ([1, 2], "scratch_long")
    assert (cell["mean"], cell["low"], cell["high"]) == pytest.approx(
        (by_hand.mean, by_hand.low, by_hand.high)
    )
    assert cell["kind"] == OTHER
    assert cell["p_holm"] >= cell["p"]


def test_kinds():
    ct, mr, both, far = SOURCES
    organs, lesions = targets()
    assert [kind_of(s, organs) for s in SOURCES] == [SAME_DATA, OTHER, SAME_DATA, SAME_MODALITY]
    assert kind_of(mr, lesions) == SAME_DATA
    assert kind_of(ct, Target("x", "a", ("MR",), (), ())) == SAME_ARCHIVE
    assert kind_of(far, Target("x", "a", ("CT", "MR"), (), ())) == SOME_MODALITIES
    assert kind_of(both, Target("x", "a", ("CT", "MR"), (), ())) == SAME_MODALITY
    assert kind_of(Source("file", {}, ("CT",)), organs) == UNKNOWN


def test_controls_compare_kinds_of_single_sources():
    found = {(c["control"], c["target"]): c for c in transfer_summary(rows(), SOURCES, targets())["controls"]}
    same = found["same modality, other data − other modality", "organs"]
    assert (same["first"], same["second"]) == (["far"], ["MR"])
    assert same["mean"] == pytest.approx(0.02, abs=0.005)
    assert same["low"] > 0
    assert found["same data − other modality", "lesions"]["second"] == ["CT", "far"]
    assert found["same data − other modality", "lesions"]["mean"] == pytest.approx(0.03, abs=0.005)
    assert ("same modality, other data − other modality", "lesions") not in found


def test_asymmetry_of_independent_targets_is_welch_and_of_shared_subjects_paired():
    found = rows()
    (apart,) = transfer_summary(found, SOURCES, targets())["asymmetry"]
    assert (apart["there"], apart["back"]) == (["CT", "lesions"], ["MR", "organs"])
    there = paired_interval(
        dice_of(found, "lesions", "CT", [1, 2]), dice_of(found, "lesions", "scratch_long", [1, 2])
    )
    back = paired_interval(
        dice_of(found, "organs", "MR", [1, 2]), dice_of(found, "organs", "scratch_long", [1, 2])
    )
    assert apart["mean"] == pytest.approx(there.mean - back.mean)
    assert apart["standard_error"] == pytest.approx(math.hypot(there.standard_error, back.standard_error))

    subjects = {f"{target}{n}": f"s{n}" for target in GAINS for n in range(6)}
    one = [
        Target("organs", "a", ("CT",), (1, 2), ("scratch_long",), subjects),
        Target("lesions", "a", ("MR",), (1, 2), ("scratch_long",), subjects),
    ]
    sources = [Source("CT", {"a": ("CT",)}, ("CT",)), Source("MR", {"a": ("MR",)}, ("MR",))]
    (paired,) = transfer_summary(found, sources, one)["asymmetry"]
    gain_there = dice_of(found, "lesions", "CT", [1, 2]) - dice_of(found, "lesions", "scratch_long", [1, 2])
    gain_back = dice_of(found, "organs", "MR", [1, 2]) - dice_of(found, "organs", "scratch_long", [1, 2])
    by_hand = paired_interval(gain_there, gain_back)
    assert (paired["mean"], paired["low"], paired["high"]) == pytest.approx(
        (by_hand.mean, by_hand.low, by_hand.high)
    )
    # one scan of one subject is missing: both are taken on the five that both have
    less = [r for r in found if (r["target"], r["case"]) != ("lesions", "lesions0")]
    (most,) = transfer_summary(less, sources, one)["asymmetry"]
    by_hand = paired_interval(gain_there[1:], gain_back[1:])
    assert (most["mean"], most["low"], most["high"]) == pytest.approx(
        (by_hand.mean, by_hand.low, by_hand.high)
    )
    assert most["gain_back"] == pytest.approx(gain_back[1:].mean())
    assert most["cases"] == 5


def test_what_stands_beside_decides_no_gain_and_keeps_its_false_alarms():
    """Of a second class that nobody's case has, sources say nothing; ``otsu`` predicts it in half of the cases."""
    found = [row | {"class": "a"} for row in rows()]
    beside = [{**row, "init": "otsu", "source": ""} for row in found if row["init"] == "scratch"]
    empty = [{**row, "class": "b", "dice": math.nan} for row in [*found, *beside]]
    alarms = [
        {**row, "dice": 0.0} if row["init"] == "otsu" and row["case"][-1] in "012" else row for row in empty
    ]
    with_beside = [replace(t, beside=("otsu",)) for t in targets()]
    plain = transfer_summary(found, SOURCES, targets())
    told = transfer_summary([*found, *beside, *alarms], SOURCES, with_beside)
    for part in ("cells", "controls", "asymmetry", "mixed"):
        assert told[part] == plain[part], part
    quiet = transfer_summary([*found, *beside, *empty], SOURCES, with_beside)["beside"]
    for loud, still in zip(told["beside"], quiet, strict=True):
        assert loud["own_mean"] == pytest.approx(still["own_mean"] * 0.75, rel=0.01), (
            "half of the cases lose half"
        )
        assert loud["mean"] == pytest.approx(still["mean"]), "and no difference does"
    assert told["false_alarms"] == {}


def test_independent_difference_is_welchs_test():
    generator = np.random.default_rng(1)
    a, b = generator.normal(1, 1, 9), generator.normal(0, 3, 5)
    found = independent_difference(crossed_interval(a[:, None]), crossed_interval(b[:, None]))
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert (found.p, found.freedom) == pytest.approx((welch.pvalue, welch.df))
    ends = welch.confidence_interval()
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    alone = independent_difference(crossed_interval(a[:1, None]), crossed_interval(b[:, None]))
    assert math.isnan(alone.low)
    assert alone.covers == "nothing"


def test_union_is_compared_with_each_single_source_of_its_data():
    mixed = transfer_summary(rows(), SOURCES, targets())["mixed"]
    assert [(m["union"], m["single"], m["target"], m["best"]) for m in mixed] == [
        ("CT+MR", "CT", "organs", True),
        ("CT+MR", "MR", "organs", False),
        ("CT+MR", "CT", "lesions", False),
        ("CT+MR", "MR", "lesions", True),
    ]
    assert mixed[1]["mean"] == pytest.approx(0.05, abs=0.005)
    assert mixed[3]["high"] < 0


def test_verdicts_claim_what_is_shown_and_no_more():
    summary = transfer_summary(rows(), SOURCES, targets())
    lines = transfer_verdicts(summary)
    assert "8 cells" in lines[0]
    assert "CT → organs (+0.03" in lines[0].split("loss")[0]
    assert "far → lesions (-0.02" in lines[0].split("loss")[1]
    (union,) = [line for line in lines if line.startswith("CT+MR → organs against CT")]
    assert "it beats each of its single sources" in union
    (limit,) = [line for line in lines if line.startswith("More than one in five such benchmarks")]
    of_ct = [c["detectable"] for c in summary["cells"] if c["target"] == "organs"]
    assert f"organs {min(of_ct):.3f} to {max(of_ct):.3f}" in limit
    assert not any("two draws" in line for line in lines)
    two = transfer_verdicts(transfer_summary(rows(draws=2), SOURCES, targets()))
    assert sum("Over two draws" in line for line in two) == len(targets())
    noisy = transfer_verdicts(transfer_summary(rows(noise=0.4), SOURCES, targets()))
    assert "gain none; loss none" in noisy[0]
    assert any("no significant difference" in line for line in noisy)
    single = transfer_verdicts(transfer_summary(rows(draws=1), SOURCES, targets()))
    assert single[0].startswith("None of 8 cells can be judged")
    ranking = {
        "target": "organs",
        "estimate": "LogME",
        "tau": 1.0,
        "p": 1 / 3,
        "sources": 3,
        "lowest_p": 1 / 3,
    }
    (line,) = [
        line
        for line in transfer_verdicts({**summary, "estimates": {"ranking": [ranking]}})
        if "Kendall" in line
    ]
    assert "p = 0.33 at best, so nothing is shown" in line


def mixture(union, target, *differences, covers="cases and draws"):
    """A union against single sources, each with its mean difference and p."""
    ends = {"low": 0.01, "high": 0.05, "p_holm": 0.001, "covers": covers}
    return [
        {"union": union, "target": target, "single": f"s{n}", "best": n == 0, "mean": mean, "p": p} | ends
        for n, (mean, p) in enumerate(differences)
    ]


def beating(*items):
    """Unions and targets of which the verdicts say that every single source is beaten."""
    mixed = [item for of_union in items for item in of_union]
    empty = {key: () for key in ("cells", "controls", "asymmetry", "beside")}
    lines = transfer_verdicts({**empty, "mixed": mixed})
    return [line.split(" against")[0] for line in lines if "it beats each of its single sources" in line]


def test_that_a_union_beats_each_of_its_sources_is_corrected_over_unions_and_targets():
    """The largest p of each: 0.03 alone is below 0.05, beside another it is doubled."""
    one, two = mixture("U", "a", (0.03, 0.001), (0.02, 0.03)), mixture("U", "b", (0.03, 0.02), (0.02, 0.04))
    assert beating(one) == ["U → a"]
    assert beating(one, two) == []
    assert beating(mixture("U", "a", (0.03, 0.001), (0.02, 0.02)), two) == ["U → a", "U → b"]
    # a source that scores more does not open the way for others, however small its p
    assert beating(one, mixture("U", "b", (-0.03, 0.0001), (0.02, 0.0001))) == []
    # what cannot be judged is no test
    assert beating(one, mixture("U", "b", (0.03, 0.04), (0.02, 0.04), covers="cases")) == ["U → a"]


def several(found, count):
    """The rows with ``count`` pretrainings of every source, each moved by a number of its own."""
    out = []
    for row in found:
        times = 1 if row["init"].startswith("scratch") else count
        out += [{**row, "dice": row["dice"] + 0.03 * n * n, "pretraining": n} for n in range(times)]
    return out


def test_pretrainings_are_the_third_level_of_every_interval():
    found = several(rows(), 3)
    summary = transfer_summary(found, SOURCES, targets())
    cell = next(c for c in summary["cells"] if (c["source"], c["target"]) == ("CT", "lesions"))
    own = dice_of(rows(), "lesions", "CT", [1, 2])
    layers = np.stack([own, own + 0.03, own + 0.12], axis=-1)
    by_hand = paired_interval(layers, dice_of(rows(), "lesions", "scratch_long", [1, 2])[..., None])
    assert (cell["pretrainings"], cell["covers"]) == (3, "cases, draws and pretrainings")
    assert (cell["mean"], cell["low"], cell["high"]) == pytest.approx(
        (by_hand.mean, by_hand.low, by_hand.high)
    )
    assert {c["pretrainings"] for c in summary["asymmetry"]} == {3}
    assert ONE_PRETRAINING not in transfer_verdicts(summary)
    assert transfer_verdicts(transfer_summary(rows(), SOURCES, targets()))[-1] == ONE_PRETRAINING
    mixed = [row for row in found if row["init"] != "far" or not row["pretraining"]]
    assert transfer_verdicts(transfer_summary(mixed, SOURCES, targets()))[-1].startswith(
        "One pretraining of far:"
    )


def test_sources_share_the_pretrainings_that_both_have():
    first, second = np.arange(12.0).reshape(2, 2, 3), np.ones((2, 2, 2))
    found = difference_table(
        Table(first, ("a", "b"), (0, 1), (0, 1, 2)), Table(second, ("a", "b"), (0, 1), (2, 3))
    )
    assert found.pretrainings == (2,)
    np.testing.assert_array_equal(found.scores_NDP[..., 0], first[..., 2] - 1)


def test_what_stands_beside_is_compared_with_every_init_and_is_no_source():
    generator = np.random.default_rng(3)
    found, scratch = rows(), [r for r in rows() if (r["init"], r["target"]) == ("scratch", "organs")]
    found += [{**r, "init": "size_only", "dice": r["dice"] + 0.04 + 0.002 * generator.standard_normal()}
              for r in scratch if r["budget"] < 4]  # fmt: skip
    asked = [replace(targets()[0], beside=("size_only",)), targets()[1]]
    summary, without = transfer_summary(found, SOURCES, asked), transfer_summary(rows(), SOURCES, targets())
    assert {key: summary[key] for key in without if key != "beside"} == {
        key: without[key] for key in without if key != "beside"
    }
    assert without["beside"] == []
    items = {item["init"]: item for item in summary["beside"]}
    assert list(items) == [*(s.name for s in SOURCES), "scratch", "scratch_long"]
    assert items["scratch"]["mean"] == pytest.approx(-0.04, abs=0.003)
    by_hand = paired_interval(
        dice_of(found, "organs", "CT+MR", [1, 2]), dice_of(found, "organs", "size_only", [1, 2])
    )
    assert (items["CT+MR"]["mean"], items["CT+MR"]["low"]) == pytest.approx((by_hand.mean, by_hand.low))
    (line,) = [line for line in transfer_verdicts(summary) if "size_only" in line]
    assert line.startswith("organs: size_only alone reaches 0.6")
    above, below = line.split("significantly above it")[1].split("below it")
    assert "CT+MR (+0.02" in above
    assert "scratch (-0.04" in below


def test_a_target_of_several_channels_has_a_control_of_its_own():
    both = [replace(targets()[0], modalities=("PT", "CT"))]
    found = [row for row in rows() if row["target"] == "organs"]
    (control,) = transfer_summary(found, SOURCES, both)["controls"]
    assert control["control"] == "one of its modalities − other modality"
    assert (control["first"], control["second"]) == (["CT", "far"], ["MR"])
    assert control["mean"] == pytest.approx(0.03, abs=0.005)


def test_unfinished_targets_and_sources_are_left_out():
    partial = [r for r in rows() if r["target"] == "organs" and r["init"] in ("scratch", "CT")]
    summary = transfer_summary(partial, SOURCES, targets())
    assert [(c["source"], c["target"], c["baseline"]) for c in summary["cells"]] == [
        ("CT", "organs", "scratch")
    ]
    assert summary["asymmetry"] == summary["mixed"] == summary["controls"] == []
    assert transfer_verdicts(transfer_summary([], SOURCES, targets())) == [
        "No cell of the matrix is finished yet."
    ]


def test_what_cannot_be_judged_has_no_p_on_the_page():
    """Gains of 0.05 over 12 cases under a single draw: p would be near 0, and says nothing of new draws."""
    summary = transfer_summary(rows(draws=1, cases=12), SOURCES, targets())
    assert {item["covers"] for item in summary["cells"]} == {"cases"}
    assert min(item["p"] for item in summary["cells"]) < 0.001
    shown = transfer_page(Transfer("t", summary, [], ["CT"], ["organs"])).split("<h2>")
    for title, name in {"Gains over": "cells", "Controls": "controls", "Mixed": "mixed"}.items():
        (part,) = [part for part in shown if part.startswith(title)]
        assert part.count("<td>–</td><td>–</td>") == len(summary[name]) > 0
        assert "judges nothing: no p." in part
    assert "judges nothing" not in transfer_page(
        Transfer("t", transfer_summary(rows(), SOURCES, targets()), [], ["CT"], ["organs"])
    )
    # pretrained three times here and once there: an asymmetry of too many kinds of levels
    uneven = [row for row in several(rows(), 3) if row["target"] == "organs" or not row["pretraining"]]
    (item,) = (found := transfer_summary(uneven, SOURCES, targets()))["asymmetry"]
    assert item["covers"] == "nothing"
    page = transfer_page(Transfer("t", found, [], ["CT"], ["organs"]))
    assert "Of two gains one alone covers new pretrainings: no p." in page


def test_page_holds_every_part_and_escapes():
    summary = transfer_summary(rows(), SOURCES, targets())
    summary |= {
        "verdicts": transfer_verdicts(summary),
        "estimates": {"values": {"organs": {"CT": -0.5}}, "ranking": []},
    }
    alike = {
        "target": "organs",
        "first": "CT",
        "first_state": "pretrained",
        "second": "CT",
        "second_level": 0,
    }
    given = {"target": "organs", "init": "CT", "given": "PT", "metric": "dice", "mean": 0.25, "ci_low": 0.2}
    found = Transfer(
        title="Transfer <b>",
        summary=summary,
        curve=curve_rows(rows()),
        sources=[s.name for s in SOURCES],
        targets=["organs", "lesions", "waiting"],
        similarity=[
            alike | {"second_state": "fine-tuned", "first_level": level, "cka": cka}
            for level, cka in ((0, 0.87), (1, 0.31))
        ],
        missing=[given | {"ci_high": 0.3}],
        links={"organs": "targets/organs/report.html"},
        roles={"organs": {"CT": "source: same data", "scratch": "scratch"}},
        picture=heat_map_png(gain_cells(summary), columns=["CT", "MR"], targets=["organs"], title="t"),
        finished=3,
        planned=4,
    )
    page = transfer_page(found)
    for text in (
        "Transfer &lt;b&gt;",
        "3 of 4 fits",
        "CT → lesions",
        "0.87",
        "<td>level 1 before</td><td>0.31</td>",
        "0.250",
        "-0.5000",
        "Dice, 4 labels",
    ):
        assert text in page, text
    assert 'href="targets/organs/report.html"' in page
    assert found.picture.startswith(b"\x89PNG")


def test_a_case_that_only_false_alarms_score_dilutes_nothing():
    """Half the cases hold no class; all inits raise a false alarm there in the first draw alone."""
    whole = rows(noise=0.0, cases=12)
    absent = {f"{target}{n}" for target in GAINS for n in range(6)}
    holed = [
        row | {"dice": 0.0 if row["draw"] == 0 else math.nan} if row["case"] in absent else row
        for row in whole
    ]
    known = [row for row in whole if row["case"] not in absent]
    expected, found = (transfer_summary(given, SOURCES, targets()) for given in (known, holed))
    for part in ("cells", "controls", "mixed", "asymmetry"):
        assert expected[part]
        for wanted, item in zip(expected[part], found[part], strict=True):
            assert item["mean"] == pytest.approx(wanted["mean"], abs=1e-9)
            assert item["cases"] == wanted["cases"]
    gains = [row for row in matrix_rows("t", holed, SOURCES, targets()) if row["metric"] == "dice"]
    assert {(r["source"], r["target"]): round(r["gain"], 6) for r in gains} == {
        (source, target): round(gain - 0.02, 6) for target, of in GAINS.items() for source, gain in of.items()
    }
