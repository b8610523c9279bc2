"""Segment NIfTI files: a label map per case, in the input's own space.

INPUT is one file or a folder. With a segmenter of several channels the files of a case are named as nnU-Net
names them, ``case_0000.nii.gz``, ``case_0001.nii.gz``, in the order of the segmenter's card.
``OUT/<case>.nii.gz`` is written for every case; one that exists is left alone, so the same command goes on where it
stopped. ``OUT/identity.json`` says whose label maps they are; another segmenter needs another folder. So do other files
under the same names: ``OUT/inputs.jsonl`` holds a hash of what each case was predicted from. A case that fails is told
in one line and the others go on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_ssl.analysis.tables import claim
from medseg_ssl.commandline import Parser
from medseg_ssl.config import ConfigError, UserError

if TYPE_CHECKING:
    from medseg_ssl.inference.predictor import Predictor

INPUTS = "inputs.jsonl"
"""A line per case: what its label map was predicted from, in hashes; of several lines the last holds."""
CHANNEL = re.compile(r"(.+)_(\d{4})")


def parser() -> Parser:
    """The command line."""
    parser = Parser(prog="medseg-ssl predict", description=__doc__)
    parser.add_argument("segmenter", type=Path, help="segmenter.safetensors of a fine-tuning run")
    parser.add_argument("input", type=Path, help="a NIfTI file, or a folder of them")
    parser.add_argument("out", type=Path, help="folder for the label maps")
    parser.add_argument(
        "--probabilities", action="store_true", help="also OUT/probabilities/<case>_<class>.nii.gz, float32"
    )
    parser.add_argument(
        "--modality",
        help="CT, MR or PT: what the files are, for a segmenter of one channel that knows several",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument(
        "--flips", action="store_true", help="average over the mirrorings of training (mirror_axes)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Predict every case of INPUT and return OUT.

    Raises:
        UserError: no input, or some case failed (after all others were written).
        ConfigError: OUT is a file, the input folder itself, or holds something else than this segmenter's label maps of
            these files.
    """
    from rich.console import Console

    args = parser().parse_args(argv)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"{args.out} is a file; OUT names a folder")
    folder = args.input if args.input.is_dir() else args.input.parent
    if args.out.resolve() == folder.resolve():
        raise ConfigError(f"OUT is the folder of the input, {folder}; label maps need a folder of their own")

    from medseg_ssl.inference.predictor import Predictor
    from medseg_ssl.train.run_folder import hash_file

    predictor = Predictor.load(args.segmenter, device=args.device, precision=args.precision, flips=args.flips)
    cases = find_cases(args.input, channels=predictor.card.channels_in)
    # what is left at its default is not named, so that folders begun before a key was new go on
    further = {"precision": args.precision} if args.precision != "fp32" else {}
    further |= {} if args.modality is None else {"modality": args.modality}
    claim(args.out, {"segmenter": hash_file(args.segmenter), "flips": args.flips, **further})
    _check_inputs(args.out, cases)
    failed, written = 0, 0
    for case, files in cases.items():
        target = args.out / f"{case}.nii.gz"
        maps = _probability_maps(target, predictor.classes) if args.probabilities else []
        if target.exists() and all(path.exists() for path in maps):
            console.print(f"{case}: {target} exists, left alone", markup=False)
            continue
        try:
            if not target.exists():
                _remember_inputs(args.out, case, files)
            _predict(predictor, files, target, modality=args.modality, probabilities=args.probabilities)
            written += 1
        except UserError as error:
            failed += 1
            console.print(f"{case}: {error}", markup=False, style="red")
        except Exception as error:  # whatever is wrong with one case, the others are still wanted
            if args.debug:
                raise
            failed += 1
            console.print(
                f"{case}: internal error {type(error).__name__}: {error}; --debug shows more", markup=False
            )
    console.print(f"{written} of {len(cases)} label maps written to {args.out}", markup=False)
    if failed:
        raise UserError(f"{failed} of {len(cases)} cases failed; the lines above say why")
    return args.out


