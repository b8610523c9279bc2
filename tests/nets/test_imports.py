"""Foreign files: features equal to the public networks', and nothing in a file ever runs."""

import contextlib
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from medseg_ssl.config import UserError, find, parse, shelf
from medseg_ssl.nets import nnunet
from medseg_ssl.nets.encoders.swin import CORNERS, Merging
from medseg_ssl.nets.imports import _files
from medseg_ssl.nets.imports import timm as timm_reader
from medseg_ssl.nets.imports.base import Import, build
from tests.nets.foreign_files import (
    STAGES,
    Bomb,
    arguments,
    nnssl_checkpoint,
    nnunet_checkpoint,
    plans,
    residual_unet,
    shaken,
)

SHELF = "medseg_ssl.nets.imports"
IMPORTS = shelf(SHELF)


LEFT_OPEN = {"timm": {"model": "test_resnet"}}
"""Options without a default."""


def reader(name: str, **options) -> Import:
    cls = find(SHELF, name, Import)
    return cls(parse(cls.Config, LEFT_OPEN.get(name, {}) | options))


def bring(name, path, *, minimum_coverage=0.9, **options):
    foreign = reader(name, **options).read(path)
    imported = build(path, foreign, minimum_coverage=minimum_coverage)
    imported.encoder.eval()
    return foreign, imported


def reverse(volume_BCDHW):
    """The volume with its axes in the order x, y, z, or back."""
    return volume_BCDHW.permute(0, 1, 4, 3, 2)


def assert_equal(ours, theirs):
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)


# -- what no import may do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMPORTS)
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_code_in_a_file_never_runs(tmp_path, name, form):
    bomb, exploded = tmp_path / "bomb.pth", tmp_path / "exploded"
    content = {"state_dict": Bomb(exploded), "network_weights": {"a": torch.zeros(2)}}
    if form == "plain":
        bomb.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, bomb, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"was not read: it holds '(io\.)?open'.*nothing was run") as error:
        reader(name).read(bomb)
    assert "\n" not in str(error.value)
    assert not exploded.exists()


def test_names_of_modules_that_may_run_anything_are_refused_too(tmp_path):
    for number, code in enumerate((b"cos\nsystem\n(S'true'\ntR.", b"cnumpy\nload\n(S'x'\ntR.")):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(b"\x80\x02" + code)
        with pytest.raises(UserError, match=r"was not read: it holds '(os\.system|numpy\.load)'"):
            _files.read(path)


def test_pickles_of_newer_protocols_are_not_opened(tmp_path):
    bomb = tmp_path / "bomb.pkl"
    bomb.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UserError, match="a pickle of more than tensors, which is never opened"):
        _files.read(bomb)
    assert not (tmp_path / "exploded").exists()


def test_numbers_of_numpy_are_harmless(tmp_path):
    numbers = {
        "scalar": np.float32(0.5),
        "whole": np.int64(3),
        "truth": np.bool_(True),
        "array": np.arange(6.0).reshape(2, 3),
        "text": np.str_("a"),
    }
    torch.save(numbers, tmp_path / "numbers.pth")
    found = _files.read(tmp_path / "numbers.pth")
    assert found["scalar"] == 0.5
    assert found["whole"] == 3
    assert found["text"] == "a"
    np.testing.assert_array_equal(found["array"], numbers["array"])
    old = (tmp_path / "numbers.pth").read_bytes().replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core.multiarray" in old


def test_names_of_numpy_1(tmp_path):
    """A pickle from before numpy 2 names the same builders elsewhere."""
    text = pickle.dumps({"ema": np.float64(0.25)}, protocol=2)
    path = tmp_path / "old.pth"
    path.write_bytes(text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    # torch's oldest form begins with pickles of its own; its restricted reader alone is asked here
    with torch.serialization.safe_globals(_files._harmless()), path.open("rb") as file:
        assert torch._weights_only_unpickler.load(file) == {"ema": 0.25}


BROKEN = {
    "missing": (None, "no file at"),
    "empty": (b"", "is empty"),
    "a page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is no file of weights but a web page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "but a Git LFS pointer"),
    "text": (b"weights, they said", "is no readable file of weights"),
    "json": (b'{"error": "not found"}', "but JSON text"),
    "zip of nothing": (b"PK\x05\x06" + bytes(18), "is no readable file of weights"),
}


@pytest.mark.parametrize("name", IMPORTS)
@pytest.mark.parametrize("which", BROKEN)
def test_files_that_are_none(tmp_path, name, which):
    content, message = BROKEN[which]
    path = tmp_path / "checkpoint.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        reader(name).read(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", IMPORTS)
