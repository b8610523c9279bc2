"""Replay: which old cases stay in training, how often they are met, and that nobody who is tested is among them."""

import csv
import json

import pytest
import torch

from finetune import evaluate
from finetune.continuing import previous
from finetune.replay import drawn, plan_replay, samples_of
from finetune.run import main
from finetune.settings import FinetuneConfig
from finetune.training_data import steps_per_epoch
from medseg_ssl.config import ConfigError, parse
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.budgets import nested_budgets
from medseg_ssl.data.joining import BEHIND
from medseg_ssl.data.partial import Access
from medseg_ssl.nets import encoder_file
from medseg_ssl.types import ViewSpec
from tests.train.archives import TEST, TRAIN, write_archive

COMMON = [
    "encoder.features=[4,8,8,8]",
    "objective.size=[16,16,16]",
    "data.batch_size=4",
    "train.accelerator=cpu",
    "wandb.mode=disabled",
    "train.preview_every=null",
    "--quiet",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An old archive of 'organ', a new one of 'lesion', and a segmenter of the former."""
    folder = tmp_path_factory.mktemp("replay")
    old = write_archive(folder / "old").path
    new = write_archive(folder / "new", classes=("background", "lesion")).path
    words = ["segmentation", str(folder / "run"), "--archive", str(old), "train.steps=1"]
    return old, new, main([*words, *COMMON])


def config(batch_size=4, accumulate=1, **replay):
    tree = {"data": {"batch_size": batch_size}, "train": {"steps": 2, "accumulate": accumulate}}
    return parse(FinetuneConfig, {**tree, "replay": {"cases": 2, **replay}})


def goes_on(world, run, *more, config="replay"):
    words = [config, str(run), "--archive", str(world[1]), "--continue-from", str(world[2])]
    return main([*words, "train.steps=3", *COMMON, *more])


def test_cases_are_drawn_once_from_the_train_list(world):
    archive = Archive.open(world[0])
    cases, available = drawn(config(), archive)
    assert available == len(TRAIN)
    assert (cases, available) == drawn(config(), archive)
    assert set(cases) <= {f"case-{subject}" for subject in TRAIN}
    more, _ = drawn(config(cases=3), archive)
    assert set(cases) < set(more), "a larger replay holds the smaller one"
    assert len(drawn(config(cases=0.5), archive)[0]) == 2
    assert {drawn(config().model_copy(update={"seed": s}), archive)[0] for s in range(8)} != {cases}
    assert drawn(config(cases=1, among=["case-s3"]), archive) == (("case-s3",), 1)
    with pytest.raises(
        ConfigError, match=rf"replay.among names 'case-{TEST[0]}', no labeled case of the train list"
    ):
        drawn(config(among=[f"case-{TEST[0]}"]), archive)
    with pytest.raises(ConfigError, match=r"replay.cases is 5, and there are 4 old cases"):
        drawn(config(cases=5), archive)
    taken = [f"case-{subject}" for subject in TRAIN]
    with pytest.raises(
        ConfigError, match="all labeled ones are trained on as new: name the old --replay-archive"
    ):
        drawn(config(), archive, taken)


def test_draws_are_not_those_of_a_label_budget(world):
    """Else the first cases that a comparison labels would be those that are replayed."""
    archive = Archive.open(world[0])
    by_subject = {subject: [f"case-{subject}"] for subject in TRAIN}

    def budget(seed):
        return tuple(sorted(nested_budgets(by_subject, [2], seed=seed, draw=0)[2]))

    replayed = [drawn(config().model_copy(update={"seed": seed}), archive)[0] for seed in range(8)]
    assert replayed != [budget(seed) for seed in range(8)]


def test_one_archive_replays_cases_of_another_modality(tmp_path):
    """A scanner of another kind joins, with a few scans of the old one; forgetting is told of the old ones alone."""
    archive = write_archive(tmp_path / "archive", labeled_mr=True).path
    words = ["--archive", str(archive), "train.steps=1", *COMMON]
    old = main(["segmentation", str(tmp_path / "ct"), *words, "data.modalities=[CT]"])
    asked = ["data.modalities=[MR]", "replay.cases=2", "--continue-from", str(old)]
    with pytest.raises(ConfigError, match=r"or other replay\.modalities"):
        main(["replay", str(tmp_path / "none"), *words, *asked])
    new = main(["replay", str(tmp_path / "mr"), *words, *asked, "replay.modalities=[CT]"])
    kept = json.loads((tmp_path / "mr" / "replay.json").read_text())["cases"]
    assert len(kept) == 2
    assert all(case.startswith("case-") for case in kept), "CT, not mr-"
    assert set(encoder_file.load_card(new).intensity) == {"CT", "MR"}
    evaluate.main([str(new), str(tmp_path / "scores"), "--archive", str(archive), "--before", str(old)])
    with (tmp_path / "scores" / "forgetting.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["cases"] for row in rows} == {str(len(TEST))}, "those of CT"
    assert {row["one_sided"] for row in rows} == {"0"}, "cases of MR are not half a pair"
    assert {row["class"] for row in rows} == {"organ"}, "of one class the mean over classes is the same test"
    assert all(row["p_holm"] == row["p"] for row in rows)
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["cases"] == 2 * len(TEST)


@pytest.mark.parametrize(
    ("batch", "accumulate", "share", "world", "samples"),
    [(4, 1, 0.25, 1, 1), (4, 1, 0.1, 1, 1), (8, 2, 0.3, 2, None), (8, 2, 0.5, 2, 4), (12, 1, 0.25, 3, 3)],
)
def test_a_share_of_every_step_is_old(batch, accumulate, share, world, samples):
    made = config(batch, accumulate, share=share)
    if samples is None:
        with pytest.raises(
            ConfigError, match=r"is 2 sample\(s\) .* 2 processes x 2 micro-batches .*possible: 0.5"
        ):
            samples_of(made, world)
    else:
        assert samples_of(made, world) == samples


def test_no_room_in_a_batch_of_one():
    with pytest.raises(ConfigError, match="take a larger batch"):
        samples_of(config(1))


def test_the_run_says_which_cases_it_kept_and_learns_from_them(world, tmp_path):
    run = tmp_path / "run"
    shipped = goes_on(world, run, "replay.cases=2", "--replay-archive", str(world[0]))
    record = json.loads((run / "replay.json").read_text())
    assert record["cases"] == list(drawn(config(), Archive.open(world[0]))[0])
    assert record["samples_per_step"] == {"new": 3, "replayed": 1}
    assert (record["share_of_samples"], record["share_of_cases"]) == (0.25, 2 / 6)
    assert (record["subjects"], record["drawn_from"]) == (2, 4)
    inputs = json.loads((run / "inputs.json").read_text())
    assert inputs["replay"]["archive"] == Archive.open(world[0]).fingerprint[:16]
    assert encoder_file.load_card(shipped).classes == ("background", "organ", "lesion")
    with pytest.raises(ConfigError, match=r"holds another run: .*replay"):
        goes_on(world, run, "replay.cases=3", "--replay-archive", str(world[0]))


def test_batches_hold_both_in_the_classes_of_the_segmenter(world):
    archive = Archive.open(world[1])
    used = [f"case-{subject}" for subject in TRAIN]
    made = config(share=0.5)
    found = plan_replay(made, archive, used, previous=previous(world[2], archive), old=world[0])
    assert found.samples == 2
    assert found.stated() == {"background", "organ"}
    assert steps_per_epoch(made, archive, used) == 2, "an epoch has every new case once"
    views = {"labeled": ViewSpec(count=1, size=(16, 12, 8), labeled=True)}
    first, second = found.batches(made, views, steps=2)
    assert set(first.subject_B + second.subject_B) == set(found.subjects)
    view = first.views["labeled"][0]
    assert set(view.label_BDHW.unique().tolist()) <= {0, 1}
    assert view.known_classes_BK.tolist() == [[True, True, False]] * 2, (
        "nobody stated the new class in an old case"
    )
    (again,) = found.batches(made, views, steps=2, first=1)
    assert torch.equal(again.views["labeled"][0].image_BCDHW, second.views["labeled"][0].image_BCDHW)


def test_two_loaders_make_one_batch(world):
    from medseg_ssl.data.joining import joined
    from medseg_ssl.data.loader import Loader

    archive = Archive.open(world[0])
    views = {"labeled": ViewSpec(count=1, size=(16, 12, 8), labeled=True)}
    one, other = (
        list(Loader(archive, views, batch_size=n, steps=2, seed=seed)) for n, seed in ((2, 0), (1, 5))
    )
    batches = list(joined(one, other))
    assert len(batches) == 2
    assert batches[1].sample_index_B.tolist() == [2, 3, BEHIND + 1]
    assert (batches[1].seed, batches[1].subject_B) == (0, one[1].subject_B + other[1].subject_B)
    view = batches[1].views["labeled"][0]
    assert view.image_BCDHW.shape == (3, 1, 16, 12, 8)
    assert torch.equal(view.image_BCDHW[2:], other[1].views["labeled"][0].image_BCDHW)
    assert torch.equal(view.label_BDHW[:2], one[1].views["labeled"][0].label_BDHW)


def test_who_is_tested_is_never_replayed_nor_trained_on(world):
    """The same scans stand in both archives, under other sides of their splits."""
    plain = Archive.open(world[1])
    known = previous(world[2], plain)
    split = plain.split().model_copy(update={"train": TEST, "test": TRAIN})
    turned = plain.limited(Access(splits=(split,)))
    with pytest.raises(
        ConfigError, match=r"2 scan\(s\) .* of the archive: scan s\d-CT has the voxels of s\d-CT"
    ):
        plan_replay(config(), turned, ["case-s6"], previous=known, old=world[0])
    split = plain.split().model_copy(update={"train": (*TRAIN, *TEST), "test": ()})
    turned = plain.limited(Access(splits=(split,)))
    with pytest.raises(
        ConfigError, match=r"1 scan\(s\) .* of the old archive: scan s6-CT has the voxels of s6-CT"
    ):
        plan_replay(config(), turned, ["case-s0", "case-s6"], previous=known, old=world[0])


def test_another_split_of_one_archive_replays_nobody_who_is_tested(world):
    plain = Archive.open(world[1])
    other = plain.split().model_copy(update={"name": "other", "train": TEST, "test": TRAIN})
    both = plain.limited(Access(splits=(other,)))
    with pytest.raises(ConfigError, match=rf"{len(TEST)} subject\(s\) whom split 'default' keeps for test"):
        plan_replay(config(split="other"), both, ["case-s0"], previous=previous(world[2], plain), old=None)


def test_a_fold_replays_nobody_whom_it_tests(tmp_path):
    """The old modality is read anew, with the archive's own split; who is tested is said by the run's."""
    path = write_archive(tmp_path / "archive", labeled_mr=True).path
    segmenter = main(["segmentation", str(tmp_path / "ct"), "--archive", str(path), "data.modalities=[CT]",
                      "train.steps=1", *COMMON])  # fmt: skip
    split = Archive.open(path).split("default")
    fold = split.model_copy(update={"train": split.test, "test": split.train})
    tree = config(modalities=["CT"]).model_dump(mode="json")
    asked = parse(FinetuneConfig, {**tree, "data": {**tree["data"], "modalities": ["MR"]}})
    for splits, refused in (((), False), ((fold,), True)):
        archive = Archive.open(path).limited(Access(splits=splits, channels=("MR",)))
        used = [f"mr-{subject}" for subject in archive.split("default").train]
        went_before = previous(segmenter, archive)
        if not refused:
            kept = plan_replay(asked, archive, used, previous=went_before, old=None)
            assert set(kept.subjects) <= set(TRAIN)
            continue
        with pytest.raises(ConfigError, match="replay would train on 2 subject"):
            plan_replay(asked, archive, used, previous=went_before, old=None)


def test_what_does_not_go_together_is_refused(world, tmp_path):
    old, new, segmenter = world
    words = [str(tmp_path / "run"), "--archive", str(new), *COMMON]
    with pytest.raises(ConfigError, match="name it by --continue-from, or set replay=null"):
        main(["segmentation", *words, "replay.cases=2"])
    with pytest.raises(ConfigError, match="--replay-archive needs the config's replay"):
        goes_on(world, tmp_path / "run", "--replay-archive", str(old), config="distillation")
    with pytest.raises(ConfigError, match=r"replay.cases: must be a number of cases, or a share"):
        goes_on(world, tmp_path / "run", "replay.cases=1.5")
    with pytest.raises(ConfigError, match="name the old --replay-archive"):
        goes_on(world, tmp_path / "run")
    third = write_archive(tmp_path / "third", classes=("background", "stone")).path
    with pytest.raises(
        ConfigError, match=r"the old archive has the class 'stone'.*known: background, organ, lesion"
    ):
        goes_on(world, tmp_path / "run", "replay.cases=2", "--replay-archive", str(third))
    assert not (tmp_path / "run").exists()
    assert segmenter.is_file()


@pytest.mark.slow
def test_a_broken_run_continues_exactly_whatever_its_workers(world, tmp_path, monkeypatch):
    from medseg_ssl.train.runtime import Runtime

    options = ["train.save_every=1", "replay.cases=2", "--replay-archive", str(world[0])]
    whole = goes_on(world, tmp_path / "whole", *options)
    beside = goes_on(world, tmp_path / "beside", *options, "data.workers=2")
    seed_step = Runtime.seed_step

    def breaks(self, seed, step):
        if step == 2:
            raise ConnectionError("the power went out")
        seed_step(self, seed, step)

    monkeypatch.setattr(Runtime, "seed_step", breaks)
    with pytest.raises(ConnectionError):
        goes_on(world, tmp_path / "broken", *options)
    monkeypatch.undo()
    broken = goes_on(world, tmp_path / "broken", *options)
    states = [encoder_file.build(path).segmenter().state_dict() for path in (whole, broken, beside)]
    for state in states[1:]:
        assert all(torch.equal(states[0][name], state[name]) for name in states[0])
