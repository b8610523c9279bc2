"""Prepare raw scans into an archive.

Example::

    python -m pretrain.prepare --config hippocampus --root DIR --out ARCHIVE
    python -m pretrain.prepare --source msd --download Task04_Hippocampus --out ARCHIVE spacing_mm=[1,1,1]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from medseg_ssl.commandline import Parser, find_config
from medseg_ssl.config import ConfigError, overlay, override, parse, read_yaml
from medseg_ssl.data.download import download_task
from medseg_ssl.data.prepare import PrepareConfig, prepare
from medseg_ssl.data.remote import is_remote, mirror
from medseg_ssl.fanout import ENGINES


def main(argv: list[str] | None = None) -> Path:
    """Run the command; returns the archive's folder.

    Raises:
        UserError: as ``medseg_ssl.data.prepare.prepare``; a ``ConfigError`` for wrong usage.
    """
    arguments = _parser().parse_args(argv)
    config = parse(PrepareConfig, _tree(arguments), where=str(arguments.config or "arguments"))
    console = Console(stderr=True, quiet=arguments.quiet)
    cache = arguments.cache or _downloads()
    roots = [_local(root, cache, console) for root in arguments.root]
    if arguments.download:
        if config.source.name != "msd":
            raise ConfigError(
                f"--download fetches Decathlon tasks for the source msd, not for {config.source.name!r}"
            )
        if len(roots) > 1:
            raise ConfigError("--download takes one --root, the folder to unpack into")
        roots = [download_task(arguments.download, roots[0] if roots else cache)]
    with _progress(console) as progress:
        bar_of_files = progress.add_task("files", total=None)
        bar = progress.add_task("cases", total=None)
        bar_of_pairs = progress.add_task("pairs", total=None)
        path = prepare(
            config,
            roots,
            arguments.out,
            workers=arguments.workers,
            engine=arguments.engine,
            on_files=lambda finished, total: progress.update(bar_of_files, completed=finished, total=total),
            on_progress=lambda finished, total: progress.update(bar, completed=finished, total=total),
            on_pairs=lambda finished, total: progress.update(bar_of_pairs, completed=finished, total=total),
        )
    _report(console, path)
    return path


def _local(root: str, cache: Path, console: Console) -> Path:
    """A root as a folder: one behind an address is mirrored first."""
    if not is_remote(root):
        return Path(root)
    with _progress(console) as progress:
        bar = progress.add_task("files", total=None)
        return mirror(
            root,
            cache / "mirrors",
            on_progress=lambda finished, total: progress.update(bar, completed=finished, total=total),
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="medseg-ssl prepare", description="Prepare raw scans into an archive.")
    parser.add_argument("--source", help="layout of the raw data: a name in medseg_ssl/data/sources")
    parser.add_argument(
        "--root",
        action="append",
        default=[],
        help="folder of raw data, or an address (s3://, gs://, https://); may be repeated",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="where roots behind an address and downloads are kept (default: the user's cache)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the archive")
    parser.add_argument(
        "--pattern", help="path pattern of the source folder, such as {subject}/{modality}.nii.gz"
    )
    parser.add_argument("--config", help="prepare YAML, or the name of a shipped one")
    parser.add_argument(
        "--download", metavar="TASK", help="fetch a Decathlon task first, such as Task04_Hippocampus"
    )
    parser.add_argument(
        "--workers", type=int, default=_cores(), help="processes (default: the cores there are)"
    )
    parser.add_argument("--engine", choices=ENGINES, default="local", help="local processes or a Ray cluster")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    return parser


def _tree(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {arguments.workers}")
    tree: dict[str, Any] = {}
    if arguments.config:
        tree = read_yaml(find_config(arguments.config, kind="prepare"))
    if arguments.source:
        tree = overlay(tree, {"source": {"name": arguments.source}})
    if "source" not in tree:
        raise ConfigError("say where the scans come from: --source NAME or --config YAML")
    if arguments.pattern:
        tree = overlay(tree, {"source": {"pattern": arguments.pattern}})
    return override(tree, arguments.overrides)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _downloads() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "medseg-ssl"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _report(console: Console, path: Path) -> None:
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    split = ", ".join(f"{count} {side}" for side, count in summary["split"].items())
    lines = [
        f"{summary['scans']} scans of {summary['subjects']} subjects ({split}), "
        f"{summary['labeled_cases']} labeled cases in {path}",
        *(f"note: {note}" for note in summary["notes"]),
    ]
    if summary["dropped"]:
        lines.append(f"{summary['dropped']} files dropped; reasons in {path / 'dropped.csv'}")
    lines.append(f"to look at: {path / 'overview.html'}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
