"""Schedules of fine-tuning by config: what moves, what ships, what a broken run continues to."""

import json

import pytest
import torch

from finetune import evaluate
from finetune.compare import main as compare
from finetune.run import SHELVES, FinetuneConfig, build, complete_config, main
from finetune.scratch import held_back
from finetune.tuning import TuneConfig, keeper, ship_plain, tune
from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets import encoder_file
from medseg_ssl.nets.encoders.primus import Primus
from medseg_ssl.nets.tuning import norm_parameters, stem_parameters
from medseg_ssl.train.optim import build_optimizer
from medseg_ssl.train.runtime import Runtime
from medseg_ssl.train.session import with_spacing
from medseg_ssl.train.trial import made_up_batches
from medseg_ssl.types import Facts
from pretrain.run import main as pretrain
from tests.shelves import ENCODERS
from tests.train.archives import write_archive

COMMON = [
    "encoder.features=[4,8,8,8]",
    "objective.size=[16,16,16]",
    "data.batch_size=2",
    "train.accelerator=cpu",
    "train.preview_every=null",
    "wandb.mode=disabled",
    "--quiet",
]
NAMES = ("full", "frozen", "stem", "norm", "lora", "ia3")
GRID = [
    ("resenc", n) if n in ("frozen", "norm", "lora") else pytest.param("resenc", n, marks=pytest.mark.slow)
    for n in NAMES
]
GRID += [pytest.param(e, n, marks=pytest.mark.slow) for e in ENCODERS if e != "resenc" for n in NAMES]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    archive = write_archive(folder / "archive").path
    encoder = pretrain(["mae", str(folder / "mae"), "--archive", str(archive), "train.steps=1", *COMMON])
    return archive, encoder


def finetune(world, run, *more):
    words = [
        "segmentation",
        str(run),
        "--archive",
        str(world[0]),
        "--encoder",
        str(world[1]),
        "train.steps=4",
    ]
    return main([*words, "train.save_every=2", "train.log_every=1", *COMMON, *more])


def expected(encoder, name):
    every = {n for n, _ in encoder.named_parameters()}
    new = {n for n in every if ".lora_" in n or ".ia3_l." in n}
    choices = {
        "full": every,
        "frozen": set(),
        "stem": stem_parameters(encoder),
        "norm": norm_parameters(encoder),
    }
    return choices.get(name, new)


@pytest.mark.parametrize(("encoder", "name"), GRID)
def test_a_step_moves_exactly_what_is_tuned(encoder, name):
    side = 64 if encoder == "lifted2d" else 16
    tree = {
        "encoder": {"name": encoder},
        "objective": {"name": "segmentation", "size": [side, side, side], "deep_supervision": False},
        "decoder": {"name": "fcn"},
        "tune": {"name": name},
        "data": {"batch_size": 2},
        "train": {"steps": 1},
    }
    config = complete_config(parse(FinetuneConfig, tree), None)
    objective, options = build(config, Facts(classes=("background", "a", "b")))
    with torch.no_grad():  # away from the start, where the scale of a residual branch is 0
        for parameter in objective.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    tuned = tune(objective, config.tune, seed=0)
    tuned.training(objective)
    assert objective.decoder.training
    assert objective.encoder.training == (name != "frozen")
    optimizer = build_optimizer(objective, config.optim, total_steps=1, undecayed=tuned.undecayed)
    before = {n: v.clone() for n, v in objective.state_dict().items()}
    facts = Facts(classes=("background", "a", "b"), modalities=("CT",))
    views = type(objective).views(options)
    for _ in range(2):  # the first moves one half of each adapter alone, since the other is 0
        batch = next(made_up_batches(views, samples=2, facts=facts)(0))
        objective(batch, 0.5).loss.backward()
        optimizer.set_rates(0.5)
        optimizer.optimizer.step()
    moved = {n for n, v in objective.state_dict().items() if not torch.equal(v, before[n])}
    of_encoder = {n.removeprefix("encoder.") for n in moved if n.startswith("encoder.")}
    statistics = {n for n in of_encoder if "running_" in n or "num_batches" in n}
    assert of_encoder - statistics == expected(objective.encoder, name)
    assert statistics == set() or name in ("full", "norm")
    assert any(n.startswith("decoder.") for n in moved)
    assert any(n.startswith("heads.") for n in moved)
    held = {id(p) for p in optimizer.optimizer.state}
    assert all((id(p) in held) == p.requires_grad for p in objective.parameters())
    ship_plain(objective, config.tune)
    assert not any("base_layer" in n for n in objective.state_dict())