def find_cases(path: Path, *, channels: int) -> dict[str, list[Path]]:
    """Case names and their files in channel order.

    With one channel a file is a case; ``_0000`` at the end of its name is dropped where no other number stands beside
    it. With several, the files of a case end in ``_0000``, ``_0001``, …; cases that lack one are kept with the files
    there are, and ``check_channels`` says so. Hidden files are none.

    Raises:
        UserError: nothing there, no NIfTI file in it, or two files that would be the same case.
    """
    from medseg_ssl.data.nifti import is_nifti_name, nifti_stem

    if not path.exists():
        raise UserError(f"no file or folder {path}")
    folder = path if path.is_dir() else path.parent
    beside = sorted(
        f for f in folder.iterdir() if f.is_file() and is_nifti_name(f) and not f.name.startswith(".")
    )
    files = beside if path.is_dir() else [path]
    if not files or not is_nifti_name(files[0]):
        raise UserError(f"{path} is no NIfTI file (.nii, .nii.gz), nor a folder that holds one")
    numbers: dict[str, set[str]] = {}
    for file in beside:
        if found := CHANNEL.fullmatch(nifti_stem(file)):
            numbers.setdefault(found[1], set()).add(found[2])

    def case_of(file: Path) -> str:
        stem = nifti_stem(file)
        found = CHANNEL.fullmatch(stem)
        if found is None:
            return stem if channels == 1 else file.name  # without a number it is no channel of a case
        return found[1] if channels > 1 or numbers.get(found[1], {"0000"}) == {"0000"} else stem

    if path.is_file() and channels > 1:
        if CHANNEL.fullmatch(nifti_stem(path)) is None:
            raise UserError(
                f"the segmenter takes {channels} channels: files are named CASE_0000.nii.gz; got {path.name}"
            )
        files = [file for file in beside if case_of(file) == case_of(path)]
    cases: dict[str, list[Path]] = {}
    for file in files:
        cases.setdefault(case_of(file), []).append(file)
    for case, members in cases.items():
        if len({nifti_stem(f) for f in members}) < len(members) or (channels == 1 and len(members) > 1):
            raise UserError(f"several files would become case {case!r}: {', '.join(f.name for f in members)}")
    return cases


def check_channels(files: Sequence[Path], modalities: Sequence[str]) -> None:
    """See that the files of a case are the channels of a segmenter, each once.

    Raises:
        UserError: they are not; the message names both.
    """
    from medseg_ssl.data.nifti import nifti_stem

    if len(modalities) == 1:
        return
    found = [match[2] if (match := CHANNEL.fullmatch(nifti_stem(f))) else "" for f in files]
    if found != [f"{number:04}" for number in range(len(modalities))]:
        wanted = ", ".join(f"CASE_{number:04} ({name})" for number, name in enumerate(modalities))
        raise UserError(f"its files are {', '.join(f.name for f in files)}; the segmenter takes {wanted}")


def _check_inputs(out: Path, cases: Mapping[str, Sequence[Path]]) -> None:
    """See that the label maps which are there were made of these files; one of before this was recorded passes.

    Raises:
        ConfigError: names the cases whose label map is that of other files, such as another patient's of the same name.
    """
    known = _inputs(out)
    others = []
    for case, files in cases.items():
        if case in known and (out / f"{case}.nii.gz").exists():
            with suppress(UserError):  # what cannot be read is left alone, as what is there already
                others += [case] if _hashes(files) != known[case] else []
    if others:
        shown = ", ".join(repr(case) for case in others[:3]) + (", …" if len(others) > 3 else "")
        raise ConfigError(
            f"{out} holds the label maps of other files for {len(others)} of {len(cases)} cases: {shown}; choose"
            " another folder for these files"
        )


def _remember_inputs(out: Path, case: str, files: Sequence[Path]) -> None:
    """Write down what a case is predicted from, before its label map: that one is never without it."""
    line = json.dumps({"case": case, "sha256": _hashes(files)})
    try:
        with (out / INPUTS).open("a", encoding="utf-8") as stream:
            stream.write(
                f"\n{line}"
            )  # the break goes first: it ends half a line of a command that was killed
    except OSError as error:
        raise UserError(f"cannot write {out / INPUTS}: {error.strerror or error}") from error


def _inputs(out: Path) -> dict[str, list[str]]:
    """Case to the hashes of its files in channel order, as they were when it was predicted."""
    path, found = out / INPUTS, {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):  # half a line of a command that was killed
            row = json.loads(line)
            found[row["case"]] = row["sha256"]
    return found


def _hashes(files: Sequence[Path]) -> list[str]:
    from medseg_ssl.train.run_folder import hash_file

    return [hash_file(path) for path in files]


def _probability_maps(target: Path, classes: Sequence[str]) -> list[Path]:
    """The files of a case's probabilities, beside its label map."""
    case = target.name.removesuffix(".nii.gz")
    safe = (re.sub(r"[^\w.-]+", "_", name) for name in classes)
    return [target.parent / "probabilities" / f"{case}_{name}.nii.gz" for name in safe]


def _predict(
    predictor: Predictor,
    files: Sequence[Path],
    target: Path,
    *,
    modality: str | None,
    probabilities: bool,
) -> None:
    """Predict one case; a label map that is there stays, and is written last: its presence says the case is done."""
    import numpy as np

    from medseg_ssl.data.nifti import write_nifti

    check_channels(files, predictor.card.modalities)
    found = predictor.predict_nifti(files, modality=modality, probabilities=probabilities)
    volumes = found.prediction.probabilities_KDHW
    if volumes is not None:
        for path, volume_DHW in zip(_probability_maps(target, predictor.classes), volumes, strict=True):
            write_nifti(path, volume_DHW, found.original, np.float32)
    if not target.exists():
        write_nifti(target, found.prediction.label_DHW, found.original, np.uint8)


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
