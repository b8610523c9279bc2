import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from medseg_ssl.config import UserError, parse
from medseg_ssl.train import interrupt
from medseg_ssl.train import runtime as runtimes
from medseg_ssl.train.checkpoint import Checkpoint
from medseg_ssl.train.health import FiniteGuard
from medseg_ssl.train.interrupt import Interrupted, StopRequest
from medseg_ssl.train.settings import TrainConfig
from tests.train.conftest import TinyObjective, run_tiny, same, tiny_batches, weights

ROOT = Path(__file__).resolve().parents[2]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_at(number_to_stop, how):
    def change(number, batch):
        if number == number_to_stop:
            how()
        return batch

    return change


def raise_signal(number):
    return lambda: os.kill(os.getpid(), number)


def fail():
    raise ConnectionError("the power went out")


def test_it_learns_and_keeps_books(tmp_path):
    objective, result = run_tiny(tmp_path, steps=60)
    rows = lines(tmp_path)
    assert [r["step"] for r in rows] == list(range(3, 61, 3))
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]
    wanted = {"train/loss", "train/error", "train/grad_norm", "train/feature_rank", "train/lr_encoder"}
    assert wanted | {"system/samples_per_s", "system/data_share"} <= set(rows[-1])
    assert result.step == 60
    assert int(objective.steps_seen) == 60
    assert not objective.training


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("optim", [{"lr": 0.01}, {"lr": 0.01, "name": "sgd", "decoder_first": "25%"}])
def test_resume_is_exact(tmp_path, ema, optim):
    whole, _ = run_tiny(tmp_path / "whole", ema=ema, optim=optim)
    with pytest.raises(ConnectionError):  # dies within step 8; the last checkpoint is of step 5
        run_tiny(tmp_path / "broken", ema=ema, optim=optim, change=stop_at(8, fail))
    assert Checkpoint(tmp_path / "broken" / "last.ckpt").load()["step"] == 5
    continued, _ = run_tiny(tmp_path / "broken", ema=ema, optim=optim)
    assert same(weights(whole), weights(continued))
    unlike = {"time_s", "system/samples_per_s", "system/data_share", "system/memory_gib"}
    told, expected = (
        [{k: v for k, v in row.items() if k not in unlike} for row in lines(tmp_path / run)]
        for run in ("broken", "whole")
    )
    assert [row["step"] for row in told] == [3, 6, 9, 12]
    assert told == expected, "a line of the log that the interruption falls into holds all of its steps"


def test_resume_is_exact_with_accumulation(tmp_path):
    whole, _ = run_tiny(tmp_path / "whole", accumulate=2)
    with pytest.raises(Interrupted):  # between the two micro-batches of a step
        run_tiny(tmp_path / "stopped", accumulate=2, change=stop_at(15, raise_signal(signal.SIGTERM)))
    assert Checkpoint(tmp_path / "stopped" / "last.ckpt").load()["step"] == 7
    continued, _ = run_tiny(tmp_path / "stopped", accumulate=2)
    assert same(weights(whole), weights(continued))


def test_a_complete_run_trains_no_further(tmp_path):
    first, _ = run_tiny(tmp_path)
    again, result = run_tiny(tmp_path, change=stop_at(0, fail))
    assert same(weights(first), weights(again))
    assert result.step == 12


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    whole, _ = run_tiny(tmp_path / "whole", dropout=0.0)
    parts, _ = run_tiny(tmp_path / "parts", dropout=0.0, accumulate=4)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-5), name
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)


def test_average_is_what_ships_and_the_checkpoint_keeps_both(tmp_path):
    objective, _ = run_tiny(tmp_path, ema=0.9)
    state = Checkpoint(tmp_path / "last.ckpt").load()
    assert torch.equal(objective.head.weight, state["average"]["head.weight"])
    assert not torch.equal(objective.head.weight, state["objective"]["head.weight"])