@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"epoch": 3}, {"a": torch.zeros(2)}], ids=str)
def test_weights_of_something_else(tmp_path, name, content):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        build(path, reader(name).read(path))
    assert "\n" not in str(error.value)


def test_a_file_cut_short(tmp_path):
    whole = nnunet_checkpoint(tmp_path / "whole.pth", residual_unet(), plans())
    for share in (0.02, 0.5, 0.99):
        cut = tmp_path / "cut.pth"
        cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
        with pytest.raises(UserError, match="is no readable file of weights"):
            reader("nnunet").read(cut)
    save_file({"a": torch.zeros(50)}, tmp_path / "b.safetensors")
    cut = tmp_path / "c.safetensors"
    cut.write_bytes((tmp_path / "b.safetensors").read_bytes()[:-10])
    with pytest.raises(UserError, match="no readable safetensors"):
        reader("nnunet").read(cut)


# -- nnU-Net ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_in", [1, 2])
def test_nnunet_gives_the_same_features(tmp_path, channels_in):
    net = residual_unet(channels_in=channels_in)
    path = nnunet_checkpoint(tmp_path / "checkpoint_final.pth", net, plans())
    foreign, (encoder, decoder, audit) = bring("nnunet", path)
    assert (foreign.spacing_mm, foreign.crop_size, foreign.modalities) == (
        (3.0, 1.0, 1.5),
        (8, 32, 24),
        ("CT",),
    )
    assert (audit.coverage, audit.decoder_coverage, audit.compute) == (1.0, 1.0, 1.0)
    assert {n.rsplit(".", 2)[0] for n in audit.unexpected} == {"decoder.seg_layers"}
    image = torch.randn(2, channels_in, 8, 32, 24)
    with torch.no_grad():
        maps = encoder(image)
        assert_equal(maps, net.encoder(image))
        assert decoder is not None
        layers = reversed(net.decoder.seg_layers)
        assert_equal([layer(m) for layer, m in zip(layers, decoder(maps), strict=True)], net(image))


def test_nnunet_axes_that_were_turned(tmp_path):
    net = residual_unet()
    said = plans(transpose_forward=[2, 0, 1], transpose_backward=[1, 2, 0])
    foreign, imported = bring("nnunet", nnunet_checkpoint(tmp_path / "c.pth", net, said))
    assert foreign.spacing_mm == (1.0, 1.5, 3.0)
    assert foreign.crop_size == (32, 24, 8)
    image = torch.randn(1, 1, 32, 24, 8)
    with torch.no_grad():
        theirs = net.encoder(image.permute(0, 1, 4, 2, 3))
        assert_equal(imported.encoder(image), [m.permute(0, 1, 3, 4, 2) for m in theirs])
    assert imported.encoder.strides == ((1, 1, 1), (2, 2, 1), (4, 4, 2))


