"""What a transfer benchmark says in plain words; what is not significant is said to be so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from medseg_ssl.analysis.statistics import holm
from medseg_ssl.analysis.transfer import JUDGED, is_found
from medseg_ssl.analysis.verdicts import false_alarms, few_levels, labels_text

ONE_PRETRAINING = "One pretraining per source: differences between pretrainings are not in the intervals."


def transfer_verdicts(summary: Mapping[str, Any]) -> list[str]:
    """What can be said in plain words; what is not significant is said to be so."""
    lines = (
        [_cells_verdict(summary["cells"])] if summary["cells"] else ["No cell of the matrix is finished yet."]
    )
    for item in summary["controls"]:
        what = (
            f"{item['target']}: {item['control']} ({_names(item['first'])} against {_names(item['second'])})"
        )
        lines.append(_line(what, item, "helps more", "helps less"))
    for item in summary["asymmetry"]:
        there, back = (" → ".join(item[way]) for way in ("there", "back"))
        lines.append(
            _line(f"{there} minus {back}, difference of the gains", item, "gains more", "gains less")
        )
    beaten = _all_beaten(summary["mixed"])
    for (union, target), of_union in _by_union(summary["mixed"]).items():
        best = next(i for i in of_union if i["best"])
        line = _line(f"{union} → {target} against {best['single']}, its best single source", best, "helps more",
                     "helps less")  # fmt: skip
        if (union, target) in beaten:
            line = f"{line[:-1]}; it beats each of its single sources (corrected over unions and targets)."
        lines.append(line)
    for name, target in dict.fromkeys((i["beside"], i["target"]) for i in summary["beside"]):
        lines.append(
            _beside_verdict([i for i in summary["beside"] if (i["beside"], i["target"]) == (name, target)])
        )
    for item in summary.get("estimates", {}).get("ranking", ()):
        lines.append(_ranking_verdict(item))
    for name, count in summary.get("false_alarms", {}).items():
        lines.append(f"Target {name}: {false_alarms(str(count))}")
    return lines + _limits(summary["cells"]) + _pretraining_verdict(summary["cells"])


def _by_union(mixed: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """(union, target) to its differences from each of its single sources."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for item in mixed:
        found.setdefault((item["union"], item["target"]), []).append(item)
    return found


