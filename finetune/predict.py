"""Segment NIfTI files: a label map per case, in the input's own space.

INPUT is one file or a folder. With a segmenter of several channels the files of a case are named as nnU-Net
names them, ``case_0000.nii.gz``, ``case_0001.nii.gz``, in the order of the segmenter's card.
``OUT/<case>.nii.gz`` is written for every case; one that exists is left alone, so the same command goes on where it
stopped. ``OUT/identity.json`` says whose label maps they are; another segmenter needs another folder. A case that
fails is told in one line and the others go on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_ssl.analysis.tables import claim
from medseg_ssl.commandline import Parser
from medseg_ssl.config import ConfigError, UserError

if TYPE_CHECKING:
    from medseg_ssl.inference.predictor import Predictor

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
        ConfigError: OUT is a file, the input folder itself, or holds something else than this segmenter's label maps.
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
    claim(args.out, {"segmenter": hash_file(args.segmenter), "flips": args.flips})
    failed, written = 0, 0
    for case, files in cases.items():
        target = args.out / f"{case}.nii.gz"
        if target.exists():
            console.print(f"{case}: {target} exists, left alone", markup=False)
            continue
        try:
            _predict(predictor, files, target, probabilities=args.probabilities)
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

    A file that lacks the channel number is its own case where the segmenter has one channel. Cases that lack
    a channel are kept with the files there are; predicting them says so.

    Raises:
        UserError: nothing there, no NIfTI file in it, or two files that would be the same case.
    """
    from medseg_ssl.data.nifti import is_nifti_name, nifti_stem

    if not path.exists():
        raise UserError(f"no file or folder {path}")
    files = sorted(
        f for f in (path.iterdir() if path.is_dir() else [path]) if f.is_file() and is_nifti_name(f)
    )
    if not files:
        raise UserError(f"{path} is no NIfTI file (.nii, .nii.gz), nor a folder that holds one")
    if path.is_file() and channels > 1:
        found = CHANNEL.fullmatch(nifti_stem(path))
        if not found:
            raise UserError(
                f"the segmenter takes {channels} channels: files are named CASE_0000.nii.gz; got {path.name}"
            )
        files = sorted(
            f for f in path.parent.iterdir() if is_nifti_name(f) and _case_of(nifti_stem(f)) == found[1]
        )
    cases: dict[str, list[Path]] = {}
    for file in files:
        cases.setdefault(_case_of(nifti_stem(file)), []).append(file)
    for case, members in cases.items():
        stems = [nifti_stem(f) for f in members]
        if len(set(stems)) < len(stems) or (channels == 1 and len(stems) > 1):
            raise UserError(f"several files would become case {case!r}: {', '.join(f.name for f in members)}")
    return cases


def _case_of(stem: str) -> str:
    found = CHANNEL.fullmatch(stem)
    return found[1] if found else stem


def _predict(predictor: Predictor, files: Sequence[Path], target: Path, *, probabilities: bool) -> None:
    """Predict one case; the label map is written last, so that its presence says the case is done."""
    import numpy as np

    from medseg_ssl.data.nifti import write_nifti

    found = predictor.predict_nifti(files, probabilities=probabilities)
    volumes = found.prediction.probabilities_KDHW
    if volumes is not None:
        case = target.name.removesuffix(".nii.gz")
        for name, volume_DHW in zip(predictor.classes, volumes, strict=True):
            safe = re.sub(r"[^\w.-]+", "_", name)
            write_nifti(
                target.parent / "probabilities" / f"{case}_{safe}.nii.gz",
                volume_DHW,
                found.original,
                np.float32,
            )
    write_nifti(target, found.prediction.label_DHW, found.original, np.uint8)


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
