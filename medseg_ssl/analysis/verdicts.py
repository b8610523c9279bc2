"""What a comparison says in plain words: what beats what, by how much, and what could not have been seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Comparison = Mapping[str, Any]


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """One line per init against its baselines: the claim, its numbers, and the noise below which nothing is seen.

    Args:
        summary: ``inits``, ``baselines``, ``comparisons`` and ``low_budgets`` of ``label_efficiency.summarise``.
    """
    lines = []
    inits = [i for i in summary["inits"] if i not in summary["baselines"]]
    judged = [c for c in summary["comparisons"] if min(c["cases"], c["draws"]) > 1]
    for init in inits:
        own = [c for c in summary["comparisons"] if c["init"] == init]
        # one budget that counts as many labels has neither few labels nor an area: it is all there is
        scopes = [[c for c in own if c["scope"] == scope] for scope in ("low budgets", "area")]
        pooled = next(filter(None, scopes), own)
        if pooled:
            corrected = sum(c["scope"] == pooled[0]["scope"] for c in judged) > 1
            about = summary["inits"][init]
            lines.append(_verdict(init, pooled, about, summary["low_budgets"], corrected=corrected))
    if not lines and inits:
        lines.append("No scratch baseline has finished fits yet: nothing can be said about savings.")
    return lines


def _verdict(
    init: str,
    pooled: Sequence[Comparison],
    about: Mapping[str, Any],
    low_budgets: Sequence[int],
    *,
    corrected: bool,
) -> str:
    first = pooled[0]
    where = f"at {_and(first['budgets'])} {'label' if first['budgets'] == [1] else 'labels'}"
    if first["scope"] == "area":
        where = "over all budgets"
    if any(math.isnan(c["low"]) for c in pooled):
        return f"{init}: too few finished fits for an interval {where}."
    numbers = "; ".join(
        f"{c['mean']:+.3f} Dice against {c['baseline']} (95 % interval {c['low']:+.3f} to {c['high']:+.3f},"
        f" {_size(c)})"
        for c in pooled
    )
    thin = [c for c in pooled if min(c["cases"], c["draws"]) < 2]
    if thin:
        reason = "a single draw or case"
        return f"{init} cannot be judged against {_names(thin)} {where} ({reason}): {numbers}."
    unbeaten = [c for c in pooled if not _beats(c)]
    doubt = (
        f"{_names(unbeaten)} {'is' if len(unbeaten) == 1 else 'are'} not beaten {where}" if unbeaten else ""
    )
    saved = _saved(about, low_budgets, doubt=doubt)
    told = (_limit(pooled, corrected=corrected), _one_sided(pooled), few_levels(pooled), saved)
    sentences = [f"{_claim(init, pooled, where)}: {numbers}.", *told]
    return " ".join(sentence for sentence in sentences if sentence)


def _beats(c: Comparison) -> bool:
    return c["low"] > 0 and c["p_holm"] < 0.05


def _claim(init: str, pooled: Sequence[Comparison], where: str) -> str:
    """Significant is what Holm's correction leaves; an interval that excludes 0 by itself is told as just that."""
    won = [c for c in pooled if _beats(c)]
    lost = [c for c in pooled if c["high"] < 0 and c["p_holm"] < 0.05]
    weak = [c for c in pooled if (c["low"] > 0 or c["high"] < 0) and not c["p_holm"] < 0.05]
    if len(won) == len(pooled):
        return f"{init} beats {_names(won)} {where}, significantly"
    clauses = [f"beats {_names(won)}"] if won else []
    open_ = [c for c in pooled if c not in won and c not in lost]
    clauses += [f"shows no significant difference from {_names(open_)}"] if open_ else []
    clauses += [f"is significantly worse than {_names(lost)}"] if lost else []
    tail = (
        f" (against {_names(weak)} the interval excludes 0 only without Holm's correction for all inits)"
        if weak
        else ""
    )
    return f"{init} {_and(clauses)} {where}{tail}" + (", so no saving can be claimed" if won else "")


def _limit(pooled: Sequence[Comparison], *, corrected: bool) -> str:
    """What the noise hides, at 80 % power; the design's property, whatever the difference turned out to be.

    It is that of a single test at 5 %; where Holm's correction takes several, each can see less.
    """
    sizes = {c["baseline"]: f"{c['detectable']:.3f}" for c in pooled}
    before = ", even before the correction" if corrected else ""
    named = [f"{size} ({baseline})" for baseline, size in sizes.items()]
    below = next(iter(sizes.values())) if len(set(sizes.values())) == 1 else " or ".join(named)
    return f"More than one in five such comparisons would miss a true difference below {below}{before}."


