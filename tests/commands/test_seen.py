"""What a card tells about who was seen: the split and the subset that are scored decide, not their names' defaults."""

from types import SimpleNamespace

import pytest

from finetune.seen import check_seen, choices, chosen_on, inherited, unchecked, warning
from medseg_ssl.config import ConfigError
from medseg_ssl.data.manifest import Split

SPLITS = {
    "default": Split(name="default", seed=0, train=("a", "b"), development=("c",), test=("d",)),
    "second": Split(name="second", seed=1, train=("c", "d"), development=("a",), test=("b",)),
    "outside": Split(name="outside", seed=0, train=("a", "b", "c", "d"), development=(), test=()),
}
ARCHIVE = SimpleNamespace(fingerprint="here", split=SPLITS.__getitem__)


def card(*entries, own="here"):
    return {"archive_fingerprint": own, "checked_against": entries}


def entry(split="default", archive="here", sides=("test",), **more):
    return {"archive": archive, "split": split, "sides": list(sides), **more}


def test_weights_of_another_split_or_of_scored_subjects_are_refused():
    whole = card(entry(trained_on=["train", "development"]))
    check_seen("the encoder", whole, ARCHIVE, split="default", subset="test")
    with pytest.raises(
        ConfigError, match="the encoder was trained on the development subjects of split 'default' of"
    ):
        check_seen("the encoder", whole, ARCHIVE, split="default", subset="development")
    with pytest.raises(
        ConfigError,
        match=r"with the split 'default' of this archive, so it may .* split 'second' keeps for scoring",
    ):
        check_seen("it", whole, ARCHIVE, split="second", subset="test")
    with pytest.raises(
        ConfigError, match="on the train subjects of split 'outside' of this archive, who are scored"
    ):
        check_seen("it", card(entry("outside")), ARCHIVE, split="outside", subset="test")
    # a card of before it was stated
    check_seen("it", card(entry()), ARCHIVE, split="default", subset="test")
    with pytest.raises(ConfigError, match="with the split 'default'"):
        check_seen("it", card(entry()), ARCHIVE, split="second", subset="test")
    # who was kept out was not seen, whatever the split; what was trained on elsewhere is no matter
    elsewhere = card(entry(archive="there", trained_on=["train"]), entry("second"), own="there")
    check_seen("it", elsewhere, ARCHIVE, split="default", subset="test")


def test_what_a_check_was_not_made_against_is_said():
    both = ("test", "development")
    checked = card(entry("there", archive="there"), entry("default", sides=both), own="there")
    assert unchecked(checked, ARCHIVE, split="default", subset="test") == ""
    assert unchecked(checked, ARCHIVE, split="default", subset="development") == ""
    assert unchecked(checked, ARCHIVE, split="second", subset="test") == (
        "it was checked against test and development of split 'default' of the scored archive, not against test of"
        " split 'second'"
    )
    assert "not against development and test and train" in unchecked(
        card(entry("outside", sides=both), own="there"), ARCHIVE, split="outside", subset="test"
    )
    assert "cannot be checked here" in unchecked(card(own="there"), ARCHIVE, split="default", subset="test")
    assert unchecked(card(entry()), ARCHIVE, split="second", subset="test") == "", "refused, not noted"


def test_a_segmenter_tells_what_its_encoder_saw():
    encoder = card(entry("second"), entry(archive="there", sides=("test", "development")))
    kept = inherited([encoder])
    assert kept == ({"trained_on": ["train"], **entry("second")},)
    segmenter = card(*kept, entry(archive="finetuned", trained_on=["train"]), own="finetuned")
    with pytest.raises(
        ConfigError, match="the segmenter was trained with the split 'second' of this archive"
    ):
        check_seen("the segmenter", segmenter, ARCHIVE, split="default", subset="test")
    said = warning("the encoder", encoder, ARCHIVE, split="default")
    assert said.endswith("keeps for scoring; 'evaluate' will not score its test subjects")
    assert warning("the encoder", encoder, ARCHIVE, split="second") == ""
    assert warning("the encoder", encoder, ARCHIVE, split="outside") == "", "it keeps nobody back"


def test_how_an_encoder_was_chosen_is_known_of_its_segmenter():
    encoder = card() | {"chosen_by": {"score": "knn/dice", "subset": "development"}}
    segmenter = card(own="finetuned") | {"chosen_before": choices(encoder)}
    for weights in (encoder, segmenter):
        assert chosen_on(weights, ARCHIVE, "development") == "knn/dice"
        assert chosen_on(weights, ARCHIVE, "test") == ""
        assert chosen_on(weights, SimpleNamespace(fingerprint="finetuned"), "development") == ""
    again = segmenter | {"chosen_by": {"score": "segmentation/dice", "subset": "development"}}
    assert [choice["archives"] for choice in choices(again)] == [["here"], ["finetuned"]]
    assert choices(card()) == ()
