import pytest
import torch

from medseg_ssl.config import ConfigError
from medseg_ssl.data.relabeling import Relabeling
from medseg_ssl.types import UNKNOWN_LABEL, Batch
from tests.objectives.conftest import make_view


def test_labels_and_known_classes_in_the_segmenters_order():
    """The archive's classes 1 and 2 are the segmenter's 3 (new) and 1; its class 2 is unknown in every case."""
    made = Relabeling.joined(("background", "liver", "spleen"), ("background", "tumour", "liver"))
    assert made.classes == ("background", "liver", "spleen", "tumour")
    assert made.place == (0, 3, 1)
    label = torch.tensor([0, 1, 2, UNKNOWN_LABEL], dtype=torch.uint8).reshape(1, 1, 2, 2)
    view, other = make_view((1, 2, 2), batch=1, label=label), make_view((1, 2, 2), batch=1)
    view.known_classes_BK = torch.tensor([[True, True, False]])
    batch = made.batch(Batch({"a": [view], "b": [other]}, ["s"], [""], torch.arange(1), seed=0))
    told = batch.views["a"][0]
    assert told.label_BDHW.flatten().tolist() == [0, 3, 1, UNKNOWN_LABEL]
    assert told.label_BDHW.dtype == torch.uint8
    assert told.known_classes_BK.tolist() == [[True, False, False, True]]
    assert batch.views["b"][0] is other
    assert label.flatten().tolist() == [0, 1, 2, UNKNOWN_LABEL], "the batch belongs to the loader"
    view.known_classes_BK = None
    assert made.batch(batch=Batch({"a": [view]}, ["s"], [""], torch.arange(1), seed=0)).views["a"][
        0
    ].known_classes_BK.tolist() == [[True, True, False, True]]


def test_backgrounds_that_differ_are_refused():
    with pytest.raises(
        ConfigError, match="class 0 is 'liver' in the archive and 'background' in the segmenter"
    ):
        Relabeling.joined(("background", "liver"), ("liver", "tumour"))