def _one_sided(pooled: Sequence[Comparison]) -> str:
    """A sentence where scores have no partner: a class that is absent is scored only where it was predicted."""
    lost = {c["baseline"]: c.get("one_sided", 0) for c in pooled}
    named = [f"{count} of the scores ({baseline})" for baseline, count in lost.items() if count]
    alone = (
        f"{_and(named)} have no partner (a class is absent, and one of the two predicts it) and are left out: a false"
        " alarm in such a case lowers a mean, but no difference."
        if named
        else ""
    )
    some = {c["baseline"]: c.get("partly", 0) for c in pooled}
    named = [f"{count} ({baseline})" for baseline, count in some.items() if count]
    partly = (
        f"{_and(named)} of the cases have a pair of scores under some of the draws alone and are left out."
        if named
        else ""
    )
    gone = {c["baseline"]: c.get("false_alarms", 0) for c in pooled}
    named = [f"{count} ({baseline})" for baseline, count in gone.items() if count]
    return " ".join(filter(None, (alone, partly, false_alarms(_and(named)) if named else "")))


def false_alarms(counts: str) -> str:
    """A sentence where classes were left out of differences (``scores.settled``)."""
    return (
        f"{counts} classes of a case have a score under some of these fits alone (they are absent, and predicted) and"
        " are left out: such a false alarm lowers a mean, but no difference."
    )


def few_levels(items: Sequence[Comparison]) -> str:
    """A sentence where an interval rests on two of something (``statistics.crossed_interval``)."""
    thin = [
        f"two {axis}"
        for axis in ("cases", "draws", "pretrainings")
        if any(item[axis] == 2 for item in items)  # one pretraining is no level; one draw cannot be judged
    ]
    return (
        f"Over {_and(thin)} such intervals held the truth in 86 to 98 of 100 simulations, by what varies, not in 95."
        if thin
        else ""
    )


def _saved(about: Mapping[str, Any], low_budgets: Sequence[int], *, doubt: str) -> str:
    """The strictest savings, and where they show none, what a laxer baseline alone would have shown."""
    strictest = about.get("savings") or ()
    told = [_savings(strictest, low_budgets, doubt=doubt)]
    better = {item["budget"]: item["baseline"] for item in strictest if not _above_one(item)}
    for baseline, found in about.get("savings_by_baseline", {}).items():
        shown = [
            item
            for item in found
            if item["budget"] in low_budgets
            and better.get(item["budget"], baseline) != baseline
            and _above_one(item)
        ]
        if shown:
            stricter = _and(list(dict.fromkeys(better[item["budget"]] for item in shown)))
            times = ", ".join(
                f"{'at least ' if item['censored'] else ''}{item['savings']:.2f} times with"
                f" {labels_text(item['budget'])} ({_ends(item)})"
                for item in shown
            )
            told.append(f"Against {baseline} alone {times}: no claim, since {stricter} needs fewer.")
    return " ".join(filter(None, told))


def _above_one(item: Mapping[str, Any]) -> bool:
    """Whether the interval of a saving says that there is one."""
    return min(item["cases"], item["draws"]) > 1 and item["ci_low"] is not None and item["ci_low"] > 1


def _savings(found: Sequence[Mapping[str, Any]], low_budgets: Sequence[int], *, doubt: str) -> str:
    """How many labels the init saved at the low budgets, with the interval; open ends in words.

    ``doubt`` is what keeps a single budget from being a claim: the baselines that the pooled difference does not beat.
    """
    told = [item for item in found if item["budget"] in low_budgets] or list(found)
    if not told:
        return ""
    judged = [item for item in told if min(item["cases"], item["draws"]) > 1]
    sure = [item["budget"] for item in judged if _above_one(item)]
    parts = [
        f"{'at least ' if item['censored'] else 'at most ' if item['at_most'] else ''}{item['savings']:.2f} times with"
        f" {labels_text(item['budget'])}" + (f" ({_ends(item)})" if sure else "")
        for item in told
    ]
    if not sure:
        why = "no interval lies above 1" if judged else "a single draw or case judges nothing"
        return f"No label saving is shown: {', '.join(parts)}; {why}."
    if doubt:
        ends = "interval at {} lies above 1" if len(sure) == 1 else "intervals at {} lie above 1, each"
        alone = f"the {ends.format(_and(sure))} by itself and without a correction"
        return f"No label saving is shown: {', '.join(parts)}; {alone}, but {doubt}."
    claim = f"the interval lies above 1 at {_and(sure)}, each by itself and without a correction"
    return (
        f"Labels saved (those the better baseline needs, divided by those used): {', '.join(parts)}; {claim}."
    )


def _ends(item: Mapping[str, Any]) -> str:
    low, high = item["ci_low"], item["ci_high"]
    if low is None and high is None:
        return "no end of the 95 % interval within the budgets tried"
    if low is None:
        return f"95 % interval up to {high:.2f}"
    return f"95 % interval from {low:.2f}" if high is None else f"95 % interval {low:.2f} to {high:.2f}"


def labels_text(budget: int) -> str:
    """``1 label``, ``4 labels``."""
    return "1 label" if budget == 1 else f"{budget} labels"


def _size(c: Comparison) -> str:
    counts = [f"{c[axis]} {axis if c[axis] != 1 else axis[:-1]}" for axis in ("cases", "draws")]
    return " × ".join([*counts, *([f"{c['pretrainings']} pretrainings"] if c["pretrainings"] > 1 else [])])


def _names(items: Sequence[Comparison]) -> str:
    return _and([c["baseline"] for c in items])


def _and(items: Sequence[object]) -> str:
    words = [str(i) for i in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
