"""A comparison's config from its file: shipped configs put in place, nested ones checked, defaults filled in."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from medseg_ssl.baselines.base import Baseline
from medseg_ssl.cli import locate
from medseg_ssl.commandline import find_config
from medseg_ssl.config import Block, ConfigError, overlay, parse, read_yaml, resolved
from medseg_ssl.train.run_folder import differences
from medseg_ssl.train.session import build_evaluations, with_defaults

from .comparison import CompareConfig
from .inits import Network, blocks
from .scratch import freed

if TYPE_CHECKING:
    from .settings import FinetuneConfig


def expand(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Put the shipped configs that ``finetune`` and ``pretrain`` blocks name in their place.

    Raises:
        ConfigError: no shipped config of a name.
    """
    out = dict(tree)
    if isinstance(out.get("finetune"), (str, Mapping)):
        out["finetune"] = _based(out["finetune"], kind="finetune")
    if isinstance(out.get("inits"), Mapping):
        out["inits"] = {
            name: {**init, "pretrain": _based(init["pretrain"], kind="pretrain")}
            if isinstance(init, Mapping) and isinstance(init.get("pretrain"), (str, Mapping))
            else init
            for name, init in out["inits"].items()
        }
    return out


def _based(block: str | Mapping[str, Any], *, kind: str) -> dict[str, Any]:
    block = {"base": block} if isinstance(block, str) else dict(block)
    base = block.pop("base", None)
    return block if base is None else overlay(read_yaml(find_config(str(base), kind=kind)), block)


def resolve(config: CompareConfig) -> CompareConfig:
    """The config with every nested config checked and its defaults filled in.

    Raises:
        ConfigError: all wrong keys of all nested configs; fine-tuning steps that are no number of steps; an
            encoder that differs between pretraining and fine-tuning; pretraining on the subjects that are
            scored; flips of what was never mirrored.
    """
    pretrains, networks = blocks(config.inits, "pretrain"), blocks(config.inits, "network")
    baselines = blocks(config.inits, "baseline")
    checks: dict[tuple[str, str], Callable[[], Any]] = {
        ("finetune", ""): lambda: finetune_config(config.finetune)
    }
    for name, tree in config.init_overrides.items():
        checks["override", name] = partial(_override_config, config, name, tree)
    for name, tree in pretrains.items():
        checks["pretrain", name] = partial(pretrain_config, tree, prefix=f"inits.{name}.pretrain")
    for name, tree in networks.items():
        checks["network", name] = partial(
            _network_config, config.finetune, tree, prefix=f"inits.{name}.network"
        )
    for name, tree in baselines.items():
        checks["baseline", name] = partial(_baseline_block, tree, prefix=f"inits.{name}.baseline")
    found = dict(zip(checks, resolved(*checks.values()), strict=True))
    finetune = found["finetune", ""]
    steps_of(finetune)
    if finetune.keep_best is not None:
        raise ConfigError(
            "finetune.keep_best has no place in a comparison, where every fit takes the same steps"
        )
    if finetune.replay is not None:
        raise ConfigError(
            "finetune.replay has no place in a comparison, where no fit goes on from a segmenter"
        )
    if finetune.data.modalities:
        raise ConfigError("finetune.data.modalities has no place in a comparison; set its modalities")
    for (kind, name), tree in found.items():
        if kind in ("finetune", "override"):
            _check_ours(config, tree, where="finetune" if kind == "finetune" else f"init_overrides.{name}")
    inits = dict(config.inits)
    for name in pretrains:
        pretraining = found["pretrain", name]
        _check_pretraining(config, name, pretraining, finetune)
        inits[name] = {"pretrain": pretraining.model_dump(mode="json")}
    for name in networks:
        tree = found["network", name].model_dump(mode="json")
        own = {key: tree[key] for key in ("encoder", "decoder", "objective")}
        batch = {"batch_size": given} if (given := networks[name].get("batch_size")) is not None else {}
        inits[name] = {"network": own | batch}
    for name in baselines:
        inits[name] = {"baseline": found["baseline", name]}
    if config.metrics.flips:
        for (kind, name), tree in found.items():
            if kind in ("finetune", "override", "network") and not tree.objective.options().get(
                "mirror_axes"
            ):
                where = {"finetune": "finetune", "override": f"init_overrides.{name}"}.get(
                    kind, f"inits.{name}.network"
                )
                raise ConfigError(
                    "metrics.flips averages over the mirrorings of training, and "
                    f"{where}.objective.mirror_axes names none"
                )
    return config.model_copy(update={"finetune": finetune.model_dump(mode="json"), "inits": inits})


def check_precision(config: CompareConfig) -> None:
    """See that every init is scored in one precision, where a GPU would take that of training.

    Raises:
        ConfigError: several precisions of training, and none for scoring.
    """
    trees = [overlay(config.finetune, tree) for tree in ({}, *config.init_overrides.values())]
    trained = {tree.get("train", {}).get("precision", "fp32") for tree in trees}
    if len(trained) > 1 and config.metrics.precision is None:
        raise ConfigError(
            f"init_overrides train in {' and '.join(sorted(trained))}, and on a GPU each would be scored in its own;"
            " set metrics.precision, which is every init's (fp32, bf16)"
        )