def test_nnunet_plans_of_old_and_that_inherit(tmp_path):
    old = plans()
    given = old["configurations"]["3d_fullres"].pop("architecture")["arch_kwargs"]
    old["configurations"]["3d_fullres"] |= {
        "UNet_class_name": "ResidualEncoderUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": given["n_blocks_per_stage"],
        "n_conv_per_stage_decoder": given["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [1, 2, 2],
        "pool_op_kernel_sizes": given["strides"],
        "conv_kernel_sizes": given["kernel_sizes"],
    }
    net = residual_unet(STAGES | {"features_per_stage": [4, 8, 8]})
    foreign, imported = bring("nnunet", nnunet_checkpoint(tmp_path / "c.pth", net, old, "3d_lowres"))
    assert foreign.spacing_mm == (6.0, 2.0, 3.0)
    assert imported.audit.coverage == 1.0
    image = torch.randn(1, 1, 8, 32, 24)
    with torch.no_grad():
        assert_equal(imported.encoder(image), net.encoder(image))


def test_nnunet_prefixes_of_wrappers(tmp_path):
    net = residual_unet()
    path = nnunet_checkpoint(tmp_path / "c.pth", net, plans())
    content = torch.load(path, weights_only=False)
    content["network_weights"] = {f"module.{n}": t.half() for n, t in content["network_weights"].items()}
    torch.save(content, path)
    _, imported = bring("nnunet", path)
    assert imported.audit.coverage == 1.0
    assert imported.encoder.stem_block.conv.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_class_name": "x.PlainConvUNet"}, "holds a PlainConvUNet: it has no residual blocks"),
        ({"network_class_name": "x.MedNeXt"}, "holds a MedNeXt; only ResidualEncoderUNet"),
        ({"arch_kwargs": arguments() | {"norm_op": "torch.nn.BatchNorm3d"}}, "norm_op is 'BatchNorm3d'"),
        ({"arch_kwargs": arguments() | {"nonlin": "torch.nn.ReLU"}}, "nonlin is 'ReLU'"),
        ({"arch_kwargs": arguments() | {"squeeze_excitation": True}}, "no option squeeze_excitation"),
        ({"arch_kwargs": arguments() | {"n_conv_per_stage_decoder": [2, 1]}}, "differs by level"),
        ({"arch_kwargs": arguments() | {"strides": [[1, 1], [2, 2], [2, 2]]}}, "2 axes; only 3D"),
        ({"arch_kwargs": arguments() | {"strides": [[1, 1, 1]]}}, "1 values for 3 stages"),
        ({"arch_kwargs": {}}, "features_per_stage"),
    ],
)
def test_nnunet_networks_that_ours_cannot_be(tmp_path, change, message):
    said = plans()
    said["configurations"]["3d_fullres"]["architecture"] |= change
    with pytest.raises(UserError, match=message) as error:
        reader("nnunet").read(nnunet_checkpoint(tmp_path / "c.pth", residual_unet(), said))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", ["x", -1, [], None, {"a": 1}, [[1, 1, 1]], [["a"] * 3] * 3, [0, 0, 0]], ids=str
)
def test_nnunet_plans_of_nonsense(value):
    """Whatever stands in a plans file, it is read or refused in words."""
    for place in (
        *arguments(),
        "spacing",
        "patch_size",
        "transpose_forward",
        "architecture",
        "inherits_from",
    ):
        said = plans()
        options = said["configurations"]["3d_fullres"]
        if place in arguments():
            options["architecture"]["arch_kwargs"][place] = value
        elif place == "transpose_forward":
            said[place] = value
        else:
            options[place] = value
        with contextlib.suppress(UserError):
            nnunet.from_plans(said, "3d_fullres", where="plans.json")


def test_weights_that_do_not_fit_their_plans(tmp_path):
    net = residual_unet(STAGES | {"features_per_stage": [4, 6, 10]})
    path = nnunet_checkpoint(tmp_path / "c.pth", net, plans())
    with pytest.raises(UserError, match=r"covers \d+\.\d% of this encoder's .* with another shape"):
        bring("nnunet", path)
    with pytest.raises(UserError, match="no configuration '3d_other'; known: 3d_fullres, 3d_lowres"):
        reader("nnunet").read(nnunet_checkpoint(path, net, plans(), "3d_other"))


# -- nnssl -----------------------------------------------------------------------------------------------------------


def test_openmind_residual_encoder_with_decoder(tmp_path):
    net = residual_unet()
    architecture = {"arch_class_name": "ResidualEncoderUNet", "arch_kwargs": arguments()}
    foreign, (encoder, decoder, audit) = bring(
        "openmind", nnssl_checkpoint(tmp_path / "c.pth", net, architecture)
    )
    assert (foreign.spacing_mm, foreign.crop_size) == ((1.0, 1.0, 1.0), (16, 16, 32))
    assert "pretrained on Dataset745_OpenMind" in foreign.format
    assert (audit.coverage, audit.decoder_coverage) == (1.0, 1.0)
    image = torch.randn(1, 1, 16, 32, 24)
    with torch.no_grad():
        assert_equal(encoder(image), net.encoder(image))
        assert decoder is not None
        assert_equal([net.decoder.seg_layers[-1](decoder(encoder(image))[0])], net(image)[:1])


