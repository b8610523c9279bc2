"""What a transfer benchmark does: its pretrainings, the facts of sources and targets, and what a reader must know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from medseg_ssl.analysis.transfer import Source, Target
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.channels import told_left_out

from .fits import PretrainTask
from .labeling import folds_of, held_channels, numbered, scored_cases
from .matrix import MatrixConfig, SourceConfig, comparison_of, pretrain_tree
from .notes import chosen_note
from .planning import EncoderKey, pretrain_folder
from .scratch import sentence

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.budget_file import BudgetFile
    from medseg_ssl.nets.encoder_file import Card

    from .comparison import CompareConfig


def pretrain_tasks(config: MatrixConfig, out: Path, archives: Mapping[str, Path]) -> list[PretrainTask]:
    """Every pretraining of every source; none sees a test or development subject of a target."""
    tasks = []
    for number in range(config.pretrainings):
        for name, source in config.own_sources().items():
            first, *more = source.archives
            # of its own archives a pretraining checks the test subjects alone: where others are scored, a copy of one
            # may stand in the other archive of a union
            own = source.archives if config.subset == "test" or len(source.archives) == 1 else ()
            others = dict.fromkeys(t.archive for t in config.targets.values() if t.archive not in own)
            tree = pretrain_tree(config, name)
            tasks.append(
                PretrainTask(
                    pretrain_folder(out, EncoderKey(name, 0, number)),
                    {**tree, "seed": tree.get("seed", 0) + number} if number else tree,
                    archives[first],
                    init=name,
                    protect=tuple(archives[other] for other in others),
                    more=tuple(archives[other] for other in more),
                    pretraining=number,
                    wandb=config.wandb,
                )
            )
    return tasks


def check_archives(archives: Mapping[str, Archive]) -> None:
    """No archive goes under two names: a source of one would pass for other data than a target of the other.

    Raises:
        ConfigError: names both.
    """
    by_content: dict[str, str] = {}
    for name, opened in archives.items():
        if (other := by_content.setdefault(opened.fingerprint, name)) != name:
            raise ConfigError(f"--archive {other}= and {name}= are one archive; give it one name")


def check_sources(config: MatrixConfig, archives: Mapping[str, Archive]) -> None:
    """Every source has training scans of every modality it names.

    Raises:
        ConfigError: names source, archive, modality and what there is.
    """
    for name, source in config.own_sources().items():
        for archive, modalities in source.archives.items():
            opened = archives[archive]
            train = set(opened.split(config.split).train)
            held = sorted({row.modality for row in opened.scans.values() if row.subject in train})
            missing = [m for m in modalities if m not in held]
            if missing or not held:
                wanted = missing[0] if missing else "any modality"
                raise ConfigError(
                    f"sources.{name}: archive {archive!r} has no training scan of {wanted}; it has"
                    f" {', '.join(held) or 'none'}"
                )


def source_facts(
    config: MatrixConfig, cards: Mapping[str, Card], archives: Mapping[str, Archive]
) -> list[Source]:
    """What the matrix must know of every source."""
    known = {opened.fingerprint: name for name, opened in archives.items()}
    out = []
    for name, source in config.sources.items():
        if isinstance(source, SourceConfig):
            parts = {
                a: modalities or archives[a].facts().modalities for a, modalities in source.archives.items()
            }
        else:  # a file that was made of an archive that is here
            card = cards[name]
            # of one archive's chosen modalities the first fingerprint is that of the choice
            made_of = card.archives[0] if len(card.archives) == 1 else card.archive_fingerprint
            where = known.get(made_of)
            parts = {} if where is None else {where: cards[name].modalities}
        out.append(Source(name, parts, cards[name].modalities))
    return out


class PlannedTarget(NamedTuple):
    """A target's facts, the comparison on it with numbers of cases for shares, and a sentence for each share."""

    facts: Target
    comparison: CompareConfig
    shares: list[str]


def target_of(
    config: MatrixConfig, name: str, archives: Mapping[str, Archive], *, given: BudgetFile | None = None
) -> PlannedTarget:
    """What is done on a target, once budgets, scored cases and modalities are known to be there.

    Args:
        config: of the benchmark.
        name: of the target.
        archives: by name.
        given: budgets whose labeled cases are used as they are; None draws them.

    Raises:
        ConfigError: a modality that no labeled case has, cases of several modalities and none named, or a file of
            budgets that does not go with them.
    """
    plan, archive = comparison_of(config, name), archives[config.targets[name].archive]
    try:
        archive = archive.limited(plan.access())
    except UserError as error:
        raise ConfigError(f"targets.{name}: {error}") from error
    held = held_channels(archive)
    wanted = "+".join(plan.modalities)
    if (wanted and wanted not in held) or (not wanted and len(held) != 1):
        asked = f"asks for {wanted}" if wanted else "must name one of these"
        raise ConfigError(
            f"targets.{name}: archive {config.targets[name].archive!r} has labeled cases of"
            f" {', '.join(held) or 'nothing'}; modalities {asked}"
        )
    cases = scored_cases(plan, archive, archive)
    try:
        plan, shares = numbered(plan, archive, [archive.split(plan.split)])
        folds_of(plan, archive, archive, given=given)
    except ConfigError as error:
        raise ConfigError(f"targets.{name}: {error}") from error
    facts = Target(
        name,
        config.targets[name].archive,
        tuple(archive.scans[key].modality for key in archive.cases[cases[0]].scans),
        tuple(map(int, plan.low_budgets)),
        tuple(plan.baselines()),
        {case: archive.cases[case].subject for case in cases},
        tuple(init for init in config.baselines_of(name) if init not in plan.baselines()),
    )
    return PlannedTarget(facts, plan, [f"Target {name}: {share}" for share in shares])


