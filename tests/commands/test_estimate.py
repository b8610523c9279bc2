import json
import multiprocessing
import signal
import time

import pytest
import torch

from medseg_ssl.cli import Terminated
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.nets.encoders.resenc import ResEnc
from medseg_ssl.nets.footprint import footprint
from medseg_ssl.nets.transformer import RotaryBlocks
from medseg_ssl.train.trial import made_up_templates
from pretrain import bench, counting, estimate, trying
from pretrain.run import main as pretrain
from tests.train.archives import write_archive

SMALL = ["objective.size=[16,16,16]", "data.batch_size=2", "train.accelerator=cpu", "train.threads=1"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("estimate") / "archive").path


def test_footprint_known_answers():
    convolution = torch.nn.Conv3d(2, 5, 3, padding=1, bias=False)
    counted = footprint(convolution, (4, 6, 8), channels=2, batch=3, run=lambda m, x: m(x))
    assert counted.operations == 2 * 27 * 2 * 5 * 4 * 6 * 8 * 3
    assert counted.saved_bytes == 4 * 2 * 4 * 6 * 8 * 3, "a convolution keeps its input"
    encoder = ResEnc(ResEnc.Config())
    one, two = (footprint(encoder, (n, 16, 16), channels=1, run=lambda m, x: m(x)) for n in (16, 32))
    assert two.saved_bytes == pytest.approx(2 * one.saved_bytes, rel=0.01)
    assert two.operations == 2 * one.operations
    assert not any(p.is_meta for p in encoder.parameters())


def test_attention_keeps_no_matrix_of_all_pairs():
    """As the fused kernels: what it keeps grows with the tokens, what it computes with their square."""
    blocks = RotaryBlocks(48, 1, 4).train()

    def run(network, image):
        tokens = image.flatten(2).mT.expand(-1, -1, 48)
        return network(tokens, torch.zeros(1, tokens.shape[1], 3, device=image.device))

    one, two, three = (footprint(blocks, (n, 8, 8), channels=1, run=run) for n in (4, 8, 12))
    assert two.saved_bytes == pytest.approx(2 * one.saved_bytes, rel=0.05)
    square = three.operations - 2 * two.operations + one.operations
    assert square == 2 * (4 * 64) ** 2 * 2 * 48 * 2, "second difference of 2 L² (48 + 48)"


def test_objectives_that_compute_some_tokens_cost_as_many():
    words = [
        "objective.size=[32,32,32]",
        "encoder.size=tiny",
        "encoder.crop=[32,32,32]",
        "encoder.patch=[4,4,4]",
    ]
    found = {}
    for name, more in (
        ("half", ["objective.hiding={ratio: [0.5, 0.5], block: [4,4,4]}"]),
        ("eighth", ["objective.hiding={ratio: [0.875, 0.875], block: [4,4,4]}"]),
    ):
        config, kind = estimate.read("mae_tokens", [*words, *more], archive=None)
        found[name] = counting.plan_of(config, kind, None)["footprint"]
    assert found["half"][1] == pytest.approx(4 * found["eighth"][1], rel=0.1)
    assert found["half"][0] > 3.5 * found["eighth"][0]