def test_openmind_decoder_of_another_form_stays_behind(tmp_path):
    net = residual_unet(STAGES | {"n_conv_per_stage_decoder": [2, 2]})
    architecture = {"arch_class_name": "ResidualEncoderUNet", "arch_kwargs": arguments()}
    net.decoder.stages[0].convs[0].conv.weight = torch.nn.Parameter(torch.zeros(1, 2, 3, 3, 3))
    foreign, imported = bring("openmind", nnssl_checkpoint(tmp_path / "c.pth", net, architecture))
    assert imported.decoder is None
    assert any(name.startswith("decoder.stages.") for name in foreign.unused)


def test_openmind_encoder_that_stands_elsewhere(tmp_path):
    net = residual_unet()
    wrapped = torch.nn.Module()
    wrapped.backbone = net.encoder
    architecture = {"arch_class_name": "ResidualEncoderUNet", "arch_kwargs": arguments()}
    path = nnssl_checkpoint(
        tmp_path / "c.pth",
        wrapped,
        architecture,
        key_to_encoder="backbone.stages",
        key_to_stem="backbone.stem",
    )
    foreign, imported = bring("openmind", path)
    assert foreign.decoder is None
    assert foreign.unused == ()
    image = torch.randn(1, 1, 16, 32, 24)
    with torch.no_grad():
        assert_equal(imported.encoder(image), net.encoder(image))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ResEncL", "NoSkipResEncL"])
