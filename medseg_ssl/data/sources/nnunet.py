"""nnU-Net v2 raw layout: dataset.json, imagesTr/CASE_0000.nii.gz per channel, labelsTr/CASE.nii.gz."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from medseg_ssl.config import UserError
from medseg_ssl.data.sources._kinds import kind_of
from medseg_ssl.data.sources._labels import (
    TaskConfig,
    check_reserved,
    class_values,
    numbered,
    read_task,
    reserved_subjects,
)
from medseg_ssl.data.sources.base import Listing, RawCase, Source


class NNUNet(Source):
    """An nnU-Net raw data set; the channels of a case lie on one grid, as nnU-Net demands."""

    Config = TaskConfig
    config: TaskConfig

    def list(self, root: Path) -> Listing:
        """List a data set folder.

        Raises:
            UserError: no dataset.json, or it does not say what nnU-Net's says; region-based labels.
        """
        root = Path(root)
        task = read_task(root)
        names = numbered(task, ("channel_names", "modality"), root)
        channels = tuple(kind_of(name, self.config.modalities) for name in names.values())
        classes, ignored = _classes(task, root)
        ending = str(task.get("file_ending", ".nii.gz"))
        cases: list[RawCase] = []
        subjects: dict[str, set[str]] = {"Tr": set(), "Ts": set()}
        rejected: list[tuple[Path, str]] = []
        for part in ("Tr", "Ts"):
            for name, files in _channel_files(root / f"images{part}", ending, rejected).items():
                wanted = set(range(len(channels)))
                if set(files) != wanted:
                    reason = f"its case has channels {sorted(files)}, dataset.json wants {sorted(wanted)}"
                    rejected += [(path, reason) for path in files.values()]
                    continue
                label = root / f"labels{part}" / f"{name}{ending}"
                paths = [files[i] for i in range(len(channels))]
                scans = self.config.scans(name, paths, channels, in_one_file=False)
                case = RawCase(name, scans, label if label.is_file() else None)
                cases.append(case)
                subjects[part].add(case.scans[0].subject)
        if not cases:
            reason = f"; {rejected[0][0].name}: {rejected[0][1]}" if rejected else ""
            raise UserError(f"no scan in {root}: imagesTr holds no complete case CASE_0000{ending}{reason}")
        check_reserved(subjects["Tr"], subjects["Ts"], root)
        reserved, unknown = reserved_subjects(self.config.test_subjects, cases)
        return Listing(
            cases=tuple(cases),
            classes=classes if any(c.label for c in cases) else {},
            relation="registered" if len(channels) > 1 else None,
            unknown_when_absent=class_values(self.config.unknown_when_absent, classes),
            ignored_values=ignored,
            rejected=tuple(rejected),
            test_subjects=reserved | subjects["Ts"],
            unknown_test_subjects=unknown,
        )


def _channel_files(folder: Path, ending: str, rejected: list[tuple[Path, str]]) -> dict[str, dict[int, Path]]:
    """Case name to channel number to file, in the order of the names."""
    cases: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or not path.name.endswith(ending):
            continue
        found = re.fullmatch(r"(.+)_(\d{4})", path.name.removesuffix(ending))
        if found is None:
            rejected.append((path, f"its name does not end in a channel number such as _0000{ending}"))
        else:
            cases.setdefault(found[1], {})[int(found[2])] = path
    return cases


def _classes(task: dict[str, Any], root: Path) -> tuple[dict[int, str], frozenset[int]]:
    """Label value to class name, either way round in the file, and the values to be ignored."""
    block = task.get("labels")
    where = root / "dataset.json"
    if not isinstance(block, dict) or not block:
        raise UserError(f"{where}: 'labels' must map class names to values, got {block!r}")
    regions = [name for name, value in block.items() if isinstance(value, list)]
    if regions:
        raise UserError(
            f"{where}: region-based labels ({', '.join(map(str, regions))}) are not supported; "
            "write 'labels' with one value per class, for example {background: 0, edema: 1, core: 2}"
        )
    by_value = all(str(key).isdigit() for key in block)
    pairs = [(k, v) if by_value else (v, k) for k, v in block.items()]
    if not all(str(value).isdigit() for value, _ in pairs):
        raise UserError(f"{where}: 'labels' must map class names to whole numbers, got {block!r}")
    classes = {int(value): str(name) for value, name in sorted(pairs, key=lambda pair: int(pair[0]))}
    if len(classes) != len(block):
        raise UserError(f"{where}: two classes of 'labels' have the same value: {block!r}")
    ignored = frozenset(value for value, name in classes.items() if name == "ignore")
    return {value: name for value, name in classes.items() if value not in ignored}, ignored
