"""What a reader of a comparison must know beside its numbers, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medseg_ssl.analysis.verdicts import labels_text
from medseg_ssl.data.budgets import unstated_classes
from medseg_ssl.data.partial import limited_cases
from medseg_ssl.data.strata import CLASSES

from .comparison import CompareConfig
from .fits import FitTask
from .inits import SCRATCH_LONG, blocks
from .labeling import Fold
from .scratch import sentence
from .seen import unchecked

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive


def notes_of(
    config: CompareConfig,
    tasks: Sequence[FitTask],
    *,
    folds: Sequence[Fold],
    cards: Mapping[str, Any],
    archive: Archive,
    test: Archive | None = None,
) -> list[str]:
    """The conditions of a comparison, each in a sentence.

    Args:
        config: resolved, with numbers of cases for budgets.
        tasks: every fit.
        folds: who is trained on and who is scored.
        cards: of the encoder of every pretrained init.
        archive: trained on.
        test: scored; None for the same one.
    """
    steps = {task.init: task.steps for task in tasks if task.baseline is None}
    flips = " averaged over mirrored copies," if config.metrics.flips else ""
    precision = f" predicted in {config.metrics.precision}," if config.metrics.precision else ""
    notes = [
        f"Scored on {sum(len(f.scored) for f in folds)} cases, subset '{config.subset}' of split '{config.split}'"
        f"{_folded(config)};{flips}{precision} NSD tolerance {config.metrics.nsd_tolerance_mm:g} mm.",
        "Every init sees the same subsets, nested by budget and drawn by subject, with the same seeds; the "
        "weights at the last step are scored, none is chosen by its score.",
        "Steps per fit: " + ", ".join(f"{init} {n}" for init, n in steps.items()) + ".",
    ]
    scored = [case for fold in folds for case in fold.scored]
    subjects = {(test or archive).cases[case].subject for case in scored}
    if len(subjects) < len(scored):
        notes.append(
            f"These are {len(scored)} cases of {len(subjects)} subjects: every mean and interval, and what tables call"
            " cases, is over subjects, whose cases are averaged first."
        )
    if config.stratify is not None:
        what = "subsets and folds" if config.folds is not None else "subsets"
        how = " (of a scored label, which classes it shows decides its fold, and nothing else)"
        shown = how if config.folds is not None and config.stratify.by == CLASSES else ""
        notes.append(f"The {what} are balanced by {config.stratify.by}{shown}.")
    times = {task.init: task.pretraining + 1 for task in sorted(tasks, key=lambda task: task.pretraining)}
    for number in sorted(set(times.values()) - {1}):
        repeated = ", ".join(init for init in config.inits if times.get(init) == number)
        notes.append(f"{repeated}: pretrained {number} times; every draw is fine-tuned from each.")
    if once := [init for init in config.inits if init in cards and times.get(init) == 1]:
        notes.append(
            f"One pretraining of {', '.join(once)}: another one of it would differ, and no interval knows it."
        )
    notes += _channel_notes(tasks, cards=cards, archive=archive)
    notes += _init_notes(config, cards=cards, archive=archive, test=test or archive)
    notes += _subject_notes(tasks, archive)
    notes += _cost_notes(folds)
    return notes + _unstated_notes(tasks, archive)


def _channel_notes(tasks: Sequence[FitTask], *, cards: Mapping[str, Any], archive: Archive) -> list[str]:
    """What goes in where a case has several channels, and how encoders of another number enter."""
    channels = [archive.scans[key].modality for key in archive.cases[tasks[0].train_cases[0]].scans]
    if len(channels) == 1:
        return []
    adapted = [init for init, card in cards.items() if card["channels_in"] != len(channels)]
    return [
        f"A case has the channels {'+'.join(channels)}, with the label of the first; voxels where one of them has no"
        " data are not trained on.",
        *([f"{', '.join(adapted)}: pretrained on another number of channels; the first layer's weights are spread over"
           f" the {len(channels)} of a case so that equal channels are answered as before."] if adapted else []),
    ]  # fmt: skip


def _subject_notes(tasks: Sequence[FitTask], archive: Archive) -> list[str]:
    """How many people the labels of a budget are of, where that is fewer than labels."""
    counts: dict[int, set[int]] = {}
    for task in tasks:
        people = {archive.cases[case].subject for case in task.train_cases}
        counts.setdefault(task.budget, set()).add(len(people))
    if all(min(of) == budget for budget, of in counts.items()):
        return []
    told = [
        f"{labels_text(budget)} of {_range(of)} subject{'s' if max(of) > 1 else ''}"
        for budget, of in sorted(counts.items())
    ]
    return [f"A subject's cases are labeled together: {', '.join(told)}."]


def _range(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _folded(config: CompareConfig) -> str:
    if config.folds is None:
        return ""
    return (
        f" and of its training subjects in {config.folds} folds, each case once per draw by fits and pretrainings that "
        "saw nothing of its fold"
    )


def _init_notes(
    config: CompareConfig, *, cards: Mapping[str, Any], archive: Archive, test: Archive
) -> list[str]:
    notes = []
    networks, baselines = blocks(config.inits, "network"), blocks(config.inits, "baseline")
    for init, kind in config.inits.items():
        if kind == SCRATCH_LONG:
            notes.append(
                f"{init}: trains from scratch for the steps of fine-tuning and of the longest pretraining "
                "together, all in batches of fine-tuning."
            )
        elif init in networks:
            parts = [networks[init].get(part) for part in ("encoder", "decoder")]
            names = " and ".join(f"'{part['name']}'" for part in parts if part is not None)
            batch = networks[init].get("batch_size")
            how = (
                "the same steps and batches"
                if batch is None
                else f"the same steps, in batches of {batch} samples"
            )
            own = (networks[init].get("objective") or {}).get("name")
            ours = config.finetune.get("objective", {}).get("name")
            learns = "" if own in (None, ours) else f", by the objective '{own}' in place of '{ours}'"
            notes.append(
                f"{init}: another network ({names}) from scratch{learns}, with {how}; it is no measure of what"
                " pretraining saves."
            )
        elif init in baselines:
            notes.append(
                f"{init}: baseline '{baselines[init]['name']}', which trains no network and learns from"
                f" {_taught_by(baselines[init], config.budgets)} alone; it is no measure of what pretraining saves."
            )
        elif init in cards:
            notes += _card_notes(init, cards[init], config=config, archive=archive, test=test)
    if alone := sentence(config.inits, config.finetune, config.init_overrides):
        notes.append(f"{alone}.")
    for init, tree in config.init_overrides.items():
        text = ", ".join(f"{key}={value}" for key, value in _flat(tree))
        notes.append(f"{init} differs from the others in: {text}.")
    for init, most in config.init_draws.items():
        notes.append(f"{init}: at most {most} draws; paired comparisons use the draws both have.")
    return notes


def _taught_by(baseline: Mapping[str, Any], budgets: Sequence[Any]) -> str:
    """Whose labels a baseline reads: all of a draw, but for one that says how many it takes (``atlas``)."""
    most = baseline.get("atlases")
    if most is None or all(int(budget) <= most for budget in budgets):
        return "the labeled cases of each draw"
    return f"at most {most} labeled cases of each draw, its first ones (atlases={most}),"


def _card_notes(
    init: str, card: Mapping[str, Any], *, config: CompareConfig, archive: Archive, test: Archive
) -> list[str]:
    own = card["archive_fingerprint"] == archive.fingerprint
    where = "this archive" if own else "another archive"
    if archive.fingerprint in (several := card.get("archives", ())):
        where = f"{'+'.join(card['modalities'])} of this archive" + (
            " and others" if len(several) > 1 else ""
        )
    chosen = card.get("chosen_by")
    steps = chosen["of_steps"] if chosen else card["steps"]
    notes = [f"{init}: {card['objective'] or 'unknown objective'}, {steps} steps on {where}."]
    if chosen:
        notes.append(chosen_note(init, chosen))
    if why := _unchecked(card, config=config, test=test):
        notes.append(f"{init}: {why}.")
    return notes


def chosen_note(name: str, chosen: Mapping[str, Any]) -> str:
    """That weights were chosen on the way, and by what (``chosen_by`` of a card), as a condition of what they score."""
    return (
        f"{name}: these weights were chosen among {chosen['candidates']} by {chosen['score']} on {chosen['subset']}"
        " subjects; labels that this evaluation reads are not counted in the budgets."
    )


def _unchecked(card: Mapping[str, Any], *, config: CompareConfig, test: Archive) -> str:
    if config.folds is None:
        return unchecked(card, test, split=config.split, subset=config.subset)
    # a check looked at subjects that were kept back; folds score training subjects too
    return unchecked({**card, "checked_against": ()}, test, split=config.split, subset=config.subset)


def _cost_notes(folds: Sequence[Fold]) -> list[str]:
    """What is labeled at each budget, where labels are known in part: means over draws and folds."""
    by_budget: dict[int, list[dict[str, int]]] = {}
    for fold in folds:
        for of in fold.budgets.cost.values():
            for budget, cost in of.items():
                by_budget.setdefault(budget, []).append(cost)
    notes = []
    for budget, costs in sorted(by_budget.items()):
        mean = {key: sum(cost[key] for cost in costs) / len(costs) for key in costs[0]}
        notes.append(
            f"{labels_text(budget)}: {mean['slices']:.6g} of {mean['of_slices']:.6g} axial slices labeled, "
            f"{mean['classes']:.6g} of {mean['of_classes']:.6g} classes stated (summed over cases, mean over draws)."
        )
    return notes


def _unstated_notes(tasks: Sequence[FitTask], archive: Archive) -> list[str]:
    notes = []
    subsets = {(task.budget, task.draw, task.fold): (task.train_cases, task.access) for task in tasks}
    for (budget, draw, fold), (drawn, access) in sorted(subsets.items(), key=lambda item: item[0]):
        rows = limited_cases(archive.cases, archive.classes, access)
        if unstated := unstated_classes((rows[case] for case in drawn), archive.classes):
            place = f"draw {draw}" + (f", fold {fold}" if fold else "")
            notes.append(
                f"{labels_text(budget)}, {place}: no labeled case states {', '.join(unstated)}, so no init can predict"
                " it there."
            )
    return notes


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in tree.items():
        pairs += (
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
        )
    return pairs
