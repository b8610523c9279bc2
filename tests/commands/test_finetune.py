import json

import pytest
import torch
import yaml

from finetune.run import SHELVES, FinetuneConfig, main, run_finetune
from finetune.segmenters import never_trained
from medseg_ssl.config import ConfigError, UserError, parse
from medseg_ssl.nets import encoder_file
from pretrain.run import main as pretrain
from tests.train.archives import write_archive

COMMON = [
    "encoder.features=[4,8,8,8]",
    "objective.size=[16,16,16]",
    "data.batch_size=2",
    "train.accelerator=cpu",
    "wandb.mode=disabled",
    "--quiet",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    archive = write_archive(folder / "archive").path
    encoder = pretrain(["mae", str(folder / "mae"), "--archive", str(archive), "train.steps=2", *COMMON])
    return archive, encoder


def finetune(archive, run, *more):
    return main(["segmentation", str(run), "--archive", str(archive), "train.steps=3", *COMMON, *more])


def test_from_an_encoder_file_with_its_decoder(world, tmp_path):
    archive, encoder = world
    shipped = finetune(
        archive,
        tmp_path,
        "--encoder",
        str(encoder),
        "transfer.decoder=true",
        "evaluations={segmentation: {}}",
    )
    card = encoder_file.load_card(shipped)
    assert (card.kind, card.classes, card.crop_size) == ("segmenter", ("background", "organ"), (16, 16, 16))
    assert card.modalities == ("CT",)
    audit = (tmp_path / "audit.txt").read_text()
    assert "100.0% of the encoder's parameters taken, 100.0% of the decoder's" in audit
    assert "eval/segmentation/dice" in (tmp_path / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "inputs.json").read_text())["cases"].startswith("4 (")


def test_what_is_shipped_predicts(world, tmp_path):
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.inference.predictor import Predictor

    archive, _ = world
    shipped = finetune(archive, tmp_path)
    opened = Archive.open(archive)
    label = Predictor.load(shipped).predict_case(opened, "case-s6")
    assert label.shape == opened.original_label("case-s6")[0].shape


def test_levels_that_no_run_trained_are_named(world, tmp_path):
    """A light decoder reads the coarsest map alone: the levels above it stay as they were drawn."""
    archive, _ = world
    encoder = (
        "encoder={name: primus, embed_dim: 48, depth: 2, heads: 2, patch: [8, 8, 8], crop: [16, 16, 16]}"
    )
    light = finetune(archive, tmp_path / "light", encoder, "decoder={name: light}")
    untrained = encoder_file.load_card(light).untrained
    assert untrained
    assert all(name.startswith("levels.") for name in untrained)
    again = finetune(archive, tmp_path / "again", encoder, "decoder={name: light}", "--encoder", str(light))
    assert encoder_file.load_card(again).untrained == untrained
    whole = finetune(archive, tmp_path / "whole", encoder, "decoder={name: unet}", "--encoder", str(light))
    assert encoder_file.load_card(whole).untrained == ()
    assert encoder_file.load_card(finetune(archive, tmp_path / "resenc")).untrained == ()


def test_never_trained_is_what_is_neither_read_nor_from_a_file():
    assert never_trained(("levels.0.", "x."), ("",)) == ("levels.0.", "x.")
    assert never_trained(("levels.",), ("levels.1.",)) == ("levels.1.",)
    assert never_trained(("levels.1.",), ("levels.",)) == ("levels.1.",)
    assert never_trained(("levels.",), ()) == ()
    assert never_trained((), ("",)) == ()


