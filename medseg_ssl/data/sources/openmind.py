"""OpenMind and other collections in nnssl's layout (arXiv 2412.17041): one JSON file names every image.

The file, ``pretrain_data.json``, mirrors BIDS: ``datasets`` → ``subjects`` → ``sessions`` → a list ``images`` of
``{name, image_path, modality, image_info, associated_masks}``. A path is relative to the root, or begins with a
placeholder such as ``$nnssl_raw/``, which nnssl replaces by an environment variable; here it stands for the root,
or for the folder below it that ``source.prefixes`` gives. An absolute path must lie below the root.

- ``modality`` is a BIDS suffix in OpenMind (``T1w``, ``FLAIR``, ``FA``, …): 24 of them, quantitative maps and PET
  included, all chosen by its authors as 3D images to pretrain on, so all are taken. A name that tells no
  modality is rejected, unless ``source.modalities`` explains it.
- ``anonymization_mask`` (1 = defaced) makes those voxels no data, so that nobody learns to paint blurred faces.
- ``anatomy_mask`` is not used: in OpenMind it is 1 *outside* of the head, which its name does not tell, and the
  archive finds the body by itself.
- Age, sex and what else ``subject_info``, ``session_info`` and ``image_info`` hold are not taken over.

The JSON is the list: files below the root that it does not name are not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from medseg_ssl.config import UserError
from medseg_ssl.data.sources._json import read_mapping
from medseg_ssl.data.sources._kinds import Kind, kind_of
from medseg_ssl.data.sources._suffixes import SCANS
from medseg_ssl.data.sources.base import Listing, RawCase, RawScan, Source, SourceConfig

COLLECTION_BYTES = 2**30
"""OpenMind's own file names 114 thousand images in about a tenth of this."""

MAPS = (
    "ADC",
    "DWI",
    "FA",
    "MD",
    "MP2RAGE",
    "T1map",
    "T2map",
    "T2starmap",
    "TRACE",
    "UNIT1_denoised",
    "minIP",
)
"""Modalities of OpenMind beside the BIDS suffixes of weighted images; the contrast is the name."""

_KNOWN: dict[str, Kind] = {
    **SCANS,
    **{name: Kind(modality="MR", contrast=name) for name in MAPS},
    # a single EPI volume; the name says nothing of its weighting
    "sbref": Kind(modality="MR"),
}


class OpenMindConfig(SourceConfig):
    """How a collection is read.

    Attributes:
        collection: the JSON file below the root.
        prefixes: placeholder (``nnssl_raw`` for ``$nnssl_raw/…``) to a folder below the root, ``.`` for the
            root; a placeholder that is not named here stands for the root.
        modalities: modality name of the JSON to its kind; these go before the known names.
        only: modality names to take; null: all.
        anonymization_masks: take voxels that were anonymised for no data. Without it they are tissue like
            any other.
        test_subjects: subjects reserved for test, as ``dataset/subject``.
    """

    collection: str = "pretrain_data.json"
    prefixes: dict[str, str] = Field(default_factory=dict)
    modalities: dict[str, Kind] = Field(default_factory=dict)
    only: tuple[str, ...] | None = None
    anonymization_masks: bool = True
    test_subjects: tuple[str, ...] = ()

    @field_validator("collection")
    @classmethod
    def _inside(cls, value: str) -> str:
        if not value or Path(value).is_absolute() or ".." in Path(value).parts:
            raise ValueError(f"{value!r} must be a path below the root, for example pretrain_data.json")
        return value

    @field_validator("prefixes")
    @classmethod
    def _placeholders(cls, value: dict[str, str]) -> dict[str, str]:
        for name, folder in value.items():
            if (
                name.startswith("$")
                or "/" in name
                or Path(folder).is_absolute()
                or ".." in Path(folder).parts
            ):
                raise ValueError(
                    f"{name!r}: {folder!r} must map a placeholder without its $ to a folder below the root"
                )
        return value


@dataclass(frozen=True)
class _Image:
    """An entry of the JSON."""

    dataset: str
    subject: str
    session: str
    path: str
    modality: str
    anonymization_mask: str | None


