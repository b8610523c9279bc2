"""What every command shares: a parser that raises instead of exiting, and configs found by name."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any, NoReturn

from medseg_ssl.config import ConfigError

PACKAGE = Path(__file__).resolve().parent


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ``ConfigError``, so that one place decides how a command ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Raise.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.prog}: {message} (--help shows the usage)")


def configs_folder() -> Path:
    """Where the shipped configs lie: inside an installed package, or at the top of a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_config(text: str, *, kind: str) -> Path:
    """A config by its path, or a shipped one of a kind (``pretrain``, ``finetune``, ``compare``, …) by its name.

    Raises:
        ConfigError: neither a file nor the name of a shipped config; the message lists those there are.
    """
    path = Path(text)
    if path.is_file():
        return path
    shipped = configs_folder() / kind / f"{text}.yaml"
    if "/" not in text and shipped.is_file():
        return shipped
    if path.suffix in (".yaml", ".yml") or "/" in text:
        raise ConfigError(f"no config file {text}")
    known = sorted(p.stem for p in shipped.parent.glob("*.yaml"))
    close = difflib.get_close_matches(text, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(
        f"no {kind} config named {text!r}{hint}; known: {', '.join(known) or 'none'}; or give a path"
    )
