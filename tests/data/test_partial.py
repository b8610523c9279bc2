"""Labels known in part: what is not annotated reaches no crop, no loss and no choice, and the archive stays whole."""

import pickle

import numpy as np
import pytest
import torch

from medseg_ssl.config import UserError
from medseg_ssl.data.loader import Loader
from medseg_ssl.data.manifest import CaseRow, Split
from medseg_ssl.data.partial import Access, PartialLabel, draw_classes, draw_slices
from medseg_ssl.data.store import write_label
from medseg_ssl.types import UNKNOWN_LABEL, Facts, ViewSpec

from .small_archive import RECIPE, make_archive, scan_row

SHAPE = (12, 10, 14)
CLASSES = ("background", "liver", "spleen")
PART = PartialLabel(classes=("liver",), slices=(1, 2))


def label_of(seed=0):
    """Liver and spleen in every slice, at places that differ between seeds."""
    label_DHW = np.zeros(SHAPE, np.uint8)
    label_DHW[:, 2:5, 2:6] = 1
    label_DHW[:, 6:9, 8:12] = 2
    if seed:
        label_DHW[:3], label_DHW[9:] = 2, 1  # another truth outside the labeled slices
        label_DHW[label_DHW == 2] = 0  # and no spleen anywhere
    return label_DHW


def archive_of(path, *, seed=0):
    """One case whose label was drawn on thick slices: its slice k covers the archive's slices 3k to 3k + 2."""
    row = scan_row("v", SHAPE, spacing_mm=(1.0, 2.0, 1.5))
    case = CaseRow(case="c", subject="s0", scans=("v",), labeled=True, known_classes=(True,) * 3)
    volume = np.random.default_rng(0).integers(50, 200, SHAPE)
    label_DHW = label_of(seed)
    made = make_archive(path, [(row, volume)], cases=[(case, label_DHW)], classes=CLASSES)
    thick_44 = np.array(row.affine_44) @ np.diag([3.0, 1, 1, 1])
    thick_44[:3, 3] += np.array(row.affine_44)[:3, 0]  # the centre of the first thick slice
    for file in (path / "labels").iterdir():
        file.unlink()
    write_label(
        path,
        "c",
        label_DHW,
        original_DHW=label_DHW[1::3],
        original_affine_44=thick_44,
        recipe=RECIPE,
        stamp="",
    )
    return made


