"""What every objective on the shelf must do; new files are picked up by listing.

Exact resume is in ``tests/train/test_resume.py``, two processes in ``tests/train/test_two_processes.py``.
"""

import copy
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medseg_ssl import draws
from medseg_ssl.config import Block, ConfigError, find, parse
from medseg_ssl.data.augment import prepare_batch
from medseg_ssl.data.loader import Loader
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.objectives.base import Objective
from medseg_ssl.train import runtime
from medseg_ssl.train.settings import TrainConfig
from pretrain.run import PretrainConfig, build, templates
from tests.objectives.waiting import NoWaiting
from tests.shelves import OBJECTIVES, build_encoder, encoder_for, options_for
from tests.train.archives import TRAIN, quick_templates, write_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("objectives") / "archive")


@pytest.fixture(scope="module")
def as_made(archive, tmp_path_factory):
    """Name of an objective to it with its smallest encoder and a batch, made once."""

    @functools.cache
    def once(name):
        with pytest.MonkeyPatch.context() as patch:
            quick_templates(patch)
            return made(
                name, archive, tmp_path_factory.mktemp(name), encoder=encoder_for(name), **options_for(name)
            )

    return once


@pytest.fixture(params=OBJECTIVES)
def trained(request, as_made):
    """An objective with its smallest encoder, and a batch as the loader makes it: copies of a test's own."""
    return copy.deepcopy(as_made(request.param))


def made(name, archive, tmp_path, *, encoder, channels=None, **more):
    """An objective with this encoder, these options and channels, and a batch as the loader makes it."""
    cls = find("medseg_ssl.objectives", name, Objective)
    given = {"name": name, "size": (16, 16, 16), **more}
    facts = archive.facts() if channels is None else replace(archive.facts(), channels=channels)
    if cls.needs_previous or channels:  # no pretraining has a segmenter that it could go on from
        options = parse(cls.Config, {key: value for key, value in given.items() if key != "name"})
        torch.manual_seed(0)
        objective = cls(options, build_encoder(**encoder, channels_in=facts.channels), facts)  # pyright: ignore[reportAbstractUsage]
        if cls.needs_previous:
            objective.begin((0, 1))
    else:
        config = PretrainConfig(
            encoder=Block.model_validate(encoder),
            objective=Block.model_validate(given),
            data={"batch_size": 4},  # pyright: ignore[reportArgumentType]
            train={"steps": 1},  # pyright: ignore[reportArgumentType]
        )
        objective, options = build(config, archive.facts())
    if objective.takes_templates:
        machine = runtime.start(parse(TrainConfig, {"steps": 1, "accelerator": "cpu"}))
        objective.use_templates(
            templates(archive, TRAIN, Path(tmp_path), machine=machine, quiet=True), seed=0
        )
    views = type(objective).views(options)
    loader = Loader(
        archive,
        views,
        batch_size=4,
        steps=1,
        seed=0,
        subjects=sorted(TRAIN),
        relations=type(objective).relations(options),
    )
    return objective, prepare_batch(next(iter(loader)), plan=views)


def test_a_step_is_a_function_of_weights_batch_and_progress(trained):
    objective, batch = trained
    objective.eval()
    untouched = copy.deepcopy(batch)
    first, second = objective(batch, 0.5), objective(batch, 0.5)
    assert first.loss.dtype == torch.float32
    assert first.loss.ndim == 0
    assert torch.equal(first.loss, second.loss)
    for name, views in batch.views.items():
        for view, before in zip(views, untouched.views[name], strict=True):
            assert torch.equal(view.image_BCDHW, before.image_BCDHW), "a batch belongs to the loader"
            assert torch.equal(view.foreground_BDHW, before.foreground_BDHW)
    for value in first.logs.values():
        assert value.ndim == 0
        assert not value.requires_grad
    if first.features_BE is not None:
        assert first.features_BE.ndim == 2
        assert not first.features_BE.requires_grad


def test_gradients_are_finite_and_reach_the_encoder(trained):
    objective, batch = trained
    objective(batch, 0.5).loss.backward()
    gradients = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in gradients.values())
    stem = gradients[f"encoder.{objective.encoder.stems[0]}"]
    assert stem.abs().max() > 0


def test_loss_falls_on_one_batch(trained):
    objective, batch = trained
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(9):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = objective(batch, 0.5).loss
        loss.backward()
        optimizer.step()
        objective.after_step(0.5)
        losses.append(loss.item())
        if step > 4 and max(losses[-3:]) < 0.9 * min(losses[:2]):
            return  # fallen by more than is asked for, three steps long: the rest would only take time
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])


