"""What a comparison says in plain words: what beats what, by how much, and what could not have been seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Comparison = Mapping[str, Any]


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """One line per init against its baselines: the claim, its numbers, and the noise below which nothing is seen.

    Args:
        summary: ``inits``, ``baselines`` and ``comparisons`` of ``label_efficiency.summarise``.
    """
    lines = []
    inits = [i for i in summary["inits"] if i not in summary["baselines"]]
    for init in inits:
        own = [c for c in summary["comparisons"] if c["init"] == init]
        pooled = [c for c in own if c["scope"] == "low budgets"] or [c for c in own if c["scope"] == "area"]
        if pooled:
            lines.append(_verdict(init, pooled))
    if not lines and inits:
        lines.append("No scratch baseline has finished fits yet: nothing can be said about savings.")
    return lines


def _verdict(init: str, pooled: Sequence[Comparison]) -> str:
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
    return f"{_claim(init, pooled, where)}: {numbers}. {_limit(pooled)}"


def _claim(init: str, pooled: Sequence[Comparison], where: str) -> str:
    won, lost = [c for c in pooled if c["low"] > 0], [c for c in pooled if c["high"] < 0]
    open_ = [c for c in pooled if c not in won and c not in lost]
    weak = [c for c in (*won, *lost) if not c["p_holm"] < 0.05]
    against = "" if len(weak) == len(won) + len(lost) else f" against {_names(weak)}" if weak else ""
    tail = f" (not{against} after Holm's correction for all inits)" if weak else ""
    if len(won) == len(pooled):
        return f"{init} beats {_names(won)} {where}, significantly{tail}"
    clauses = [f"beats {_names(won)}"] if won else []
    clauses += [f"shows no significant difference from {_names(open_)}"] if open_ else []
    clauses += [f"is significantly worse than {_names(lost)}"] if lost else []
    return f"{init} {_and(clauses)} {where}{tail}" + (", so no saving can be claimed" if won else "")


def _limit(pooled: Sequence[Comparison]) -> str:
    """What the noise hides, at 80 % power; the design's property, whatever the difference turned out to be."""
    sizes = {c["baseline"]: f"{c['detectable']:.3f}" for c in pooled}
    named = [f"{size} ({baseline})" for baseline, size in sizes.items()]
    below = next(iter(sizes.values())) if len(set(sizes.values())) == 1 else " or ".join(named)
    return f"More than one in five such comparisons would miss a true difference below {below}."


def _size(c: Comparison) -> str:
    counts = [f"{c[axis]} {axis if c[axis] != 1 else axis[:-1]}" for axis in ("cases", "draws")]
    return " × ".join([*counts, *([f"{c['pretrainings']} pretrainings"] if c["pretrainings"] > 1 else [])])


def _names(items: Sequence[Comparison]) -> str:
    return _and([c["baseline"] for c in items])


def _and(items: Sequence[object]) -> str:
    words = [str(i) for i in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