def test_estimate_with_and_without_an_archive(archive, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "in_a_process", trying.trial)  # a new process takes seconds
    shown = estimate.main(["mae", *SMALL, "--seconds", "0.2", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["parameters"] == shown.parameters
    encoder = sum(p.numel() for p in ResEnc(ResEnc.Config()).parameters())
    assert shown.parameters["encoder"] == encoder
    assert shown.encoder_file_gib * 2**30 == 4 * (encoder + shown.parameters["decoder"])
    assert shown.checkpoint_gib * 2**30 == pytest.approx(12 * sum(shown.parameters.values()), rel=0.01)
    assert shown.steps == 2000
    assert shown.hours == pytest.approx(2000 * shown.step_s / 3600)
    assert shown.wait_share is None
    assert shown.trial_size is None

    words = ["mae", *SMALL, "train.steps=3 epochs", "--seconds", "0.2", "--archive", str(archive)]
    real = estimate.main(words)
    assert real.steps == 12, "four training subjects with two scans each, two at a time"
    assert 0 <= real.wait_share < 1
    assert "waiting for data" in capsys.readouterr().out


@pytest.mark.slow
def test_a_config_too_large_for_this_machine_is_tried_smaller(monkeypatch):
    monkeypatch.setattr(counting, "_operations_per_second", lambda threads: 1e10)
    monkeypatch.setattr(counting, "SLOWEST_TRIAL_STEP_S", 0.2)
    # a set time: two timings of a busy machine cannot be compared
    set_time = {"step_s": 0.01, "wait_s": 0.0}
    monkeypatch.setattr(estimate, "in_a_process", lambda job: {**trying.trial(job), **set_time})
    config, kind = estimate.read("mae", [*SMALL, "objective.size=[32,32,32]"], archive=None)
    found = estimate.estimate(config, kind=kind, seconds=0.2)
    assert found.trial_size == (16, 16, 16)
    assert "crops of [16, 16, 16]" in dict(estimate.table(found))["measured on"]
    smaller = estimate.estimate(counting.with_size(config, (16, 16, 16)), kind=kind, seconds=0.2)
    assert found.operations_per_step == 8 * smaller.operations_per_step
    assert found.step_s == pytest.approx(8 * smaller.step_s)


@pytest.mark.slow
def test_a_frozen_encoder_has_no_backward_pass_and_other_modalities_cost_nothing(archive):
    plans = {}
    for name in ("full", "frozen"):
        config, kind = estimate.read("segmentation", [*SMALL, f"tune.name={name}"], archive=None)
        plans[name] = counting.plan_of(config, kind, None)["footprint"]
    encoder = ResEnc(ResEnc.Config())
    forward = footprint(encoder, (16, 16, 16), channels=1, run=lambda m, x: m(x))
    assert plans["full"][0] - plans["frozen"][0] == 2 * forward.operations
    assert plans["full"][1] - plans["frozen"][1] == forward.saved_bytes
    words = [*SMALL, "train.steps=3 epochs"]
    for more, steps in (([], 12), (["data.modalities=[CT]"], 6)):
        config, kind = estimate.read("mae", [*words, *more], archive=archive)
        assert counting.plan_of(config, kind, archive)["steps"] == steps


def test_the_earlier_segmenter_counts():
    counted = {}
    for name in ("segmentation", "distillation"):
        words = [*SMALL, "train.steps=2", "objective.deep_supervision=false"]
        config, kind = estimate.read(name, words, archive=None)
        counted[name] = counting.plan_of(config, kind, None)["weights"]
    assert counted["distillation"] == 2 * counted["segmentation"], "the earlier segmenter answers every crop"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean_teacher", "distillation"])
def test_a_copy_is_made_of_networks_that_have_their_adapters(name, monkeypatch):
    """As the run makes it: a teacher without the student's adapters could not follow it."""
    monkeypatch.setattr(estimate, "in_a_process", trying.trial)
    found = estimate.main([name, *SMALL, "tune.name=lora", "--seconds", "0.1"])
    assert found.step_s > 0
    plain = estimate.main([name, *SMALL, "--seconds", "0.1"])
    assert sum(found.parameters.values()) > sum(plain.parameters.values()), "adapters of both"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["maee"], "no pretrain config named 'maee' \\(did you mean 'mae'"),
        (["nothing.yaml"], "no config file nothing.yaml"),
        (["mae", "objective.sise=[16,16,16]"], "did you mean 'size'"),
        (["mae", "--seconds", "0"], "--seconds must lie above 0"),
        (["mae", "objective.size=[20,16,16]"], "does not fit the encoder"),
        (["mae", "train.accelerator=gpu"], "torch sees none"),
    ],
)
def test_wrong_use(words, message):
    if "gpu" in words[-1] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=message):
        estimate.main(words)


def test_a_compare_config_is_no_training(tmp_path):
    path = tmp_path / "compare.yaml"
    path.write_text("task: x\ninits: {scratch: scratch}\n")
    with pytest.raises(ConfigError, match="estimate takes a pretrain or finetune config"):
        estimate.main([str(path)])


@pytest.mark.slow
def test_bench_of_the_machine(archive, capsys):
    figures = bench.machine_figures(archive=archive, seconds=0.01)
    assert len(figures) == 6
    assert all(figure.value > 0 for figure in figures)