class OpenMind(Source):
    """The images a collection's JSON names."""

    Config = OpenMindConfig
    config: OpenMindConfig

    def list(self, root: Path) -> Listing:
        """List a collection.

        Raises:
            UserError: no such folder or JSON file, the JSON does not say what nnssl's says, or no image it
                names is there.
        """
        root, config = Path(os.path.normpath(root)), self.config
        if not root.is_dir():
            raise UserError(f"no folder {root}")
        path = root / config.collection
        if not path.is_file():
            raise UserError(
                f"no scan below {root}: there is no {config.collection} (source.collection names the JSON file)"
            )
        try:
            content = read_mapping(path, most_bytes=COLLECTION_BYTES)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        cases: dict[Path, RawCase] = {}
        rejected: list[tuple[Path, str]] = []
        for image in _images(content, path):
            file = self._place(image.path, root)
            if file in cases:
                rejected.append((file, "the collection names it a second time"))
                continue
            scan = self._scan(image, file, root)
            if isinstance(scan, RawScan):
                cases[file] = RawCase(file.relative_to(root).as_posix(), (scan,))
            else:
                rejected.append((file, scan))
        if not cases:
            why = f"; {rejected[0][0].name}: {rejected[0][1]}" if rejected else ""
            raise UserError(
                f"no scan below {root}: of {len(rejected)} images that {config.collection} names none is one{why}"
            )
        unknown = set(config.test_subjects) - {case.scans[0].subject for case in cases.values()}
        if unknown:
            raise UserError(f"source.test_subjects names {sorted(unknown)[0]!r}, which is not in {path}")
        return Listing(
            cases=tuple(cases.values()),
            rejected=tuple(rejected),
            test_subjects=frozenset(config.test_subjects),
        )

    def _scan(self, image: _Image, file: Path, root: Path) -> RawScan | str:
        """The scan of an entry, or the reason why it is none."""
        config = self.config
        kind = self._kind(image.modality)
        if kind is None:
            # without the name: anybody's JSON may hold anything, and reasons are public
            return (
                f"its modality is none of the known ones: {', '.join({**_KNOWN, **config.modalities})}, "
                "or names such as CT and MRI; source.modalities can explain it"
            )
        if config.only is not None and image.modality not in config.only:
            return f"its modality is none of source.only: {', '.join(config.only)}"
        if not file.is_relative_to(root):
            return "the collection names it outside of the root (source.prefixes places $… paths)"
        if not os.path.isfile(file):
            return "the collection names it, but there is no such file"
        mask = None
        if config.anonymization_masks and image.anonymization_mask is not None:
            mask = self._place(image.anonymization_mask, root)
            if not mask.is_relative_to(root) or not os.path.isfile(mask):
                return (
                    "its anonymization_mask is not there, so nobody knows which voxels were defaced "
                    "(source.anonymization_masks: false takes them for tissue)"
                )
        return RawScan(
            path=file,
            subject=f"{image.dataset}/{image.subject}",
            study=image.session,
            modality=kind.modality,
            contrast=kind.contrast,
            unit=kind.stored_unit,
            token=image.modality,
            no_data_mask=mask,
        )

    def _kind(self, modality: str) -> Kind | None:
        known = {**_KNOWN, **self.config.modalities}
        if modality in known:
            return known[modality]
        try:
            return kind_of(modality, {})
        except UserError:
            return None

    def _place(self, text: str, root: Path) -> Path:
        """Where a path of the JSON leads, ``..`` resolved without asking the disk; it may lie anywhere."""
        if text.startswith("$"):
            placeholder, _, text = text[1:].partition("/")
            text = text.lstrip("/")
            folder = root / self.config.prefixes.get(placeholder, ".")
        else:
            folder = root
        return Path(os.path.normpath(folder / text))


def _images(content: Mapping[str, Any], path: Path) -> Iterator[_Image]:
    """Every image of a collection, in the JSON's order.

    Raises:
        UserError: a level is missing or of another type; the message holds no name of a subject.
    """
    for dataset_name, dataset in _mapping(content, "datasets", f"{path}").items():
        for subject_name, subject in _mapping(dataset, "subjects", f"{path}: a data set").items():
            sessions = _mapping(subject, "sessions", f"{path}: a subject")
            for session_name, session in sessions.items():
                images = session.get("images") if isinstance(session, dict) else None
                if not isinstance(images, list):
                    raise UserError(f"{path}: a session must hold a list 'images', as nnssl writes it")
                for image in images:
                    yield _image(image, (dataset_name, subject_name, session_name), path)


def _mapping(block: object, key: str, where: str) -> dict[str, Any]:
    inner = block.get(key) if isinstance(block, dict) else None
    if not isinstance(inner, dict):
        raise UserError(
            f"{where} must hold a mapping {key!r}, as nnssl writes it, got {type(inner).__name__}"
        )
    return inner


def _image(image: object, names: tuple[str, str, str], path: Path) -> _Image:
    if not isinstance(image, dict):
        raise UserError(f"{path}: an image must be a mapping, got {type(image).__name__}")
    for key in ("image_path", "modality"):
        if not isinstance(image.get(key), str) or not image[key]:
            raise UserError(
                f"{path}: an image must hold a text {key!r}, got {type(image.get(key)).__name__}; "
                f"its keys: {', '.join(map(str, image))}"
            )
    masks = image.get("associated_masks")
    mask = masks.get("anonymization_mask") if isinstance(masks, dict) else None
    if mask is not None and not isinstance(mask, str):
        raise UserError(f"{path}: an anonymization_mask must be a path or null, got {type(mask).__name__}")
    dataset, subject, session = names
    return _Image(dataset, subject, session, image["image_path"], image["modality"], mask or None)