def test_openmind_resenc_l(tmp_path, kind):
    net = residual_unet(
        {
            "features_per_stage": [32, 64, 128, 256, 320, 320],
            "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
            "kernel_sizes": [[3, 3, 3]] * 6,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
            "n_conv_per_stage_decoder": [1] * 5,
        }
    )
    path = nnssl_checkpoint(tmp_path / "c.pth", net, {"arch_class_name": kind})
    _, imported = bring("openmind", path)
    assert imported.audit.coverage == 1.0
    assert (imported.decoder is None) == (kind == "NoSkipResEncL")
    image = torch.randn(1, 1, 64, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_equal(imported.encoder.double()(image), net.double().encoder(image))


PRIMUS = {
    "small": {"embed_dim": 72, "eva_depth": 2, "eva_numheads": 2},
    "PrimusS": {"embed_dim": 396, "eva_depth": 12, "eva_numheads": 6},
}


PRIMUS_KEYS = {
    "key_to_encoder": "eva",
    "key_to_stem": "down_projection",
    "keys_to_in_proj": ["down_projection.proj"],
    "key_to_lpe": "eva.pos_embed",
}


def dna_primus(size, which="small", **options):
    primus = pytest.importorskip("dynamic_network_architectures.architectures.primus")
    torch.manual_seed(0)
    net = primus.Primus(
        1, patch_embed_size=(8, 8, 8), num_classes=1, input_shape=size, init_values=0.1, scale_attn_inner=True,
        **PRIMUS[which], **options,
    )  # fmt: skip
    shaken(net, 0.02)
    return net


def primus_file(path, net, size, which="small", *, trainer="SimMIMEvaTrainer", spacing=(1, 1, 1), **plan):
    architecture = {"arch_class_name": "PrimusS", "arch_kwargs": PRIMUS[which] if which == "small" else None}
    stated = {"configurations": {"one": {"spacing": list(spacing), "patch_size": list(size)}}}
    return nnssl_checkpoint(
        path, net, architecture, trainer=trainer, **{"pretrain_plan": stated, **PRIMUS_KEYS, **plan}
    )


def eva_mae(net, image_BCWHD):
    """What nnssl's ``EvaMAE`` computes of a volume: tokens in the order h, w, d."""
    map_BEWHD = net.down_projection(image_BCWHD)
    tokens_BHWDE = map_BEWHD.permute(0, 3, 2, 4, 1)
    found, _ = net.eva(tokens_BHWDE.flatten(1, 3))
    return found.unflatten(1, tokens_BHWDE.shape[1:4]).permute(0, 4, 2, 1, 3)


@pytest.mark.parametrize("which", ["small", pytest.param("PrimusS", marks=pytest.mark.slow)])
def test_openmind_primus(tmp_path, which):
    size = (16, 16, 32)
    net = dna_primus(size, which)
    foreign, imported = bring(
        "openmind", primus_file(tmp_path / "c.pth", net, size, which), minimum_coverage=0.5
    )
    assert foreign.encoder["crop"] == size
    assert {n.split(".")[0] for n in foreign.unused} == {"up_projection"}
    assert imported.audit.missing
    assert all(n.startswith("encoder.levels.") for n in imported.audit.missing)
    image = torch.randn(2, 1, *size)
    net.up_projection = torch.nn.Identity()
    with torch.no_grad():
        assert_equal([imported.encoder(image)[-1]], [net(image)])


def test_openmind_primus_of_a_masked_autoencoder_has_its_first_axes_exchanged(tmp_path):
    """nnssl hands tokens over in another order than it counts positions in."""
    size = (24, 24, 32)
    net = dna_primus(size)
    path = primus_file(tmp_path / "c.pth", net, size, trainer="BaseEvaMAETrainer_BS8")
    foreign, imported = bring("openmind", path, minimum_coverage=0.5)
    assert any("first two axes are exchanged" in note for note in foreign.notes)
    image = torch.randn(2, 1, *size)
    with torch.no_grad():
        theirs = eva_mae(net, image)
        assert_equal([imported.encoder(image)[-1]], [theirs])
        _, straight = bring("openmind", path, minimum_coverage=0.5, tokens="whd")
        assert (straight.encoder(image)[-1] - theirs).abs().max() > 1e-2 * theirs.abs().max()


def test_openmind_primus_whose_order_or_crop_is_unknown(tmp_path):
    net = dna_primus((16, 24, 32))
    cases = [
        ({"trainer": "BaseEvaMAETrainer"}, {}, "where the first two sides differ"),
        (
            {"trainer": "MyTrainer"},
            {},
            r"\(MyTrainer\), so the order of its tokens is unknown: state tokens=hwd",
        ),
        (
            {"pretrain_plan": {}},
            {},
            r"learned positions of 24 tokens, but no crop .* \(160 x 160 x 160 has 8000",
        ),
        ({"pretrain_plan": {}, "recommended_downstream_patchsize": None}, {}, "does not state the crop"),
    ]
    for options, config, message in cases:
        path = primus_file(tmp_path / "c.pth", net, (16, 24, 32), **options)
        with pytest.raises(UserError, match=message):
            bring("openmind", path, minimum_coverage=0.5, **config)
    bring("openmind", primus_file(path, net, (16, 24, 32), trainer="My"), minimum_coverage=0.5, tokens="whd")


def test_openmind_plan_of_one_configuration_or_several(tmp_path):
    """The plan may be the one configuration itself; of several the one is meant whose tokens the file has."""
    net = dna_primus((16, 24, 32))
    flat = {"spacing": [3, 1, 2], "patch_size": [16, 24, 32], "resampling_fn_data_kwargs": {"order": 3}}
    several = {"wide": {"spacing": [5, 5, 5], "patch_size": [160, 160, 160]}, "own": flat}
    for stated in (flat, several):
        path = primus_file(tmp_path / "c.pth", net, (16, 24, 32), pretrain_plan={"configurations": stated})
        foreign, imported = bring("openmind", path, minimum_coverage=0.5)
        assert (foreign.crop_size, foreign.spacing_mm) == ((16, 24, 32), (3.0, 1.0, 2.0))
        assert imported.encoder.config.spacing_mm == (3.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("architecture", "plan", "message"),
    [
        ({"arch_class_name": "PlainConvUNet"}, {}, "holds a PlainConvUNet"),
        (
            {"arch_class_name": "PrimusXXL"},
            {"key_to_encoder": "eva", "trainer": "SimMIMEvaTrainer"},
            r"encoder\.size",
        ),
        ({}, {}, "names no architecture"),
        (
            {"arch_class_name": "ResidualEncoderUNet", "arch_kwargs": arguments()},
            {"key_to_stem": None},
            "lacks 'key_to_stem'",
        ),
        (
            {"arch_class_name": "ResidualEncoderUNet", "arch_kwargs": arguments()},
            {"key_to_stem": "elsewhere"},
            r"has no elsewhere\.convs\.0\.conv\.weight",
        ),
    ],
)
def test_openmind_plans_that_are_none(tmp_path, architecture, plan, message):
    path = nnssl_checkpoint(tmp_path / "c.pth", residual_unet(), architecture, **plan)
    with pytest.raises(UserError, match=message):
        reader("openmind").read(path)


# -- MONAI and Models Genesis ----------------------------------------------------------------------------------------


def swin_unetr(**options):
    pytest.importorskip("einops")
    from monai.networks.nets.swin_unetr import SwinUNETR

    torch.manual_seed(0)
    options = {"window_size": 3, **options}
    return shaken(SwinUNETR(1, 2, feature_size=12, num_heads=(1, 2, 3, 4), **options))


SLOW = [pytest.param(more, marks=pytest.mark.slow) for more in ({}, {"depths": (2, 1, 2, 1)})]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"use_v2": True}, *SLOW], ids=str)
def test_monai_whole_network(tmp_path, options):
    net = swin_unetr(**options)
    path = tmp_path / "model.pt"
    torch.save({"epoch": 3, "state_dict": net.state_dict(), "best_acc": 0.5}, path)
    foreign, (encoder, decoder, audit) = bring("monai_swin", path, axes="zyx", merging="merging")
    assert (audit.coverage, audit.decoder_coverage) == (1.0, 1.0)
    assert foreign.unused == ("out.conv.conv.weight", "out.conv.conv.bias")
    image = torch.randn(1, 1, 32, 32, 64, dtype=torch.float64)
    net.double()
    encoder.double()
    with torch.no_grad():
        maps = encoder(image)
        assert_equal(maps, [net.encoder1(image), *net.swinViT(image, normalize=True)])
        assert decoder is not None
        assert_equal([net.out(decoder.double()(maps)[0])], [net(image)])


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"use_v2": True, "downsample": "mergingv2"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_monai_volumes_have_other_axes_than_ours(tmp_path, options):
    """What MONAI's network says of x, y, z, ours says of z, y, x."""
    net = swin_unetr(**{"window_size": 2, **options}).double()
    for name, value in net.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(value)
    path = tmp_path / "model.pt"
    torch.save({"state_dict": net.state_dict()}, path)
    merging = options.get("downsample", "merging")
    _, (encoder, decoder, _) = bring("monai_swin", path, merging=merging)
    image = torch.randn(1, 1, 32, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        maps = encoder.double()(image)
        theirs = [net.encoder1(reverse(image)), *net.swinViT(reverse(image), normalize=True)]
        assert_equal(maps, [reverse(m) for m in theirs])
        assert decoder is not None
        assert_equal([net.out(decoder.double()(maps)[0])], [reverse(net(reverse(image)))])


def test_old_swin_weights_read_two_tokens_twice_on_either_axes():
    """One stage: tokens are read as the weights were trained, along x, y, z or along ours."""
    torch.manual_seed(0)
    theirs, ours = (Merging(3, CORNERS[name]) for name in ("twice", "twice_xyz"))
    ours.load_state_dict(theirs.state_dict())
    state = torch.randn(1, 4, 6, 8, 3)
    with torch.no_grad():
        expected = theirs(state.permute(0, 3, 2, 1, 4)).permute(0, 3, 2, 1, 4)
        assert_equal([ours(state)], [expected])


def test_the_order_of_a_whole_monai_network_is_to_be_stated(tmp_path):
    """No weight shows it, and a network in the wrong order says something else without a word."""
    path = tmp_path / "model.pt"
    torch.save({"state_dict": swin_unetr(window_size=2).state_dict()}, path)
    with pytest.raises(
        UserError, match=r"state merging=twice \(.*MONAI up to 1\.4.*merging=merging \(MONAI 1\.5 and later\)"
    ) as error:
        reader("monai_swin").read(path)
    assert "\n" not in str(error.value)
    for stated, taken in (("twice", "twice_xyz"), ("merging", "merging"), ("mergingv2", "mergingv2")):
        assert reader("monai_swin", merging=stated).read(path).encoder["merging"] == taken


@pytest.mark.parametrize(
    "prefix",
    ["module.", *(pytest.param(p, marks=pytest.mark.slow) for p in ("module.swin_vit.", "swinViT."))],
)
def test_monai_self_supervised_transformer(tmp_path, prefix):
    net = swin_unetr()
    weights = {
        prefix + name.replace(".linear", ".fc"): value for name, value in net.swinViT.state_dict().items()
    }
    whole = "module." if prefix.startswith("module.") else ""
    weights[f"{whole}rotation_head.weight"] = torch.zeros(4, 192)
    path = tmp_path / "model_swinvit.pt"
    torch.save({"epoch": 3, "state_dict": weights}, path)
    foreign, imported = bring("monai_swin", path, minimum_coverage=0.5, merging="merging", axes="zyx")
    assert foreign.unused == ("rotation_head.weight",)
    assert all(n.startswith("encoder.full.") for n in imported.audit.missing)
    assert imported.audit.compute is not None
    assert (
        imported.audit.compute < imported.audit.coverage
    )  # the convolutions at full resolution are most of it
    image = torch.randn(1, 1, 32, 64, 32)
    with torch.no_grad():
        assert_equal(imported.encoder(image)[1:], net.swinViT(image, normalize=True))
    assert reader("monai_swin").read(path).encoder["merging"] == "twice_xyz"
    assert reader("monai_swin", axes="zyx").read(path).encoder["merging"] == "twice"


@pytest.mark.parametrize(("blocks", "groups"), [((1, 2, 2, 4), 8), ((2, 1), 4)], ids=str)
def test_monai_segresnet(tmp_path, blocks, groups):
    from monai.networks.nets.segresnet import SegResNet

    torch.manual_seed(0)
    shape = {
        "init_filters": 8,
        "in_channels": 2,
        "blocks_down": blocks,
        "blocks_up": (1,) * (len(blocks) - 1),
    }
    net = shaken(SegResNet(norm=("GROUP", {"num_groups": groups}), **shape))
    path = tmp_path / "model.pt"
    torch.save({"state_dict": net.state_dict()}, path)
    foreign, (encoder, decoder, audit) = bring("monai_segresnet", path, groups=groups, axes="zyx")
    assert (audit.coverage, decoder, foreign.channels_in) == (1.0, None, 2)
    assert {name.split(".")[0] for name in foreign.unused} == {"up_layers", "up_samples", "conv_final"}
    image = torch.randn(1, 2, 17, 24, 9)
    with torch.no_grad():
        assert_equal(encoder(image), net.encode(image)[1])
        _, (encoder, _, _) = bring("monai_segresnet", path, groups=groups)
        image = image.double()
        assert_equal(encoder.double()(image), [reverse(m) for m in net.double().encode(reverse(image))[1]])
    with pytest.raises(UserError, match="8 features in its first level, which 3 groups do not divide"):
        reader("monai_segresnet", groups=3).read(path)
    for norm in ("batch", "instance"):
        torch.save(SegResNet(norm=norm, **shape).state_dict(), path)
        with pytest.raises(UserError, match="another norm than the group norm"):
            reader("monai_segresnet").read(path)


def test_genesis_on_axes_as_ours(tmp_path):
    from tests.nets.test_cnn3d import Replica

    torch.manual_seed(0)
    net = shaken(Replica())
    weights = {f"module.{name}": value for name, value in net.state_dict().items()}
    weights |= {
        "module.up_tr64.up_conv.weight": torch.zeros(2),
        "module.out_tr.final_conv.bias": torch.zeros(1),
    }
    path = tmp_path / "Genesis_Chest_CT.pt"
    torch.save(
        {"epoch": 9, "state_dict": weights, "optimizer_state_dict": {}},
        path,
        _use_new_zipfile_serialization=False,
    )
    foreign, imported = bring("genesis", path)
    assert imported.audit.coverage == 1.0
    assert foreign.unused == ("up_tr64.up_conv.weight", "out_tr.final_conv.bias")
    image = torch.randn(1, 1, 16, 32, 24)
    with torch.no_grad():
        theirs = net.double()(image.double().permute(0, 1, 4, 3, 2))
        ours = imported.encoder.double()(image.double())
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their.permute(0, 1, 4, 3, 2), atol=1e-5, rtol=1e-5)
    _, imported = bring("genesis", path, axes="zyx", norm="batch")
    assert imported.audit.coverage == 1.0


