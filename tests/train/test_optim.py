import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.train.optim import OptimConfig, build_optimizer, param_groups
from medseg_ssl.train.settings import TrainConfig
from tests.shelves import build_encoder
from tests.train.conftest import TinyObjective


def build(objective=None, **options):
    return build_optimizer(objective or TinyObjective(), parse(OptimConfig, options), total_steps=100)


def test_groups_split_encoder_and_vectors():
    groups = param_groups(TinyObjective(), parse(OptimConfig, {"weight_decay": 0.1}))
    found = {(g["role"], g["weight_decay"]): [tuple(p.shape) for p in g["params"]] for g in groups}
    assert found == {
        ("encoder", 0.1): [(4, 1, 3, 3, 3)],
        ("encoder", 0.0): [(4,)],
        ("rest", 0.1): [(1, 4)],
        ("rest", 0.0): [(1,), (4,), (4,)],
    }


def test_frozen_parameters_are_left_out():
    objective = TinyObjective()
    objective.encoder.requires_grad_(False)
    assert {g["role"] for g in param_groups(objective, OptimConfig())} == {"rest"}
    objective.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        build(objective)


def test_rates_known_answers():
    optimizer = build(
        lr=1.0, warmup="10%", schedule="constant", encoder_lr_scale=0.1, decoder_first="20 steps"
    )

    def rates(progress):
        optimizer.set_rates(progress)
        shown = optimizer.shown_rates()
        return shown["lr_encoder"], shown["lr_rest"]

    assert rates(0.05) == pytest.approx((0.0, 0.5))
    assert rates(0.15) == pytest.approx((0.0, 1.0))
    assert rates(0.25) == pytest.approx((0.05, 1.0))
    assert rates(0.9) == pytest.approx((0.1, 1.0))


def test_a_waiting_encoder_does_not_move():
    objective = TinyObjective()
    optimizer = build(objective, lr=0.1, decoder_first="50%", weight_decay=0.1)
    before = objective.encoder.first.weight.clone()
    optimizer.set_rates(0.3)
    objective.encoder.first.weight.grad = torch.ones_like(before)
    objective.head.weight.grad = torch.ones_like(objective.head.weight)
    optimizer.optimizer.step()
    assert torch.equal(objective.encoder.first.weight, before)


def test_unknown_optimizer_lists_the_choices():
    with pytest.raises(
        ConfigError, match=r"no optimizer named 'adamww' \(did you mean 'adamw'\?\); known: adamw, sgd"
    ):
        build(name="adamww")


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb"])
def test_each_optimizer_takes_a_step(name):
    objective = TinyObjective()
    optimizer = build(objective, name=name, lr=0.1)
    before = objective.head.weight.clone()
    optimizer.set_rates(0.5)
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.optimizer.step()
    assert not torch.equal(before, objective.head.weight)
    assert len(optimizer.optimizer.param_groups) == len(optimizer.rates)


@pytest.mark.parametrize("steps", ["0 steps", 0, -3])
def test_a_run_has_steps(steps):
    with pytest.raises(ConfigError, match=r"at least 1 step|-3 is no duration"):
        parse(TrainConfig, {"steps": steps})


def test_betas_are_bounded():
    with pytest.raises(ConfigError, match=r"betas\.1: Input should be less than 1"):
        parse(OptimConfig, {"betas": [0.9, 2]})


def test_wrong_keys_are_told_at_once():
    with pytest.raises(ConfigError, match=r"2 errors.*optim.schedule: .*unknown key 'optim.learning_rate'"):
        parse(OptimConfig, {"learning_rate": 1, "schedule": "cosin"}, prefix="optim")


def test_a_pretrained_decoder_has_its_own_rate():
    objective = TinyObjective()
    objective.decoder = torch.nn.Conv3d(4, 4, 1)
    optimizer = build(
        objective, lr=1.0, warmup="0%", schedule="constant", encoder_lr_scale=0.1, decoder_lr_scale=0.2
    )
    optimizer.set_rates(0.5)
    assert optimizer.shown_rates() == pytest.approx({"lr_encoder": 0.1, "lr_decoder": 0.2, "lr_rest": 1.0})
    by_role = {
        g["role"]: [tuple(p.shape) for p in g["params"]]
        for g in optimizer.optimizer.param_groups
        if g["weight_decay"]
    }
    assert by_role["decoder"] == [(4, 4, 1, 1, 1)]


def test_what_nothing_has_trained_learns_at_the_full_rate():
    from medseg_ssl.train.optim import param_groups

    objective = TinyObjective()
    config = parse(OptimConfig, {"lr": 0.1, "encoder_lr_scale": 0.3})
    plain = {g["role"]: len(g["params"]) for g in param_groups(objective, config) if g["weight_decay"]}
    fresh = param_groups(objective, config, fresh=("encoder.first.",))
    assert plain["encoder"] == 1
    assert {g["role"] for g in fresh} == {"rest"}


