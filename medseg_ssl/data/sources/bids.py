"""BIDS, the Brain Imaging Data Structure (https://bids-specification.readthedocs.io, doi 10.1038/sdata.2016.44).

Scans are ``sub-<label>[/ses-<label>]/<datatype>/sub-<label>[_ses-<label>][_<entity>-<value> …]_<suffix>.nii[.gz]``
below a folder with a ``dataset_description.json``. A root may hold several data sets, one within another too;
a data set below ``derivatives`` is none of them.

- The suffix tells modality and contrast (``T1w``, ``T2w``, ``T2starw``, ``FLAIR``, ``PDw``, ``angio``, ``ct``,
  ``pet``, …). One that nobody explained is rejected, never guessed; ``source.modalities`` explains it.
- Series (``bold``, ``dwi``, ``asl``), field maps, projections, masks, quantitative maps (``T1map``, ``MTRmap``)
  and the images such maps are computed from (``MEGRE``, ``MTR``) are rejected with the reason. Maps and their
  sources are taken where ``source.modalities`` names them.
- ``part-phase``, ``part-real`` and ``part-imag`` are rejected: the magnitude is the scan.
- ``ce-<agent>``, or ``ContrastBolusIngredient`` in the sidecar, adds ``+C`` to the contrast.
- ``Manufacturer`` and ``ManufacturersModelName`` in the sidecar name the scanner.
- A PET's contrast is its tracer (``trc-``, else ``TracerName``). It is in SUV where the sidecar's ``Units`` say
  so (``SUV`` or ``SUVbw``), else raw: ``Bq/mL``, ``g/mL`` and SUVs by other norms are no SUV. One with several
  time frames is rejected.
- A session is a study. The frame of reference is unknown, unless the scan's own sidecar names its
  ``FrameOfReferenceUID``.
- Sidecars are inherited as BIDS has it: one further up applies where its suffix is the same and its entities are
  among the scan's. Nothing else is taken from them. A sidecar that cannot be read is listed as rejected, and its
  scan goes on as one without it. ``participants.tsv`` and other tables are never opened.
- What lies below ``derivatives`` is a label that ``labels`` names, a scan where ``derivatives`` names the
  derivative, or rejected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from medseg_ssl.config import UserError
from medseg_ssl.data.nifti import is_nifti_name
from medseg_ssl.data.scanner import scanner_name
from medseg_ssl.data.sources._bids_tree import DESCRIPTION, BIDSTree, BIDSVolume, Sidecars, read_tree
from medseg_ssl.data.sources._kinds import Kind
from medseg_ssl.data.sources._labels import class_values
from medseg_ssl.data.sources._suffixes import SCANS, why_no_scan
from medseg_ssl.data.sources.base import Listing, RawCase, RawScan, Source, SourceConfig

_DERIVED = ("space", "res", "den", "label", "desc", "hemi", "seg", "atlas", "scale")
"""Entities that only derivatives have; a label may add them to the entities of its scan."""

_WITHOUT_AGENT = ("no", "none", "pre", "native", "without")
_SUV = re.compile(r"suv(?:[ _-]?bw)?(?:\s*[(\[]?\s*g\s*/\s*ml\s*[)\]]?)?", re.IGNORECASE)


class BIDSConfig(SourceConfig):
    """How a BIDS tree is read.

    Attributes:
        suffixes: suffixes to take (``[T1w, T2w]``); null: every one that is known to be a scan's.
        modalities: suffix to its kind, for suffixes that do not tell it; they go before the known ones.
        labels: what follows the scan's name in the name of its label below ``derivatives``, in order of
            preference: ``seg-manual`` for ``sub-1_T1w_seg-manual``; ``dseg`` or ``desc-manual_dseg`` or
            ``label-lesion_mask`` for a label with the scan's entities and without its suffix. ``*`` stands for
            any text; ``NAME/`` in front names the derivative. The first that is there is the label.
        labeled: suffixes of the scans the labels belong to; null: all.
        classes: label value to name; background (0) need not be named.
        derivatives: derivatives whose volumes are scans too, for example preprocessed ones: the name of their
            folder.
        shared_subjects: one subject label means one person in every data set below the root; without it a
            label counts within its data set. Two roots always share their labels.
        unknown_when_absent: classes (values or names) that are unknown, not absent, in a case without a voxel
            of them.
        test_subjects: subjects reserved for test, as ``sub-01``, behind the folder of their data set below the
            root (``study2/sub-01``).
    """

    suffixes: tuple[str, ...] | None = None
    modalities: dict[str, Kind] = Field(default_factory=dict)
    labels: tuple[str, ...] = ()
    labeled: tuple[str, ...] | None = None
    classes: dict[int, str] = Field(default_factory=dict)
    derivatives: tuple[str, ...] = ()
    shared_subjects: bool = False
    unknown_when_absent: tuple[int | str, ...] = ()
    test_subjects: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> BIDSConfig:
        known = {**SCANS, **self.modalities}
        for name in ("suffixes", "labeled"):
            wrong = sorted(set(getattr(self, name) or ()) - set(known))
            if wrong:
                raise ValueError(f"{name} names {wrong[0]!r}; known suffixes: {', '.join(known)}")
        if self.labels and not set(self.classes) - {0}:
            raise ValueError("labels needs classes, for example classes: {1: tumour}")
        for label in self.labels:
            if not re.fullmatch(r"(?:[^/]+/)?[^/]+", label) or is_nifti_name(Path(label)):
                raise ValueError(
                    f"labels holds {label!r}; write what follows the scan's name, without .nii.gz, "
                    "for example seg-manual or NAME/desc-manual_dseg"
                )
        return self


class BIDS(Source):
    """Scans of the BIDS data sets below a root."""

    Config = BIDSConfig
    config: BIDSConfig

    def list(self, root: Path) -> Listing:
        """List the data sets below ``root``.

        Raises:
            UserError: the root is missing or cannot be read, or holds no scan in BIDS layout.
        """
        root, config = Path(root), self.config
        if not root.is_dir():
            raise UserError(f"no folder {root}")
        tree = read_tree(root)
        sidecars = Sidecars(tree.sidecars)
        rejected = list(tree.rejected)
        readable = []
        for volume in tree.volumes:
            if os.path.isfile(volume.path):
                readable.append(volume)
            else:
                rejected.append(
                    (volume.path, "its content is not here: a broken link (`datalad get` fetches such files)")
                )
        scans: dict[BIDSVolume, RawScan] = {}
        for volume in readable:
            scan = self._scan(volume, sidecars)
            if isinstance(scan, RawScan):
                scans[volume] = scan
            else:
                rejected.append((volume.path, scan))
        labels, refused = self._labels(scans, readable)
        used = set(labels.values())
        rejected = [(path, refused.get(path, why)) for path, why in rejected if path not in used]
        cases = [RawCase(v.relative, (scan,), labels.get(v)) for v, scan in scans.items()]
        rejected += sidecars.unreadable
        if not cases:
            raise UserError(_nothing_found(root, tree, rejected))
        unknown = set(config.test_subjects) - {case.scans[0].subject for case in cases}
        if unknown:
            raise UserError(f"source.test_subjects names {sorted(unknown)[0]!r}, which is not below {root}")
        return Listing(
            cases=tuple(cases),
            classes={0: "background", **config.classes} if config.labels else {},
            unknown_when_absent=class_values(config.unknown_when_absent, config.classes),
            rejected=tuple(rejected),
            test_subjects=frozenset(config.test_subjects),
        )

    def _scan(self, volume: BIDSVolume, sidecars: Sidecars) -> RawScan | str:
        """The scan a file holds, or the reason why it is none."""
        config = self.config
        if volume.derivative and volume.derivative not in config.derivatives:
            return (
                "it lies in a derivative and is neither the label of a listed scan (source.labels) "
                "nor to be taken as a scan (source.derivatives)"
            )
        if not volume.subject:
            return "it does not lie in sub-<label>[/ses-<label>]/<datatype>/ of a BIDS data set"
        if not volume.suffix or not volume.entities:
            return "its name is none of BIDS: sub-<label>[_ses-<label>][_<entity>-<value> …]_<suffix>.nii.gz"
        named = (volume.entity("sub"), volume.entity("ses") or "")
        if named != (volume.subject[4:], volume.session[4:]):
            return "its name and its folders tell different subjects or sessions"
        known = {**SCANS, **config.modalities}
        if volume.suffix not in known:
            # without the suffix: of an odd name it may hold a part of the subject's, and reasons are public
            return why_no_scan(volume.suffix) or (
                f"its suffix is none of the known ones: {', '.join(known)}; source.modalities can explain it"
            )
        if config.suffixes is not None and volume.suffix not in config.suffixes:
            return f"its suffix is none of source.suffixes: {', '.join(config.suffixes)}"
        if volume.entity("part") in ("phase", "real", "imag"):
            return "the phase, real or imaginary part of a complex image; its magnitude is the scan"
        metadata = sidecars.of(volume)
        times = metadata.get("FrameTimesStart")
        if isinstance(times, list) and len(times) > 1:
            return f"a dynamic series of {len(times)} time frames (4D); a scan is one static or summed volume"
        kind = known[volume.suffix]
        return RawScan(
            path=volume.path,
            subject=volume.subject if self.config.shared_subjects else _below(volume.dataset, volume.subject),
            study=_below(volume.dataset, volume.session),
            modality=kind.modality,
            contrast=_contrast(kind, volume, metadata),
            unit="SUV" if kind.unit is None and _is_suv(kind, metadata) else kind.stored_unit,
            frame=sidecars.frame(volume),
            token="_".join(
                (*(f"{k}-{v}" for k, v in volume.entities if k not in ("sub", "ses")), volume.suffix)
            ),
            scanner=scanner_name(metadata.get("Manufacturer"), metadata.get("ManufacturersModelName")),
        )

    # -- labels ----------------------------------------------------------------------------------------------

    def _labels(
        self, scans: Iterable[BIDSVolume], volumes: Iterable[BIDSVolume]
    ) -> tuple[dict[BIDSVolume, Path], dict[Path, str]]:
        """The label of each scan that has one, and label files that cannot be used, with the reason."""
        config = self.config
        if not config.labels:
            return {}, {}
        candidates: dict[tuple[str, str, str, str], list[BIDSVolume]] = {}
        known = {**SCANS, **config.modalities}
        for volume in volumes:
            # a preprocessed scan is no label, whatever the pattern
            if volume.derivative and volume.subject and volume.suffix not in known:
                candidates.setdefault(volume.group, []).append(volume)
        claims: dict[BIDSVolume, list[BIDSVolume]] = {}
        refused: dict[Path, str] = {}
        for scan in scans:
            if config.labeled is not None and scan.suffix not in config.labeled:
                continue
            found = next(filter(None, self._found(scan, candidates.get(scan.group, []))), [])
            if len(found) == 1:
                claims.setdefault(found[0], []).append(scan)
                continue
            refused |= dict.fromkeys(
                (volume.path for volume in found),
                f"one of {len(found)} labels of the same scan; "
                "write source.labels as NAME/… to choose the derivative",
            )
        labels = {}
        for label, claimants in claims.items():
            # what a derivative made of a scan comes before the scan itself
            own = [scan for scan in claimants if scan.derivative == label.derivative] or claimants
            if len(own) == 1:
                labels[own[0]] = label.path
            else:
                refused[label.path] = (
                    f"it could be the label of {len(own)} scans; source.labeled chooses by their suffix"
                )
        return labels, refused

    def _found(self, scan: BIDSVolume, candidates: Sequence[BIDSVolume]) -> Iterator[list[BIDSVolume]]:
        """For each entry of ``labels`` in turn, the files that could be meant."""
        for pattern in self.config.labels:
            derivative, _, ending = pattern.rpartition("/")
            yield [
                volume
                for volume in candidates
                if derivative in ("", volume.derivative)
                and any(fnmatchcase(rest, ending) for rest in _rests(volume, scan))
            ]


def _rests(volume: BIDSVolume, scan: BIDSVolume) -> Iterator[str]:
    """What the name of a derivative adds to the name of a scan, read in either way BIDS trees have it."""
    if volume.stem.startswith(f"{scan.stem}_"):
        yield volume.stem[len(scan.stem) + 1 :]
    shared = tuple((key, value) for key, value in scan.entities if key != "desc" or not scan.derivative)
    own, added = volume.entities[: len(shared)], volume.entities[len(shared) :]
    if volume.suffix and own == shared and all(key in _DERIVED for key, _ in added):
        yield "_".join((*(f"{key}-{value}" for key, value in added), volume.suffix))


# -- what a scan shows ---------------------------------------------------------------------------------------


def _contrast(kind: Kind, volume: BIDSVolume, metadata: Mapping[str, Any]) -> str:
    contrast = kind.contrast
    if kind.modality == "PT":
        return contrast or _tracer(volume.entity("trc") or metadata.get("TracerName"))
    agent = volume.entity("ce") or metadata.get("ContrastBolusIngredient")
    given = isinstance(agent, str) and agent.strip().lower() not in ("", *_WITHOUT_AGENT)
    return f"{contrast}+C" if given and not contrast.endswith("+C") else contrast


def _tracer(name: object) -> str:
    """A tracer's name as it may stand in a manifest; every way to write fluorodeoxyglucose is ``FDG``."""
    plain = re.sub(r"[^A-Za-z0-9]", "", name) if isinstance(name, str) else ""
    return "FDG" if re.search("fdg|deoxyglucose", plain, re.IGNORECASE) else plain[:24]


def _is_suv(kind: Kind, metadata: Mapping[str, Any]) -> bool:
    units = metadata.get("Units")
    return kind.modality == "PT" and isinstance(units, str) and _SUV.fullmatch(units.strip()) is not None


def _below(dataset: str, name: str) -> str:
    return "/".join(filter(None, (dataset, name)))


def _nothing_found(root: Path, tree: BIDSTree, rejected: Sequence[tuple[Path, str]]) -> str:
    if not tree.datasets:
        return f"no scan below {root}: it holds no {DESCRIPTION} and no folder sub-<label>, so it is no BIDS data set"
    if not rejected:
        return f"no scan below {root}: its BIDS data set holds no NIfTI file"
    path, reason = rejected[0]
    return f"no scan below {root}: of {len(rejected)} files none is one; {path.name}: {reason}"
