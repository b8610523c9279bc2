"""Configs: strict records, YAML with one level of ``base``, dotted overrides, and the shelves.

A ``name:`` in a YAML is a file on a shelf: ``objective: {name: mae}`` is ``medseg_ssl/objectives/mae.py``. Folders
named in ``MEDSEG_SHELVES`` (separated as in ``PATH``) that are laid out like ``medseg_ssl`` are searched too.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

T = TypeVar("T")
M = TypeVar("M", bound="Record")


class UserError(Exception):
    """Something the user can mend; the command prints the message, one line, and exits with ``code``.

    Attributes:
        code: 1 for a failure (a broken file, a full disk), 2 for wrong usage or config.
    """

    code = 1


class ConfigError(UserError):
    """Wrong usage or config; the message lists every wrong key at once."""

    code = 2


class Record(BaseModel):
    """Base of every config block: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, given: Any) -> Any:
        # A block inside a block keeps the defaults that its owner gave it: to set one key of
        # ``restoration: Restoration = Restoration(loss="l1")`` leaves the others as the owner has them.
        if not isinstance(given, Mapping):
            return given
        owned = {
            name: overlay(field.default.model_dump(), given[name])
            for name, field in cls.model_fields.items()
            if isinstance(field.default, Record)
            and not isinstance(field.default, Block)
            and isinstance(given.get(name), Mapping)
        }
        return {**given, **owned}