# -- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "unused"), [("test_resnet", {"fc"}), ("test_vit", {"norm", "head"})])
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_timm_slice_by_slice(tmp_path, model, unused, form):
    import timm

    torch.manual_seed(0)
    net = shaken(timm.create_model(model, in_chans=3))
    path = tmp_path / f"weights.{form}"
    if form == "pth":
        torch.save({"state_dict": net.state_dict(), "epoch": 3}, path)
    else:
        save_file(net.state_dict(), path)
    foreign, imported = bring(
        "timm", path, minimum_coverage=0.3, model=model, channels_in=3, encoder={"kind": "slices"}
    )
    assert {name.split(".")[0] for name in foreign.unused} == unused
    assert foreign.notes == ()
    assert all(n.startswith(("encoder.network.mixing.", "encoder.levels.")) for n in imported.audit.missing)
    image = torch.randn(1, 3, 2, 160, 160)
    with torch.no_grad():
        # fresh mixing adds nothing, so that each slice is what the 2D network makes of it
        ours = imported.encoder.network(image)[-1]
        theirs = net.forward_intermediates(image[:, :, 1], indices=1, intermediates_only=True)[0]
    torch.testing.assert_close(ours[:, :, 1], theirs, atol=1e-5, rtol=1e-5)


def test_timm_leaves_out_what_its_maps_do_not_need():
    """The last norm of a windowed transformer ends in the name of others that are used."""
    import timm

    torch.manual_seed(0)
    model = "swin_tiny_patch4_window7_224"
    options = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64, "window_size": 4}
    net = shaken(timm.create_model(model, **options))
    names = {name: tensor for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    assert "norm.weight" in names
    assert any(name.endswith("downsample.norm.weight") for name in names)
    loaded = {
        name.replace("layers.", "layers_"): tensor for name, tensor in names.items() if "head" not in name
    }
    loaded.pop("norm.weight")
    loaded["patch_embed.proj.weight"] = loaded["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert timm_reader._used(names, loaded) == {n for n in names if "head" not in n and n != "norm.weight"}
    renamed = {"old." + name: tensor for name, tensor in names.items()}
    assert timm_reader._used(renamed, loaded) == {
        n for n in renamed if "head" not in n and n != "old.norm.weight"
    }


@pytest.mark.slow
def test_timm_windowed_transformer(tmp_path):
    import timm

    torch.manual_seed(0)
    model = "swin_tiny_patch4_window7_224"
    path = tmp_path / "weights.pth"
    torch.save(shaken(timm.create_model(model)).state_dict(), path)
    more = {"model": model, "encoder": {"kind": "slices"}}
    foreign, _ = bring("timm", path, minimum_coverage=0.3, **more)
    assert {name for name in foreign.unused if "head" not in name} == {"norm.weight", "norm.bias"}
    assert foreign.notes == ("timm adapted patch_embed.proj.weight",)


def test_timm_adapts_the_channels_and_says_so(tmp_path):
    import timm

    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    foreign, _ = bring("timm", path, minimum_coverage=0.3)
    assert foreign.notes == ("timm adapted conv1.0.weight",)
    assert foreign.unused == ("fc.weight", "fc.bias")
    with pytest.raises(UserError, match="no network named 'resnet5o' in timm"):
        reader("timm", model="resnet5o").read(path)
    with pytest.raises(UserError, match="timm cannot give these weights to test_vit"):
        reader("timm", model="test_vit").read(path)


def test_timm_inflated(tmp_path):
    """On a slice that is repeated through the depth an inflated network sees what the 2D network sees."""
    import timm

    torch.manual_seed(0)
    net = shaken(timm.create_model("test_resnet", in_chans=1))
    path = tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    foreign, imported = bring("timm", path, encoder={"kind": "inflate", "depth_from": None})
    assert imported.audit.missing == ()
    assert foreign.unused == ("fc.weight", "fc.bias")
    image = torch.randn(1, 1, 1, 64, 96)
    with torch.no_grad():
        deep = imported.encoder(image.expand(-1, -1, 40, -1, -1))[-1]
        flat = net.forward_features(image[:, :, 0])
    torch.testing.assert_close(deep[:, :, 20], flat, atol=1e-5, rtol=1e-5)
