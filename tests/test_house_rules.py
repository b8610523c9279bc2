"""The house rules that are not a matter of taste: floors, doors for guests, shelves, words."""

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest

from medseg_ssl.config import ConfigError, find, shelf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "medseg_ssl"
SOURCES = sorted(
    [*PACKAGE.rglob("*.py"), *(ROOT / "pretrain").glob("*.py"), *(ROOT / "finetune").glob("*.py")]
)

ALLOWED = {
    "ground": {"ground"},
    "data": {"data", "ground"},
    "nets": {"nets", "ground"},
    "objectives": {"objectives", "nets", "ground"},
    "inference": {"inference", "nets", "data", "ground"},
    "train": {"train", "objectives", "ground"},
    "baselines": {"baselines", "inference", "data", "ground"},
    "evaluations": {"evaluations", "inference", "objectives", "nets", "data", "ground"},
}
DOORS = {
    "wandb": {"medseg_ssl/train/recorder.py"},
    "nibabel": {"medseg_ssl/data/nifti.py"},
    "pydicom": {f"medseg_ssl/data/dicom/{name}.py" for name in ("headers", "pixels", "regions", "suv")},
    "ray": {"medseg_ssl/fanout.py"},
    "peft": {"medseg_ssl/nets/adapters.py"},
    "skimage": {"medseg_ssl/baselines/_classical.py"},
    "SimpleITK": {"medseg_ssl/data/coregistration.py"},
    "onnx": {"medseg_ssl/nets/exports/onnx.py"},
    "onnxruntime": {"medseg_ssl/nets/exports/onnx.py"},
    "onnxscript": {"medseg_ssl/nets/exports/onnx.py"},
    "lightning": {"medseg_ssl/train/runtime.py", "medseg_ssl/train/loop.py"},
    "lightning_fabric": {"medseg_ssl/train/runtime.py", "medseg_ssl/train/loop.py"},
}


def room(module: str) -> str:
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in {
        "data",
        "nets",
        "objectives",
        "train",
        "evaluations",
        "inference",
        "baselines",
    }:
        return parts[1]
    return "ground"


@functools.cache
def imports(path: Path) -> frozenset[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(found)


def every(paths, check):
    """Run a check on every file and name all that fail: one test, since a thousand of them would cost seconds."""
    wrong = []
    for path in paths:
        try:
            check(path)
        except (AssertionError, pytest.fail.Exception) as error:
            wrong.append(f"{path.relative_to(ROOT)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_imports_go_down_only():
    inside = [path for path in SOURCES if PACKAGE in path.parents]
    assert len(inside) > 200
    every(inside, imports_go_down)


def imports_go_down(path):
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if path.name in {"cli.py"}:
        return
    for module in imports(path):
        if module.startswith("medseg_ssl.") and module.count(".") >= 1:
            there = room(module)
            assert there in ALLOWED[here], f"{path.name} on floor '{here}' imports {module}"


def test_loop_cannot_name_a_method():
    from_objectives = {
        m for m in imports(PACKAGE / "train" / "loop.py") if m.startswith("medseg_ssl.objectives")
    }
    assert all(m.startswith("medseg_ssl.objectives.base") for m in from_objectives)


def test_one_door_per_guest():
    every(SOURCES, has_its_doors)


def has_its_doors(path):
    for module in imports(path):
        top = module.split(".")[0]
        if top in DOORS:
            assert str(path.relative_to(ROOT)) in DOORS[top], f"{path} imports {top}"


def test_no_print_no_star_no_pickle():
    every(SOURCES, has_no_print_star_or_pickle)


def has_no_print_star_or_pickle(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in calls
    assert not re.search(r"^from .* import \*", text, re.M)
    assert not {"pickle", "dill", "joblib"} & {m.split(".")[0] for m in imports(path)}
    assert not re.search(r"weights_only\s*=\s*False", text)


def test_modules_keep_no_state():
    every(SOURCES, keeps_no_state)


def keeps_no_state(path):
    """No ``global``, and no function puts into, or takes from, a list, dictionary or set of its module by name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Global)]
    holding = (ast.List, ast.Dict, ast.Set, ast.Call, ast.ListComp, ast.DictComp, ast.SetComp)
    held = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, holding)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    if not held:
        return
    changing = {
        "append",
        "extend",
        "add",
        "update",
        "pop",
        "clear",
        "setdefault",
        "insert",
        "remove",
        "discard",
    }
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
        own = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
        for node in ast.walk(function):
            spot = None
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in changing
            ):
                spot = node.func.value
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                spot = node.value
            if isinstance(spot, ast.Name) and spot.id in held - own:
                pytest.fail(f"{path}:{node.lineno} changes {spot.id} of the module")


def test_no_rooms_without_a_name():
    names = {p.stem for p in SOURCES}
    assert not names & {"utils", "util", "misc", "common", "helpers"}


def test_objectives_do_not_see_each_other():
    names = shelf("medseg_ssl.objectives")
    for path in (PACKAGE / "objectives").glob("*.py"):
        others = {f"medseg_ssl.objectives.{n}" for n in names if n != path.stem}
        assert not imports(path) & others


@pytest.mark.parametrize("wrong", ["maee", "simclrr", "nonsense"])
def test_unknown_name_lists_the_shelf(wrong):
    from medseg_ssl.objectives.base import Objective

    with pytest.raises(ConfigError, match=rf"no objective named '{wrong}'.*known: .*mae"):
        find("medseg_ssl.objectives", wrong, Objective)


def test_shelves_can_be_extended_from_outside(tmp_path, monkeypatch):
    folder = tmp_path / "objectives"
    folder.mkdir()
    source = (
        (PACKAGE / "objectives" / "mae.py").read_text(encoding="utf-8").replace("class MAE(", "class Mine(")
    )
    (folder / "mine_from_outside.py").write_text(
        source.replace("-> MAE.Config", "-> Mine.Config"), encoding="utf-8"
    )
    monkeypatch.setenv("MEDSEG_SHELVES", str(tmp_path))
    from medseg_ssl.objectives.base import Objective

    assert "mine_from_outside" in shelf("medseg_ssl.objectives")
    assert find("medseg_ssl.objectives", "mine_from_outside", Objective).__name__ == "Mine"


def test_no_path_or_index_host_in_tracked_files():
    others = [ROOT / name for name in ("constraints.txt", "pyproject.toml", "Makefile", "README.md")]
    for path in [*SOURCES, *ROOT.glob("configs/*/*.yaml"), *others]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(roo[t]|wor[k]|hom[e])/", text), path
        assert not re.search(r"inde[x]-url|fin[d]-links", text), path


def test_the_wheel_holds_every_package():
    stated = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    here = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert stated == here | {"medseg_ssl.pretrain", "medseg_ssl.finetune", "medseg_ssl.configs"}
