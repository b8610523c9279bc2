"""``medseg-ssl demo [OUT]``: the whole story on an embedded phantom archive, offline, in minutes on two cores.

Writes made-up bodies as NIfTI, prepares them, pretrains with one objective of each family and compares the encoders
with training from scratch on a few labeled cases; then the matrix of CT and MR, pretrained on one and fine-tuned on the
other. It calls the commands a user would call, and prints how.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from medseg_ssl.cli import locate
from medseg_ssl.commandline import Parser, find_config

RAW, ARCHIVE, COMPARISON = "phantom", "archive", "comparison"
TWO_TASKS, MATRIX = "archive-transfer", "transfer"  # organs in CT and organs in MR are two tasks


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the demo, or go on with it; returns the path of the comparison's report."""
    import importlib

    from medseg_ssl.data.phantom import write_phantom

    given = parser().parse_intermixed_args(argv)
    console = Console(stderr=True, highlight=False)
    out = Path(given.out)
    raw = out / RAW
    prepare = importlib.import_module(locate("pretrain.prepare"))
    compare = importlib.import_module(locate("finetune.compare"))
    transfer = importlib.import_module(locate("finetune.transfer"))

    if not raw.is_dir():
        console.print(f"1/4 phantom: {given.subjects} made-up subjects in CT, PET, T1 and T2 -> {raw}")
        half = out / f"{RAW}.part"  # an interrupted write must not pass for a whole one
        shutil.rmtree(half, ignore_errors=True)
        write_phantom(half, subjects=given.subjects, seed=0).rename(raw)
    for config, archive in (("phantom", out / ARCHIVE), ("phantom_transfer", out / TWO_TASKS)):
        prepared = ["--root", str(raw), "--out", str(archive)]
        console.print(f"2/4 medseg-ssl prepare --config {config} {' '.join(prepared)}", soft_wrap=True)
        prepare.main(["--config", str(find_config(config, kind="prepare")), *prepared])
    compared = [given.config, str(out / COMPARISON), "--archive", str(out / ARCHIVE), *given.overrides]
    console.print(f"3/4 medseg-ssl compare {' '.join(compared)}", soft_wrap=True)
    report = compare.main(compared)
    transferred = [given.transfer, str(out / MATRIX), "--archive", f"phantom={out / TWO_TASKS}"]
    console.print(f"4/4 medseg-ssl transfer {' '.join(transferred)}", soft_wrap=True)
    matrix = transfer.main(transferred)
    console.print(f"[bold]report: {report}[/bold]", soft_wrap=True)
    console.print(f"[bold]transfer between modalities: {matrix}[/bold]", soft_wrap=True)
    return report


def parser() -> Parser:
    """The arguments."""
    made = Parser(prog="medseg-ssl demo", description=__doc__)
    made.add_argument(
        "out", nargs="?", default="runs/demo", help="folder for everything (default: runs/demo)"
    )
    made.add_argument("--subjects", type=int, default=28, help="phantom subjects (default: %(default)s)")
    made.add_argument("--config", default="phantom", help="compare config (default: %(default)s)")
    made.add_argument("--transfer", default="phantom", help="transfer config (default: %(default)s)")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the compare config")
    return made