def test_a_true_sawtooth_has_two_teeth():
    objective = TinyObjective()
    objective.decoder = torch.nn.Conv3d(4, 4, 1)
    options = {"lr": 1.0, "schedule": "linear", "warmup": "10%", "decoder_first": "20%", "sawtooth": True}
    optimizer = build(objective, encoder_lr_scale=0.5, **options)

    def rates(progress):
        optimizer.set_rates(progress)
        shown = optimizer.shown_rates()
        return shown["lr_encoder"], shown["lr_decoder"], shown["lr_rest"]

    assert rates(0.05) == pytest.approx((0.0, 0.5, 0.5))  # the decoder warms up over half of the first tooth,
    assert rates(0.15) == pytest.approx((0.0, 0.5, 0.5))  # decays over the other half,
    assert rates(0.2) == pytest.approx((0.0, 0.0, 0.0))
    assert rates(0.25) == pytest.approx((0.25, 0.5, 0.5))  # then all warm up together
    assert rates(0.3) == pytest.approx((0.5, 1.0, 1.0))
    assert rates(0.65) == pytest.approx((0.25, 0.5, 0.5))
    with pytest.raises(ConfigError, match="sawtooth needs a decoder_first"):
        build(sawtooth=True)


def test_rates_fall_layer_by_layer_towards_the_image():
    objective = TinyObjective(encoder=build_encoder("segresnet", features=8, blocks=(1, 1, 1)))
    optimizer = build(
        objective, lr=1.0, warmup="0%", schedule="constant", layer_decay=0.5, encoder_lr_scale=0.1
    )
    optimizer.set_rates(0.5)
    names = {id(p): name for name, p in objective.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.optimizer.param_groups for p in g["params"]}
    assert rates["encoder.first.weight"] == pytest.approx(0.1 * 0.5**4)
    assert rates["encoder.levels.0.0.conv1.weight"] == pytest.approx(0.1 * 0.5**3)
    assert rates["encoder.down.0.weight"] == rates["encoder.levels.1.0.norm1.weight"] == pytest.approx(0.025)
    assert rates["encoder.down.1.weight"] == rates["encoder.levels.2.0.conv2.weight"] == pytest.approx(0.05)
    assert rates["head.weight"] == 1.0
    assert optimizer.shown_rates() == pytest.approx({"lr_encoder": 0.05, "lr_rest": 1.0})
    fresh = build_optimizer(
        objective, parse(OptimConfig, {"layer_decay": 0.5}), total_steps=100, fresh=("encoder.down.1.",)
    )
    assert {g["scale"] for g in fresh.optimizer.param_groups if g["role"] == "rest"} == {1.0}


def test_rates_by_layer_need_layers():
    objective = TinyObjective()
    objective.encoder.__class__ = type("Untold", (type(objective.encoder),), {"layer_prefixes": ()})
    with pytest.raises(
        ConfigError, match=r"optim\.layer_decay needs an encoder that says its layers; Untold"
    ):
        build(objective, layer_decay=0.9)


def test_what_decay_would_harm_is_left_alone():
    groups = param_groups(TinyObjective(), OptimConfig(), undecayed=("encoder.first.weight",))
    assert [g["weight_decay"] for g in groups if g["role"] == "encoder"] == [0.0]


def test_tokens_and_positions_are_not_decayed_and_layers_are():
    class WithTokens(TinyObjective):
        def __init__(self, config):
            super().__init__(config)
            self.unknown = torch.nn.Parameter(torch.zeros(1, 1, 8))
            self.places = torch.nn.Parameter(torch.zeros(1, 27, 8))
            self.relative_position_bias_table = torch.nn.Parameter(torch.zeros(27, 2))
            self.sites = torch.nn.Parameter(torch.zeros(27, 2))

    objective = WithTokens(TinyObjective.Config())
    groups = param_groups(objective, parse(OptimConfig, {"weight_decay": 0.1}))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name in ("unknown", "places", "relative_position_bias_table"):
        assert id(getattr(objective, name)) not in decayed, name
    assert id(objective.sites) in decayed
    assert id(objective.head.weight) in decayed, (
        "of one output: its first side is 1 and it is a layer all the same"
    )
    assert id(objective.head.bias) not in decayed


def test_betas_and_momentum_reach_optimizers_of_timm_or_are_refused():
    def built(name):
        config = parse(OptimConfig, {"name": name, "betas": [0.8, 0.98]})
        return build_optimizer(TinyObjective(TinyObjective.Config()), config, total_steps=4)

    assert built("lamb").optimizer.param_groups[0]["betas"] == (0.8, 0.98)
    with pytest.raises(ConfigError, match=r"optimizer 'madgrad' does not take optim\.betas"):
        built("madgrad")
