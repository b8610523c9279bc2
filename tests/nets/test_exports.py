"""Exports opened by the software they are for."""

import io
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from medseg_ssl.config import ConfigError, UserError, find, parse
from medseg_ssl.nets.encoder_file import Card, Loaded
from medseg_ssl.nets.exports.base import Export
from medseg_ssl.nets.imports.base import build, modules
from medseg_ssl.nets.imports.nnunet import NnUNet
from medseg_ssl.nets.segmenter import Segmenter
from tests.nets.foreign_files import STAGES, plans, residual_unet, shaken
from tests.shelves import DECODERS, ENCODERS

CARD = Card(
    encoder={},
    spacing_mm=(3.0, 1.0, 1.5),
    crop_size=(16, 32, 24),
    intensity={"CT": {"kind": "window", "hu_range": [-160.0, 240.0]}},
    modalities=("CT",),
)
OURS = {
    "features": STAGES["features_per_stage"],
    "blocks": STAGES["n_blocks_per_stage"],
    "strides": STAGES["strides"],
    "kernels": STAGES["kernel_sizes"],
}


def exporter(name: str, **options) -> Export:
    cls = find("medseg_ssl.nets.exports", name, Export)
    return cls(parse(cls.Config, options))


def loaded(
    encoder=None, decoder=None, *, classes: int = 0, channels_in: int = 1, card: Card = CARD
) -> Loaded:
    """As ``encoder_file.build`` would give it, with weights away from their start; classes make it a segmenter."""
    torch.manual_seed(0)
    encoder = encoder or {"name": "resenc", **OURS}
    pyramid, reader = modules(encoder, decoder, channels_in)
    head = Segmenter(pyramid, reader, classes).heads if reader is not None and classes else None
    for module in (pyramid, reader, head):
        if module is not None:
            shaken(module)
    changes = {"encoder": encoder, "decoder": decoder, "channels_in": channels_in}
    if classes:
        changes |= {"kind": "segmenter", "classes": ("background", *(f"c{i}" for i in range(1, classes)))}
    return Loaded(pyramid, reader, head, card.model_copy(update=changes))


# -- nnU-Net ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def plans_file(tmp_path) -> Path:
    path = tmp_path / "nnUNetResEncUNetLPlans.json"
    path.write_text(json.dumps(plans()))
    return path


def load_as_nnunet_does(network: torch.nn.Module, path: Path) -> None:
    """The rule of nnU-Net's ``load_pretrained_weights``: every key but the layers of classes, with equal shapes."""
    given, own = torch.load(path, weights_only=True)["network_weights"], network.state_dict()
    for key, value in own.items():
        if ".seg_layers." not in key:
            assert key in given
            assert given[key].shape == value.shape, key
    own.update({k: v for k, v in given.items() if k in own and ".seg_layers." not in k})
    network.load_state_dict(own)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_nnunet_loads_it_and_gives_the_same_features(tmp_path, order):
    """Also where nnU-Net turns the volumes: plans then state strides and kernels for turned axes."""
    turned = {key: [[s[a] for a in order] for s in STAGES[key]] for key in ("strides", "kernel_sizes")}
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(plans(STAGES | turned, transpose_forward=list(order))))
    ours = loaded(decoder={"name": "unet"})
    made = exporter("nnunet", plans=path).write(ours, tmp_path / "pretrained.pth")
    assert any("decoder: " in line and "tensors taken" in line for line in made.report)
    network = residual_unet(STAGES | turned)
    load_as_nnunet_does(network, tmp_path / "pretrained.pth")
    image = torch.randn(1, 1, 16, 32, 24)
    axes = tuple(2 + a for a in order)
    back = tuple(2 + order.index(a) for a in range(3))
    with torch.no_grad():
        skips = network.encoder(image.permute(0, 1, *axes))
        for mine, their in zip(ours.encoder(image), skips, strict=True):
            torch.testing.assert_close(mine, their.permute(0, 1, *back), atol=1e-5, rtol=1e-5)
        finest = []
        network.decoder.seg_layers[-1].register_forward_pre_hook(
            lambda module, given: finest.append(given[0])
        )
        network(image.permute(0, 1, *axes))
        assert ours.decoder is not None
        mine = ours.decoder(ours.encoder(image))[0]
    torch.testing.assert_close(mine, finest[0].permute(0, 1, *back), atol=1e-5, rtol=1e-5)