def test_average_known_answer():
    from medseg_ssl.train.averaging import Average

    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    average = Average(module, decay=0.5)
    with torch.no_grad():
        module.weight.fill_(3.0)
    average.update(100)
    with average.applied():
        assert module.weight.item() == 2.0
    assert module.weight.item() == 3.0
    average.settle()
    assert module.weight.item() == 2.0


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    def poison(number, batch):
        if number == 7:
            batch.views["crop"][0].image_BCDHW[2] = float("nan")
        return batch

    with pytest.raises(
        UserError, match=r"the loss is nan at step 8; scans in this batch: .*scan58"
    ) as caught:
        run_tiny(tmp_path, change=poison)
    assert caught.value.code == 1
    assert "\n" not in str(caught.value)
    assert Checkpoint(tmp_path / "last.ckpt").load()["step"] == 5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, code):
    before = signal.getsignal(signal.SIGTERM)
    whole, _ = run_tiny(tmp_path / "whole")
    # the action runs after step 7: the signal comes to a loop that is not waiting for data
    told = r"after step 7 of 12, saved in .*last\.ckpt; run the same command again"
    with pytest.raises(Interrupted, match=told) as caught:
        run_tiny(tmp_path / "stopped", actions=[(7, lambda step: os.kill(os.getpid(), number))])
    assert caught.value.code == code
    assert signal.getsignal(signal.SIGTERM) is before
    continued, _ = run_tiny(tmp_path / "stopped")
    assert same(weights(whole), weights(continued))


def test_a_worker_that_ignores_ctrl_c_goes_on_ignoring_it(monkeypatch):
    # Ctrl-C reaches parent and workers at once, and the parent then ends its workers by SIGTERM: one request, not two
    monkeypatch.setattr(interrupt.multiprocessing, "parent_process", lambda: "somebody")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.interruption().code == 143
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_sigterm_sent_twice_is_one_request(monkeypatch):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.interruption().code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(interrupt, "ONE_REQUEST_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_the_loader_waits(tmp_path):
    def hang():
        threading.Timer(0.2, raise_signal(signal.SIGTERM)).start()
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(Interrupted, match="after step 4 of 12"):
        run_tiny(tmp_path, change=stop_at(4, hang))
    assert time.monotonic() - began < 20
    assert Checkpoint(tmp_path / "last.ckpt").load()["step"] == 4


def test_a_worker_that_dies_of_the_same_signal_is_no_error_of_its_own(tmp_path):
    def hang():
        threading.Timer(0.1, raise_signal(signal.SIGTERM)).start()
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Terminated")

    with pytest.raises(Interrupted):
        run_tiny(tmp_path, change=stop_at(4, hang))


def test_an_interruption_survives_the_way_between_processes():
    import pickle

    copy = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM, "stopped")))
    assert (copy.code, str(copy)) == (143, "stopped")


def test_an_interrupted_action_is_run_again(tmp_path):
    seen = []

    def stopped(step):
        seen.append(step)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_tiny(tmp_path, actions=[(4, stopped)], ema=0.9)
    objective, _ = run_tiny(tmp_path, actions=[(4, stopped)], ema=0.9)
    assert seen == [4, 8, 8, 12]
    whole, _ = run_tiny(tmp_path / "whole", ema=0.9)
    assert same(weights(whole), weights(objective))


def test_actions_see_averaged_weights_in_eval_mode(tmp_path):
    seen, held, looked = [], [], []

    def look(step):
        (objective,) = held
        seen.append((step, torch.is_grad_enabled(), objective.training))
        looked.append(objective.head.weight.detach().clone())

    objective, _ = run_tiny(tmp_path, actions=[(5, look), (100, look)], ema=0.9, built=held.append)
    assert seen == [(step, False, False) for step in (5, 10, 12, 12)]
    live = Checkpoint(tmp_path / "last.ckpt").load()["objective"]["head.weight"]
    assert torch.equal(looked[-1], objective.head.weight), "the average, which ships"
    assert not torch.equal(looked[-1], live)


