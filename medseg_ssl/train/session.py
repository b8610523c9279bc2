"""What the two training commands share: configs, crop sizes that fit, and a session of ``fit`` in a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from medseg_ssl.config import Block, ConfigError, Record, find, override, parse, read_yaml, resolved, shelf
from medseg_ssl.train.settings import OptimConfig, TrainConfig, WandbConfig
from medseg_ssl.types import Batch, Triple, TripleMm, ViewPlan, ViewSpec

if TYPE_CHECKING:
    from medseg_ssl.objectives.base import Objective
    from medseg_ssl.train.best import Best
    from medseg_ssl.train.loop import Action, FitResult
    from medseg_ssl.train.runtime import Runtime

C = TypeVar("C", bound=Record)
Shelves = Mapping[str, tuple[str, Callable[[], type]]]
"""Key of a block to its shelf and a function that imports the contract (late, since it imports torch)."""
LookedAt = Literal["encoder", "segmenter"]
"""What an evaluation looks at, ``Evaluation.of``."""
EVALUATIONS = "medseg_ssl.evaluations"


def read_config(
    model: type[C],
    path: Path,
    assignments: Sequence[str],
    *,
    shelves: Shelves,
    evaluates: LookedAt | None = None,
) -> C:
    """Read a YAML, apply the overrides and check everything, blocks included, before anything is built.

    Args:
        model: of the config.
        path: of the YAML.
        assignments: overrides.
        shelves: of its blocks.
        evaluates: what its evaluations must look at; None takes all.

    Raises:
        ConfigError: names every wrong key at once.
    """
    tree = override(read_yaml(path), assignments)

    def block(key: str) -> Callable[[], Any]:
        def check() -> None:
            given = tree.get(key)
            # a block that is no mapping with a name is the record's own error
            if isinstance(given, dict) and isinstance(given.get("name"), str):
                resolve_block(Block(**given), key, shelves)

        return check

    def evaluations() -> None:
        given = tree.get("evaluations")
        if isinstance(given, dict) and all(isinstance(options, dict) for options in given.values()):
            build_evaluations(given, of=evaluates)

    checks = [block(key) for key in shelves]
    results = resolved(lambda: parse(model, tree, where=f"config {path.name}"), *checks, evaluations)
    return with_defaults(results[0], shelves)


def with_defaults(config: C, shelves: Shelves) -> C:
    """The config with every default of its blocks written out, so that it means the same after a default changes.

    Raises:
        ConfigError: a block names nothing on its shelf, or has a wrong key.
    """
    update = {}
    for key in shelves:
        given = getattr(config, key)
        if given is not None:
            _, options = resolve_block(given, key, shelves)
            update[key] = Block(name=given.name, **options.model_dump(mode="json"))
    return config.model_copy(update=update)


def with_spacing(config: C, shelves: Shelves, archive_spacing_mm: TripleMm | None) -> C:
    """The config with the voxel size of its crops written into the encoder, where that one thinks in millimetres.

    Args:
        config: with an ``encoder`` and an ``objective`` block.
        shelves: of both.
        archive_spacing_mm: voxel size (D, H, W) of the archive (``Archive.reference_spacing_mm``), None for unknown.
    """
    _, encoder = resolve_block(config.encoder, "encoder", shelves)  # pyright: ignore[reportAttributeAccessIssue]
    cls, options = resolve_block(config.objective, "objective", shelves)  # pyright: ignore[reportAttributeAccessIssue]
    first: ViewSpec = next(iter(cls.views(options).values()))  # pyright: ignore[reportAttributeAccessIssue]
    filled = encoder.at_spacing(first.spacing_mm or archive_spacing_mm)
    block = Block(name=config.encoder.name, **filled.model_dump(mode="json"))  # pyright: ignore[reportAttributeAccessIssue]
    return config.model_copy(update={"encoder": block})


def resolve_block(block: Block, key: str, shelves: Shelves) -> tuple[type, Any]:
    """The class a block names and its validated options.

    Raises:
        ConfigError: no such name, or wrong keys in the block.
    """
    shelf, contract = shelves[key]
    return block.resolve(shelf, contract(), prefix=key)


def build_evaluations(
    evaluations: Mapping[str, Mapping[str, Any]],
    *,
    of: LookedAt | None = None,
    prefix: str = "evaluations",
) -> dict[str, Any]:
    """The evaluations a config names, on development subjects and with few crops unless it says otherwise.

    Args:
        evaluations: name on the shelf to options.
        of: what the run has to look at; None takes evaluations of everything.
        prefix: where they stand in the config, for messages.

    Raises:
        ConfigError: unknown names or options, or evaluations of something else, all at once.
    """

    def one(name: str) -> Any:
        # the contract is the shelf's own, found by name: training and evaluations do not see each other
        contract = import_module(f"{EVALUATIONS}.base").Evaluation
        block = Block.model_validate({**evaluations[name], "name": name})
        cls, options = block.resolve(EVALUATIONS, contract, prefix=f"{prefix}.{name}")
        if of is not None and cls.of != of:
            a = {"encoder": "an encoder", "segmenter": "a segmenter"}
            fitting = [other for other in shelf(EVALUATIONS) if find(EVALUATIONS, other, contract).of == of]
            raise ConfigError(
                f"{prefix}.{name} looks at {a[cls.of]}, this run has {a[of]}; known: {', '.join(fitting)}"
            )
        given = evaluations[name]
        changes = {key: value for key, value in cls.sparing.items() if key not in given}
        if "subset" in type(options).model_fields and "subset" not in given:
            changes["subset"] = "development"
        return cls(options.model_copy(update=changes))

    built = resolved(*(lambda name=name: one(name) for name in evaluations))
    return dict(zip(evaluations, built, strict=True))


def scoring(
    evaluations: Mapping[str, Mapping[str, Any]],
    model: Callable[[Objective], Any],
    archive: Any,
    *,
    pictures: Callable[[str, bytes, int], Any] | None = None,
) -> Callable[[Objective, int], dict[str, float]] | None:
    """What ``Session.evaluate`` takes: scores as ``eval/<evaluation>/<score>``; None without evaluations.

    Args:
        evaluations: name on the shelf to options.
        model: objective to what the evaluations look at.
        archive: an opened archive.
        pictures: takes (name, PNG, step) of evaluations that draw.
    """
    if not evaluations:
        return None
    built = build_evaluations(evaluations)

    def measure(objective: Objective, step: int) -> dict[str, float]:
        looked_at = model(objective)
        found = {}
        for name, one in built.items():
            for score in one.run(looked_at, archive):
                found[f"eval/{name}/{score.name}"] = score.value
                if pictures is not None:
                    for picture, png in (score.pictures or {}).items():
                        pictures(f"{name}-{picture}", png, step)
        return found

    return measure


def look_first(
    look: Callable[[Objective, int], Mapping[str, float]], objective: Objective, best: Best | None
) -> None:
    """Evaluate once at step 0, so that what an evaluation lacks is said before hours of training.

    Raises:
        ConfigError: see ``Best.check``; the evaluation does not go with networks or archive.
        UserError: there is nothing to score.
    """
    scores = look(objective, 0)
    if best is not None:
        best.check(scores)


def check_crop_sizes(views: ViewPlan, strides: Sequence[Triple], *, key: str = "objective") -> None:
    """Every crop must be a whole number of the encoder's deepest voxels, and more than one of them.

    One voxel along an axis is a slice and fits every encoder.

    Raises:
        ConfigError: names each view that does not fit and the nearest sizes that do.
    """
    deepest = strides[-1]
    wrong = []
    for name, view in views.items():
        pairs = list(zip(view.size, deepest, strict=True))
        if any(size > 1 and size % stride for size, stride in pairs):
            lower = tuple(1 if s == 1 else max(t, s // t * t) for s, t in pairs)
            upper = tuple(1 if s == 1 else -(-s // t) * t for s, t in pairs)
            choices = f"{list(lower)} or {list(upper)}" if lower != upper else f"{list(upper)}"
        elif all(size <= stride for size, stride in pairs):
            choices = (
                f"{[s if s == 1 else 2 * s for s in view.size]}"  # one voxel has no variance to normalise by
            )
        else:
            continue
        wrong.append(
            f"the crop size {list(view.size)} of view '{name}' does not fit the encoder, whose deepest level has stride"
            f" {list(deepest)}; nearest sizes that do: {choices}"
        )
    if wrong:
        raise ConfigError(f"{key}: " + "; ".join(wrong))


def check_bf16_depth(views: ViewPlan, strides: Sequence[Triple]) -> None:
    """No map may be two voxels deep where a CPU trains in bfloat16.

    The backward pass of torch 2.15's 3³ convolution (oneDNN) then reads memory that nobody wrote, and the gradient of
    its weight is wrong or NaN; other depths and float32 are right.

    Raises:
        ConfigError: names the view and what to do.
    """
    for name, view in views.items():
        for stride in strides:
            if -(-view.size[0] // stride[0]) == 2:
                raise ConfigError(
                    "train.precision 'bf16' on a CPU gives wrong gradients for maps 2 voxels deep, as view"
                    f" '{name}' has at stride {list(stride)}; use 'fp32', or a first number other than"
                    f" {view.size[0]} in its size"
                )


@dataclass(frozen=True)
class Session:
    """One run of ``fit`` in a run folder.

    Attributes:
        run: the run folder, already locked.
        config: the resolved config as a tree, for the mirror.
        seed: of the run.
        train: lengths and precision.
        optim: optimizer.
        wandb: the mirror.
        steps: optimizer steps, and per epoch.
        description: shown beside the progress bar.
        quiet: show nothing.
        preview_batch: makes the batch that pictures are taken of.
        evaluate: function of (objective, step) to scores by name, each ``train.evaluate_every`` and at the end.
        prepare_batch: finishes a batch on the device.
        tags: words to find the run by in the mirror.
        group: of runs in the mirror, None without one.
        fresh: beginnings of the names of parameters that a loaded file has not trained.
        undecayed: names of parameters that weight decay would harm.
        training: puts the objective into training mode; all of it, unless parts are frozen.
        best: keeps the weights of the best evaluation, and says when to stop; None runs all steps.
        looked_s: seconds that a look at step 0 took, which counts for the share of time spent on evaluations.
    """

    run: Path
    config: Mapping[str, Any]
    seed: int
    train: TrainConfig
    optim: OptimConfig
    wandb: WandbConfig
    steps: int
    steps_per_epoch: int
    description: str
    quiet: bool = False
    preview_batch: Callable[[], Batch] | None = None
    evaluate: Callable[[Objective, int], Mapping[str, float]] | None = None
    prepare_batch: Callable[[Batch], Batch] | None = None
    tags: tuple[str, ...] = field(default=())
    group: str | None = None
    fresh: tuple[str, ...] = ()
    undecayed: tuple[str, ...] = ()
    training: Callable[[Objective], object] = methodcaller("train")
    best: Best | None = None
    looked_s: float = 0.0

    def fit(
        self, objective: Objective, *, batches: Callable[[int], Iterator[Batch]], runtime: Runtime
    ) -> FitResult:
        """Train the objective; see ``loop.fit`` for what it raises."""
        from medseg_ssl.train.checkpoint import Checkpoint
        from medseg_ssl.train.loop import TrainPlan, fit
        from medseg_ssl.train.optim import build_optimizer
        from medseg_ssl.train.progress import Progress
        from medseg_ssl.train.recorder import Recorder

        plan = TrainPlan(
            steps=self.steps,
            accumulate=self.train.accumulate,
            ema=self.train.ema,
            log_every=self._every(self.train.log_every),
            save_every=self._every(self.train.save_every),
            seed=self.seed,
        )
        optimizer = build_optimizer(
            objective,
            self.optim,
            total_steps=self.steps,
            steps_per_epoch=self.steps_per_epoch,
            fresh=self.fresh,
            undecayed=self.undecayed,
        )
        with (
            Progress(self.description, quiet=self.quiet or not runtime.is_main) as progress,
            Recorder(
                self.run,
                writes=runtime.is_main,
                wandb=self.wandb,
                config=self.config,
                progress=progress,
                total_steps=self.steps,
                tags=self.tags,
                group=self.group,
            ) as recorder,
        ):
            return fit(
                objective,
                batches=batches,
                plan=plan,
                optimizer=optimizer,
                runtime=runtime,
                recorder=recorder,
                checkpoint=Checkpoint(self.run / "last.ckpt", writes=runtime.is_main),
                actions=self._actions(objective, runtime, recorder),
                prepare_batch=self.prepare_batch,
                training=self.training,
                best=self.best,
            )

    def _every(self, length: Any) -> int:
        return max(1, length.steps(steps_per_epoch=self.steps_per_epoch, total_steps=self.steps))

    def _actions(self, objective: Objective, runtime: Runtime, recorder: Any) -> list[Action]:
        from medseg_ssl.train.health import alarms

        actions: list[Action] = []
        if self.preview_batch is not None and self.train.preview_every is not None:
            make = self.preview_batch

            def preview(step: int) -> None:
                if not runtime.is_main:
                    return
                batch = make().to(runtime.device)
                batch = self.prepare_batch(batch) if self.prepare_batch is not None else batch
                for name, volume in objective.preview(batch).items():
                    recorder.image(name, volume, step=step)

            actions.append((self._every(self.train.preview_every), preview))
        if self.evaluate is not None:
            measure = self.evaluate
            began, spent = time.perf_counter() - self.looked_s, self.looked_s

            def evaluate(step: int) -> None:
                nonlocal spent
                if runtime.is_main:
                    asked = time.perf_counter()
                    scores = dict(measure(objective, step))
                    now = time.perf_counter()
                    spent += now - asked
                    if self.best is not None:
                        self.best.see(step, scores, objective)
                        scores |= {} if self.best.step is None else {"eval/best_step": float(self.best.step)}
                    recorder.log(step, {**scores, "system/evaluate_share": spent / (now - began)})
                    for alarm in alarms(scores):
                        recorder.warn(alarm)
                runtime.barrier()

            every = (
                self.steps if self.train.evaluate_every is None else self._every(self.train.evaluate_every)
            )
            actions.append((every, evaluate))
        return actions