def test_nnunet_round_trip(tmp_path, plans_file):
    ours = loaded(decoder={"name": "unet"})
    exporter("nnunet", plans=plans_file).write(ours, tmp_path / "pretrained.pth")
    again = build(tmp_path / "pretrained.pth", NnUNet(NnUNet.Config()).read(tmp_path / "pretrained.pth"))
    assert again.audit.coverage == again.audit.decoder_coverage == 1.0
    for name, value in ours.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[name], value)
    assert ours.decoder is not None
    assert again.decoder is not None
    for name, value in ours.decoder.state_dict().items():
        assert torch.equal(again.decoder.state_dict()[name], value)


def test_nnunet_decoder_that_the_file_lacks_is_named_and_drawn_from_the_seed(tmp_path, plans_file):
    contents = {}
    for number, (seed, decoder) in enumerate([(0, None), (0, {"name": "fcn"}), (1, None)]):
        out = tmp_path / f"{number}.pth"
        made = exporter("nnunet", plans=plans_file, seed=seed).write(loaded(decoder=decoder), out)
        line = next(line for line in made.report if line.startswith("new, from seed"))
        assert line.startswith(f"new, from seed {seed}: decoder.* (12 tensors); the file")
        contents[number] = torch.load(out, weights_only=True)["network_weights"]
        load_as_nnunet_does(residual_unet(), out)
    name = "decoder.transpconvs.0.weight"
    assert torch.equal(contents[0][name], contents[1][name])
    assert not torch.equal(contents[0][name], contents[2][name])


def test_nnunet_channels_of_another_data_set(tmp_path, plans_file):
    ours = loaded()
    made = exporter("nnunet", plans=plans_file, channels=3).write(ours, tmp_path / "p.pth")
    assert "adapted: encoder.stem_block.conv.weight from 1 to 3 channels" in made.report
    network = residual_unet(channels_in=3)
    load_as_nnunet_does(network, tmp_path / "p.pth")
    image = torch.randn(1, 1, 8, 32, 24)
    with torch.no_grad():
        theirs = network.encoder(image.expand(-1, 3, -1, -1, -1))[0]
        torch.testing.assert_close(ours.encoder(image)[0], theirs, atol=1e-5, rtol=1e-5)


def test_nnunet_another_topology_is_refused_with_its_stages(tmp_path, plans_file):
    other = OURS | {"blocks": [1, 3, 2], "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}
    with pytest.raises(
        UserError,
        match=r"not the network of nnUNetResEncUNetLPlans\.json: stage 1 blocks 3 against 2; "
        r"stage 1 stride 2x2x2 against 1x2x2 \(here against there\)",
    ):
        exporter("nnunet", plans=plans_file).make(loaded({"name": "resenc", **other}))
    short = {key: value[:2] for key, value in OURS.items()}
    with pytest.raises(UserError, match="2 stages against 3"):
        exporter("nnunet", plans=plans_file).make(loaded({"name": "resenc", **short}))
    with pytest.raises(
        UserError, match="only a 'resenc' encoder becomes a network of nnU-Net, this is a 'swin'"
    ):
        exporter("nnunet", plans=plans_file).make(loaded({"name": "swin"}))
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read plans"),
        ("{", "no valid JSON"),
        ("[]", "must hold a mapping, found list"),
        ("{}", "no configuration '3d_fullres'; known: none"),
    ],
)
def test_nnunet_plans_that_are_none(tmp_path, content, message):
    path = tmp_path / "plans.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        exporter("nnunet", plans=path).make(loaded())


LOADS = """
import json, sys
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

plans, weights = sys.argv[1:]
configuration = PlansManager(plans).get_configuration("3d_fullres")
network = get_network_from_plans(
    configuration.network_arch_class_name, configuration.network_arch_init_kwargs,
    configuration.network_arch_init_kwargs_req_import, 1, 3, deep_supervision=True,
)
before = {k: v.clone() for k, v in network.state_dict().items()}
load_pretrained_weights(network, weights)
changed = [k for k, v in network.state_dict().items() if not v.equal(before[k])]
print(json.dumps({"keys": len(before), "changed": len(changed), "heads": sum(".seg_layers." in k for k in changed)}))
"""