def state(run):
    return torch.load(run / "last.ckpt", weights_only=True)


def assert_same_runs(a, b, shipped="segmenter.safetensors"):
    first, second = state(a), state(b)
    for part in ("objective", "average"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(v, second[part][n]) for n, v in first[part].items())
    one, two = (encoder_file.build(run / shipped) for run in (a, b))
    for part in ("encoder", "decoder", "head"):
        weights = getattr(two, part).state_dict()
        assert all(torch.equal(v, weights[n]) for n, v in getattr(one, part).state_dict().items())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("lora", "frozen", "stem", "norm", "ia3")]
)
def test_a_broken_run_continues_exactly_and_ships_a_plain_network(name, world, tmp_path, monkeypatch):
    shipped = finetune(world, tmp_path / "whole", f"tune.name={name}")
    seed_step = Runtime.seed_step

    def breaks(self, seed, step):
        if step == 3:
            raise ConnectionError("the power went out")
        seed_step(self, seed, step)

    monkeypatch.setattr(Runtime, "seed_step", breaks)
    with pytest.raises(ConnectionError):
        finetune(world, tmp_path / "broken", f"tune.name={name}")
    monkeypatch.undo()
    finetune(world, tmp_path / "broken", f"tune.name={name}")
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    before = encoder_file.build(world[1]).encoder.state_dict()
    after = encoder_file.build(shipped).encoder.state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert before.keys() == after.keys()
    assert (moved == set()) == (name == "frozen")
    averaged = state(tmp_path / "whole")["average"]
    assert any(n.startswith("encoder.") for n in averaged) == (name != "frozen")
    if name == "lora":
        assert all("lora_" in n for n in averaged if n.startswith("encoder."))
        assert moved <= {n for n, v in before.items() if v.ndim > 1}


BEST = ["evaluations={segmentation: {}}", "train.evaluate_every=1"]


def test_the_best_weights_ship_and_the_run_ends_early(world, tmp_path, monkeypatch, capsys):
    from medseg_ssl.evaluations.segmentation import Segmentation
    from medseg_ssl.types import Score

    found = iter([0.9, 0.2, 0.5, 0.4, 0.3])  # the first is the look before the run, which chooses nothing
    subsets = []
    seen = []

    def run(self, model, archive):
        subsets.append(self.config.subset)
        seen.append({n: v.clone() for n, v in model.segmenter.encoder.state_dict().items()})
        yield Score("dice", next(found), "share")

    monkeypatch.setattr(Segmentation, "run", run)
    shipped = finetune(
        world,
        tmp_path,
        *BEST,
        "keep_best={score: segmentation/dice, patience: 2}",
        "train.steps=9",
        "optim.lr=0.05",
    )
    assert subsets == ["development"] * 5
    card = encoder_file.load_card(shipped)
    assert card.steps == 2
    assert card.chosen_by == {
        "score": "segmentation/dice",
        "mode": "max",
        "value": 0.5,
        "subset": "development",
        "step": 2,
        "of_steps": 9,
        "candidates": 4,
    }
    monkeypatch.undo()
    evaluate.main(
        [str(shipped), str(tmp_path / "scores"), "--archive", str(world[0]), "--subset", "development"]
    )
    told = "chosen by segmentation/dice on the development subjects"
    assert told in " ".join(capsys.readouterr().out.split())
    assert told in json.loads((tmp_path / "scores" / "summary.json").read_text())["conditions"][0]
    weights = encoder_file.build(shipped).encoder.state_dict()
    assert all(torch.equal(v, weights[n]) for n, v in seen[2].items())
    assert not all(torch.equal(v, weights[n]) for n, v in seen[4].items())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/best_step"] for line in lines if "eval/best_step" in line] == [1, 2, 2, 2]


