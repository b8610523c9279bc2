"""What frozen-feature evaluations cost while an encoder is pretrained, at their default interval and options.

    python benchmarks/probes.py ARCHIVE [--config mae_probed] [--seconds 20] [key=value …]

Measures a training step on batches of the archive, then each evaluation that needs no more than this archive offers
(the quicker of two runs), as pretraining runs it: few crops, development subjects. Its share is its time over that of
the steps between two of them (10 % of the run, 1000 samples at least). Aim: those that the config names (*) together
below 5 %.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medseg_ssl.commandline import find_config
from medseg_ssl.config import UserError, shelf
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.augment import prepare_batch
from medseg_ssl.train import runtime as runtimes
from medseg_ssl.train.loop import TrainPlan
from medseg_ssl.train.optim import build_optimizer
from medseg_ssl.train.session import build_evaluations, read_config, with_defaults, with_spacing
from medseg_ssl.train.trial import measure

# a script sees its own folder, not the checkout's commands
sys.path.insert(0, str(Path(__file__).parents[1]))
from pretrain.probing import frozen, with_interval
from pretrain.run import SHELVES, PretrainConfig, build, loader, make_card, steps_per_epoch


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--config", default="mae_probed")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training steps")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()

    archive = Archive.open(args.archive)
    config = read_config(
        PretrainConfig, find_config(args.config, kind="pretrain"), args.overrides, shelves=SHELVES
    )
    config = with_spacing(
        with_defaults(config, SHELVES), SHELVES, archive.reference_spacing_mm(config.data.split)
    )
    machine = runtimes.start(config.train)
    objective, options = build(config, archive.facts())
    views = type(objective).views(options)
    per_epoch = steps_per_epoch(config, archive)
    steps = config.train.steps.steps(steps_per_epoch=per_epoch)
    load = loader(config, archive, views, relations=type(objective).relations(options))
    found = measure(
        objective,
        batches=lambda first: itertools.chain.from_iterable(
            iter(load(steps=1000)) for _ in itertools.count()
        ),
        plan=TrainPlan(steps=steps, accumulate=config.train.accumulate, ema=config.train.ema),
        optimizer=build_optimizer(objective, config.optim, total_steps=steps, steps_per_epoch=per_epoch),
        runtime=machine,
        seconds=args.seconds,
        prepare_batch=partial(prepare_batch, plan=views),
    )
    every = with_interval(config, steps).evaluate_every
    assert every is not None
    between = max(1, every.steps(steps_per_epoch=per_epoch, total_steps=steps))

    def card():
        return make_card(config, archive, views, steps=steps, channels=objective.encoder.channels_in)

    model = frozen(objective, card=card, device=machine.device, precision=config.train.precision)
    names = sorted({*config.evaluations, *shelf("medseg_ssl.evaluations")})
    table = Table(
        title=f"{config.objective.name}: {found.step_s:.3f} s a step, {between} steps between evaluations"
    )
    for column in ("evaluation", "seconds", "share of training"):
        table.add_column(column, justify="left" if column == "evaluation" else "right")
    chosen = whole = 0.0
    for name in names:
        (evaluation,) = build_evaluations({name: config.evaluations.get(name, {})}).values()
        if evaluation.of != "encoder":
            continue
        try:
            took = min(_time(evaluation, model, archive) for _ in range(2))
        except UserError as error:
            table.add_row(name, "–", str(error).split(";")[0][:60])
            continue
        share = took / (between * found.step_s)
        whole += share
        chosen += share if name in config.evaluations else 0.0
        mark = " *" if name in config.evaluations else ""
        table.add_row(name + mark, f"{took:.2f}", f"{share:.2%}")
    table.add_row("* together", "", f"{chosen:.2%}")
    table.add_row("all together", "", f"{whole:.2%}")
    Console().print(table)


def _time(evaluation, model, archive) -> float:
    began = time.perf_counter()
    list(evaluation.run(model, archive))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