def test_a_batch_without_body_or_data_gives_no_nan(trained):
    objective, batch = trained
    for views in batch.views.values():
        for view in views:
            view.valid_BDHW.zero_()
            view.foreground_BDHW.zero_()
            view.image_BCDHW.zero_()
            if view.clean_BCDHW is not None:
                view.clean_BCDHW.zero_()
    output = objective(batch, 0.5)
    assert output.loss.isfinite()
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


ODD = [
    pytest.param(n, (9, 21, 15), 4, marks=[] if n in ("mae", "segmentation") else [pytest.mark.slow])
    for n in OBJECTIVES
]


@pytest.mark.parametrize(
    ("name", "size", "channels"), [*((n, (8, 24, 16), 2) for n in OBJECTIVES), *ODD], ids=str
)
def test_flat_crops_of_long_voxels_and_several_channels(name, size, channels, archive, tmp_path, monkeypatch):
    """Non-cubic and odd crops of 3.0 x 1.5 x 1.0 mm: finite, and the preview and the gradient have their shapes."""
    quick_templates(monkeypatch)
    given = {"encoder": encoder_for(name), "channels": channels, "size": size, **options_for(name)}
    objective, batch = made(name, archive, tmp_path, **given)
    for view in {id(view): view for views in batch.views.values() for view in views}.values():
        stretched = torch.tensor([3.0, 1.5, 1.0])
        view.spacing_mm_B3, view.noted_mm_B = view.spacing_mm_B3 * stretched, None
        view.affine_B44 = view.affine_B44 * torch.cat([stretched, torch.ones(1)]).double()
        for part in ("image_BCDHW", "clean_BCDHW"):
            image = getattr(view, part)
            if image is not None:
                gains = torch.linspace(1.0, -0.5, channels).view(1, -1, 1, 1, 1)
                setattr(view, part, image[:, :1] * gains)
    output = objective(batch, 0.5)
    assert output.loss.isfinite()
    output.loss.backward()
    stem = dict(objective.encoder.named_parameters())[objective.encoder.stems[0]]
    assert stem.shape[1] == channels
    assert stem.grad.isfinite().all()
    assert stem.grad.abs().max() > 0
    with torch.no_grad():
        pictures = objective.eval().preview(batch)
    views = {tuple(view.image_BCDHW.shape[2:]) for views in batch.views.values() for view in views}
    for picture in pictures.values():
        assert picture.isfinite().all()
        assert tuple(picture.shape[-3:]) in views


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_parameter_and_buffer_is_initialised(name, archive, monkeypatch):
    """What is allocated and never filled stays NaN: tokens, heads, predictors and a teacher made at the beginning."""

    def poisoned(allocate):
        def full(*args, **kwargs):
            made = allocate(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return full

    with monkeypatch.context() as patch:
        for where, call in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(where, call, poisoned(getattr(where, call)))
        assert torch.nn.Linear(2, 2).weight.isfinite().all()  # it fills what it allocates
        assert torch.empty(1).isnan()
        assert torch.empty_like(torch.ones(1)).isnan()
        cls = find("medseg_ssl.objectives", name, Objective)
        options = parse(cls.Config, {"size": (16, 16, 16), **options_for(name)})
        objective = cls(options, build_encoder(**encoder_for(name)), archive.facts())  # pyright: ignore[reportAbstractUsage]
        if cls.needs_previous:
            objective.begin((0, 1))
    for part, value in objective.state_dict().items():
        assert value.isfinite().all(), part


def test_the_preview_shows_the_batch(trained):
    objective, batch = trained
    with torch.no_grad():
        pictures = objective.eval().preview(batch)
    for name, picture in pictures.items():
        assert picture.ndim in (4, 5), name
        assert len(picture) == 4, name
        assert picture.float().isfinite().all(), name


def test_what_ships_is_live_and_was_trained(trained):
    """Every shipped parameter gets a gradient, or stands among those that are said to be untrained."""
    assert_trained(*trained)


FINER = {
    "primus": {"encoder": {"name": "primus"}},
    "swin": {"encoder": {"name": "swin"}},
    "slices": {"encoder": {"name": "lifted2d", "kind": "slices"}},
    "light": {"encoder": {"name": "primus"}, "decoder": {"name": "light"}},
    "level": {"encoder": {"name": "swin"}, "decoder": {"name": "linear", "levels": [1]}},
}
"""Encoders with parameters that their coarsest map does not need, and decoders that do not read every level."""
OFTEN = {
    ("simclr", "primus"),
    ("paired", "swin"),
    ("mae", "light"),
    ("segmentation", "level"),
    ("gvsl", "light"),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(n, how, marks=[] if (n, how) in OFTEN else [pytest.mark.slow])
        for n in OBJECTIVES
        for how in FINER
    ],
)
def test_what_ships_was_trained_or_is_said_to_be_untrained(name, how, archive, tmp_path, monkeypatch):
    cls = find("medseg_ssl.objectives", name, Objective)
    if "decoder" in FINER[how] and "decoder" not in cls.Config.model_fields:
        pytest.skip("has no pyramid's decoder")
    quick_templates(monkeypatch)
    # by the deepest map alone, where a term can be left out
    alone = (
        {"dense_weight": 0.0}
        if "decoder" not in FINER[how] and "dense_weight" in cls.Config.model_fields
        else {}
    )
    try:
        made_of = made(name, archive, tmp_path, **FINER[how], **alone)
    except ConfigError as error:
        pytest.skip(str(error))  # an encoder that this objective cannot train
    objective, batch = made_of
    for views in batch.views.values():
        for view in views:
            view.modality_B = ["CT"] * len(
                view.modality_B
            )  # so that neighbours are pairs, where it needs those
    assert_trained(objective, batch)


