"""Hand weights on: an encoder or segmenter file in, a file that other software opens out.

What is written was checked before: ``torchscript`` and ``onnx`` files give the segmenter's output, a ``monai`` state
dict loads into MONAI's class, and an ``nnunet`` checkpoint is the network of the plans. A file that exists is never
replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_ssl.commandline import Parser
from medseg_ssl.config import find, override, parse, shelf

if TYPE_CHECKING:
    from medseg_ssl.nets.exports.base import Export

SHELF = "medseg_ssl.nets.exports"


def parser() -> Parser:
    """The command line."""
    parser = Parser(prog="medseg-ssl export", description=__doc__)
    parser.add_argument("file", type=Path, help="encoder.safetensors or segmenter.safetensors")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="options such as dynamic=true")
    parser.add_argument("--to", dest="kind", required=True, metavar="FORMAT", help=", ".join(shelf(SHELF)))
    parser.add_argument("--plans", type=Path, help="nnunet: the plans file of the data set to be trained on")
    parser.add_argument("--configuration", help="nnunet: such as 3d_fullres, the default")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Export FILE and return OUT.

    Raises:
        ConfigError: OUT exists, no such format, or wrong options.
        UserError: a broken file, or one whose networks cannot be exported so.
    """
    from rich.console import Console

    args = parser().parse_intermixed_args(argv)
    options = override({}, args.assignments)
    for key in ("plans", "configuration"):  # paths come through flags
        if getattr(args, key) is not None:
            options[key] = getattr(args, key)

    from medseg_ssl.nets.encoder_file import build
    from medseg_ssl.nets.exports.base import Export

    cls: type[Export] = find(SHELF, args.kind, Export)
    export = cls(parse(cls.Config, options, where="options"))
    export.check_free(args.out)
    made = export.write(build(args.file), args.out)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for line in made.report:
        console.print(f"  {line}", markup=False)
    console.print(f"written: {', '.join(map(str, export.places(args.out)))}", markup=False)
    return args.out


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
