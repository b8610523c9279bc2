"""Show what is in an archive: counts, geometry, intensities, labels, pairs, quality and drops.

Example::

    python -m pretrain.inspect ARCHIVE
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medseg_ssl.commandline import Parser
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.overview import Sheet, headline, sheets


def main(argv: list[str] | None = None) -> Path:
    """Run the command; returns the archive's folder.

    Raises:
        UserError: it is no archive, or a damaged one.
    """
    parser = Parser(prog="medseg-ssl inspect", description="Show what is in an archive.")
    parser.add_argument("archive", type=Path)
    parser.add_argument("--split", default="default", help="name of the split to count by")
    arguments = parser.parse_args(argv)
    archive = Archive.open(arguments.archive)
    # names may hold brackets; in a pipe there is no window to fit into
    console = Console(markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(f"{archive.path}: {headline(archive)}", soft_wrap=True)
    for sheet in sheets(archive, split=arguments.split):
        console.print(_table(sheet))
    return archive.path


def _table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left")
    for i, column in enumerate(sheet.columns):
        table.add_column(column, justify="left" if i < sheet.left else "right")
    for row in sheet.rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