def _all_beaten(mixed: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """(union, target) where the union beats each of its single sources, with Holm's correction over all of them.

    Of one union on one target the largest p stands for "each": an intersection-union test needs no correction within
    (Berger 1982, Technometrics 24(4)). A source that scores more makes it 1, lest it leave others less to correct for.
    """
    found = _by_union(mixed)
    largest = [
        max(i["p"] if i["mean"] > 0 else 1.0 for i in items)
        if all(i["covers"] in JUDGED for i in items)
        else math.nan
        for items in found.values()
    ]
    return {pair for pair, p in zip(found, holm(largest), strict=True) if p < 0.05}


def _limits(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the noise of every target hides at 80 % power, whatever the gains turned out to be."""
    least: dict[str, list[float]] = {}
    for cell in cells:
        if not math.isnan(cell["detectable"]):
            least.setdefault(cell["target"], []).append(cell["detectable"])
    lines = []
    if least:
        told = [
            f"{target} {min(values):.3f}" + (f" to {max(values):.3f}" if len(values) > 1 else "")
            for target, values in least.items()
        ]
        lines.append(
            "More than one in five such benchmarks would miss, even before the correction, a true gain below this (of"
            f" the surest to the least sure source of a target): {'; '.join(told)}."
        )
    for target in dict.fromkeys(cell["target"] for cell in cells):
        few = few_levels([cell for cell in cells if cell["target"] == target])
        lines += [f"{target}: {few}"] if few else []
    return lines


def _pretraining_verdict(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whose differences between pretrainings nobody can see."""
    times: dict[str, int] = {}
    for cell in cells:
        times[cell["source"]] = max(times.get(cell["source"], 1), cell["pretrainings"])
    single = [name for name, number in times.items() if number == 1]
    if not single:
        return []
    if len(single) == len(times):
        return [ONE_PRETRAINING]
    return [
        f"One pretraining of {_listed(single)}: differences between its pretrainings are not in the intervals."
    ]


def _beside_verdict(items: Sequence[Mapping[str, Any]]) -> str:
    """How the inits of a target do against something that no pretraining and no scratch network made."""
    first = items[0]
    ends = (
        "" if math.isnan(first["own_low"])
        else f" (95 % interval {first['own_low']:.3f} to {first['own_high']:.3f})"
    )  # fmt: skip
    head = f"{first['target']}: {first['beside']} alone reaches {first['own_mean']:.3f} Dice{ends} {pooled_text(items)}"
    judged = [item for item in items if item["covers"] in JUDGED]
    if not judged:
        return f"{head}; too few draws or cases to judge others against it."
    above = [i for i in judged if is_found(i) and i["low"] > 0]
    below = [i for i in judged if is_found(i) and i["high"] < 0]
    told = [
        f"{word} {', '.join(_difference(i) for i in found) or 'none'}"
        for word, found in (("significantly above it", above), ("below it", below))
    ]
    rest = [i["init"] for i in judged if i not in above and i not in below]
    more = f"; no significant difference: {_listed(rest)}" if rest else ""
    return f"{head}; {'; '.join(told)}{more} (Holm's correction over all inits)."


def _difference(item: Mapping[str, Any]) -> str:
    return f"{item['init']} ({item['mean']:+.3f}, {item['low']:+.3f} to {item['high']:+.3f})"


def _cells_verdict(cells: Sequence[Mapping[str, Any]]) -> str:
    def listed(test: Callable[[Mapping[str, Any]], bool]) -> str:
        chosen = [c for c in cells if test(c)]
        return "none" if not chosen else ", ".join(
            f"{c['source']} → {c['target']} ({c['mean']:+.3f}, {c['low']:+.3f} to {c['high']:+.3f})" for c in chosen
        )  # fmt: skip

    judged = [c for c in cells if c["covers"] in JUDGED]
    if not judged:
        return f"None of {len(cells)} cells can be judged: that takes two draws and two test cases."
    better = listed(lambda c: c in judged and c["low"] > 0 and c["p_holm"] < 0.05)
    worse = listed(lambda c: c in judged and c["high"] < 0 and c["p_holm"] < 0.05)
    open_ = sum(1 for c in judged if (c["low"] > 0 or c["high"] < 0) and not c["p_holm"] < 0.05)
    return (
        f"Against the better scratch baseline, {pooled_text(cells)}, {len(judged)} cells, Holm's correction over all:"
        f" gain {better}; loss {worse}; {open_} more exclude 0 only without the correction."
    )


def pooled_text(items: Sequence[Mapping[str, Any]]) -> str:
    """Over which numbers of labels: ``over 2 and 8 labels``."""
    budgets = {tuple(item["budgets"]) for item in items}
    if len(budgets) > 1:
        return "over the pooled labels of each target"
    (pooled,) = budgets
    return f"over {labels_text(pooled[0]) if len(pooled) == 1 else f'{_listed([str(b) for b in pooled])} labels'}"


def _line(what: str, item: Mapping[str, Any], more: str, less: str) -> str:
    numbers = f"{item['mean']:+.3f} Dice"
    if math.isnan(item["low"]) or item["covers"] not in JUDGED:
        return f"{what}: {numbers}; too few draws or cases to judge."
    numbers += f" (95 % interval {item['low']:+.3f} to {item['high']:+.3f})"
    if item["low"] > 0 or item["high"] < 0:
        if not is_found(item):
            return (
                f"{what}: {numbers}, no significant difference: it excludes 0 only without Holm's correction."
            )
        return f"{what}: {numbers}, significantly {more if item['low'] > 0 else less}."
    return f"{what}: {numbers}, no significant difference."


def _ranking_verdict(item: Mapping[str, Any]) -> str:
    head = f"{item['target']}: {item['estimate']} and gain over {item['sources']} sources"
    if item["tau"] is None or math.isnan(item["tau"]):
        return f"{head}: no ranking."
    tail = ""
    if item["lowest_p"] > 0.05:
        tail = f"; so few can give p = {item['lowest_p']:.2f} at best, so nothing is shown"
    return f"{head}: Kendall's τ {item['tau']:+.2f} (p {item['p']:.2f}){tail}."


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"mean of {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
