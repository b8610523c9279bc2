"""The folder of a run: one config, one set of inputs, one process at a time; no run overwrites another."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from medseg_ssl import __version__
from medseg_ssl.config import ConfigError, UserError, to_yaml
from medseg_ssl.locking import lock

if TYPE_CHECKING:
    from medseg_ssl.train.runtime import Runtime

PACKAGES = (
    "torch",
    "lightning-fabric",
    "lightly",
    "timm",
    "monai",
    "numpy",
    "nibabel",
    "blosc2",
    "safetensors",
    "scipy",
    "scikit-image",
    "SimpleITK",
    "peft",
)


WARNINGS = "warnings.txt"
"""What a run warned of, a line each."""
BEFORE_THE_RUN = {
    ".lock",
    "config.yaml",
    "config.tmp",
    "inputs.json",
    "environment.json",
    "audit.txt",
    "replay.json",
    "plan.json",
    "budgets.json",
    "error.txt",
    WARNINGS,
}
"""Files that may be there before anything was computed; whatever else is there belongs to the config beside it."""
TEMPLATE = "template_*.npz"
"""Made before the first step, and it says itself what it was made of."""
MIRROR = "wandb"


class RunFolder:
    """A locked run folder.

    Args:
        path: the folder; made where it is missing.
        config: the resolved config.
        inputs: what the run is fed besides its config: archive fingerprint, hash of an encoder file, cases.
        ships: name of the file that a complete run holds.
        device: named in ``environment.json``.
        today: fills a config that an earlier version wrote with the defaults of keys that are new; None takes the
            defaults of the config's class.

    Raises:
        ConfigError: the folder holds a run of another config or other inputs (the message lists each difference), or
            is no run folder.
        UserError: another process works on it.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: BaseModel,
        inputs: Mapping[str, Any],
        ships: str,
        device: str = "cpu",
        today: Callable[[Mapping[str, Any]], BaseModel] | None = None,
    ) -> None:
        self.path = Path(path)
        self._today = type(config).model_validate if today is None else today
        self.shipped = self.path / ships
        self._prepare()
        self._lock = lock(self.path / ".lock")
        try:
            self._check_or_write(config, inputs, device)
        except BaseException:
            self.close()
            raise

    @property
    def complete(self) -> bool:
        """Whether the run has shipped what it is for."""
        return self.shipped.is_file()

    def close(self) -> None:
        """Let other processes in."""
        os.close(self._lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; a run needs a folder")
        # with the note of a fit that failed before its config was written
        ours = {".lock", "config.yaml", "inputs.json", "environment.json", "config.tmp", "error.txt"}
        if self.path.is_dir() and not (self.path / "config.yaml").is_file():
            foreign = sorted(p.name for p in self.path.iterdir() if p.name not in ours)
            if foreign:
                shown = ", ".join(foreign[:3])
                raise ConfigError(
                    f"{self.path} is no run folder (no config.yaml beside {shown}); name a new one"
                )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {self.path}: {error.strerror}") from error

    def _check_or_write(self, config: BaseModel, inputs: Mapping[str, Any], device: str) -> None:
        file = self.path / "config.yaml"
        new = {"config": config.model_dump(mode="json"), "inputs": dict(inputs)}
        if file.is_file():
            try:
                held = json.loads((self.path / "inputs.json").read_text(encoding="utf-8"))
                written = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise UserError(f"the run folder {self.path} is damaged: {error}; name a new one") from error
            different = differences(written, new["config"])
            if different:
                different = differences(self._filled(written), new["config"])
            different += differences(held, new["inputs"])
            if different and not self._untouched():
                listed = "; ".join(different)
                raise ConfigError(
                    f"{self.path} holds another run: {listed}; name a new folder, or undo these"
                )
            if not different:
                return
        environment = json.dumps(describe_environment(device), indent=2) + "\n"
        (self.path / "environment.json").write_text(environment, encoding="utf-8")
        (self.path / "inputs.json").write_text(json.dumps(new["inputs"], indent=2) + "\n", encoding="utf-8")
        # the config goes last and in one move: a folder that has it has all three
        temporary = self.path / "config.tmp"
        temporary.write_text(to_yaml(config), encoding="utf-8")
        os.replace(temporary, file)

    def _filled(self, written: Any) -> Any:
        # a key that the version which wrote the config did not know was at its default then
        try:
            return self._today(written).model_dump(mode="json")
        except (ConfigError, ValidationError):
            return written

    def _untouched(self) -> bool:
        # a run that failed before its first line (no scan that fits, say) may be repeated with a mended config; not
        # so a comparison with some fits done, which would count them among those of the new config
        files = (p.relative_to(self.path) for p in self.path.rglob("*") if p.is_file())
        return all(
            file.name in BEFORE_THE_RUN or file.match(TEMPLATE) or MIRROR in file.parts for file in files
        )


@contextmanager
def open_run(
    path: Path, *, config: BaseModel, inputs: Mapping[str, Any], ships: str, runtime: Runtime
) -> Iterator[bool]:
    """The run folder, locked by the main process while the context lasts; yields whether the run is complete already.

    Raises:
        ConfigError: see ``RunFolder``.
        UserError: see ``RunFolder``.
    """
    if not runtime.is_main:
        runtime.barrier()
        yield (Path(path) / ships).is_file()
        return
    with RunFolder(path, config=config, inputs=inputs, ships=ships, device=runtime.device_name) as folder:
        complete = folder.complete
        runtime.barrier()
        yield complete


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Keep other processes out of a run folder while the context lasts; yields whether none was working on it."""
    try:
        descriptor = lock(Path(path) / ".lock")
    except UserError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def differences(old: Any, new: Any, *, prefix: str = "") -> list[str]:
    """Every key in which two trees differ, as ``key: old -> new``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in dict.fromkeys([*old, *new]):
            found += differences(old.get(key), new.get(key), prefix=f"{prefix}.{key}" if prefix else str(key))
        return found
    return [] if old == new else [f"{prefix}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def hash_file(path: Path) -> str:
    """First 16 hex digits of a file's sha256.

    Raises:
        UserError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()[:16]


def kind_of_warning(message: str) -> str:
    """The message without its numbers: of one kind, a run says only the first."""
    return re.sub(r"[0-9.]+", "#", message)


def hash_names(names: Any) -> str:
    """How many names there are and a short hash of them in order, to compare lists without printing them."""
    names = list(names)
    return f"{len(names)} ({hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:12]})"


def describe_environment(device: str) -> dict[str, Any]:
    """Versions, device and git commit; no path and no name of a user or host."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "medseg_ssl": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": device,
        "packages": versions,
    }


def git_commit() -> str | None:
    """Commit of the checkout this package lies in, ``+changes`` where it has uncommitted ones, None when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        ask = {"cwd": root, "capture_output": True, "text": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **ask)
        status = subprocess.run(["git", "status", "--porcelain"], **ask)
    except (OSError, subprocess.SubprocessError):
        return None
    if commit.returncode != 0:
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")
