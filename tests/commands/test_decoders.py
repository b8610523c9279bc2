"""Any decoder on the shelf by config alone: fine-tuned, shipped, built back, and predicting."""

import pytest

from finetune.run import FinetuneConfig, run_finetune
from medseg_ssl.config import parse
from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.nets import encoder_file
from tests.shelves import DECODERS
from tests.train.archives import write_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("decoders") / "archive")


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_a_name_in_a_config(archive, name, tmp_path):
    tree = {
        "encoder": {"name": "resenc", "features": [8, 12, 16], "blocks": [1, 1, 1]},
        "decoder": {"name": name},
        "objective": {"name": "segmentation", "size": [12, 16, 24]},
        "data": {"batch_size": 2},
        "train": {"steps": 2, "accelerator": "cpu", "preview_every": None},
        "wandb": {"mode": "disabled"},
    }
    shipped = run_finetune(parse(FinetuneConfig, tree), tmp_path, archive=archive.path, quiet=True)
    built = encoder_file.build(shipped)
    assert encoder_file.block_of(built.decoder) == built.card.decoder
    assert built.card.decoder["name"] == name
    assert len(built.head) == len(built.decoder.channels_out)
    label = Predictor.load(shipped).predict_case(archive, "case-s6")
    assert label.shape == archive.original_label("case-s6")[0].shape
    assert set(label.flat) <= {0, 1}