class Duration(BaseModel):
    """A length of training: ``"2000 steps"``, ``"10 epochs"`` or ``"5%"`` (of the run)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    unit: str

    @staticmethod
    def parse(text: object) -> Duration:
        """Read ``"N steps"``, ``"N epochs"``, ``"N%"`` or a bare integer (steps).

        Raises:
            ValueError: any other text.
        """
        if isinstance(text, Duration):
            return text
        if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
            return Duration(value=text, unit="steps")
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(steps?|epochs?|%)\s*", str(text))
        if not found or (found[2].startswith("step") and "." in found[1]):
            raise ValueError(f"{text!r} is no duration; write '2000 steps', '10 epochs' or '5%'")
        unit = "%" if found[2] == "%" else found[2].rstrip("s") + "s"
        return Duration(value=float(found[1]), unit=unit)

    def __str__(self) -> str:
        """The text ``parse`` reads back."""
        return f"{self.value:g}%" if self.unit == "%" else f"{self.value:.10g} {self.unit}"

    def steps(self, *, steps_per_epoch: int | None = None, total_steps: int | None = None) -> int:
        """Convert to optimizer steps.

        Raises:
            ConfigError: epochs without ``steps_per_epoch`` or a percentage without ``total_steps``.
        """
        if self.unit == "steps":
            return int(self.value)
        if self.unit == "epochs":
            if steps_per_epoch is None:
                raise ConfigError(f"'{self}' cannot be given in epochs here; write steps")
            return max(1, round(self.value * steps_per_epoch))
        if total_steps is None:
            raise ConfigError(f"'{self}' cannot be a percentage here; write steps or epochs")
        return round(self.value / 100.0 * total_steps)


Length = Annotated[Duration, BeforeValidator(Duration.parse), PlainSerializer(str, return_type=str)]
"""A ``Duration`` field: read from its text and written back as it."""


def _each_once(axes: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(axes)) < len(axes):
        raise ValueError(f"an axis stands twice in {list(axes)}")
    return axes


MirrorAxes = Annotated[tuple[Annotated[int, Field(ge=0, le=2)], ...], AfterValidator(_each_once)]
"""A field of axes to mirror: 0 superior-inferior, 1 anterior-posterior, 2 left-right."""


# -- shelves ---------------------------------------------------------------------------------------------------------


def _extra_shelves(package: str) -> list[Path]:
    folders = [Path(p) for p in os.environ.get("MEDSEG_SHELVES", "").split(os.pathsep) if p]
    return [f.joinpath(*package.split(".")[1:]) for f in folders]


def shelf(package: str) -> list[str]:
    """Names on a shelf such as ``medseg_ssl.objectives``, sorted, ``base`` left out."""
    names = {m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)}
    for folder in _extra_shelves(package):
        names |= {p.stem for p in folder.glob("*.py")}
    return sorted(n for n in names if n != "base" and not n.startswith("_"))


def find(package: str, name: str, contract: type[T]) -> type[T]:
    """The one final class that implements ``contract`` in the file ``name`` of a shelf.

    Raises:
        ConfigError: no such file on the shelf; the message lists the names there are.
    """
    known = shelf(package)
    if name not in known:
        kind = package.rsplit(".", 1)[-1].rstrip("s")
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"no {kind} named {name!r}{hint}; known: {', '.join(known)}")
    module = _load(package, name)
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, contract)
        and not inspect.isabstract(c)
        and c.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ConfigError(
            f"{module.__name__} must hold exactly one class of {contract.__name__}, found {len(classes)}"
        )
    return classes[0]


def _load(package: str, name: str):
    full = f"{package}.{name}"
    if full in sys.modules:
        return sys.modules[full]
    for folder in _extra_shelves(package):
        file = folder / f"{name}.py"
        if file.is_file():
            spec = importlib.util.spec_from_file_location(full, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[full] = module
            spec.loader.exec_module(module)
            return module
    return importlib.import_module(full)


# -- reading ---------------------------------------------------------------------------------------------------------


def overlay(below: Any, above: Any) -> Any:
    """Merge two YAML trees: mappings key by key, everything else replaced; a changed ``name`` replaces the block."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "name" in above and above["name"] != below.get("name"):
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        merged[key] = overlay(below[key], value) if key in below else value
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, laid over the file its ``base:`` names (relative to it).

    Raises:
        ConfigError: missing file, broken YAML, something else than a mapping, or a circle of bases.
    """
    return _read_yaml(Path(path), ())


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: 'base' goes round in a circle")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, found {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return overlay(_read_yaml(path.parent / str(base), (*seen, path.resolve())), tree)


def override(tree: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply ``key.sub=value`` assignments; values are read as YAML.

    Raises:
        ConfigError: an assignment without ``=``, or through something that is no mapping.
    """
    out: dict[str, Any] = dict(tree)
    for text in assignments:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"cannot read {text!r}; overrides look like optim.lr=3e-4")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise ConfigError(f"cannot read the value of {text!r} as YAML") from error
        nested: Any = _number(value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        out = overlay(out, nested)
    return out


def _number(value: Any) -> Any:
    # YAML 1.1 reads 3e-4 (no dot) as text
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", value):
        return float(value)
    return value


def parse(model: type[M], tree: Mapping[str, Any], *, where: str = "config", prefix: str = "") -> M:
    """Validate a YAML tree against a record.

    Raises:
        ConfigError: lists every wrong key at once, each with the nearest valid name.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, model, where=where, prefix=prefix)) from None


def explain(
    error: ValidationError, model: type[BaseModel], *, where: str = "config", prefix: str = ""
) -> str:
    """All errors of a validation in one text, a clause per key."""
    clauses = []
    for item in error.errors():
        path = [str(p) for p in item["loc"]]
        dotted = ".".join(([prefix] if prefix else []) + path)
        if item["type"] == "extra_forbidden":
            choices = _fields_at(model, path[:-1])
            close = difflib.get_close_matches(path[-1], choices, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(choices)}"
            clauses.append(f"unknown key '{dotted}' ({hint})")
        elif item["type"] == "missing":
            clauses.append(f"missing key '{dotted}'")
        else:
            message = item["msg"].removeprefix("Value error, ")
            long = isinstance(item["input"], (dict, list)) and len(str(item["input"])) > 80
            shown = "" if long else f", got {item['input']!r}"
            clauses.append(f"{dotted or 'config'}: {message}{shown}")
    count = "1 error" if len(clauses) == 1 else f"{len(clauses)} errors"
    return f"{count} in the {where}: " + "; ".join(clauses)


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    current: Any = model
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            break
        current = field.annotation
    return sorted(getattr(current, "model_fields", {}))


class Block(Record):
    """A block ``{name: FILE, …}`` that names a file on a shelf; its own keys are checked by that file's ``Config``."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    def options(self) -> dict[str, Any]:
        """The block without its name."""
        return {k: v for k, v in self.model_dump().items() if k != "name"}

    def resolve(self, package: str, contract: type[T], *, prefix: str = "") -> tuple[type[T], Any]:
        """The class on the shelf and its validated ``Config``.

        Raises:
            ConfigError: no such name, or wrong keys in the block.
        """
        cls = find(package, self.name, contract)
        return cls, parse(cls.Config, self.options(), prefix=prefix)  # pyright: ignore[reportAttributeAccessIssue]


def resolved(*checks: Any) -> list[Any]:
    """Run several config checks (callables) and raise one ``ConfigError`` with all their messages.

    Raises:
        ConfigError: the joined messages of all checks that failed.
    """
    results, messages = [], []
    for check in checks:
        try:
            results.append(check())
        except ConfigError as error:
            messages.append(str(error))
    if messages:
        raise ConfigError("; ".join(messages))
    return results


def to_yaml(model: BaseModel) -> str:
    """The record as YAML that ``parse`` reads back to the same record."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False)
