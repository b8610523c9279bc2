import pytest
import torch

from medseg_ssl.nets.tuning import norm_parameters, rest_frozen, stem_parameters, train_part
from tests.shelves import build_encoder


def trained(encoder):
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def test_parts_of_a_residual_encoder_by_name():
    encoder = build_encoder("resenc", features=(4, 8), blocks=(1, 1))
    assert stem_parameters(encoder) == {"stem_block.conv.weight", "stem_block.conv.bias"}
    norms = norm_parameters(encoder)
    assert norms == {name for name, _ in encoder.named_parameters() if ".norm." in name}
    assert len(norms) == 2 * (1 + 2 + 3)
    train_part(encoder, "norm", fresh=("stages.1.0.conv2.conv.",))
    assert trained(encoder) == norms | {"stages.1.0.conv2.conv.weight", "stages.1.0.conv2.conv.bias"}
    train_part(encoder, "frozen")
    assert trained(encoder) == set()


def test_every_layer_that_sees_the_image_is_a_stem():
    assert stem_parameters(build_encoder("swin")) == {
        *("patch_embed.weight", "patch_embed.bias", "full.conv1.weight", "full.conv3.weight")
    }


def test_norms_of_other_projects_are_norms():
    for model in ("test_convnext", "test_resnet", "test_vit"):
        encoder = build_encoder("lifted2d", model=model)
        named = {n for n, _ in encoder.named_parameters() if "norm" in n or "bn" in n}
        assert named <= norm_parameters(encoder)


def test_an_encoder_without_norms_has_none_to_train():
    encoder = build_encoder("lifted2d", model="test_nfnet", pyramid={"image": False})
    for layer in encoder.modules():
        for name, _ in list(layer.named_parameters(recurse=False)):
            if "Norm" in type(layer).__name__:
                delattr(layer, name)
    with pytest.raises(ValueError, match="Lifted2D has no parameters of this part: norm"):
        train_part(encoder, "norm")


def test_frozen_parts_keep_their_statistics_and_trained_ones_do_not():
    encoder = build_encoder("cnn3d", features=(4, 8), norm="batch").train()
    train_part(encoder, "frozen", fresh=("levels.1.1.",))
    rest_frozen(encoder)
    modes = {
        name: layer.training
        for name, layer in encoder.named_modules()
        if isinstance(layer, torch.nn.BatchNorm3d)
    }
    assert modes == {
        "levels.0.0.norm": False,
        "levels.0.1.norm": False,
        "levels.1.0.norm": False,
        "levels.1.1.norm": True,
    }
    before = encoder.state_dict()["levels.0.0.norm.running_mean"].clone()
    encoder(torch.randn(2, 1, 8, 12, 16))
    assert torch.equal(encoder.state_dict()["levels.0.0.norm.running_mean"], before)
