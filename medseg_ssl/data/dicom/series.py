"""Planes to stacks: which planes make a volume together, told by where they lie, not by folders or file names.

A series may hold several orientations, b-values, echoes or time points; each becomes a stack of its own. What cannot be
a volume is refused with a reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from medseg_ssl.data.dicom.headers import Plane
from medseg_ssl.data.nifti import BadScan

SAME_PLACE_MM = 0.01
"""Planes closer than this along their normal lie at one place."""
_DIRECTION = 1e-3
_TOLERANCE_MM = 0.05
_TOLERANCE_SHARE = 0.02
_MISSING_FROM = 1.5
_STRAY_MM, _STRAY_SHARE = 0.25, 0.1
_LOCALIZER_PLANES = 12
_LOCALIZER_DIRECTIONS = 3


@dataclass(frozen=True)
class Stack:
    """Planes of one volume, sorted along their normal, one at each place.

    Attributes:
        planes: in the order of the normal (row × column).
    """

    planes: tuple[Plane, ...]

    @property
    def first(self) -> Plane:
        """The plane whose header speaks for the stack."""
        return self.planes[0]


@dataclass(frozen=True)
class Spacing:
    """How the planes of a stack follow one another.

    Attributes:
        step_mm: vector (3,) from a plane to the next, LPS; not along the normal where the gantry was tilted.
        places_mm: (N,) position of every plane along the normal, rising from 0.
        uniform: the gaps are equal within tolerance.
        tilted: the step leaves the normal by more than half a voxel over the whole stack.
    """

    step_mm: np.ndarray
    places_mm: np.ndarray
    uniform: bool
    tilted: bool


def stacks(
    planes: Iterable[Plane], *, minimum_slices: int, repeats: str = "all"
) -> tuple[list[Stack], list[tuple[tuple[Plane, ...], str]]]:
    """Sort planes into stacks.

    Args:
        planes: of any number of series.
        minimum_slices: fewer places than these make no volume.
        repeats: ``all`` time points of one place become a scan each, or only the ``first``.

    Returns:
        The stacks, and groups of planes that make none, each with its reason.
    """
    series: dict[tuple[object, ...], list[Plane]] = defaultdict(list)
    for plane in planes:
        series[plane.subject, plane.study, plane.series].append(plane)
    found: list[Stack] = []
    refused: list[tuple[tuple[Plane, ...], str]] = []
    for members in series.values():
        members, copies = _without_copies(members)
        refused += [((plane,), "a copy of another file of its series") for plane in copies]
        groups = _alike(members)
        directions = len(_by_direction(members))
        for group in groups:
            places = len(_places(group))
            localizer = directions >= _LOCALIZER_DIRECTIONS and places < _LOCALIZER_PLANES
            if places < minimum_slices or localizer:
                reason = _too_few(places, directions if localizer else 1, minimum_slices)
                refused.append((tuple(group), reason))
                continue
            made, left = _one_at_a_place(group, repeats=repeats)
            found += made
            refused += left
    return found, refused


def spacing(stack: Stack) -> Spacing:
    """How the planes of a stack follow one another.

    Raises:
        BadScan: planes are missing, or the gaps differ too much to be resampled.
    """
    normal = normal_of(stack.first)
    positions = np.array([plane.position_mm for plane in stack.planes])
    places = (positions - positions[0]) @ normal
    gaps = np.diff(places)
    middle = float(np.median(gaps))
    equal = bool((np.abs(gaps - middle) <= max(_TOLERANCE_MM, _TOLERANCE_SHARE * middle)).all())
    # small differences that all have one sign add up
    stray = float(np.abs(places - np.linspace(0.0, places[-1], len(places))).max())
    uniform = equal and stray <= max(_STRAY_MM, _STRAY_SHARE * middle)
    if not equal:
        wide = np.flatnonzero(gaps > _MISSING_FROM * middle)
        if len(wide):
            at = int(wide[0])
            raise BadScan(
                f"missing slices: {gaps[at]:.2f} mm between slices {at + 1} and {at + 2} of {len(places)}, "
                f"{middle:.2f} mm elsewhere"
            )
        narrow = np.flatnonzero(gaps * _MISSING_FROM < middle)
        if len(narrow):
            at = int(narrow[0])
            raise BadScan(
                f"slices overlap unevenly: {gaps[at]:.2f} mm between slices {at + 1} and {at + 2} of {len(places)}, "
                f"{middle:.2f} mm elsewhere"
            )
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    aside = step - normal * (step @ normal)
    drift = float(np.linalg.norm(aside)) * (len(positions) - 1)
    tilted = drift > 0.5 * min(stack.first.spacing_mm)
    if np.linalg.norm(aside) > abs(step @ normal):
        raise BadScan("its slices lean by more than 45 degrees: no gantry does that")
    # planes that wander aside other than by a steady shear are no stack of one gantry
    straight = positions[0] + np.outer(places / places[-1], positions[-1] - positions[0])
    wander = float(np.linalg.norm(positions - straight, axis=1).max())
    if wander > max(1.0, min(stack.first.spacing_mm)):
        raise BadScan(f"slices are shifted against one another by up to {wander:.1f} mm")
    return Spacing(step, places, uniform, tilted)


def normal_of(plane: Plane) -> np.ndarray:
    """Unit vector (3,) row × column, LPS."""
    row, column = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    normal = np.cross(row, column)
    return normal / np.linalg.norm(normal)


def _without_copies(members: Sequence[Plane]) -> tuple[list[Plane], list[Plane]]:
    """Planes, each once, and those whose object is there under another file name too."""
    seen: set[tuple[str, int]] = set()
    kept, copies = [], []
    for plane in members:
        again = plane.uid and (plane.uid, plane.frame) in seen
        (copies if again else kept).append(plane)
        seen.add((plane.uid, plane.frame))
    return kept, copies


def _alike(members: Sequence[Plane]) -> list[list[Plane]]:
    """Planes of one direction, size, pixel spacing, image type and phase.

    A phase that differs from plane to plane (a timer, an echo noted per slice) tells no volumes apart.
    """
    out = []
    for group in _by_direction(members):
        kinds: dict[tuple[object, ...], list[Plane]] = defaultdict(list)
        for plane in group:
            fine = (round(plane.spacing_mm[0], 3), round(plane.spacing_mm[1], 3))
            kinds[plane.size, fine, plane.image_type].append(plane)
        for planes in kinds.values():
            phases: dict[tuple[object, ...], list[Plane]] = defaultdict(list)
            for plane in planes:
                phases[plane.contrast, *plane.phase].append(plane)
            single = max(map(len, phases.values())) == 1
            out += [planes] if single else list(phases.values())
    return out


def _by_direction(members: Sequence[Plane]) -> list[list[Plane]]:
    groups: list[list[Plane]] = []
    for plane in members:
        for group in groups:
            if np.allclose(group[0].orientation, plane.orientation, rtol=0, atol=_DIRECTION):
                group.append(plane)
                break
        else:
            groups.append([plane])
    return groups


def _places(planes: Sequence[Plane]) -> dict[int, list[Plane]]:
    """Planes by their place along the normal, rising."""
    row, column = np.array(planes[0].orientation[:3]), np.array(planes[0].orientation[3:])
    normal = np.cross(row, column)
    along = np.array([plane.position_mm for plane in planes]) @ normal
    places: dict[int, list[Plane]] = {}
    last, number = -np.inf, -1
    for i in np.argsort(along, kind="stable"):
        if along[i] - last > SAME_PLACE_MM:
            last, number = float(along[i]), number + 1
        places.setdefault(number, []).append(planes[int(i)])
    return places


def _one_at_a_place(
    group: Sequence[Plane], *, repeats: str
) -> tuple[list[Stack], list[tuple[tuple[Plane, ...], str]]]:
    """Stacks of planes that lie at the same places several times (time points, copies)."""
    places = _places(group)
    if max(map(len, places.values())) == 1:
        return [Stack(tuple(p[0] for p in places.values()))], []
    by_order: dict[tuple[object, ...], list[Plane]] = defaultdict(list)
    for plane in group:
        by_order[plane.order].append(plane)
    if all(len(_places(part)) == len(part) == len(places) for part in by_order.values()):
        ordered = sorted(by_order.values(), key=lambda part: min(p.instance for p in part))
        made = [Stack(tuple(p[0] for p in _places(part).values())) for part in ordered]
    else:
        counts = Counter(len(p) for p in places.values())
        if len(counts) > 1:
            return [], [
                (
                    tuple(group),
                    f"places repeat unevenly ({len(group)} slices at {len(places)} places): the volumes cannot be "
                    "told apart",
                )
            ]
        tied = any(
            a.instance == b.instance and a.path != b.path
            for p in places.values()
            for a, b in combinations(p, 2)
        )
        if tied:
            reason = (
                f"places repeat ({len(group)} slices at {len(places)} places) and nothing tells their order"
            )
            return [], [(tuple(group), reason)]
        columns = [
            sorted(p, key=lambda plane: (plane.instance, plane.path, plane.frame)) for p in places.values()
        ]
        made = [Stack(tuple(column[k] for column in columns)) for k in range(next(iter(counts)))]
    if repeats == "first":
        reason = "a further time point of its series (repeats: all would keep it)"
        return made[:1], [(stack.planes, reason) for stack in made[1:]]
    return made, []


def _too_few(places: int, directions: int, minimum: int) -> str:
    count = "a single slice" if places == 1 else f"only {places} slices"
    if directions > 1:
        return f"{count} in this direction, {directions} directions in the series: a localizer, not a volume"
    return f"{count} at different places; a volume has at least {minimum}"