def assert_trained(objective, batch):
    exported = objective.export()
    parts = {id(part) for part in objective.modules()}
    assert id(exported.encoder) in parts
    assert exported.decoder is None or id(exported.decoder) in parts
    for progress in (0.1, 0.9):
        objective(batch, progress).loss.backward()
    for name, parameter in objective.encoder.named_parameters():  # a teacher has the names of its student
        assert (parameter.grad is None) == name.startswith(exported.untrained), name
    if exported.decoder is not None:
        coarse = {n for n, p in exported.decoder.named_parameters() if p.grad is None}
        assert not coarse, coarse


KIN = (
    *("simmim", "genesis", "volume_fusion", "pseudo_labels", "distillation"),
    *("mask_guided", "mean_teacher", "paired", "swinunetr", "template", "gvsl"),
)
"""Watched in slow tests: a step on ``meta`` takes seconds. The others are one of each kind."""


@pytest.mark.parametrize(
    "trained",
    [pytest.param(n, marks=[pytest.mark.slow] if n in KIN else []) for n in OBJECTIVES],
    indirect=True,
)
def test_no_step_makes_the_host_wait_for_the_device(trained, monkeypatch):
    """Device ``meta`` has no values: whatever reads one back raises; blocking copies and checks are noted."""
    objective, batch = trained
    # meta has neither generators nor autocast
    made, cast = draws.torch_generator, torch.autocast
    monkeypatch.setattr(draws, "torch_generator", lambda *key: made(*key[:3]))
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: cast("cpu", **options))
    objective.to("meta")
    with NoWaiting() as watch:
        for progress in (0.1, 0.9):
            objective(batch.to("meta"), progress).loss.backward()
            objective.after_step(progress)
    assert not watch.found


@pytest.mark.slow
def test_compiling_reaches_what_the_objective_calls(trained, monkeypatch):
    """``Module.compile`` alone misses ``encoder.tokens(…)``: token objectives would run as they were, silently."""
    compiled = []

    def compile_eagerly(function, **options):
        def traced(module, inputs):
            compiled.append(function)
            return module.forward

        return real(function, backend=traced, **options)

    objective, batch = trained
    expected = objective.eval()(batch, 0.5).loss
    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    machine = runtime.start(parse(TrainConfig, {"steps": 1, "accelerator": "cpu", "compile": True}))
    machine.setup(objective, torch.optim.SGD(objective.parameters(), lr=0.1))
    encoders = [part for part in objective.modules() if isinstance(part, Encoder)]
    decoders = [part for name, part in objective.named_children() if name == "decoder"]
    assert all({*part.entrances, "_compiled_call_impl"} <= set(vars(part)) for part in encoders), (
        "teachers' too"
    )
    assert all(part._compiled_call_impl is not None for part in (*encoders, *decoders))
    copied = copy.deepcopy(objective.encoder)
    assert not {*objective.encoder.entrances, "_compiled_call_impl"} & set(vars(copied)), (
        "bound to other weights"
    )
    assert torch.allclose(objective(batch, 0.5).loss, expected, rtol=1e-4)
    assert compiled, "nothing was traced"
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_says_what_a_cpu_says(trained, precision):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    objective, batch = trained
    expected = objective.eval()(batch, 0.5).loss
    objective.to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
        found = objective(batch.to("cuda"), 0.5).loss
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=0.01 if precision == "fp32" else 0.1)
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
