"""Take over public weights: another project's file in, an encoder file of this suite out, and an audit of what fits.

Nothing in FILE is run: it is read as tensors, numbers and text, or refused. The audit names every tensor that was
matched, missing or not used, and the shares of parameters and of multiply-adds that the file covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_ssl import __version__
from medseg_ssl.commandline import Parser
from medseg_ssl.config import ConfigError, find, override, parse, shelf

if TYPE_CHECKING:
    from medseg_ssl.nets.imports.base import Import, Imported

SHELF = "medseg_ssl.nets.imports"


def parser() -> Parser:
    """The command line."""
    parser = Parser(prog="medseg-ssl import", description=__doc__)
    parser.add_argument("file", type=Path, help="weights of another project (.pth, .pt, .safetensors)")
    parser.add_argument("out", type=Path, help="encoder file to write, such as openmind.safetensors")
    parser.add_argument(
        "assignments", nargs="*", metavar="key=value", help="what the format leaves open, such as size=m"
    )
    parser.add_argument(
        "--from", dest="kind", required=True, metavar="FORMAT", help=f"one of {', '.join(shelf(SHELF))}"
    )
    parser.add_argument("--licence", default="", help="of the weights, for the card")
    parser.add_argument("--source", default="", help="where they come from (address, DOI), for the card")
    parser.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="voxel size in mm of their training crops; without it what the file says",
    )
    parser.add_argument(
        "--minimum-coverage",
        type=float,
        default=0.9,
        help="least share of each part's parameters that must be found (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Import FILE and return OUT.

    Raises:
        ConfigError: OUT exists, no such format, or wrong options.
        UserError: a file that cannot be read, holds more than plain weights, or does not fit any encoder here.
    """
    args = parser().parse_intermixed_args(argv)
    if args.out.exists():
        raise ConfigError(f"{args.out} exists; nothing is overwritten, name another file")
    if not 0 <= args.minimum_coverage <= 1:
        raise ConfigError(f"--minimum-coverage is a share from 0 to 1, got {args.minimum_coverage}")
    if args.spacing is not None and min(args.spacing) <= 0:
        raise ConfigError(f"--spacing must be positive, got {args.spacing}")

    from rich.console import Console

    from medseg_ssl.nets.encoder_file import Card, save
    from medseg_ssl.nets.imports.base import Import, build

    cls: type[Import] = find(SHELF, args.kind, Import)
    foreign = cls(parse(cls.Config, override({}, args.assignments), where="options")).read(args.file)
    if args.spacing is not None:
        foreign = replace(foreign, spacing_mm=tuple(args.spacing))
    imported = build(args.file, foreign, minimum_coverage=args.minimum_coverage)
    card = Card(
        encoder={},
        spacing_mm=foreign.spacing_mm,
        crop_size=foreign.crop_size,
        modalities=foreign.modalities,
        code_version=__version__,
        untrained=_drawn(imported),
        licence=args.licence or foreign.licence,
        source="; ".join(
            part for part in (args.source, foreign.format, *args.assignments, _identity(args.file)) if part
        ),
    )
    save(args.out, encoder=imported.encoder, decoder=imported.decoder, card=card)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(str(imported.audit), markup=False)
    for note in foreign.notes:
        console.print(f"  note: {note}", markup=False)
    if foreign.spacing_mm is None:
        console.print(
            "  note: the voxel size of its training is unknown; state it by --spacing", markup=False
        )
    if not card.licence:
        console.print("  note: no licence is on the card; state it by --licence", markup=False)
    console.print(f"encoder: {args.out}", markup=False)
    return args.out


def _drawn(imported: Imported) -> tuple[str, ...]:
    """Beginnings of the names of the encoder's parameters that the file lacks: they are random, not trained."""
    from medseg_ssl.nets.transfer import beginnings

    lacking = {*imported.audit.missing, *imported.audit.mismatched}
    names = [name for name, _ in imported.encoder.named_parameters()]
    return beginnings([name for name in names if f"encoder.{name}" in lacking], names)


def _identity(path: Path) -> str:
    """Name and content of a file, in a way that can be checked."""
    import hashlib

    with path.open("rb") as file:
        return f"{path.name} sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
