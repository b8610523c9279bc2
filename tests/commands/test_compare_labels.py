"""What a comparison may be made of: shares, strata, parts of labels, folds, pretraining seeds, other kinds of inits."""

import csv
import hashlib
import json
from pathlib import Path

import pytest
import yaml

from finetune import budget_record, labeling, planning, report
from finetune import compare as command
from finetune import resolving as plans
from finetune.comparison import Metrics
from medseg_ssl.config import ConfigError, overlay, parse, to_yaml
from medseg_ssl.data import strata
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.budget_file import read_budgets
from medseg_ssl.data.manifest import CaseRow

from . import fake_comparison as fakes

NAMED = """
from medseg_ssl.baselines.base import Baseline, BaselineConfig


class Named(Baseline):
    class Config(BaselineConfig):
        level: int = 3

    def fit(self, archive, cases, *, seed): ...

    def predict_cases(self, archive, cases): ...
"""


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    """Fits that are fakes, and no pages: they are looked at elsewhere."""
    fakes.use_fakes(monkeypatch.setattr)
    monkeypatch.setattr(report, "comparison_page", lambda comparison: comparison.title)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A shelf from outside with one baseline."""
    (tmp_path / "shelves" / "baselines").mkdir(parents=True)
    (tmp_path / "shelves" / "baselines" / "named_outside.py").write_text(NAMED, encoding="utf-8")
    monkeypatch.setenv("MEDSEG_SHELVES", str(tmp_path / "shelves"))


def run(out, config, **options):
    return command.compare(
        config,
        out,
        archive=Path("archive"),
        workers=1,
        quiet=True,
        fit=fakes.fake_fit,
        pretrain=fakes.fake_pretrain,
        **options,
    )


def rows_of(out):
    with (out / "cases.csv").open() as file:
        return list(csv.DictReader(file))


def tasks_of(config, archive=None):
    archive = archive or fakes.archive()
    (folds, numbered) = planned(config, archive)
    return planning.fit_tasks(
        numbered,
        Path("out"),
        archives=(Path("a"), Path("a")),
        folds=folds,
        encoders={planning.EncoderKey("mae"): Path("e")} if "mae" in config.inits else {},
        sources={"mae": "MR"},
        target="MR",
        pretraining_steps=100,
        network=None,
        keep=False,
    )


def planned(config, archive):
    numbered, _ = labeling.numbered(config, archive, labeling.splits_of(config, archive))
    return labeling.folds_of(numbered, archive, archive), numbered


def test_a_config_of_before_gives_the_fits_of_before():
    """Computed with the code as it was before shares, folds, parts and kinds existed."""

    def digest(tree):
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]

    config = fakes.config(init_overrides={"mae": {"optim": {"lr": 0.5}}})
    (fold,), _ = planned(config, fakes.archive())
    assert budget_record.folds_hash([fold]) == {"subsets": "82f2533d3c9a4158"}
    told = [
        [t.folder.as_posix(), t.config, t.seed, t.steps, list(t.train_cases), t.pictures]
        for t in tasks_of(config)
    ]
    assert digest(told) == "9683888a50e6dc99"


def test_a_folder_of_before_goes_on(tmp_path):
    """Keys that are new are missing in its config.yaml, and its fits have no column ``pretraining``."""
    scratch = {
        "inits": {"scratch": "scratch"},
        "finetune": {"data": {"batch_size": 2}, "train": {"steps": 5}},
    }
    config = plans.resolve(fakes.config(**scratch))
    run(tmp_path / "out", config)
    tree = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    for key in ("stratify", "labels", "pretrainings", "folds"):
        del tree[key]
    del tree["metrics"]["flips"]
    (tmp_path / "out" / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "out" / "budgets.json").unlink()
    before = (tmp_path / "out" / "cases.csv").read_bytes()
    for file in (tmp_path / "out").glob("fits/*/*/*/cases.csv"):
        lines = [line.rpartition(",")[0] for line in file.read_text().splitlines()]
        file.write_text("\n".join(lines) + "\n")
    run(tmp_path / "out", config)
    assert (tmp_path / "out" / "cases.csv").read_bytes() == before
    assert (tmp_path / "out" / "budgets.json").is_file()
    with pytest.raises(ConfigError, match="folds: null -> 3"):
        run(tmp_path / "out", config.model_copy(update={"folds": 3}))


# -- shares and strata -----------------------------------------------------------------------------------------------


def test_shares_are_numbers_of_labeled_training_cases():
    config = fakes.config(budgets=[1, "40%", 0.75], draws={1: 1, "40%": 2, 0.75: 1}, low_budgets=["40%"])
    assert config.budgets == (1, "40%", "75%")
    assert parse(plans.CompareConfig, yaml.safe_load(to_yaml(config))) == config
    archive = fakes.archive(train=10)
    numbered, notes = labeling.numbered(config, archive, labeling.splits_of(config, archive))
    assert numbered.budgets == (1, 4, 8)
    assert numbered.draws == {1: 1, 4: 2, 8: 1}
    assert numbered.low_budgets == (4,)
    assert notes == [
        "Budget 40% is 4 of 10 labeled training cases.",
        "Budget 75% is 8 of 10 labeled training cases.",
    ]
    least, _ = labeling.numbered(fakes.config(budgets=["1%"]), archive, [archive.split()])
    assert least.budgets == (1,)
    with pytest.raises(ConfigError, match=r"not ascending and different among 10 .*: 1% = 1, 2% = 1"):
        labeling.numbered(fakes.config(budgets=["1%", "2%"]), archive, [archive.split()])


@pytest.mark.parametrize("wrong", ["0%", "120%", "ten", 1.5, 0])
def test_wrong_budgets_are_named(wrong):
    with pytest.raises(ConfigError, match=r"budgets"):
        fakes.config(budgets=[wrong])


def test_columns_of_the_scans_take_turns_and_classes_are_covered(monkeypatch):
    archive = fakes.archive(train=9)
    for i in (2, 6):
        archive.scans[f"v{i}"].modality = "PT"
    config = fakes.config(budgets=[2, 4], stratify={"by": "modality"})
    for of in labeling.training_subsets(config, archive).values():
        assert sum(case in ("c2", "c6") for case in of[4]) == 2
    shown = {f"c{i}": ("lesion",) if i in (1, 8) else ("organ <b>",) for i in range(9)}
    monkeypatch.setattr(strata, "classes_shown", lambda archive, case: shown[case])
    config = fakes.config(budgets=[2, 4], stratify={"by": "classes"})
    for of in labeling.training_subsets(config, archive).values():
        assert sum(case in ("c1", "c8") for case in of[2]) == 1
    with pytest.raises(ConfigError, match=r"stratify.by: Input should be 'classes', 'contrast'"):
        fakes.config(stratify={"by": "age"})


# -- parts of labels -------------------------------------------------------------------------------------------------


def test_some_classes_are_known_and_the_report_says_what_that_costs(tmp_path):
    archive = fakes.archive()
    archive.cases = {case: CaseRow.model_validate(vars(row)) for case, row in archive.cases.items()}
    archive.original_grid = lambda case: ((20, 30, 40), None)
    config = fakes.config(labels={"classes": 1})
    folds, numbered = planned(config, archive)
    tasks = tasks_of(config, archive)
    for task in tasks:
        assert set(task.access.labels) == set(task.train_cases)
        assert all(len(part.classes) == 1 for part in task.access.labels.values())
    by_cell = {}
    for task in tasks:
        by_cell.setdefault((task.budget, task.draw), set()).add(task.access.model_dump_json())
    assert all(len(found) == 1 for found in by_cell.values()), "the same for every init"
    four = next(t for t in tasks if t.budget == 4)
    two = next(t for t in tasks if t.budget == 2)
    assert {c: four.access.labels[c] for c in two.train_cases} == two.access.labels, "nested"
    assert sorted(p.classes[0] for p in two.access.labels.values()) == ["lesion", "organ <b>"]
    assert folds[0].budgets.cost[0][2] == {
        "cases": 2, "slices": 40, "of_slices": 40, "classes": 2, "of_classes": 4,
    }  # fmt: skip
    from finetune.notes import notes_of

    notes = notes_of(numbered, tasks, folds=folds, cards={}, archive=archive)
    assert (
        "2 labels: 40 of 40 axial slices labeled, 2 of 4 classes stated (summed over cases, mean over draws)."
        in notes
    )
    assert any(n.startswith("1 label, draw 0: no labeled case states") for n in notes)
    assert not any(n.startswith("2 labels, draw 0: no labeled") for n in notes)
    with pytest.raises(
        ConfigError, match=r"labels.classes is 2, of 2 foreground classes \(organ <b>, lesion\)"
    ):
        planned(fakes.config(labels={"classes": 2}), archive)
    with pytest.raises(ConfigError, match="labels needs classes, slices or both"):
        fakes.config(labels={})


# -- files -----------------------------------------------------------------------------------------------------------


def test_budgets_of_one_comparison_are_used_in_another(tmp_path):
    run(tmp_path / "a", fakes.config())
    file = tmp_path / "a" / "budgets.json"
    text = file.read_text()
    assert not [name for name in ("c0", "s0", "v0", str(tmp_path)) if f'"{name}"' in text]
    other = fakes.config(seed=7, draws=2, budgets=[1, 4], inits={"scratch": "scratch"})
    run(tmp_path / "b", other, budgets=file)
    run(tmp_path / "free", other)
    subsets = {
        name: json.loads((tmp_path / name / "plan.json").read_text())["subsets"]
        for name in ("a", "b", "free")
    }
    assert subsets["b"] == {d: {b: subsets["a"][d][b] for b in ("1", "4")} for d in ("0", "1")}
    assert subsets["free"] != subsets["b"]
    assert json.loads((tmp_path / "b" / "budgets.json").read_text())["seed"] == 0, "of the draws"
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert any("those of a file of budgets" in line for line in summary["conditions"])
    with pytest.raises(ConfigError, match="subsets: "):
        run(tmp_path / "b", other)
    for changes, message in (
        ({"draws": 4}, "hold no draw 3 of 1 cases; they have the draws 0, 1, 2 of 1, 2, 4 cases"),
        ({"budgets": [3]}, "hold no draw 0 of 3 cases"),
        ({"stratify": {"by": "unit"}}, "drawn with stratify None, the config says 'unit'"),
        ({"folds": 3}, "drawn with folds None, the config says 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "c", fakes.config(**changes), budgets=file)


def test_budgets_of_an_archive_that_was_prepared_anew(tmp_path, monkeypatch, caplog):
    """Another fingerprint and the same cases: said in one line, and kept with the run."""
    run(tmp_path / "a", fakes.config(budgets=[1, 2], draws=1))
    file, scratch = (
        tmp_path / "a" / "budgets.json",
        {"inits": {"scratch": "scratch"}, "budgets": [1, 2], "draws": 1},
    )

    def anew(path, **changes):
        made = fakes.archive(**changes)
        made.fingerprint = "0" * 16
        return made

    monkeypatch.setattr(Archive, "open", staticmethod(anew))
    command.compare(
        fakes.config(**scratch),
        tmp_path / "b",
        archive=Path("archive"),
        budgets=file,
        workers=1,
        fit=fakes.fake_fit,
    )
    said = (
        "were drawn from the archive ffffffffffff…, this one is 000000000000…; all 2 named cases are the same"
    )
    assert [record.message for record in caplog.records if said in record.message]
    inputs, plan = (json.loads((tmp_path / "b" / name).read_text()) for name in ("inputs.json", "plan.json"))
    assert inputs["budgets_drawn_from"] == "f" * 16
    assert any(said in note for note in plan["notes"])
    assert "budgets_drawn_from" not in json.loads((tmp_path / "a" / "inputs.json").read_text())
    again = json.loads((tmp_path / "b" / "budgets.json").read_text())
    assert (again["archive"], again["cases"]) == ("0" * 16, json.loads(file.read_text())["cases"])


# -- folds and pretraining seeds -------------------------------------------------------------------------------------


def test_folds_score_every_case_once_per_draw_and_share_no_training(tmp_path):
    config = fakes.config(folds=3, budgets=[1, 2], draws=2)
    run(tmp_path / "out", config)
    cells = [(r["init"], r["budget"], r["draw"], r["case"], r["class"]) for r in rows_of(tmp_path / "out")]
    assert len(cells) == len(set(cells)) == 3 * 2 * 2 * 11 * 2
    tasks = tasks_of(config)
    archive = fakes.archive()
    for task in tasks:
        scored = {archive.cases[case].subject for case in task.test_cases}
        (split,) = task.access.splits
        assert scored == set(split.test)
        assert not scored & set(split.train)
        assert {archive.cases[case].subject for case in task.train_cases} <= set(split.train)
    assert len({t.seed for t in tasks}) == 2 * 2 * 3
    names = {p.name for p in (tmp_path / "out" / "fits" / "mae" / "b1").iterdir()}
    assert names == {"d0", "d1", "d0f1", "d1f1", "d0f2", "d1f2"}
    assert {p.name for p in (tmp_path / "out" / "pretrain").iterdir()} == {"mae", "mae@f1", "mae@f2"}
    (folds, numbered) = planned(config, archive)
    for task in planning.pretrain_tasks(numbered, Path("o"), archive=Path("a"), folds=folds):
        assert set(task.access.splits[0].test) == {archive.cases[c].subject for c in folds[task.fold].scored}
    saved = json.loads((tmp_path / "out" / "budgets.json").read_text())
    assert (saved["folds"], len(saved["cases"])) == (3, 3)
    run(
        tmp_path / "again",
        fakes.config(folds=3, budgets=[2], draws=1, seed=5),
        budgets=tmp_path / "out" / "budgets.json",
    )


def test_folds_share_out_the_subjects_whose_modality_is_compared():
    """Six CT subjects among many of MR: every fold has two, not as chance will."""
    for seed in range(5):
        archive = fakes.archive(train=30, test=10)
        for i in range(0, 36, 6):
            archive.scans[f"v{i}"].modality = "CT"
        config = fakes.config(folds=3, budgets=[2], draws=1, modalities=["CT"], seed=seed)
        folds, _ = planned(config, archive)
        assert [len(fold.scored) for fold in folds] == [2, 2, 2]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "data",
            {"split": "wide"},
            r"\.data\.split is 'wide', but the comparison's split decides: 'default'",
        ),
        ("seed", 5, r"\.seed is 5, but every fit's seed follows from the comparison's"),
        (
            "evaluations",
            {"segmentation": {}},
            r"\.evaluations names segmentation, but a comparison looks at test",
        ),
    ],
)
def test_what_a_comparison_decides_is_refused_in_its_fine_tuning(key, value, message):
    base = {
        "task": "t",
        "budgets": [1],
        "inits": {"scratch": "scratch"},
        "finetune": {
            "encoder": {"name": "resenc", "size": "tiny"},
            "objective": {"name": "segmentation"},
            "data": {"batch_size": 2},
            "train": {"steps": "20 steps"},
        },
    }
    plans.resolve(parse(plans.CompareConfig, base))
    changed = overlay(base, {"finetune": {key: value}})
    with pytest.raises(ConfigError, match="finetune" + message):
        plans.resolve(parse(plans.CompareConfig, changed))
    own = {**base, "init_overrides": {"scratch": {key: value}}}
    unequal = r"\.seed would make the comparison unequal"
    with pytest.raises(
        ConfigError, match=r"init_overrides\.scratch" + (unequal if key == "seed" else message)
    ):
        plans.resolve(parse(plans.CompareConfig, own))


def test_folds_are_balanced_as_the_budgets_are_and_cut_again_from_the_file(tmp_path, monkeypatch):
    shown = {f"c{i}": ("lesion",) if i in (1, 4, 8) else ("organ <b>",) for i in range(11)}
    monkeypatch.setattr(strata, "classes_shown", lambda archive, case: shown[case])
    config = fakes.config(folds=3, budgets=[2], draws=1, stratify={"by": "classes"})
    folds, _ = planned(config, fakes.archive())
    assert [sum(shown[c] == ("lesion",) for c in fold.scored) for fold in folds] == [1, 1, 1]
    for fold in folds:  # of each fold's two lesions one stands in its two labels
        assert sum(shown[c] == ("lesion",) for c in fold.budgets.subsets[0][2]) == 1
    run(tmp_path / "out", config)
    file = tmp_path / "out" / "budgets.json"
    assert json.loads(file.read_text())["balanced_folds"]
    notes = json.loads((tmp_path / "out" / "plan.json").read_text())["notes"]
    assert any(
        note.startswith("The subsets and folds are balanced by classes (of a scored") for note in notes
    )
    free = fakes.config(folds=3, budgets=[2], draws=1, seed=9)
    again = labeling.folds_of(free, fakes.archive(), fakes.archive(), given=read_budgets(file))
    assert [fold.scored for fold in again] == [fold.scored for fold in folds]
    plain, _ = planned(fakes.config(folds=3, budgets=[2], draws=1), fakes.archive())
    assert [fold.scored for fold in plain] != [fold.scored for fold in folds]


def test_folds_refuse_encoders_that_saw_their_subjects(tmp_path):
    (tmp_path / "e").write_text("weights")
    config = fakes.config(folds=2, budgets=[1], inits={"scratch": "scratch", "given": "encoder"})
    with pytest.raises(
        ConfigError, match="encoder of 'given' was pretrained on this archive, and folds score all"
    ):
        run(tmp_path / "out", config, encoders={"given": tmp_path / "e"})
    with pytest.raises(ConfigError, match="leave out --test-archive or folds"):
        run(tmp_path / "out", fakes.config(folds=2), test_archive=Path("other"))


def test_an_encoder_of_another_split_of_this_archive_is_refused(tmp_path, monkeypatch):
    """Such as one of a fold, which has seen subjects that the split itself keeps back."""
    (tmp_path / "e").write_text("weights")
    config = fakes.config(budgets=[1], draws=1, inits={"scratch": "scratch", "given": "encoder"})
    for split, refused in (("default", False), ("default, other lists 0f1e", True)):
        checked = [{"archive": "f" * 16, "split": split}]
        monkeypatch.setattr(
            command, "_card", lambda path, c=checked: {**fakes.card(path), "checked_against": c}
        )
        if refused:
            with pytest.raises(ConfigError, match=f"with the split '{split}' of this archive, so it may"):
                run(tmp_path / split[:9], config, encoders={"given": tmp_path / "e"})
        else:
            run(tmp_path / "fine", config, encoders={"given": tmp_path / "e"})


def test_an_encoder_of_a_mixture_with_this_archive_is_checked_too(tmp_path, monkeypatch):
    (tmp_path / "e").write_text("weights")
    config = fakes.config(budgets=[1], draws=1, inits={"scratch": "scratch", "given": "encoder"})
    mixed = {
        "archive_fingerprint": "a mixture",
        "archives": ["f" * 16],
        "checked_against": [{"archive": "f" * 16, "split": "other"}],
    }
    began_with = {"archive": "f" * 16, "split": "other", "sides": [], "trained_on": ["train"]}
    inherited = {"archive_fingerprint": "elsewhere", "archives": [], "checked_against": [began_with]}
    for seen in (mixed, inherited):
        monkeypatch.setattr(command, "_card", lambda path, seen=seen: {**fakes.card(path), **seen})
        with pytest.raises(ConfigError, match="with the split 'other' of this archive, so it may"):
            run(tmp_path / "out", config, encoders={"given": tmp_path / "e"})


def test_who_is_scored_does_not_choose_an_encoder(tmp_path, monkeypatch):
    (tmp_path / "e").write_text("weights")
    config = fakes.config(
        budgets=[1], draws=1, inits={"scratch": "scratch", "given": "encoder"}, subset="development"
    )
    chosen = {"score": "knn/dice", "subset": "development", "step": 1, "of_steps": 2, "candidates": 2}
    before = {"chosen_before": [{**chosen, "archives": [fakes.card(None)["archive_fingerprint"]]}]}
    for told in ({"chosen_by": chosen}, before):
        monkeypatch.setattr(command, "_card", lambda path, told=told: {**fakes.card(path), **told})
        with pytest.raises(ConfigError, match="chosen by knn/dice on development subjects of this archive"):
            run(tmp_path / "out", config, encoders={"given": tmp_path / "e"})
    scored = config.model_copy(update={"subset": "test"})
    monkeypatch.setattr(command, "_card", lambda path: {**fakes.card(path), "steps": 1, "chosen_by": chosen})
    run(tmp_path / "out", scored, encoders={"given": tmp_path / "e"})
    told = json.loads((tmp_path / "out" / "summary.json").read_text())["conditions"]
    assert any(line.startswith("given: ") and line.endswith(" 2 steps on this archive.") for line in told)
    assert any(
        "given: these weights were chosen among 2 by knn/dice on development subjects" in t for t in told
    )
    probed = {"pretrain": {"base": "mae_probed"}}
    words = {"task": "t", "inits": {"scratch": "scratch", "mae": probed}, "budgets": [1]}
    tree = {**words, "finetune": {"base": "segmentation"}, "subset": "development"}
    with pytest.raises(ConfigError, match=r"inits\.mae\.pretrain\.keep_best chooses by development subjects"):
        plans.resolve(parse(plans.CompareConfig, plans.expand(tree)))


def test_every_draw_is_fine_tuned_from_every_pretraining(tmp_path):
    config = fakes.config(pretrainings=3, budgets=[1, 2], draws=2)
    run(tmp_path / "out", config)
    rows = rows_of(tmp_path / "out")
    assert list(rows[0])[-1] == "pretraining"
    found = {(r["init"], r["draw"], r["pretraining"]) for r in rows}
    assert found == {
        *((init, d, "0") for init in ("scratch", "scratch_long") for d in "01"),
        *(("mae", d, p) for d in "01" for p in "012"),
    }
    tasks = tasks_of(config)
    assert len({(t.budget, t.draw): t.seed for t in tasks}) == len({t.seed for t in tasks}) == 4
    folders = {t.folder.name for t in tasks if t.init == "mae"}
    assert folders == {"d0", "d0p1", "d0p2", "d1", "d1p1", "d1p2"}
    pretrains = planning.pretrain_tasks(config, Path("o"), archive=Path("a"))
    assert [(t.folder.name, t.config.get("seed")) for t in pretrains] == [
        ("mae", None),
        ("mae@p1", 1),
        ("mae@p2", 2),
    ]
    with pytest.raises(ConfigError, match="pretrainings repeats the inits of kind"):
        fakes.config(pretrainings=2, inits={"scratch": "scratch"})


def test_a_draw_counts_once_all_its_pretrainings_are_done(tmp_path):
    config = fakes.config(pretrainings=2, budgets=[1], draws=2)
    run(tmp_path / "out", config)
    (tmp_path / "out" / "fits" / "mae" / "b1" / "d1p1" / "cases.csv").unlink()
    command.main([str(tmp_path / "out"), "--report-only", "--quiet"])
    assert {(r["init"], r["draw"]) for r in rows_of(tmp_path / "out")} == {
        (init, "0") for init in config.inits
    }


# -- kinds of inits --------------------------------------------------------------------------------------------------

FINETUNE = {
    "base": "segmentation",
    "encoder": {"name": "resenc", "size": "tiny", "features": [4, 8, 8]},
    "objective": {"size": [8, 16, 24]},
    "train": {"steps": "5 steps"},
}


def read(tmp_path, **changes):
    tree = {"task": "t", "budgets": [1], "draws": 1, "finetune": FINETUNE, **changes}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return command.read_config(tmp_path / "c.yaml", [])


def test_how_many_labels_an_atlas_reads_is_stated_where_it_reads_fewer(tmp_path):
    inits = {"scratch": "scratch", "atlas": {"baseline": "atlas"}}
    for budgets, told in (
        ([1, 2], "learns from the labeled cases of each draw alone;"),
        ([1, 3], "learns from at most 2 labeled cases of each draw, its first ones (atlases=2), alone;"),
    ):
        made = fakes.config(budgets=budgets, low_budgets=budgets, draws=1, inits=inits)
        made.inits["atlas"] = {"baseline": {"name": "atlas", "atlases": 2}}
        run(tmp_path / str(budgets), config=plans.resolve(made))
        conditions = json.loads((tmp_path / str(budgets) / "summary.json").read_text())["conditions"]
        assert told in next(line for line in conditions if line.startswith("atlas: "))


def test_another_network_and_a_baseline_share_all_but_themselves(tmp_path, shelf):
    inits = {
        "scratch": "scratch",
        "wide": {"network": {"encoder": {"name": "resenc", "size": "tiny", "features": [8, 16, 16]}}},
        "named": {"baseline": "named_outside"},
    }
    config = read(tmp_path, inits=inits)
    assert config.inits["named"] == {"baseline": {"name": "named_outside", "level": 3}}
    assert config.inits["wide"]["network"]["encoder"]["features"] == [8, 16, 16]
    assert plans.resolve(config) == config
    assert parse(plans.CompareConfig, yaml.safe_load(to_yaml(config))) == config
    assert config.baselines() == ["scratch"], "savings are measured against the same network from nothing"
    assert config.pretrained() == []
    assert config.kinds() == {"scratch": "scratch", "wide": "network", "named": "baseline"}
    scratch, wide, named = tasks_of(config)
    assert scratch.train_cases == wide.train_cases == named.train_cases
    assert scratch.seed == wide.seed == named.seed
    assert (scratch.steps, wide.steps, named.steps) == (5, 5, 0)
    assert wide.config["encoder"]["features"] == [8, 16, 16]
    same = ("data", "train", "optim", "objective", "decoder", "seed")
    assert {key: wide.config[key] for key in same} == {key: scratch.config[key] for key in same}
    assert (scratch.baseline, named.baseline) == (None, {"name": "named_outside", "level": 3})
    slices = {"network": {**inits["wide"]["network"], "batch_size": 64}}
    more = read(tmp_path, inits={**inits, "flat": slices})
    assert plans.resolve(more) == more
    flat = tasks_of(more)[-1]
    assert (flat.config["data"]["batch_size"], scratch.config["data"]["batch_size"]) == (64, 2)
    teacher = {"network": {**inits["wide"]["network"], "objective": {"name": "mean_teacher", "weight": 0.5}}}
    taught = read(tmp_path, inits={**inits, "taught": teacher})
    assert plans.resolve(taught) == taught
    learns = tasks_of(taught)[-1].config["objective"]
    assert (learns["name"], learns["weight"]) == ("mean_teacher", 0.5)
    for key in ("size", "augment", "deep_supervision"):
        assert learns[key] == scratch.config["objective"][key], "what it says nothing of is the comparison's"
    run(tmp_path / "out", config)
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["kinds"]["named"] == "baseline"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "Steps per fit: scratch 5, wide 5." in summary["conditions"]
    assert any(
        line.startswith("wide: another network ('resenc' and 'unet')") for line in summary["conditions"]
    )
    assert any(
        line.startswith("named: baseline 'named_outside', which trains no") for line in summary["conditions"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inits": {"a": {"baseline": "otsuu_"}}}, "no baseline named 'otsuu_'"),
        (
            {"inits": {"a": {"baseline": {"name": "named_outside", "lvl": 1}}}},
            "unknown key 'inits.a.baseline.lvl'",
        ),
        ({"inits": {"a": {"baseline": ["x"]}}}, "init 'a' is none of scratch"),
        (
            {"inits": {"a": {"network": {"decoder": {"name": "unet"}}}}},
            "missing key 'inits.a.network.encoder'",
        ),
        ({"inits": {"a": {"network": {"encoder": {"name": "resenk"}}}}}, "no encoder named 'resenk'"),
        (
            {"inits": {"a": {"baseline": "named_outside"}}, "init_overrides": {"a": {"optim": {"lr": 1}}}},
            "init_overrides.a has nothing to override: a baseline trains no network",
        ),
        (
            {"inits": {"scratch": "scratch"}, "metrics": {"flips": True}},
            "metrics.flips averages over the mirrorings of training, and finetune.objective.mirror_axes names none",
        ),
    ],
)
def test_wrong_kinds_are_named(tmp_path, shelf, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)


def test_on_a_gpu_every_init_is_scored_in_one_precision():
    both = {"inits": {"scratch": "scratch", "coarse": "scratch"}}
    config = fakes.config(**both, init_overrides={"coarse": {"train": {"precision": "bf16"}}})
    with pytest.raises(
        ConfigError, match=r"init_overrides train in bf16 and fp32, .* set metrics\.precision"
    ):
        plans.check_precision(config)
    plans.check_precision(config.model_copy(update={"metrics": Metrics(precision="fp32")}))
    plans.check_precision(fakes.config(**both))


@pytest.mark.parametrize(
    ("labeled", "modalities", "message"),
    [
        (True, ("PT",), "the archive has labeled cases of MR; modalities asks for PT"),
        (False, (), "the archive has no labeled case; prepare it from a source with labels"),
    ],
)
def test_modalities_that_no_labeled_case_has_are_named(labeled, modalities, message):
    archive = fakes.archive()
    for row in archive.cases.values():
        row.labeled = labeled
    with pytest.raises(ConfigError, match=message):
        labeling.check_held(fakes.config(modalities=modalities), archive)


@pytest.mark.parametrize("override", [{"data": {"modalities": ["CT"]}}, {"replay": {"cases": 2}}])
def test_no_init_has_data_of_its_own(tmp_path, override):
    inits = {"scratch": "scratch", "other": "scratch_long"}
    with pytest.raises(ConfigError, match="would make the comparison unequal"):
        read(tmp_path, inits=inits, finetune=FINETUNE, init_overrides={"other": override})


def test_flips_reach_the_fits_that_mirrored(tmp_path):
    mirrored = {**FINETUNE, "objective": {"size": [8, 16, 24], "mirror_axes": [2]}}
    config = read(tmp_path, inits={"scratch": "scratch"}, finetune=mirrored, metrics={"flips": True})
    assert all(task.flips for task in tasks_of(config))
    assert not any(task.flips for task in tasks_of(fakes.config()))
