"""Splits and folds by subject, and nested label budgets.

The order of subjects comes from the content of their scans, not from names or salted keys, so the same data
split the same way in every archive; subjects that share a scan (a duplicate) always stand on the same side.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from medseg_ssl import draws
from medseg_ssl.analysis.tables import write_text
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.manifest import CaseRow, Split

SIDES = ("train", "development", "test")


def make_split(
    subject_hashes: Mapping[str, str | Iterable[str]],
    *,
    seed: int,
    test: int | float,
    development: int | float,
    reserved_test: Collection[str] = frozenset(),
    name: str = "default",
) -> Split:
    """Draw train, development and test subjects.

    Subjects are ordered by ``sha256(f"{seed}:{content}")``, where content is the smallest content hash of
    their scans: the first ``test`` go to test, the next ``development`` to development, the rest to train. Each
    list keeps that order.

    Args:
        subject_hashes: subject to the content hash(es) of its scans.
        seed: of the draw.
        test: number of test subjects, or their share where it is a fraction below 1.
        development: number or share of development subjects.
        reserved_test: subjects the source reserves for test; they go there on top of the drawn ones.
        name: of the split.

    Raises:
        ConfigError: a share or number out of range, or nobody left to train on.
    """
    hashes = {s: sorted([h] if isinstance(h, str) else h) for s, h in subject_hashes.items()}
    groups = _groups(hashes)
    reserved = {s for group in groups for s in group if any(member in reserved_test for member in group)}
    free = [group for group in groups if group[0] not in reserved]
    content = {tuple(group): min(h for s in group for h in hashes[s]) for group in groups}

    def place(group: Sequence[str]) -> str:
        return _place(seed, content[tuple(group)])

    free.sort(key=place)
    total = sum(map(len, free))
    wanted_test = _count("test", test, total)
    wanted_development = _count("development", development, total)
    if total and wanted_test + wanted_development >= total:
        raise ConfigError(
            f"split.test ({wanted_test}) and split.development ({wanted_development}) leave none of {total}"
            " subjects for training; lower them"
        )
    sides: dict[str, list[str]] = {side: [] for side in SIDES}
    for group in free:
        if len(sides["test"]) < wanted_test:
            side = "test"
        elif len(sides["development"]) < wanted_development:
            side = "development"
        else:
            side = "train"
        sides[side] += group
    for group in sorted((g for g in groups if g[0] in reserved), key=place):
        sides["test"] += group
    return Split(name=name, seed=seed, **{side: tuple(members) for side, members in sides.items()})


def make_folds(
    subject_hashes: Mapping[str, Iterable[str]],
    *,
    folds: int,
    seed: int,
    labeled: Collection[str],
    strata: Mapping[str, Collection[str]] | None = None,
) -> list[tuple[str, ...]]:
    """Deal subjects out to folds of nearly equal size; subjects that share a scan are in one fold.

    Subjects are ordered as in ``make_split`` and go to the fold that holds fewest so far: those with labels first, so
    that every fold has its share of them. With ``strata`` those with labels go to the fold that holds fewest of the
    rarest stratum among those that are left (iterative stratification, Sechidis et al. 2011,
    doi:10.1007/978-3-642-23808-6_10), so that every fold has its share of each.

    Args:
        subject_hashes: subject to the content hashes of its scans.
        folds: number of folds.
        seed: of the order.
        labeled: subjects with a labeled case.
        strata: subject to the names of its strata, such as the classes that its labels show.

    Returns:
        The subjects of every fold, in the order of their hashes.

    Raises:
        ConfigError: fewer than 2 folds, or fewer labeled subjects (that share no scan) than folds.
    """
    hashes = {subject: sorted(contents) for subject, contents in subject_hashes.items()}
    content = {subject: min(contents) for subject, contents in hashes.items()}
    groups = sorted(_groups(hashes), key=lambda group: _place(seed, min(content[s] for s in group)))
    first = [group for group in groups if any(s in labeled for s in group)]
    if not 2 <= folds <= len(first):
        raise ConfigError(
            f"folds must lie between 2 and the number of labeled subjects, {len(first)}, got {folds}"
        )
    dealt: list[list[str]] = [[] for _ in range(folds)]
    rest = first if strata is None else _deal_strata(first, strata, dealt)
    for group in (*rest, *(group for group in groups if group not in first)):
        min(dealt, key=len).extend(group)
    return [tuple(sorted(fold, key=lambda s: (_place(seed, content[s]), s))) for fold in dealt]


def _deal_strata(
    groups: Sequence[Sequence[str]], strata: Mapping[str, Collection[str]], dealt: Sequence[list[str]]
) -> list[Sequence[str]]:
    """Deal out the groups that are of any stratum, the rarest first; those of none come back."""
    left = [(group, {name for subject in group for name in strata.get(subject, ())}) for group in groups]
    held = [Counter() for _ in dealt]
    while counts := Counter(name for _, names in left for name in names):
        rarest = min(counts, key=lambda name: (counts[name], name))
        for group, names in left:
            if rarest in names:
                fold = min(range(len(dealt)), key=lambda f: (held[f][rarest], len(dealt[f])))
                dealt[fold].extend(group)
                held[fold].update(names)
        left = [(group, names) for group, names in left if rarest not in names]
    return [group for group, _ in left]


def check_split(split: Split, *, known: Collection[str] | None = None, where: str = "") -> Split:
    """Return the split if every subject stands in exactly one list.

    Args:
        split: to check.
        known: subjects of the archive; None skips the check for strangers.
        where: file named in the message.

    Raises:
        UserError: a subject in two lists or twice in one, or one the archive does not hold.
    """
    prefix = f"{where}: " if where else ""
    seen: dict[str, str] = {}
    for side in SIDES:
        for subject in getattr(split, side):
            if subject in seen:
                both = f"twice in {side}" if seen[subject] == side else f"in {seen[subject]} and in {side}"
                raise UserError(f"{prefix}subject {subject} stands {both}; one subject is in one split only")
            seen[subject] = side
            if known is not None and subject not in known:
                raise UserError(f"{prefix}subject {subject} of {side} is not in the archive")
    return split


def write_split(folder: Path, split: Split) -> Path:
    """Write ``folder/NAME.json`` whole or not at all.

    Raises:
        UserError: a subject in two lists, or the file cannot be written.
    """
    check_split(split)
    path = Path(folder) / f"{split.name}.json"
    return write_text(path, json.dumps(split.model_dump(), indent=1) + "\n")


def read_split(path: Path, *, known: Collection[str] | None = None) -> Split:
    """Read a split file and check it.

    Raises:
        UserError: missing or unreadable file, wrong keys, or a subject in two lists.
    """
    path = Path(path)
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
        raise UserError(f"no split named {path.stem!r}; known: {there}")
    try:
        split = Split.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read split {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{path} is no valid split: {place}: {first['msg']}") from None
    return check_split(split, known=known, where=str(path))


def nested_budgets(
    cases_by_subject: Mapping[str, Sequence[str]],
    budgets: Sequence[int],
    *,
    seed: int,
    draw: int,
    stratify: Mapping[str, str] | None = None,
    cover: Mapping[str, Collection[str]] | None = None,
) -> dict[int, list[str]]:
    """Choose the labeled training cases of each budget; a smaller one is the start of a larger one.

    One permutation of the subjects per (seed, draw); a subject's cases come together, so a budget takes whole
    subjects until it has its number of cases, the last subject in part where it has more than fit.

    Args:
        cases_by_subject: labeled training cases per subject. Give subjects in the order of ``Split.train``,
            which depends on content alone; then a draw is the same in every archive of the same data.
        budgets: numbers of labeled cases.
        seed: of the comparison.
        draw: number of the draw; other draws give other permutations.
        stratify: subject to stratum; strata take turns in the permutation, the most frequent ones first.
        cover: subject to the classes it shows; the next subject always shows the class that was seen least so far
            (of several the rarest), so that rare classes stand in the smallest budgets too.

    Returns:
        Budget to its cases, in order of the permutation.

    Raises:
        ConfigError: a budget below 1 or above the number of cases.
    """
    subjects = list(cases_by_subject)
    available = sum(len(cases) for cases in cases_by_subject.values())
    for budget in budgets:
        if not 1 <= budget <= available:
            raise ConfigError(f"budget {budget} is impossible: there are {available} labeled training cases")
    generator = draws.numpy_generator(seed, draw, "label budgets")
    order = [subjects[i] for i in generator.permutation(len(subjects))]
    if stratify is not None:
        order = _turns(order, stratify)
    if cover is not None:
        order = _covering(order, cover)
    cases = [case for subject in order for case in cases_by_subject[subject]]
    return {budget: cases[:budget] for budget in budgets}


def _turns(order: Sequence[str], stratum: Mapping[str, str]) -> list[str]:
    """Reorder so that the k-th member of every stratum stands before any (k+1)-th."""
    queues: dict[str, list[str]] = {}
    for subject in order:
        queues.setdefault(stratum.get(subject, ""), []).append(subject)
    # ties keep the order of the permutation, so that rare strata do not always come last
    rows = sorted(queues.values(), key=len, reverse=True)
    return [queue[turn] for turn in range(len(rows[0]) if rows else 0) for queue in rows if turn < len(queue)]


def _covering(order: Sequence[str], classes_of: Mapping[str, Collection[str]]) -> list[str]:
    """Reorder so that every class comes up as early and as often as it can.

    Greedy, the rarest class first, as the iterative stratification of several labels does (Sechidis et al. 2011,
    doi:10.1007/978-3-642-23808-6_10), but for one growing list instead of folds.
    """
    pool = Counter(name for subject in order for name in set(classes_of.get(subject, ())))
    left, seen, out = list(order), Counter(), []
    while left:
        shown = {name for subject in left for name in classes_of.get(subject, ())}
        if not shown:
            return out + left
        wanted = min(shown, key=lambda name: (seen[name], pool[name], name))
        subject = next(s for s in left if wanted in classes_of.get(s, ()))
        left.remove(subject)
        out.append(subject)
        seen.update(set(classes_of[subject]))
    return out


def _place(seed: int, content: str) -> str:
    return hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()


def _groups(hashes: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Subjects that share a content hash, together; every list sorted by content."""
    parent = {subject: subject for subject in hashes}

    def root(subject: str) -> str:
        while parent[subject] != subject:
            subject = parent[subject]
        return subject

    owner: dict[str, str] = {}
    for subject, contents in hashes.items():
        if not contents:
            raise ValueError(f"subject {subject} has no content hash")
        for content in contents:
            parent[root(subject)] = root(owner.setdefault(content, subject))
    groups: dict[str, list[str]] = {}
    for subject in sorted(hashes, key=lambda s: (list(hashes[s]), s)):
        groups.setdefault(root(subject), []).append(subject)
    return list(groups.values())


def _count(key: str, wanted: int | float, total: int) -> int:
    """Subjects of a side; a float is a share, an int a number."""
    if isinstance(wanted, bool) or wanted < 0 or (isinstance(wanted, float) and wanted >= 1):
        raise ConfigError(
            f"split.{key} must be a number of subjects or a share from 0 to below 1, got {wanted!r}"
        )
    if isinstance(wanted, int):
        return wanted
    return max(1, round(wanted * total)) if wanted > 0 and total > 2 else round(wanted * total)


def unstated_classes(cases: Iterable[CaseRow], classes: Sequence[str]) -> tuple[str, ...]:
    """Classes that no annotator stated in any of these labeled cases, so that nothing can be learned about them."""
    known = [case.known_classes or (True,) * len(classes) for case in cases]
    return tuple(name for k, name in enumerate(classes) if not any(stated[k] for stated in known))