def test_labels_are_limited_on_both_grids_and_nothing_is_written(tmp_path):
    archive = archive_of(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.b2nd")}
    limited = pickle.loads(pickle.dumps(archive.limited(Access(labels={"c": PART}))))
    expected_DHW = np.where(label_of() == 1, 1, 0)
    expected_DHW[:3], expected_DHW[9:] = UNKNOWN_LABEL, UNKNOWN_LABEL
    assert np.array_equal(limited.read_label("c", (0, 0, 0), SHAPE), expected_DHW)
    assert np.array_equal(limited.read_label("c", (2, 1, 3), (5, 4, 6)), expected_DHW[2:7, 1:5, 3:9])
    original_DHW, affine_44 = limited.original_label("c")
    assert np.array_equal(original_DHW, expected_DHW[1::3])
    assert np.array_equal(affine_44, archive.original_label("c")[1])
    assert limited.cases["c"].known_classes == (True, True, False)
    assert limited.fingerprint == archive.fingerprint
    assert np.array_equal(archive.read_label("c", (0, 0, 0), SHAPE), label_of())
    assert archive.cases["c"].known_classes == (True, True, True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.b2nd")} == before
    with pytest.raises(UserError, match="no labeled case 'x'"):
        archive.limited(Access(labels={"x": PART}))


def test_training_sees_nothing_of_what_is_not_annotated(tmp_path):
    """Two truths that differ only in unlabeled slices and unknown classes give the same crops, and so the same loss."""
    plan = {"labeled": ViewSpec(count=1, size=(8, 8, 8), augment="segmentation", labeled=True)}
    batches = []
    for seed in (0, 1):
        archive = archive_of(tmp_path / str(seed), seed=seed).limited(Access(labels={"c": PART}))
        batches.append(list(Loader(archive, plan, batch_size=4, steps=4, seed=3, foreground_share=0.5)))
    from medseg_ssl.nets.encoders.resenc import ResEnc
    from medseg_ssl.objectives.segmentation import Segmentation

    torch.manual_seed(0)
    encoder = ResEnc(ResEnc.Config(size="tiny", features=(4, 4, 4)), channels_in=1)
    objective = Segmentation(Segmentation.Config(size=(8, 8, 8)), encoder, Facts(classes=CLASSES)).eval()
    for a, b in zip(*batches, strict=True):
        first, second = a.views["labeled"][0], b.views["labeled"][0]
        assert torch.equal(first.label_BDHW, second.label_BDHW)
        assert torch.equal(first.image_BCDHW, second.image_BCDHW), "crops lie elsewhere"
        assert first.known_classes_BK.tolist() == [[True, True, False]] * 4
        assert set(first.label_BDHW.unique().tolist()) <= {0, 1, UNKNOWN_LABEL}
        with torch.no_grad():
            assert objective(a, 0.0).loss.item() == objective(b, 0.0).loss.item() > 0


def test_foreground_crops_are_centred_on_annotated_voxels(tmp_path):
    plan = {"labeled": ViewSpec(count=1, size=(3, 3, 3), labeled=True)}
    archive = archive_of(tmp_path)
    middles = {}
    for name, part in {"whole": PartialLabel(), "part": PART}.items():
        limited = archive.limited(Access(labels={"c": part}))
        batches = Loader(limited, plan, batch_size=4, steps=25, seed=0, foreground_share=1.0)
        views = [batch.views["labeled"][0] for batch in batches]
        labels = {int(label[1, 1, 1]) for view in views for label in view.label_BDHW}
        rows = (
            np.linalg.inv(np.array(archive.scans["v"].affine_44))
            @ np.concatenate([view.affine_B44.numpy() @ [1.0, 1.0, 1.0, 1.0] for view in views]).T
        )
        middles[name] = labels, {round(float(d)) for d in rows[0]}
    assert middles["part"] == ({1}, {3, 4, 5, 6, 7, 8})
    assert middles["whole"][0] == {1, 2}
    assert middles["whole"][1] >= {1, 2, 9, 10}


def test_another_split_stands_in_for_the_archives_own(tmp_path):
    archive = archive_of(tmp_path)
    given = Split(name="default", seed=0, train=(), development=(), test=("s0",))
    assert archive.limited(Access(splits=(given,))).split() == given
    with pytest.raises(UserError, match="no split named 'default'"):
        archive.split()
    strange = given.model_copy(update={"train": ("nobody",)})
    with pytest.raises(UserError, match="subject nobody of train is not in the archive"):
        archive.limited(Access(splits=(strange,))).split()


def test_classes_are_dealt_out_evenly_and_a_prefix_stays_the_same():
    names = ("a", "b", "c", "d")
    stated = {f"case{i}": names for i in range(8)}
    stated["case3"] = ("a",)
    dealt = draw_classes(stated, count=2, seed=0, draw=0)
    assert dealt["case3"] == ("a",), "no more than the annotator stated"
    counts = [sum(name in kept for kept in dealt.values()) for name in names]
    assert sum(counts) == 15
    assert max(counts) - min(counts) <= 1
    assert all(len(kept) == 2 for case, kept in dealt.items() if case != "case3")
    few = draw_classes({case: stated[case] for case in list(stated)[:4]}, count=2, seed=0, draw=0)
    assert few == {case: dealt[case] for case in few}
    assert draw_classes(stated, count=2, seed=0, draw=1) != dealt


@pytest.mark.parametrize("spread", ["random", "even"])
def test_drawn_slices_are_a_share_of_all_and_show_something(spread):
    found = set()
    for draw in range(20):
        chosen = draw_slices("x", shape_d=40, shown=[7], share=0.1, spread=spread, seed=0, draw=draw)
        assert len(chosen) == 4
        assert 7 in chosen
        assert list(chosen) == sorted(set(chosen))
        assert 0 <= chosen[0] <= chosen[-1] < 40
        found.add(chosen)
    assert len(found) > 5
    assert len(draw_slices("x", shape_d=3, shown=[], share=0.01, spread=spread, seed=0, draw=0)) == 1
    even = draw_slices("y", shape_d=40, shown=range(40), share=0.25, spread="even", seed=0, draw=0)
    assert set(np.diff(even)) == {4}