def test_a_folder_of_something_else_is_refused_before_the_look(world, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.run.look_first", lambda *_: pytest.fail("looked"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no run folder"):
        finetune(world, tmp_path / "run", *BEST)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["keep_best={score: segmentation/dice}"],
            "keep_best.score 'segmentation/dice' needs its evaluation",
        ),
        (["keep_best={score: segmentation/dice}", BEST[0]], "keep_best needs train.evaluate_every"),
        (
            ["keep_best={score: segmentation/dice}", BEST[1], "evaluations={segmentation: {subset: test}}"],
            "keep_best chooses by development subjects, but evaluations.segmentation.subset is 'test'",
        ),
        (
            ["keep_best={score: segmentation/dice}", *BEST, "data.split=fold1"],
            "evaluations.segmentation.split is 'default', but data.split is 'fold1'",
        ),
        (
            ["keep_best={score: knn/dice}", "evaluations={knn: {subset: test}}"],
            r"keep_best needs train.evaluate_every.*evaluations.knn.subset is 'test'.*"
            r"evaluations.knn looks at an encoder, this run has a segmenter; known: calibration, missing_modalities,",
        ),
        (
            [*BEST, "keep_best={score: segmentation/dise}"],
            r"keep_best.score: no score 'segmentation/dise'; there are segmentation/dice, segmentation/dice/organ,",
        ),
        (
            ["evaluations={missing_modalities: {}}"],
            "needs a segmenter of several channels, this one takes CT alone",
        ),
        (["tune={name: frozen, rank: 4}"], "rank belongs to tune 'lora', not to 'frozen'"),
        (["tune.name=frozn"], "tune.name: Input should be 'full', 'frozen'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(words, told, world, tmp_path):
    with pytest.raises(ConfigError, match=told):
        finetune(world, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["segmentation_frozen", "segmentation_lora"])
def test_a_random_encoder_is_not_frozen_by_a_command(name, world, tmp_path):
    words = [name, str(tmp_path / "run"), "--archive", str(world[0]), *COMMON]
    with pytest.raises(
        ConfigError, match=r"no file is given: name one by --encoder, or set tune=\{name: full\}"
    ):
        main(words)
    assert not (tmp_path / "run").exists()


def test_without_a_file_all_learns_at_the_full_rate(world, tmp_path, monkeypatch, caplog):
    seen = {}
    monkeypatch.setattr(
        "finetune.run.run_finetune", lambda config, run, **_: seen.update({run.name: config}) or run
    )
    for name in ("segmentation", "segmentation_few", "segmentation_sawtooth", "segmentation_layer_decay"):
        for kind, more in (("file", ["--encoder", str(world[1])]), ("none", [])):
            main([name, str(tmp_path / f"{name}-{kind}"), "--archive", str(world[0]), "--quiet", *more])
        assert held_back(seen[f"{name}-none"].model_dump(mode="json")) == {}
        assert bool(held_back(seen[f"{name}-file"].model_dump(mode="json"))) == (name != "segmentation")
        assert seen[f"{name}-none"].optim.lr == seen[f"{name}-file"].optim.lr
    assert seen["segmentation-none"] == seen["segmentation-file"], "and so nothing else changed"
    assert "nothing is pretrained: optim.encoder_lr_scale=0.3 is not heeded" in caplog.text
    assert "optim.decoder_first=10%, optim.sawtooth=True is not heeded" in caplog.text


def test_the_best_needs_development_subjects_that_are_not_trained_on(world, tmp_path, monkeypatch):
    from medseg_ssl.data.archive import Archive

    keep = parse(
        FinetuneConfig,
        {
            "data": {"batch_size": 1},
            "train": {"steps": 1, "evaluate_every": 1},
            "evaluations": {"segmentation": {}},
            "keep_best": {"score": "segmentation/dice"},
        },
    ).keep_best
    archive = Archive.open(world[0])
    assert keeper(keep, archive, "default", ["case-s0"]).step is None
    with pytest.raises(ConfigError, match="case 'case-s4' of one is trained on"):
        keeper(keep, archive, "default", ["case-s0", "case-s4"])
    none = archive.split("default").model_copy(update={"development": ()})
    monkeypatch.setattr(Archive, "split", lambda self, name: none)
    with pytest.raises(ConfigError, match="split 'default' has none: leave it out"):
        finetune(world, tmp_path / "run", *BEST, "keep_best={score: segmentation/dice}")
    assert not (tmp_path / "run").exists()


def test_a_comparison_takes_fixed_steps(world, tmp_path):
    words = [
        "phantom",
        str(tmp_path / "out"),
        "--archive",
        str(world[0]),
        "finetune.keep_best.score=segmentation/dice",
    ]
    more = ["finetune.train.evaluate_every=5%", "finetune.evaluations={segmentation: {}}"]
    with pytest.raises(ConfigError, match="keep_best has no place in a comparison"):
        compare([*words, *more])


def test_a_comparison_refuses_evaluations_of_encoders_and_replay(world, tmp_path):
    words = ["phantom", str(tmp_path / "out"), "--archive", str(world[0])]
    with pytest.raises(ConfigError, match=r"finetune.evaluations.knn looks at an encoder"):
        compare([*words, "finetune.evaluations={knn: {}}"])
    with pytest.raises(ConfigError, match="replay has no place in a comparison"):
        compare([*words, "finetune.replay={cases: 2}"])


def test_defaults_are_todays():
    assert TuneConfig().name == "full"
    assert parse(FinetuneConfig, {"data": {"batch_size": 1}, "train": {"steps": 1}}).keep_best is None


# -- positions in millimetres ----------------------------------------------------------------------------------------


def primus_file(path, *, spacing_mm, own=None):
    encoder = Primus(parse(Primus.Config, {"crop": (16, 16, 16), "spacing_mm": own}))
    return encoder_file.save(path, encoder=encoder, card=encoder_file.Card(encoder={}, spacing_mm=spacing_mm))


@pytest.mark.parametrize("given", [None, {"name": "primus", "crop": [16, 16, 16]}])
def test_positions_in_millimetres_keep_the_spacing_they_were_trained_at(tmp_path, given):
    """Whether the config names the network or takes the file's; the archive's own spacing comes last."""
    trained = primus_file(tmp_path / "a.safetensors", spacing_mm=None, own=(1.0, 2.0, 3.0))
    carded = primus_file(tmp_path / "b.safetensors", spacing_mm=(4.0, 5.0, 6.0))
    unknown = primus_file(tmp_path / "c.safetensors", spacing_mm=None)
    tree = {"objective": {"name": "segmentation", "size": [16, 16, 16]}, "encoder": given}
    tree |= {"data": {"batch_size": 2}, "train": {"steps": 2}}
    for file, expected in ((trained, [1, 2, 3]), (carded, [4, 5, 6]), (unknown, [7, 7, 7])):
        config = complete_config(parse(FinetuneConfig, tree), file)
        filled = with_spacing(config, SHELVES, (7.0, 7.0, 7.0))
        assert list(filled.encoder.options()["spacing_mm"]) == expected
    stated = {**tree, "encoder": {**(given or {"name": "primus"}), "spacing_mm": [9, 9, 9]}}
    config = complete_config(parse(FinetuneConfig, stated), trained)
    assert list(config.encoder.options()["spacing_mm"]) == [9, 9, 9], "what a config says goes first"