def notes_of(
    config: MatrixConfig,
    archives: Mapping[str, Archive],
    cards: Mapping[str, Card],
    targets: Sequence[PlannedTarget],
) -> list[str]:
    """Conditions a reader of the matrix must know."""
    made = list(config.own_sources())
    alike = "Every source is pretrained with the same network, steps and batch; every"
    if len(made) < len(config.sources):
        given = ", ".join(name for name in config.sources if name not in made)
        of_made = f"{', '.join(made)}: pretrained with the same network, steps and batch; " if made else ""
        alike = f"{of_made}{given}: as the files given by hand were made, which need not be alike. Every"
    notes = [
        f"{alike} init of a target is fine-tuned on the same subsets with the same steps and seeds.",
        f"Scored on subset '{config.subset}' of split '{config.split}'; no source that is pretrained here sees a test"
        " subject of a target, nor a copy of one of their scans.",
    ]
    if config.pretrainings > 1:
        notes.append(f"{', '.join(config.own_sources())}: pretrained {config.pretrainings} times, with seeds that"
                     " follow one another; every draw is fine-tuned from each.")  # fmt: skip
        looks = ["similarity of features"] * config.similarity + ["transferability"] * config.estimate
        if looks:
            notes.append(f"Looked at for the first pretraining alone: {' and '.join(looks)}.")
    for name, card in cards.items():
        where = "an encoder file given by hand"
        if source := config.own_sources().get(name):
            named = [
                f"{a} ({', '.join(m or archives[a].facts().modalities)})" for a, m in source.archives.items()
            ]
            where = " and ".join(named)
        spacing = "each scan's own spacing" if card.spacing_mm is None else f"{_triple(card.spacing_mm)} mm"
        chosen = card.chosen_by
        steps = chosen["of_steps"] if chosen else card.steps
        notes.append(
            f"{name}: {card.objective or 'unknown objective'}, {steps} steps at {spacing} on {where}."
        )
        if chosen:
            notes.append(chosen_note(name, chosen))
        if name in config.own_sources() and config.own_sources()[name].pretrain:
            notes.append(
                f"{name} is pretrained with settings of its own: {config.own_sources()[name].pretrain}."
            )
    for target, plan, shares in targets:
        archive = archives[target.archive]
        spacing = archive.recipe.spacing_mm
        at = "each scan's own spacing" if spacing is None else f"{_triple(spacing)} mm"
        low = [b for b in plan.low_budgets if b in plan.budgets] or plan.budgets
        cases = f"{len(target.subjects)} scored cases of {'+'.join(target.modalities)}"
        notes.append(f"Target {target.name}: {cases} in archive {target.archive} at {at}, pooled over the budgets"
                     f" {', '.join(map(str, low))} where they were fitted.")  # fmt: skip
        notes += shares
        if alone := sentence(plan.inits, plan.finetune, plan.init_overrides):
            notes.append(f"Target {target.name}: {alone}.")
        if plan.stratify is not None:
            notes.append(f"Target {target.name}: the subsets are balanced by {plan.stratify.by}.")
        if plan.labels is not None:
            known = plan.labels.model_dump(exclude_none=True)
            parts = [f"{known['slices']:.0%} of the slices ({known['spread']})"] if "slices" in known else []
            parts += [f"{known['classes']} classes"] if "classes" in known else []
            notes.append(f"Target {target.name}: of each drawn label {' and '.join(parts)} are known.")
        entering = [n for n, card in cards.items() if card.channels_in != len(target.modalities)]
        if entering:
            notes.append(f"Target {target.name}: {', '.join(entering)} come from another number of channels; the first"
                         f" layer's weights are spread over its {len(target.modalities)}, so that equal channels are"
                         " answered as before (audit.txt of every fit).")  # fmt: skip
        lists = archive.split(config.split)
        whom = {*lists.train, *(lists.test if config.subset == "test" else lists.development)}
        if told := told_left_out(archive, archive.limited(plan.access()), plan.modalities, whom):
            notes.append(f"Target {target.name}: {told}.")
        if target.beside:
            notes.append(f"Target {target.name}, beside its sources: {', '.join(target.beside)}, which no pretraining"
                         " has made; no gain, control or asymmetry is made of it.")  # fmt: skip
    return notes


def _triple(values: Sequence[float]) -> str:
    return "×".join(f"{v:g}" for v in values)