def test_bench_of_a_config_orders_its_options(monkeypatch, capsys):
    times = {("fp32", False): 3.0, ("fp32", True): 2.0, ("bf16", False): 1.0}

    def fake(config, *, kind, archive, seconds):
        way = (config.train.precision, config.train.channels_last)
        if way not in times:
            raise ConfigError("too deep")
        return estimate.Estimate({}, 0, 1, times[way], None, 1.0, None, 0, 0, 0, "cpu")

    monkeypatch.setattr(estimate, "estimate", fake)
    options = bench.main(["mae", *SMALL])
    assert [option.step_s for option in options] == [1.0, 2.0, 3.0]
    printed = capsys.readouterr().out
    assert "failed: train.precision=bf16 train.channels_last=true train.compile=false: too deep" in printed
    assert "fastest here: train.precision=bf16 train.channels_last=false" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["mae", "objective.size=[32,32,32]", "data.batch_size=4"],
        [
            "mae_tokens",
            "encoder.patch=[4,4,4]",
            "encoder.crop=[32,32,32]",
            "objective.size=[32,32,32]",
            "data.batch_size=4",
        ],
        ["simclr", "objective.size=[32,32,32]", "data.batch_size=4", "train.precision=bf16"],
        ["segmentation", "encoder={name: resenc, size: s}", "objective.size=[32,32,32]", "data.batch_size=2"],
    ],
    ids=lambda words: words[0],
)
def test_the_estimate_holds_for_a_real_run(words, archive, tmp_path):
    """Within 25 % for time and memory, with a process of its own for the run, as a user has it."""
    import subprocess
    import sys

    common = ["train.steps=60 steps", "train.log_every=20", "train.preview_every=null", "train.threads=1"]
    words = [*words, "train.accelerator=cpu", *common]
    found = estimate.main([*words, "--archive", str(archive), "--seconds", "8"])
    module = "finetune.run" if words[0] == "segmentation" else "pretrain.run"
    command = [
        sys.executable,
        "-m",
        module,
        words[0],
        str(tmp_path / "run"),
        *words[1:],
        "wandb.mode=disabled",
    ]
    subprocess.run([*command, "--archive", str(archive), "--quiet"], check=True)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    samples = next(int(w.split("=")[1]) for w in words if w.startswith("data.batch_size"))
    assert found.step_s == pytest.approx(samples / last["system/samples_per_s"], rel=0.25)
    assert found.memory_gib == pytest.approx(last["system/memory_gib"], rel=0.25)
    assert (tmp_path / "run" / "last.ckpt").stat().st_size / 2**30 == pytest.approx(
        found.checkpoint_gib, rel=0.1
    )


def test_recomputing_changes_no_weight(archive, tmp_path):
    for name, flag in (("plain", "false"), ("again", "true")):
        words = [
            "mae",
            str(tmp_path / name),
            *SMALL,
            "encoder.features=[4,8,8,8]",
            "train.steps=3",
            "train.log_every=1",
            f"train.recompute={flag}",
        ]
        pretrain(
            [*words, "train.preview_every=null", "wandb.mode=disabled", "--archive", str(archive), "--quiet"]
        )
    plain, again = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["objective"]
        for name in ("plain", "again")
    )
    assert plain.keys() == again.keys()
    for key, value in plain.items():
        assert torch.equal(value, again[key]), key


def test_a_smaller_crop_is_never_larger_along_an_axis():
    assert counting.halved((32, 64, 64), (32, 32, 32), least=2) == (32, 64, 64)
    assert counting.halved((32, 160, 160), (32, 32, 32), least=3) == (32, 96, 96)
    assert counting.halved((1, 160, 160), (32, 32, 32), least=2) == (1, 64, 64)


def test_made_up_scans_lie_in_their_template_as_they_are():
    """Millimetres (x, y, z) of a voxel to its index (D, H, W) in a template of 2 mm voxels."""
    template = made_up_templates({"CT": ["a"]}, extent_mm=64.0)["CT"]
    point = torch.tensor([2.0, 4.0, 8.0, 1.0], dtype=torch.float64)
    assert (template.to_lattice_S44[0] @ point).tolist() == [4.0, 2.0, 1.0, 1.0]


def test_what_fails_in_a_trial_is_one_line(monkeypatch):
    class Pool:
        def __init__(self, *args, **kwargs): ...
        def shutdown(self, **options): ...

        def submit(self, *args):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(trying, "ProcessPoolExecutor", Pool)
    with pytest.raises(UserError, match=r"the trial failed: CUDA out of memory\. Tried to allocate"):
        trying.in_a_process({})


def asleep(job):
    time.sleep(60)


def test_an_interrupted_trial_ends_its_process_at_once(monkeypatch):
    def stop(number, frame):
        raise Terminated

    monkeypatch.setattr(trying, "trial", asleep)
    others = set(multiprocessing.active_children())
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        began = time.monotonic()
        with pytest.raises(Terminated):
            trying.in_a_process({})
        assert time.monotonic() - began < 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert set(multiprocessing.active_children()) <= others


def test_a_config_that_no_option_can_train_is_told_once(capsys):
    with pytest.raises(ConfigError, match="deepest level has stride"):
        bench.main(["segmentation", *SMALL, "objective.size=[1,7,7]", "--seconds", "0.2", "--rounds", "1"])
    assert capsys.readouterr().err.count("round 1") == 1
