"""``medseg-ssl demo [OUT]``: the whole story on an embedded phantom archive, offline, in minutes on two cores.

Writes made-up bodies as NIfTI, prepares them, pretrains with one objective of each family and compares the encoders
with training from scratch on a few labeled cases. It calls the commands a user would call, and prints how.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from medseg_ssl.cli import locate
from medseg_ssl.commandline import Parser, find_config

RAW, ARCHIVE, COMPARISON = "phantom", "archive", "comparison"


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the demo, or go on with it; returns the path of the report."""
    import importlib

    from medseg_ssl.data.phantom import write_phantom

    given = parser().parse_intermixed_args(argv)
    console = Console(stderr=True, highlight=False)
    out = Path(given.out)
    raw, archive, comparison = out / RAW, out / ARCHIVE, out / COMPARISON
    prepare = importlib.import_module(locate("pretrain.prepare"))
    compare = importlib.import_module(locate("finetune.compare"))

    if not raw.is_dir():
        console.print(f"1/3 phantom: {given.subjects} made-up subjects in CT, PET, T1 and T2 -> {raw}")
        half = out / f"{RAW}.part"  # an interrupted write must not pass for a whole one
        shutil.rmtree(half, ignore_errors=True)
        write_phantom(half, subjects=given.subjects, seed=0).rename(raw)
    prepared = ["--root", str(raw), "--out", str(archive)]
    console.print(f"2/3 medseg-ssl prepare --config phantom {' '.join(prepared)}", soft_wrap=True)
    prepare.main(["--config", str(find_config("phantom", kind="prepare")), *prepared])
    compared = [given.config, str(comparison), "--archive", str(archive), *given.overrides]
    console.print(f"3/3 medseg-ssl compare {' '.join(compared)}", soft_wrap=True)
    report = compare.main(compared)
    console.print(f"[bold]report: {report}[/bold]", soft_wrap=True)
    return report


def parser() -> Parser:
    """The arguments."""
    made = Parser(prog="medseg-ssl demo", description=__doc__)
    made.add_argument(
        "out", nargs="?", default="runs/demo", help="folder for everything (default: runs/demo)"
    )
    made.add_argument("--subjects", type=int, default=28, help="phantom subjects (default: %(default)s)")
    made.add_argument("--config", default="phantom", help="compare config (default: %(default)s)")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the compare config")
    return made
