"""The contract of an export: our modules in, a file that other software opens out.

Adding one is one file with one final class, and one test that opens the file with the other software.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

from medseg_ssl.config import ConfigError, Record
from medseg_ssl.nets.encoder_file import Loaded, write_atomically


class ExportConfig(Record):
    """Options every export has (none); each file's ``Config`` adds its own."""


class Exported(NamedTuple):
    """What an export makes, complete and checked, before anything is written.

    Attributes:
        content: of the file.
        beside: name endings to the content of further files, such as ``.json`` for a description.
        report: what was taken, what was made up, and how it was checked, a line each.
    """

    content: bytes
    beside: dict[str, bytes]
    report: tuple[str, ...]


class Export(ABC):
    """Writes one kind of file.

    Subclasses are final, hold a nested ``Config`` (a subclass of ``ExportConfig``) and are built as ``Export(config)``.

    Attributes:
        beside: endings of the files that it writes beside the first, which are refused like it where they exist.
    """

    Config: ClassVar[type[ExportConfig]] = ExportConfig
    beside: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ExportConfig) -> None:
        self.config = config

    @abstractmethod
    def make(self, loaded: Loaded) -> Exported:
        """The file's content.

        Raises:
            UserError: what the file holds cannot be exported so; the message says what can.
        """

    def places(self, out: Path) -> list[Path]:
        """The files that ``write`` makes."""
        return [out, *(out.with_suffix(ending) for ending in self.beside)]

    def check_free(self, out: Path) -> None:
        """Refuse to overwrite.

        Raises:
            ConfigError: a file is there already, or two would have one name.
        """
        places = self.places(out)
        for place in places:
            if place.exists():
                raise ConfigError(f"{place} exists; nothing is overwritten, name another file")
        if len(set(places)) < len(places):
            raise ConfigError(f"{out} would be overwritten by its own description; give it another ending")

    def write(self, loaded: Loaded, out: Path) -> Exported:
        """Make the export and write its files, each whole or not at all, the description first.

        Raises:
            ConfigError: a file is there already.
            UserError: see ``make``; or the disk is full or not writable.
        """
        self.check_free(out)
        made = self.make(loaded)
        for ending, content in made.beside.items():
            write_atomically(out.with_suffix(ending), content)
        write_atomically(out, made.content)
        return made