def test_nothing_looks_at_broken_weights(tmp_path):
    """On a GPU the check of a step comes a step later; before an evaluation it comes at once."""
    looked = []

    def broken(number, batch):
        if number == 4:
            batch.views["crop"][0].image_BCDHW.fill_(torch.nan)
        return batch

    def later(self, device):
        guard_init(self, device)
        self._later = True

    guard_init = FiniteGuard.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FiniteGuard, "__init__", later)
        patch.setattr(
            torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        )
        with pytest.raises(UserError, match=r"the loss is nan at step 5; scans in this batch: scan32"):
            run_tiny(tmp_path, actions=[(5, looked.append)], change=broken)
    assert not looked


def test_batches_that_end_early_are_told(tmp_path):
    from medseg_ssl.train.loop import TrainPlan

    short = tiny_batches(TrainPlan(steps=3))
    with pytest.raises(RuntimeError, match="ended at step 3"):
        run_tiny(tmp_path, batches=short)


def test_no_state_leaks_into_the_objectives_names(tmp_path):
    run_tiny(tmp_path, steps=1)
    state = Checkpoint(tmp_path / "last.ckpt").load()
    assert state["objective"].keys() == TinyObjective().state_dict().keys()


def test_affines_stay_float64_and_batches_are_not_copied(tmp_path):
    seen = []

    class Looks(TinyObjective):
        pass

    original = TinyObjective.forward

    def forward(self, batch, progress):
        seen.append(batch.views["crop"][0].affine_B44.dtype)
        return original(self, batch, progress)

    TinyObjective.forward = forward
    try:
        run_tiny(tmp_path, steps=1, train={"precision": "bf16"})
    finally:
        TinyObjective.forward = original
    assert seen == [torch.float64]


TWO = """
import os
import sys
from pathlib import Path
from tests.train.conftest import run_tiny
import torch
objective, _ = run_tiny(Path(sys.argv[1]), steps=6, log_every=1, ema=0.9, dropout=0.0)
if os.environ.get("RANK", "0") == "0":
    torch.save(objective.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    one = [sys.executable, str(script), str(tmp_path / "one"), str(tmp_path / "one.pt")]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    two += [str(tmp_path / "two"), str(tmp_path / "two.pt")]
    for command in (one, two):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name].double(), b[name].double(), atol=1e-6), name
    for first, second in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert first["train/loss"] == pytest.approx(second["train/loss"], rel=1e-4)
        assert first["train/grad_norm"] == pytest.approx(second["train/grad_norm"], rel=1e-4)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.train.conftest import run_tiny
def change(number, batch):
    if number == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return batch
run_tiny(Path(sys.argv[1]), change=change, ema=0.9)
"""


@pytest.mark.slow
def test_a_killed_process_continues_exactly(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "run", "9"], cwd=ROOT, env=environment, timeout=240
    )
    assert done.returncode == -signal.SIGKILL
    whole, _ = run_tiny(tmp_path / "whole", ema=0.9)
    continued, _ = run_tiny(tmp_path / "run", ema=0.9)
    assert same(weights(whole), weights(continued))


def test_recomputing_keeps_less_for_the_backward_pass():
    from torch.autograd.graph import saved_tensors_hooks

    from medseg_ssl.nets.encoders.resenc import ResEnc
    from medseg_ssl.objectives.mae import MAE
    from medseg_ssl.types import Facts

    kept = {}
    for flag in (False, True):
        machine = runtimes.start(parse(TrainConfig, {"steps": 1, "accelerator": "cpu", "recompute": flag}))
        objective = MAE(MAE.Config(size=(16, 16, 16)), ResEnc(ResEnc.Config()), Facts())
        machine.setup(objective, torch.optim.SGD(objective.parameters()))
        sizes = []
        with saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            objective.encoder(torch.randn(2, 1, 16, 16, 16))
        kept[flag] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_shared_statistics_leave_norms_alone_that_do_more():
    class WithActivation(torch.nn.BatchNorm3d):
        def forward(self, input):
            return super().forward(input).relu()

    network = torch.nn.Sequential(torch.nn.BatchNorm3d(2), WithActivation(2))
    runtimes.share_statistics(network)
    assert type(network[0]) is torch.nn.SyncBatchNorm
    assert type(network[1]) is WithActivation
