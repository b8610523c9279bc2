"""Known answers for configs: every wrong key at once, bases, overrides, durations, shelves."""

import pytest

from medseg_ssl.config import (
    Block,
    ConfigError,
    Duration,
    Length,
    Record,
    overlay,
    override,
    parse,
    read_yaml,
    to_yaml,
)


class Optim(Record):
    lr: float
    warmup: Length = Duration(value=5, unit="%")


class Run(Record):
    seed: int = 0
    optim: Optim
    objective: Block = Block(name="mae")


def test_all_wrong_keys_at_once_with_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        parse(Run, {"sede": 1, "optim": {"lr": "fast", "warmupp": "5%"}})
    text = str(caught.value)
    assert text.startswith("3 errors in the config")
    assert "unknown key 'sede' (did you mean 'seed'?)" in text
    assert "unknown key 'optim.warmupp' (did you mean 'warmup'?)" in text
    assert "optim.lr" in text
    assert "'fast'" in text
    assert "\n" not in text


def test_base_is_overlaid_and_a_changed_name_replaces_the_block(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "seed: 1\noptim: {lr: 0.1}\nobjective: {name: mae, size: [8, 8, 8]}\n"
    )
    (tmp_path / "run.yaml").write_text("base: base.yaml\nseed: 2\nobjective: {name: simclr}\n")
    assert read_yaml(tmp_path / "run.yaml") == {
        "seed": 2,
        "optim": {"lr": 0.1},
        "objective": {"name": "simclr"},
    }


def test_circle_of_bases_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [1\n"])
def test_broken_yaml_is_one_line(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)


def test_missing_file():
    with pytest.raises(ConfigError, match="cannot read config"):
        read_yaml("nowhere.yaml")


def test_override_reads_numbers_yaml_would_read_as_text():
    assert override({"optim": {"lr": 1}}, ["optim.lr=3e-4", "a.b=[1, 2]"]) == {
        "optim": {"lr": 3e-4},
        "a": {"b": [1, 2]},
    }
    with pytest.raises(ConfigError, match="overrides look like"):
        override({}, ["optim.lr"])


@pytest.mark.parametrize(
    ("text", "steps"),
    [("2000 steps", 2000), ("10 epochs", 50), ("5%", 10), (7, 7), ("1 step", 1), ("0.5 epochs", 2)],
)
def test_durations(text, steps):
    assert Duration.parse(text).steps(steps_per_epoch=5, total_steps=200) == steps


@pytest.mark.parametrize("text", ["2.5 steps", "soon", "10", "-3 steps", -3, True])
def test_wrong_durations(text):
    with pytest.raises(ValueError, match="is no duration"):
        Duration.parse(text)


def test_round_trip():
    run = parse(Run, {"optim": {"lr": 0.1, "warmup": "10%"}, "objective": {"name": "mae", "size": [8, 8, 8]}})
    import yaml

    assert parse(Run, yaml.safe_load(to_yaml(run))) == run


def test_overlay_replaces_lists():
    assert overlay({"a": [1, 2], "b": {"c": 1}}, {"a": [3], "b": {"d": 2}}) == {
        "a": [3],
        "b": {"c": 1, "d": 2},
    }


def test_a_block_inside_a_block_keeps_the_defaults_of_its_owner():
    class Inner(Record):
        a: int = 1
        b: int = 2

    class Outer(Record):
        inner: Inner = Inner(a=10)
        block: Block = Block(name="unet")

    assert parse(Outer, {"inner": {"b": 3}}).inner == Inner(a=10, b=3)
    assert parse(Outer, {"inner": {"a": 4}}).inner == Inner(a=4, b=2)
    assert parse(Outer, {"block": {"name": "light"}}).block == Block(name="light")
    with pytest.raises(ConfigError, match=r"unknown key 'inner.c' \(known: a, b\)"):
        parse(Outer, {"inner": {"c": 4}})