@pytest.mark.slow
def test_nnunet_itself_loads_it(tmp_path, plans_file):
    """In an interpreter that has nnU-Net: ``MEDSEG_NNUNET_PYTHON``."""
    python = os.environ.get("MEDSEG_NNUNET_PYTHON")
    if not python:
        pytest.skip("no nnU-Net: MEDSEG_NNUNET_PYTHON names an interpreter that has nnunetv2")
    exporter("nnunet", plans=plans_file).write(loaded(decoder={"name": "unet"}), tmp_path / "p.pth")
    folders = {name: str(tmp_path) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    done = subprocess.run(
        [python, "-c", LOADS, plans_file, tmp_path / "p.pth"],
        env=os.environ | folders,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Loading pretrained weights from file" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["heads"] == 0
    assert found["changed"] == found["keys"] - 4  # two layers of classes with weight and bias


# -- MONAI -----------------------------------------------------------------------------------------------------------

SWIN = {"name": "swin", "features": 12, "depths": [1, 1, 1, 1], "heads": [1, 2, 3, 4], "window": [2, 2, 2]}


def rebuilt(out: Path) -> tuple[torch.nn.Module, dict]:
    """MONAI's class with the arguments that lie beside the weights, which it loads strictly."""
    from monai.networks import nets

    said = json.loads(out.with_suffix(".json").read_text())
    network = getattr(nets, said["class"].rsplit(".", 1)[-1])(**said["arguments"])
    network.load_state_dict(torch.load(out, weights_only=True), strict=True)
    return network.eval(), said


@pytest.mark.parametrize(
    ("options", "axes"),
    [
        ({}, "xyz"),
        pytest.param({}, "zyx", marks=pytest.mark.slow),
        pytest.param({"v2": True, "merging": "mergingv2"}, "xyz", marks=pytest.mark.slow),
        pytest.param({"v2": True, "merging": "mergingv2"}, "zyx", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_monai_swin_unetr_is_the_segmenter(tmp_path, options, axes):
    pytest.importorskip("einops")
    ours = loaded(SWIN | options, {"name": "swin_unetr"}, classes=3)
    made = exporter("monai", axes=axes).write(ours, tmp_path / "swin.pt")
    assert not any("new, from seed" in line for line in made.report)
    network, said = rebuilt(tmp_path / "swin.pt")
    assert said["card"]["intensity"]["CT"]["hu_range"] == [-160.0, 240.0]
    image = torch.randn(1, 1, 32, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        mine = ours.segmenter().double().eval()(image)
        order = (0, 1, 4, 3, 2) if axes == "xyz" else (0, 1, 2, 3, 4)
        theirs = network.double()(image.permute(order)).permute(order)
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_monai_swin_encoder_alone_names_what_is_new(tmp_path):
    pytest.importorskip("einops")
    old = loaded(SWIN | {"merging": "twice"})
    with pytest.raises(UserError, match="export with axes=zyx"):
        exporter("monai").make(old)
    made = exporter("monai", classes=5, axes="zyx").write(old, tmp_path / "swin.pt")
    new = next(line for line in made.report if line.startswith("new, from seed 0: "))
    assert "encoder2.* (2 tensors)" in new
    assert "decoder1.* " in new
    assert "swinViT" not in new
    assert any("as in MONAI before 1.5" in line for line in made.report)
    network, _ = rebuilt(tmp_path / "swin.pt")
    assert network.out.conv.conv.out_channels == 5


def test_monai_segresnet(tmp_path):
    ours = loaded({"name": "segresnet", "features": 8, "blocks": [1, 2, 1], "groups": 4}, channels_in=2)
    made = exporter("monai").write(ours, tmp_path / "segresnet.pt")
    assert any("up_layers" in line for line in made.report)
    network, _ = rebuilt(tmp_path / "segresnet.pt")
    image = torch.randn(1, 2, 16, 32, 24, dtype=torch.float64)
    with torch.no_grad():
        theirs = network.double().encode(image.permute(0, 1, 4, 3, 2))[1]
        for mine, their in zip(ours.encoder.double()(image), theirs, strict=True):
            torch.testing.assert_close(mine, their.permute(0, 1, 4, 3, 2), atol=1e-5, rtol=1e-5)


def test_monai_says_what_it_has_no_class_for():
    with pytest.raises(
        UserError, match=r"no network of a 'resenc' encoder, only of swin, segresnet; .*--to nnunet"
    ):
        exporter("monai").make(loaded())
    with pytest.raises(UserError, match=r"4 stages.*this encoder has 2 stages"):
        exporter("monai").make(loaded({"name": "swin"}))


# -- graphs ----------------------------------------------------------------------------------------------------------


def test_a_graph_of_a_network_that_thinks_in_millimetres_has_one_spacing(tmp_path):
    encoder = {
        "name": "primus",
        "embed_dim": 48,
        "depth": 1,
        "heads": 2,
        "patch": [4, 4, 4],
        "crop": [16, 16, 16],
    }
    ours = loaded(encoder | {"spacing_mm": [1.0, 2.0, 2.0]}, {"name": "light"}, classes=2)
    several = ours._replace(card=ours.card.model_copy(update={"spacing_mm": None}))
    with pytest.raises(UserError, match=r"state it by spacing_mm='\[D, H, W\]'"):
        exporter("torchscript", size=[16, 16, 16]).make(several)
    made = [
        exporter("torchscript", size=[16, 16, 16], spacing_mm=list(mm)).write(
            several, tmp_path / f"{mm[0]}.pt"
        )
        for mm in ((1.0, 2.0, 2.0), (3.0, 2.0, 2.0))
    ]
    assert len(made) == 2
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        for mm in ((1.0, 2.0, 2.0), (3.0, 2.0, 2.0)):
            said = torch.jit.load(tmp_path / f"{mm[0]}.pt")(image)
            torch.testing.assert_close(
                said, ours.segmenter().eval()(image, torch.tensor([mm])), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        ({"name": "primus", "embed_dim": 48, "depth": 1, "heads": 2, "crop": [32, 32, 32]}, "light"),
        pytest.param({"name": "swin"}, "linear", marks=pytest.mark.slow),
        pytest.param({"name": "cnn3d"}, "upernet", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_torchscript_runs_where_its_image_is(encoder, decoder):
    """A trace writes down the device of tensors made on the way: on another one the graph would mix two."""
    made = exporter("torchscript", size=[32, 32, 32]).make(loaded(encoder, {"name": decoder}, classes=2))
    code = torch.jit.load(io.BytesIO(made.content)).code
    assert "torch.device(" not in code
    assert "ops.prim.device(image_BCDHW)" in code


def run_graph(kind: str, path: Path, image: torch.Tensor) -> torch.Tensor:
    if kind == "torchscript":
        with torch.no_grad():
            return torch.jit.load(path)(image)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


SMALL = {"name": "resenc", "features": [4, 6, 8], "blocks": [1, 1, 1], "strides": STAGES["strides"]}
"""Few layers: torch.onnx takes a tenth of a second for each."""


@pytest.mark.parametrize(
    ("kind", "dynamic"),
    [
        ("torchscript", False),
        ("torchscript", True),
        ("onnx", False),
        pytest.param("onnx", True, marks=pytest.mark.slow),
    ],
)
def test_graph_gives_the_output_of_the_segmenter(tmp_path, kind, dynamic):
    ours = loaded(SMALL, {"name": "unet"}, classes=3, channels_in=2)
    out = tmp_path / f"segmenter.{kind}"
    made = exporter(kind, dynamic=dynamic).write(ours, out)
    assert sum("same output in" in line for line in made.report) == 1 + dynamic
    segmenter = ours.segmenter().eval()
    for batch, size in [(1, (16, 32, 24))] + [(3, (9, 33, 41))] * dynamic:
        image = torch.randn(batch, 2, *size)
        with torch.no_grad():
            expected = segmenter(image)
        torch.testing.assert_close(run_graph(kind, out, image), expected, atol=1e-4, rtol=1e-4)
    said = Card.model_validate_json(out.with_suffix(".json").read_text())
    assert said.intensity == CARD.intensity
    assert said.spacing_mm == (3.0, 1.0, 1.5)
    assert said.classes == ("background", "c1", "c2")


def test_graphs_carry_their_card_inside(tmp_path):
    shallow = SMALL | {key: value[:2] for key, value in SMALL.items() if key != "name"}
    ours = loaded(shallow, {"name": "unet"}, classes=2)
    exporter("torchscript").write(ours, tmp_path / "a.ts")
    files = {"card.json": ""}
    torch.jit.load(io.BytesIO((tmp_path / "a.ts").read_bytes()), _extra_files=files)
    assert Card.model_validate_json(files["card.json"]) == ours.card
    onnx = pytest.importorskip("onnx")
    exporter("onnx", size=[8, 16, 16]).write(ours, tmp_path / "b.onnx")
    model = onnx.load(tmp_path / "b.onnx")
    assert Card.model_validate_json({p.key: p.value for p in model.metadata_props}["card"]) == ours.card
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 8, 16, 16]
    onnx.checker.check_model(model, full_check=True)


def test_a_class_that_is_never_predicted_stays_so(tmp_path):
    """Its logit of -10000 must not widen the tolerance for the others."""
    from medseg_ssl.nets.segmenter import silence

    ours = loaded(decoder={"name": "unet"}, classes=3)
    silence(ours.head, [1])
    made = exporter("torchscript").make(ours)
    assert any("same output" in line for line in made.report)


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_graph_of_an_encoder_is_refused(kind):
    with pytest.raises(UserError, match=f"{kind} is of a segmenter; this file holds an encoder"):
        exporter(kind).make(loaded())
    bare = loaded(decoder={"name": "unet"}, classes=2, card=CARD.model_copy(update={"crop_size": None}))
    with pytest.raises(UserError, match="the card states no crop"):
        exporter(kind).make(bare)


def test_a_size_that_is_built_in_is_told(tmp_path):
    """Windows of attention are cut by sizes that a trace takes for constants."""
    ours = loaded({"name": "swin"}, {"name": "linear"}, classes=2)
    with pytest.raises(
        UserError, match=r"torch\.jit .* at 35 x 38 x 33 voxels.* export without dynamic"
    ) as error:
        exporter("torchscript", size=[32, 32, 32], dynamic=True).write(ours, tmp_path / "a.ts")
    assert len(str(error.value)) < 300
    assert not list(tmp_path.iterdir())


def test_a_graph_that_gives_something_else_is_not_written(tmp_path, monkeypatch):
    from medseg_ssl.nets.exports import torchscript

    def other(module, inputs, **options):
        wrong = torch.nn.Conv3d(1, 3, 1)
        return trace(wrong, inputs)

    trace = torch.jit.trace
    monkeypatch.setattr(torchscript.torch.jit, "trace", other)
    with pytest.raises(
        UserError, match=r"torch\.jit gives another output at 16 x 32 x 24 voxels \(logits at most"
    ):
        exporter("torchscript").write(loaded(decoder={"name": "unet"}, classes=3), tmp_path / "a.ts")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["nnunet", "monai", "torchscript", "onnx"])
def test_nothing_is_overwritten(tmp_path, plans_file, kind):
    export = exporter(kind, **({"plans": plans_file} if kind == "nnunet" else {}))
    out = tmp_path / "out.bin"
    for place in export.places(out):
        place.write_text("mine")
        with pytest.raises(ConfigError, match=f"{place} exists; nothing is overwritten") as error:
            export.write(loaded(decoder={"name": "unet"}, classes=2), out)
        assert error.value.code == 2
        assert place.read_text() == "mine"
        place.unlink()
    if export.beside:
        with pytest.raises(ConfigError, match="overwritten by its own description"):
            export.check_free(tmp_path / "out.json")


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_every_pair_becomes_a_graph_of_one_size(tmp_path, kind, encoder, decoder):
    ours = loaded({"name": encoder}, {"name": decoder}, classes=3)
    made = exporter(kind, size=[32, 64, 32]).write(ours, tmp_path / f"a.{kind}")
    assert any("same output" in line for line in made.report)
