"""Verdicts on summaries made by hand: what the pooled comparison does not show, a single budget must not claim."""

from medseg_ssl.analysis.verdicts import verdicts


def compared(baseline, mean, low, high, scope="low budgets"):
    counts = {"cases": 12, "draws": 4, "pretrainings": 1, "p": 0.01, "p_holm": 0.01, "detectable": 0.02}
    ends = {"mean": mean, "low": low, "high": high}
    return {"init": "mae", "baseline": baseline, "scope": scope, "budgets": [1, 4]} | ends | counts


def saved(baseline, budget, times, low, high):
    found = {"baseline": baseline, "budget": budget, "savings": times, "ci_low": low, "ci_high": high}
    return found | {"censored": False, "at_most": False, "cases": 12, "draws": 4}


def said(*pooled, strictest, low_budgets=(1, 4)):
    baselines = list(dict.fromkeys(c["baseline"] for c in pooled))
    each = {b: [s for s in strictest if s["baseline"] == b] for b in baselines}
    about = {"savings": strictest, "savings_by_baseline": each}
    inits = {**{baseline: {} for baseline in baselines}, "mae": about}
    summary = {"inits": inits, "baselines": baselines, "comparisons": pooled}
    (line,) = verdicts(summary | {"low_budgets": list(low_budgets)})
    return line


ONE_ABOVE = [saved("scratch", 1, 0.9, 0.7, 1.2), saved("scratch", 4, 1.8, 1.2, 2.5)]


def test_one_budget_is_no_saving_where_the_pooled_difference_shows_none():
    line = said(compared("scratch", 0.01, -0.01, 0.03), strictest=ONE_ABOVE)
    assert line.startswith("mae shows no significant difference from scratch at 1 and 4 labels: ")
    assert "Labels saved" not in line
    assert line.endswith(
        "No label saving is shown: 0.90 times with 1 label (95 % interval 0.70 to 1.20), 1.80 times with 4 labels"
        " (95 % interval 1.20 to 2.50); the interval at 4 lies above 1 by itself and without a correction, but scratch"
        " is not beaten at 1 and 4 labels."
    )


def test_every_baseline_must_be_beaten():
    won, open_, lost = (
        compared("scratch", 0.05, 0.03, 0.07),
        compared("long", 0.01, -0.01, 0.03),
        compared("longer", -0.05, -0.07, -0.03),
    )
    line = said(won, open_, lost, strictest=ONE_ABOVE)
    assert ", so no saving can be claimed" in line
    assert "Labels saved" not in line
    assert line.endswith("but long and longer are not beaten at 1 and 4 labels.")
    assert "Labels saved (those the better baseline needs" in said(won, strictest=ONE_ABOVE)
    area = [{**c, "scope": "area"} for c in (won, open_)]
    assert said(*area, strictest=ONE_ABOVE).endswith("but long is not beaten over all budgets.")


def test_two_budgets_above_one_and_none():
    both = [saved("scratch", budget, 1.8, 1.2, None) for budget in (1, 4)]
    line = said(compared("scratch", 0.01, -0.01, 0.03), strictest=both)
    assert (
        "; the intervals at 1 and 4 lie above 1, each by itself and without a correction, but scratch" in line
    )
    none = [saved("scratch", 1, 0.9, 0.7, 1.2)]
    line = said(compared("scratch", 0.01, -0.01, 0.03), strictest=none)
    assert line.endswith("No label saving is shown: 0.90 times with 1 label; no interval lies above 1.")