def _check_ours(config: CompareConfig, tree: FinetuneConfig, *, where: str) -> None:
    """Refuse what the comparison decides, and a fit would not heed.

    Raises:
        ConfigError: names the key and what decides it.
    """
    if tree.data.split not in ("default", config.split):
        raise ConfigError(
            f"{where}.data.split is {tree.data.split!r}, but the comparison's split decides: {config.split!r}"
        )
    if tree.seed != 0:
        raise ConfigError(f"{where}.seed is {tree.seed}, but every fit's seed follows from the comparison's")
    if tree.evaluations:
        raise ConfigError(
            f"{where}.evaluations names {', '.join(tree.evaluations)}, but a comparison looks at test cases alone,"
            " at the end of a fit"
        )


def _check_pretraining(config: CompareConfig, name: str, pretraining: Any, finetune: FinetuneConfig) -> None:
    if config.subset in pretraining.data.splits:
        raise ConfigError(
            f"inits.{name}.pretrain.data.splits holds {config.subset!r}, which is scored; leave it out"
        )
    check_choice(f"inits.{name}.pretrain", pretraining, config.subset)
    if pretraining.data.split != config.split:
        raise ConfigError(
            f"inits.{name}.pretrain.data.split is {pretraining.data.split!r}, split is {config.split!r}"
        )
    if pretraining.data.protect:
        raise ConfigError(
            f"inits.{name}.pretrain.data.protect has no place in a comparison, which protects what it scores"
        )
    if finetune.encoder is not None and finetune.encoder != pretraining.encoder:
        different = differences(finetune.encoder.model_dump(), pretraining.encoder.model_dump())
        raise ConfigError(
            f"finetune.encoder and inits.{name}.pretrain.encoder differ, so the weights would not fit:"
            f" {'; '.join(different)}"
        )


def check_choice(where: str, pretraining: Any, subset: str) -> None:
    """Evaluations of a pretraining must be possible, and ``keep_best`` must not choose by who is scored."""
    probing = importlib.import_module(locate("pretrain.probing"))
    try:
        _, judged_on = probing.with_judge(pretraining)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if judged_on == subset:
        raise ConfigError(
            f"{where}.keep_best chooses by {subset} subjects, who are scored; let its evaluation take another subset"
        )


def _override_config(config: CompareConfig, name: str, tree: Mapping[str, Any]) -> FinetuneConfig:
    below = config.finetune if name in config.pretrained() else freed(config.finetune)
    return finetune_config(below, tree, prefix=f"init_overrides.{name}")


def _network_config(finetune: Mapping[str, Any], tree: Mapping[str, Any], *, prefix: str) -> FinetuneConfig:
    return finetune_config(parse(Network, tree, prefix=prefix).over(finetune), prefix=prefix)


def _baseline_block(tree: str | Mapping[str, Any], *, prefix: str) -> dict[str, Any]:
    block = parse(Block, {"name": tree} if isinstance(tree, str) else tree, prefix=prefix)
    _, options = block.resolve("medseg_ssl.baselines", Baseline, prefix=prefix)
    return {"name": block.name, **options.model_dump(mode="json")}


def finetune_config(
    tree: Mapping[str, Any], above: Mapping[str, Any] | None = None, *, prefix: str = "finetune"
) -> FinetuneConfig:
    """The checked ``FinetuneConfig`` of a tree with an init's overrides laid over it.

    Raises:
        ConfigError: wrong keys.
    """
    from . import run

    config = with_defaults(parse(run.FinetuneConfig, overlay(tree, above or {}), prefix=prefix), run.SHELVES)
    build_evaluations(config.evaluations, of="segmenter", prefix=f"{prefix}.evaluations")
    # the decoder has its place at the top level; as a default inside the objective it could not be read back
    objective = {k: v for k, v in config.objective.model_dump(mode="json").items() if k != "decoder"}
    return config.model_copy(update={"objective": Block.model_validate(objective)})


def pretrain_config(tree: Mapping[str, Any], *, prefix: str) -> Any:
    """The checked ``PretrainConfig`` of a tree.

    Raises:
        ConfigError: wrong keys.
    """
    command = importlib.import_module(locate("pretrain.run"))
    return with_defaults(parse(command.PretrainConfig, tree, prefix=prefix), command.SHELVES)


def steps_of(finetune: FinetuneConfig) -> int:
    """Optimizer steps of every fit.

    Raises:
        ConfigError: the length is given in epochs, which differ between budgets.
    """
    length = finetune.train.steps
    if length.unit != "steps":
        raise ConfigError(
            f"finetune.train.steps must be a number of steps, equal for every budget, got '{length}'"
        )
    return length.steps()
