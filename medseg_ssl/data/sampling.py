"""Which scan, pair or case stands at a global sample index: a pure function, with modalities balanced.

Indices are dealt out in rounds of as many samples as there are units. In a round every modality gets a share
of samples that grows with (number of units) ** temperature, and a unit comes again only when all of its
modality have been; so small archives are covered evenly, and a batch seldom holds one scan twice, which
contrastive objectives would take for two. A modality with fewer places than units (below temperature 1 the
largest) is drawn from anew in every round, without repetition within it. Nothing is stored but the last
rounds, so any index can be asked for at any time, in any process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.manifest import Affine, affine_rows
from medseg_ssl.draws import numpy_generator
from medseg_ssl.types import RELATIONS, ViewPlan


@dataclass(frozen=True)
class SampleSpec:
    """What one sample is made of.

    Attributes:
        index: global sample index.
        subject: subject key.
        scans: scan keys: one, the two of a pair, or the channels of a case in order.
        case: case key where views are labeled, else None.
        relation: of the pair, ``""`` unpaired.
        transform_44: RAS mm of the second scan of a pair to those of the first, None where they share theirs already.
    """

    index: int
    subject: str
    scans: tuple[str, ...]
    case: str | None = None
    relation: str = ""
    transform_44: Affine | None = None


@dataclass(frozen=True)
class _Unit:
    group: tuple[str, ...]
    subject: str
    scans: tuple[str, ...]
    case: str | None = None
    relation: str = ""
    transform_44: Affine | None = None


class Sampler:
    """Deals out scans, pairs (where the plan pairs views) or labeled cases (where views are labeled)."""

    def __init__(
        self,
        archive: Archive,
        plan: ViewPlan,
        *,
        seed: int,
        subjects: Collection[str] | None = None,
        cases: Collection[str] | None = None,
        relations: Sequence[str] = (),
        modality_temperature: float = 0.5,
        max_offset_mm: float | None = None,
        units: Sequence[_Unit] | None = None,
        purpose: str = "sampling",
    ) -> None:
        """List the units.

        Args:
            archive: to draw from.
            plan: what the objective asks for.
            seed: of the run.
            subjects: keys to draw from; None for all.
            cases: keys of labeled cases to draw from; None for all of the subjects.
            relations: of pairs the objective can use; empty for all.
            modality_temperature: 1 keeps the proportions of the archive, 0 gives every modality the same
                share.
            max_offset_mm: leave out pairs that were measured to lie further apart.
            units: what to deal out in place of what the plan asks for; see ``pool``.
            purpose: names the stream of draws, so that two samplers of one run deal independently.

        Raises:
            UserError: nothing to draw from, or a subject or case the archive does not have.
            ConfigError: an unknown relation or a temperature outside [0, 1].
        """
        if not 0 <= modality_temperature <= 1:
            raise ConfigError(f"modality_temperature must lie in [0, 1], got {modality_temperature}")
        self.seed = seed
        self._temperature = modality_temperature
        self._archive = archive
        self._subjects = (
            None if subjects is None else self._known(subjects, {r.subject for r in archive.scans.values()})
        )
        self._purpose = purpose
        if units is not None:
            self.units = list(units)
        elif any(spec.labeled for spec in plan.values()):
            self.units = self._cases(cases)
        elif any(spec.pair != "none" for spec in plan.values()):
            self.units = self._pairs(relations, max_offset_mm)
        else:
            self.units = self._scans()
        groups = sorted({unit.group for unit in self.units})
        self._members = [[i for i, unit in enumerate(self.units) if unit.group == group] for group in groups]
        sizes = np.array([len(m) for m in self._members], float)
        weight = sizes**modality_temperature
        self.shares = {
            group: float(share) for group, share in zip(groups, weight / weight.sum(), strict=True)
        }
        self._round = lru_cache(maxsize=4)(self._deal)

    def __len__(self) -> int:
        """Units there are: scans, pairs or cases."""
        return len(self.units)

    def __getstate__(self) -> dict[str, object]:
        """Everything but the remembered rounds, which cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_round"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore what ``__getstate__`` gave."""
        self.__dict__.update(state)
        self._round = lru_cache(maxsize=4)(self._deal)

    def sample(self, index: int) -> SampleSpec:
        """The sample at a global index."""
        number, place = divmod(index, len(self.units))
        unit = self.units[self._round(number)[place]]
        return SampleSpec(index, unit.subject, unit.scans, unit.case, unit.relation, unit.transform_44)

    def _deal(self, number: int) -> np.ndarray:
        # units of one round: each group's share of places, filled from a stream of permutations of its
        # members
        generator = numpy_generator(self.seed, number, f"{self._purpose}/round")
        total = len(self.units)
        bounds = np.floor(np.cumsum([0.0, *self.shares.values()]) * total + generator.random()).astype(int)
        bounds[0], bounds[-1] = 0, total
        chosen = []
        for members, count in zip(self._members, np.diff(np.minimum(bounds, total)), strict=True):
            rounds = -(-int(count) // len(members))
            stream = [generator.permutation(members) for _ in range(rounds)]
            chosen.append(np.concatenate(stream)[:count] if stream else np.empty(0, int))
        return generator.permutation(np.concatenate(chosen)).astype(int)

    def pool(self) -> Sampler:
        """A sampler of every case of the subjects, labeled or not, with the modalities of one of this one's cases.

        What it deals out has no ``case``: nobody can read a label by it.

        Raises:
            ConfigError: the subjects were not stated, so that the pool could hold test subjects.
        """
        if self._subjects is None:
            raise ConfigError("a view from the pool of all cases needs the subjects that may be drawn from")
        groups = {unit.group for unit in self.units}
        found = []
        for row in self._archive.cases.values():
            group = tuple(self._archive.scans[key].modality for key in row.scans)
            if group in groups and self._wanted(row.subject):
                found.append(_Unit(group, row.subject, row.scans))
        units = self._ordered(found)
        return Sampler(
            self._archive,
            {},
            seed=self.seed,
            modality_temperature=self._temperature,
            units=units,
            purpose="sampling/pool",
        )

    # -- units -----------------------------------------------------------------------------------------------

    def _wanted(self, subject: str) -> bool:
        return self._subjects is None or subject in self._subjects

    def _scans(self) -> list[_Unit]:
        rows = [row for row in self._archive.scans.values() if self._wanted(row.subject)]
        if not rows:
            raise UserError(f"no scan to draw from in archive {self._archive.path}")
        return self._ordered(_Unit((row.modality,), row.subject, (row.key,)) for row in rows)

    def _pairs(self, relations: Sequence[str], max_offset_mm: float | None) -> list[_Unit]:
        unknown = [r for r in relations if r not in RELATIONS]
        if unknown:
            raise ConfigError(f"no relation named {unknown[0]!r}; known: {', '.join(RELATIONS)}")
        wanted = set(relations) or set(RELATIONS)
        scans = self._archive.scans
        units = []
        for pair in self._archive.pairs:
            a, b = sorted(
                (scans[pair.scan_a], scans[pair.scan_b]),
                key=lambda row: (row.modality, row.content_hash, row.key),
            )
            apart = (
                max_offset_mm is not None and pair.offset_mm is not None and pair.offset_mm > max_offset_mm
            )
            if pair.relation in wanted and self._wanted(a.subject) and not apart:
                way = pair.transform_44
                if way is not None and a.key != pair.scan_a:
                    way = affine_rows(np.linalg.inv(np.array(way)))
                kinds = (a.modality, b.modality)
                units.append(_Unit(kinds, a.subject, (a.key, b.key), None, pair.relation, way))
        if not units:
            present = sorted({pair.relation for pair in self._archive.pairs})
            raise UserError(
                f"no pair to draw from in archive {self._archive.path}: the objective takes "
                f"{', '.join(sorted(wanted))}; the archive has {', '.join(present) or 'no pairs'}"
                + ("" if max_offset_mm is None else f", at most {max_offset_mm:g} mm apart")
                + ("" if self._subjects is None else f" (over all subjects; {len(self._subjects)} asked for)")
            )
        return self._ordered(units)

    def _cases(self, cases: Collection[str] | None) -> list[_Unit]:
        rows = {key: row for key, row in self._archive.cases.items() if row.labeled}
        if cases is not None:
            rows = {key: rows[key] for key in self._known(cases, rows, what="labeled case")}
        rows = {key: row for key, row in rows.items() if self._wanted(row.subject)}
        if not rows:
            raise UserError(f"no labeled case to draw from in archive {self._archive.path}")
        counts = sorted({len(row.scans) for row in rows.values()})
        if len(counts) > 1:
            raise UserError(
                f"labeled cases of archive {self._archive.path} have {counts} channels; they must be equal"
            )
        modality = {
            key: tuple(self._archive.scans[s].modality for s in row.scans) for key, row in rows.items()
        }
        return self._ordered(_Unit(modality[key], row.subject, row.scans, key) for key, row in rows.items())

    def _ordered(self, units: Iterable[_Unit]) -> list[_Unit]:
        # by voxels before keys: keys are salted, and a run must draw the same scans from every archive of the same data
        scans = self._archive.scans

        def place(unit: _Unit) -> tuple[object, ...]:
            return (tuple(scans[key].content_hash for key in unit.scans), unit.scans, unit.relation)

        return sorted(units, key=place)

    def _known(
        self, asked: Collection[str], there: Collection[str], *, what: str = "subject"
    ) -> frozenset[str]:
        missing = sorted(set(asked) - set(there))
        if missing:
            raise UserError(
                f"archive {self._archive.path} has no {what} {missing[0]!r} ({len(missing)} missing)"
            )
        return frozenset(asked)