def test_it_learns_from_few_labels(world, tmp_path):
    archive, _ = world
    finetune(archive, tmp_path, "train.steps=40", "train.log_every=5", "optim.lr=0.01", "train.ema=null")
    losses = [
        json.loads(line)["train/loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.6 * losses[0]


def test_the_encoder_of_the_file_is_the_default(world, tmp_path):
    """And what its card says of who chose it goes on the segmenter's."""
    archive, encoder = world
    loaded = encoder_file.build(encoder)
    choice = {"score": "knn/dice", "subset": "development"}
    chosen = loaded.card.model_copy(update={"chosen_by": choice})
    encoder = encoder_file.save(tmp_path / "e.safetensors", encoder=loaded.encoder, card=chosen)
    shipped = finetune(archive, tmp_path / "run", "encoder=null", "--encoder", str(encoder))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["encoder"]["size"] == "tiny"
    made = encoder_file.load_card(shipped)
    assert made.chosen_by is None
    assert made.chosen_before == ({**choice, "archives": [chosen.archive_fingerprint]},)
    with pytest.raises(
        ConfigError, match="no encoder: give the config an 'encoder:' block, or an encoder file"
    ):
        finetune(archive, tmp_path / "none", "encoder=null")


def test_a_decoder_that_no_file_filled_learns_at_the_full_rate(world, tmp_path):
    """``decoder_lr_scale`` is for one that was pretrained; else it would hold back what scratch trains freely."""
    archive, encoder = world
    loaded = encoder_file.build(encoder)
    alone = encoder_file.save(tmp_path / "e.safetensors", encoder=loaded.encoder, card=loaded.card)
    rates = ["optim.encoder_lr_scale=0.5", "optim.decoder_lr_scale=0.25", "train.log_every=1"]
    learned = {}
    for name, file in (("whole", encoder), ("alone", alone)):
        run = tmp_path / name
        finetune(archive, run, "transfer.decoder=true", *rates, "--encoder", str(file))
        learned[name] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        told = json.loads((run / "inputs.json").read_text()).get("decoder")
        assert told == (None if name == "whole" else "new, at the full rate")
    for found, scale in ((learned["whole"], 0.25), (learned["alone"], 1.0)):
        keys = [key for key in found if key.endswith("lr_decoder")]
        assert len(keys) == 1
        whole = found[keys[0].replace("decoder", "rest")]
        assert found[keys[0]] == pytest.approx(scale * whole)
        assert found[keys[0].replace("decoder", "encoder")] == pytest.approx(0.5 * whole)


def test_weights_really_come_from_the_file(world, tmp_path):
    archive, encoder = world
    frozen = ["optim.encoder_lr_scale=0", "--encoder", str(encoder)]
    shipped = finetune(archive, tmp_path, *frozen)
    before, after = (encoder_file.build(p).encoder.state_dict() for p in (encoder, shipped))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_encoder_file_is_another_run(world, tmp_path, tmp_path_factory):
    archive, encoder = world
    finetune(archive, tmp_path, "--encoder", str(encoder))
    with pytest.raises(ConfigError, match=r'encoder: "[0-9a-f]{16}" -> null'):
        finetune(archive, tmp_path)


def test_another_topology_is_refused(world, tmp_path):
    archive, encoder = world
    with pytest.raises(UserError, match=r"of this encoder's .* parameters"):
        finetune(
            archive,
            tmp_path / "run",
            "--encoder",
            str(encoder),
            "encoder.features=[8,16,16,16]",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("cases", "told"),
    [
        (["case-s6"], "belongs to a test subject"),
        (["nobody"], "no labeled case 'nobody'"),
        (["mr-s0"], "no labeled case 'mr-s0'"),
        ([], "no cases to train on"),
    ],
)
def test_cases_that_may_not_be_trained_on(world, tmp_path, cases, told):
    config = parse(
        FinetuneConfig, {"encoder": {"name": "resenc"}, "data": {"batch_size": 2}, "train": {"steps": 1}}
    )
    with pytest.raises(UserError, match=told):
        run_finetune(config, tmp_path, archive=world[0], cases=cases, quiet=True)


def test_only_the_given_cases_are_read(world, tmp_path, monkeypatch):
    from medseg_ssl.data.archive import Archive

    read = set()
    original = Archive.read_label
    monkeypatch.setattr(
        Archive, "read_label", lambda self, case, *box: read.add(case) or original(self, case, *box)
    )
    tree = {
        "encoder": {"name": "resenc", "size": "tiny", "features": [4, 8, 8, 8]},
        "objective": {"name": "segmentation", "size": [16, 16, 16]},
        "data": {"batch_size": 2},
        "train": {"steps": 2, "accelerator": "cpu"},
        "wandb": {"mode": "disabled"},
    }
    run_finetune(parse(FinetuneConfig, tree), tmp_path, archive=world[0], cases=["case-s1"], quiet=True)
    assert read == {"case-s1"}


def test_no_labels(tmp_path):
    archive = write_archive(tmp_path / "archive", labels=False).path
    with pytest.raises(UserError, match="no labeled cases"):
        finetune(archive, tmp_path / "run")


def test_the_decoder_has_one_place(world, tmp_path):
    with pytest.raises(ConfigError, match=r"objective.decoder stands at the top level"):
        finetune(world[0], tmp_path, "objective.decoder={name: unet}")


def test_every_shipped_config_parses_and_round_trips():
    from medseg_ssl.commandline import configs_folder
    from medseg_ssl.config import to_yaml
    from medseg_ssl.train.session import read_config

    files = sorted((configs_folder() / "finetune").glob("*.yaml"))
    assert {"segmentation", "segmentation_l"} <= {f.stem for f in files}
    for file in files:
        config = read_config(FinetuneConfig, file, [], shelves=SHELVES)
        without = {k: v for k, v in yaml.safe_load(to_yaml(config)).items()}
        without["objective"].pop("decoder", None)
        assert parse(FinetuneConfig, without)


def test_a_class_that_no_case_states_is_never_predicted(tmp_path, caplog):
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.inference.predictor import Predictor

    archive = write_archive(tmp_path / "archive", known=(True, False)).path
    command = ["segmentation", str(tmp_path / "run"), "--archive", str(archive), *COMMON[:-1]]
    shipped = main([*command, "train.steps=6", "optim.lr=0.01", "optim.weight_decay=0.5"])
    assert "none of the 4 labeled cases states organ: the segmenter will never predict it" in caplog.text
    assert encoder_file.load_card(shipped).silent_classes == ("organ",)
    predictor, opened = Predictor.load(shipped), Archive.open(archive)
    assert not predictor.predict_case(opened, "case-s6").any()


def test_a_class_that_one_case_states_is_learned(tmp_path):
    archive = write_archive(tmp_path / "archive", known=(True, False), stating=("s0",)).path
    shipped = finetune(archive, tmp_path / "run")
    assert encoder_file.load_card(shipped).silent_classes == ()


def test_an_objective_without_class_heads_is_refused(world, tmp_path):
    archive, _ = world
    with pytest.raises(ConfigError, match=r"objective 'template' has no class heads.*'segmentation' has"):
        finetune(archive, tmp_path / "run", "objective={name: template, size: [16, 16, 16]}")


def test_mirror_axes_reach_the_card_and_an_axis_stands_once(world, tmp_path):
    archive, _ = world
    shipped = finetune(archive, tmp_path / "run", "objective.mirror_axes=[2, 0]")
    assert encoder_file.load_card(shipped).mirror_axes == (2, 0)
    with pytest.raises(ConfigError, match=r"an axis stands twice in \[2, 2\]"):
        finetune(archive, tmp_path / "twice", "objective.mirror_axes=[2, 2]")


def test_flips_need_a_mirrored_training_and_folders_of_their_own(world, tmp_path):
    from finetune.evaluate import main as evaluate

    archive, _ = world
    shipped = finetune(archive, tmp_path / "run", "objective.mirror_axes=[2]")
    words = [str(shipped), str(tmp_path / "scores"), "--archive", str(archive)]
    evaluate([*words, "--flips"])
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["flips"] is True
    with pytest.raises(ConfigError, match="flips"):
        evaluate(words)
    plain = finetune(archive, tmp_path / "plain")
    with pytest.raises(UserError, match="trained without mirror_axes"):
        evaluate([str(plain), str(tmp_path / "other"), "--archive", str(archive), "--flips"])


@pytest.mark.parametrize("name", ["mean_teacher", "pseudo_labels"])
def test_unlabeled_scans_are_used_and_their_labels_never_read(world, tmp_path, monkeypatch, name):
    """Of one labeled case: its label alone is read, and crops come from every scan like it of the training subjects."""
    from medseg_ssl.data.archive import Archive

    labels, scans = set(), set()
    read_label, read = Archive.read_label, Archive.read

    def guarded(self, case, *box):
        assert case == "case-s1", f"the label of {case} was read"
        labels.add(case)
        return read_label(self, case, *box)

    monkeypatch.setattr(Archive, "read_label", guarded)
    monkeypatch.setattr(Archive, "read", lambda self, key, *box: scans.add(key) or read(self, key, *box))
    tree = {
        "encoder": {"name": "resenc", "size": "tiny", "features": [4, 8, 8, 8]},
        "objective": {"name": name, "size": [16, 16, 16]},
        "data": {"batch_size": 2},
        "train": {"steps": 4, "accelerator": "cpu", "preview_every": None},
        "wandb": {"mode": "disabled"},
    }
    shipped = run_finetune(
        parse(FinetuneConfig, tree), tmp_path, archive=world[0], cases=["case-s1"], quiet=True
    )
    assert labels == {"case-s1"}
    assert scans == {f"s{i}-CT" for i in range(4)}
    card = encoder_file.load_card(shipped)
    assert (card.objective, card.kind) == (name, "segmenter")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("train/certain_share" in line or "train/confident_share" in line for line in lines)


def test_channels_are_joined_as_an_archive_of_such_cases_holds_them(tmp_path, capsys):
    """Cases of CT and MR joined when read train the same weights as an archive that was prepared with them."""
    from finetune import evaluate

    single = write_archive(tmp_path / "single").path
    both = write_archive(tmp_path / "both", channels=("CT", "MR")).path
    joined = finetune(single, tmp_path / "joined", "data.modalities=[CT, MR]")
    stored = finetune(both, tmp_path / "stored")
    card = encoder_file.load_card(joined)
    assert (card.modalities, card.channels_in, set(card.intensity)) == (("CT", "MR"), 2, {"CT", "MR"})
    ours, theirs = (encoder_file.build(p).encoder.state_dict() for p in (joined, stored))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name, archive in (("joined", single), ("stored", both)):
        evaluate.main([str(tmp_path / name / "segmenter.safetensors"), str(tmp_path / f"{name}-scores"),
                       "--archive", str(archive), "--task", "t"])  # fmt: skip
    scores = [(tmp_path / f"{name}-scores" / "cases.csv").read_text() for name in ("joined", "stored")]
    assert scores[0] == scores[1]


def test_what_a_segmenter_of_one_modality_does_not_know_is_not_scored(tmp_path, capsys):
    from finetune import evaluate

    archive = write_archive(tmp_path / "archive", labeled_mr=True).path
    shipped = finetune(archive, tmp_path / "run", "data.modalities=[CT]")
    assert set(encoder_file.load_card(shipped).intensity) == {"CT"}
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["cases"].startswith("4 (")
    evaluate.main([str(shipped), str(tmp_path / "scores"), "--archive", str(archive)])
    told = "2 case(s) of MR are not scored: the segmenter knows CT."
    assert told in " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert (summary["cases"], summary["conditions"]) == (2, [told])
    with pytest.raises(UserError, match="has no labeled case of PT; it has labeled cases of CT, MR"):
        finetune(archive, tmp_path / "none", "data.modalities=[PT]")


@pytest.mark.slow
def test_budgets_of_joined_cases_ask_for_their_modalities(tmp_path):
    from finetune.compare import main as compare

    single = write_archive(tmp_path / "single").path
    tree = {
        "task": "balls",
        "modalities": ["CT", "MR"],
        "budgets": [1],
        "draws": 1,
        "inits": {"scratch": "scratch", "size_only": {"baseline": "size_only"}},
        "finetune": {"base": "segmentation", "data": {"batch_size": 2}, "wandb": {"mode": "disabled"},
                     "objective": {"size": [16, 16, 16]}, "train": {"steps": "1 steps", "accelerator": "cpu"}},
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    words = [
        str(tmp_path / "c.yaml"),
        str(tmp_path / "out"),
        "--archive",
        str(single),
        "--quiet",
        "--workers",
        "1",
    ]
    with pytest.raises(ConfigError, match=r"finetune\.data\.modalities has no place in a comparison"):
        compare([*words, "finetune.data.modalities=[CT, MR]"])
    compare(words)
    drawn = ["--cases", str(tmp_path / "out" / "budgets.json"), "--budget", "1"]
    with pytest.raises(ConfigError, match=r"names cases of CT\+MR; set data\.modalities=\[CT, MR\]"):
        finetune(single, tmp_path / "run", *drawn)
    shipped = finetune(single, tmp_path / "run", *drawn, "data.modalities=[CT, MR]", "train.steps=1")
    assert encoder_file.load_card(shipped).channels_in == 2
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["cases"].startswith("1 (")
