import contextlib
import copy
import os
import signal
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.augment import SPATIAL, prepare_batch
from medseg_ssl.data.loader import Loader
from medseg_ssl.data.manifest import CaseRow, PairRow
from medseg_ssl.types import UNKNOWN_LABEL, ViewSpec
from tests.data.small_archive import make_archive, scan_row

SHAPE = (20, 24, 28)


@pytest.fixture(scope="module", autouse=True)
def _short_farewell():
    """A loader that is dropped waits so long for a worker that was blocked or killed: 5 s in torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
        yield


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    generator = np.random.default_rng(0)
    coarse_affine = np.zeros((4, 4))
    # same frame, other grid: voxels of 2 x 1.5 x 1.5 mm shifted by some millimetres
    coarse_affine[0, 2], coarse_affine[1, 1], coarse_affine[2, 0] = 1.5, 1.5, 2.0
    coarse_affine[:, 3] = (-9, 6, 101, 1)
    scans, cases, pairs = [], [], []
    for i in range(6):
        ct = scan_row(f"ct{i}", SHAPE, subject=f"s{i}", modality="CT", box=((2, 2, 2), (18, 22, 26)))
        mr = scan_row(f"mr{i}", SHAPE, subject=f"s{i}")
        pt = scan_row(
            f"pt{i}",
            (9, 14, 17),
            subject=f"s{i}",
            modality="PT",
            spacing_mm=(2.0, 1.5, 1.5),
            affine_44=coarse_affine,
        )
        for row in (ct, mr, pt):
            scans.append((row, ramp(row) + generator.integers(0, 3, row.shape)))
        label = np.zeros(SHAPE)
        label[4:7, 5:9, 6:10] = 1
        label[15, 20, 25] = 2
        known = (True, True, i != 3)
        cases.append(
            (
                CaseRow(
                    case=f"c{i}",
                    subject=f"s{i}",
                    scans=(f"ct{i}", f"mr{i}"),
                    labeled=True,
                    known_classes=known,
                ),
                label,
            )
        )
        pairs.append(PairRow(scan_a=f"ct{i}", scan_b=f"mr{i}", relation="registered"))
        pairs.append(PairRow(scan_a=f"ct{i}", scan_b=f"pt{i}", relation="same_frame"))
    path = tmp_path_factory.mktemp("archive")
    return make_archive(path, scans, cases=cases, pairs=pairs, classes=("background", "big", "small"))


def ramp(row):
    """Intensity that tells the RAS millimetres of a voxel: 3 x + 2 y + z, always above 0."""
    affine = np.array(row.affine_44)
    mm = np.tensordot(affine[:3, :3], np.indices(row.shape), axes=1) + affine[:3, 3].reshape(3, 1, 1, 1)
    return np.round(3 * mm[0] + 2 * mm[1] + mm[2]).astype(int)


def everything(batch):
    """All tensors and lists of a batch, for comparison."""
    flat = [batch.subject_B, batch.relation_B, batch.scans_B, batch.sample_index_B]
    for many in batch.views.values():
        flat += [getattr(view, f.name) for view in many for f in fields(view)]
    return flat


def same(one, other):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(everything(one), everything(other), strict=True)
    )


MIXED = {
    "global": ViewSpec(2, (10, 12, 9), augment="strong", overlap=0.5),
    "local": ViewSpec(2, (6, 6, 6), augment="weak"),
}
LABELED = {"crop": ViewSpec(1, (8, 10, 12), augment="segmentation", labeled=True)}
PAIRED = {
    "pair": ViewSpec(2, (8, 8, 8), spacing_mm=(1.5, 1.5, 1.5), augment="strong", pair="same_box", overlap=0.6)
}


@pytest.mark.parametrize("plan", [MIXED, LABELED, PAIRED])
def test_shapes_and_fields(archive, plan):
    batch = next(iter(Loader(archive, plan, batch_size=3, steps=1, seed=0)))
    assert batch.seed == 0
    assert batch.sample_index_B.tolist() == [0, 1, 2]
    for name, many in batch.views.items():
        spec = plan[name]
        assert len(many) == spec.count
        for view in many:
            assert view.image_BCDHW.shape == (3, 2 if spec.labeled else 1, *spec.size)
            assert view.image_BCDHW.dtype == torch.float32
            assert view.valid_BDHW.dtype == view.foreground_BDHW.dtype == torch.bool
            assert view.affine_B44.dtype == torch.float64
            hidden = ~view.valid_BDHW[:, None].expand_as(view.image_BCDHW)
            assert torch.all(view.image_BCDHW[hidden] == 0)
            assert not (view.foreground_BDHW & ~view.valid_BDHW).any()
            assert (view.label_BDHW is not None) == spec.labeled
            columns = view.affine_B44[:, :3, :3].norm(dim=1)
            torch.testing.assert_close(view.spacing_mm_B3.double(), columns, atol=1e-5, rtol=0)
    first, again = (
        prepare_batch(copy.deepcopy(batch), plan) for _ in range(2)
    )  # labeled views change in place
    assert same(first, again)


def check_millimetres(view, archive, keys):
    # the image is a ramp over millimetres: its inverse intensity says where each voxel truly lies
    for i, key in enumerate(keys):
        line = archive.linear(key)
        index = torch.from_numpy(np.indices(view.image_BCDHW.shape[2:]).reshape(3, -1)).double()
        mm = view.affine_B44[i, :3, :3] @ index + view.affine_B44[i, :3, 3:]
        expected = (3 * mm[0] + 2 * mm[1] + mm[2] + 1).clamp(line.low, line.high)
        found = view.image_BCDHW[i, 0].reshape(-1).double() * line.scale + line.shift
        valid = view.valid_BDHW[i].reshape(-1)
        assert valid.any()
        error = (found - expected)[valid].abs()
        # voxels half a voxel beyond the outermost centres repeat them
        assert error.median() < 1.5
        assert error.max() < 6


@pytest.mark.parametrize("plan", [MIXED, PAIRED])
def test_affines_tell_where_each_voxel_lies(archive, plan):
    mirrored = {n: s.model_copy(update={"mirror_axes": (0, 1, 2)}) for n, s in SPATIAL.items()}
    for batch in Loader(archive, plan, batch_size=4, steps=4, seed=2, spatial=mirrored):
        for many in batch.views.values():
            for number, view in enumerate(many):
                keys = [scans[number if plan is PAIRED else 0] for scans in batch.scans_B]
                check_millimetres(view, archive, keys)


def boxes_mm(view):
    corners = torch.tensor([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)]).double()
    size = torch.tensor(view.image_BCDHW.shape[2:]).double()
    points = corners * size - 0.5
    mm = points @ view.affine_B44[:, :3, :3].transpose(1, 2) + view.affine_B44[:, None, :3, 3]
    return mm.amin(1), mm.amax(1)


@pytest.mark.parametrize(("pair", "overlap"), [("none", 0.5), ("none", 1.0), ("same_box", 0.7)])
def test_views_overlap_as_asked(archive, pair, overlap):
    plan = {"two": ViewSpec(2, (10, 9, 8), spacing_mm=(1.0, 1.0, 1.0), pair=pair, overlap=overlap)}
    shares = []
    for batch in Loader(archive, plan, batch_size=6, steps=4, seed=1, relations=("registered", "same_frame")):
        (low_a, high_a), (low_b, high_b) = (boxes_mm(view) for view in batch.views["two"])
        shared = torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)
        shares.append((shared / (high_a - low_a)).amin(dim=1))
    shares = torch.cat(shares)
    assert shares.min() >= overlap - 0.06
    if overlap < 1:
        assert shares.min() < overlap + 0.2


def test_unaligned_relations_are_placed_independently(tmp_path):
    volume = np.ones((40, 40, 40))
    rows = [scan_row(k, volume.shape, modality=m) for k, m in (("a", "CT"), ("b", "MR"))]
    pairs = [PairRow(scan_a="a", scan_b="b", relation="same_study")]
    archive = make_archive(tmp_path, [(row, volume) for row in rows], pairs=pairs)
    plan = {"pair": ViewSpec(2, (6, 6, 6), pair="same_box", overlap=0.9)}
    distance = []
    for batch in Loader(archive, plan, batch_size=8, steps=3, seed=0):
        a, b = batch.views["pair"]
        distance.append((a.affine_B44 - b.affine_B44)[:, :3, 3].abs().amax(dim=1))
        assert batch.relation_B == ["same_study"] * 8
        assert (a.modality_B[0], b.modality_B[0]) == ("CT", "MR")
    assert torch.cat(distance).max() > 10


def test_labels_follow_their_image(archive):
    for batch in Loader(archive, LABELED, batch_size=4, steps=6, seed=0):
        (view,) = batch.views["crop"]
        for i in range(4):
            index = torch.from_numpy(np.indices(view.label_BDHW.shape[1:]).reshape(3, -1)).double()
            mm = view.affine_B44[i, :3, :3] @ index + view.affine_B44[i, :3, 3:]
            scan = np.linalg.inv(np.array(archive.scans[batch.scans_B[i][0]].affine_44))
            voxel = scan[:3, :3] @ mm.numpy() + scan[:3, 3:]
            low, high = np.array([[4.4], [5.4], [6.4]]), np.array([[5.6], [7.6], [8.6]])
            inside = np.all((voxel > low) & (voxel < high), axis=0)
            label = view.label_BDHW[i].reshape(-1).numpy()
            assert np.all(label[inside] == 1)
            assert np.all((label == UNKNOWN_LABEL) == ~view.valid_BDHW[i].reshape(-1).numpy())
        known = [archive.cases[f"c{s[1:]}"].known_classes for s in batch.subject_B]
        assert view.known_classes_BK.tolist() == [list(k) for k in known]


def test_foreground_share_centres_crops_on_known_classes(archive):
    plan = {"crop": ViewSpec(1, (5, 5, 5), labeled=True)}
    seen = {0.0: [], 1.0: []}
    for share, counts in seen.items():
        for batch in Loader(archive, plan, batch_size=4, steps=20, seed=0, foreground_share=share):
            label = batch.views["crop"][0].label_BDHW
            for i, subject in enumerate(batch.subject_B):
                middle = int(label[i, 2, 2, 2])
                counts.append(middle in (1, 2))
                if share == 1.0 and subject == "s3":
                    assert middle == 1  # class 2 is unknown there
    assert np.mean(seen[1.0]) == 1
    assert np.mean(seen[0.0]) < 0.2


def test_crops_around_classes_do_not_depend_on_salted_keys(tmp_path):
    generator = np.random.default_rng(1)
    voxels, label = generator.integers(1, 99, (30, 32, 34)), np.zeros((30, 32, 34))
    label[5:25, 5:25, 5:25] = 1  # more voxels than are remembered
    crops = []
    for name in ("x", "y"):
        row = scan_row(f"scan-{name}", label.shape, box=((0, 0, 0), label.shape)).model_copy(
            update={"content_hash": "same"}
        )
        case = CaseRow(
            case=f"case-{name}", subject="s0", scans=(row.key,), labeled=True, known_classes=(True, True)
        )
        made = make_archive(
            tmp_path / name, [(row, voxels)], cases=[(case, label)], classes=("background", "big")
        )
        plan = {"crop": ViewSpec(1, (5, 5, 5), labeled=True)}
        batches = Loader(made, plan, batch_size=2, steps=3, seed=0, foreground_share=1.0)
        crops.append([batch.views["crop"][0].image_BCDHW for batch in batches])
    assert all(torch.equal(a, b) for a, b in zip(*crops, strict=True))


def test_a_crop_larger_than_the_volume_is_padded(archive):
    plan = {"crop": ViewSpec(1, (30, 30, 30))}
    starts = set()
    for batch in Loader(archive, plan, batch_size=4, steps=4, seed=0, modality_temperature=1.0):
        (view,) = batch.views["crop"]
        for i, scans in enumerate(batch.scans_B):
            assert view.valid_BDHW[i].sum() == np.prod(archive.scans[scans[0]].shape)
            starts.add(tuple(torch.argwhere(view.valid_BDHW[i])[0].tolist()))
    assert len(starts) > 4


def test_crops_of_air_are_drawn_again(tmp_path):
    volume = np.full((40, 40, 40), -50)
    volume[20:, 20:, 20:] = 100
    archive = make_archive(tmp_path, [(scan_row("a", volume.shape), volume)])
    plan = {"crop": ViewSpec(1, (12, 12, 12))}

    def bodies(minimum):
        loader = Loader(archive, plan, batch_size=20, steps=3, seed=0, minimum_foreground=minimum)
        return np.mean([b.views["crop"][0].foreground_BDHW.flatten(1).any(1).float().mean() for b in loader])

    assert bodies(0.05) > bodies(0.0) + 0.15


def test_resuming_ranks_and_accumulation_see_the_same_samples(archive):
    whole = list(Loader(archive, MIXED, batch_size=4, steps=4, seed=5))
    resumed = list(Loader(archive, MIXED, batch_size=4, steps=4, seed=5, start_step=2))
    assert len(whole) == 4
    assert len(resumed) == 2
    assert all(same(a, b) for a, b in zip(whole[2:], resumed, strict=True))
    ranks = [
        list(Loader(archive, MIXED, batch_size=4, steps=4, seed=5, rank=r, world=2, accumulate=2))
        for r in (0, 1)
    ]
    assert [len(r) for r in ranks] == [8, 8]
    for step, batch in enumerate(whole):
        slices = [ranks[r][2 * step + micro] for micro in (0, 1) for r in (0, 1)]
        for number, part in enumerate(slices):
            assert part.sample_index_B.tolist() == [4 * step + number]
            for name, many in batch.views.items():
                for view, piece in zip(many, part.views[name], strict=True):
                    assert torch.equal(view.image_BCDHW[number], piece.image_BCDHW[0])


def test_workers_change_nothing(archive):
    here = list(Loader(archive, LABELED, batch_size=2, steps=5, seed=1, start_step=1))
    there = list(Loader(archive, LABELED, batch_size=2, steps=5, seed=1, start_step=1, workers=2))
    assert len(here) == 4
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_a_dead_worker_and_a_damaged_file_end_in_one_line(archive, tmp_path):
    stream = iter(Loader(archive, MIXED, batch_size=2, steps=500, seed=0, workers=1))
    next(stream)
    worker = max(pid for pid in _children(os.getpid()) if _is_worker(pid))
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match=r"data worker process died .*fewer workers"):
        for _ in stream:
            pass

    volume = np.ones((8, 8, 8))
    broken = make_archive(tmp_path, [(scan_row("a", volume.shape), volume)])
    (tmp_path / "volumes" / "a.b2nd").unlink()
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"a\.b2nd"):
            next(
                iter(
                    Loader(
                        broken,
                        {"crop": ViewSpec(1, (4, 4, 4))},
                        batch_size=1,
                        steps=2,
                        seed=0,
                        workers=workers,
                    )
                )
            )


def _children(pid):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid:
                found += [int(folder.name), *_children(int(folder.name))]
    return found


def _is_worker(pid):
    return b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_wrong_use_is_refused(archive):
    with pytest.raises(ConfigError, match="batch_size 3 does not divide into 2 processes"):
        Loader(archive, MIXED, batch_size=3, steps=1, seed=0, world=2)
    with pytest.raises(ConfigError, match="crop size"):
        Loader(archive, {"crop": ViewSpec(1, (0, 4, 4))}, batch_size=1, steps=1, seed=0)
    with pytest.raises(ConfigError, match="foreground_share"):
        Loader(archive, LABELED, batch_size=1, steps=1, seed=0, foreground_share=3)


def test_mirror_axes_mirror_image_and_label_together_about_half_the_time(archive):
    shape = (16, 20, 24)  # the box of the CT, so every crop is all of it
    plain, mirrored = (
        list(
            Loader(
                archive,
                {"crop": ViewSpec(1, shape, labeled=True, mirror_axes=axes)},
                batch_size=4,
                steps=5,
                seed=0,
                foreground_share=0.0,
            )
        )
        for axes in ((), (1,))
    )
    turned = []
    for before, after in zip(plain, mirrored, strict=True):
        a, b = before.views["crop"][0], after.views["crop"][0]
        for i in range(4):
            flip = torch.equal(b.image_BCDHW[i], a.image_BCDHW[i].flip(2))
            assert flip != torch.equal(b.image_BCDHW[i], a.image_BCDHW[i])
            expected = a.label_BDHW[i].flip(1) if flip else a.label_BDHW[i]
            assert torch.equal(b.label_BDHW[i], expected)
            turned.append(flip)
    assert 5 <= sum(turned) <= 15


def test_mirror_axes_beyond_the_third_are_refused(archive):
    with pytest.raises(ConfigError, match=r"mirror_axes are among 0 \(D\), 1 \(H\), 2 \(W\), got \[3\]"):
        Loader(archive, {"crop": ViewSpec(1, (8, 8, 8), mirror_axes=(3,))}, batch_size=1, steps=1, seed=0)


def test_a_small_class_gets_its_share_of_the_crops(tmp_path):
    """The voxels of class 2 are one in a hundred: as many crops as class 1, or one in a hundred of them."""
    label = np.zeros((12, 20, 30))
    label[1:11, 2:12, 3:13], label[5, 6:16, 16] = 1, 2
    assert (label == 1).sum() == 100 * (label == 2).sum()
    row = scan_row("scan", label.shape, box=((0, 0, 0), label.shape))
    case = CaseRow(
        case="case", subject="s0", scans=("scan",), labeled=True, known_classes=(True, True, True, True)
    )
    made = make_archive(
        tmp_path, [(row, label)], cases=[(case, label)], classes=("background", "big", "small", "absent")
    )
    shares = {}
    for balance in (True, False):
        plan = {"crop": ViewSpec(1, (1, 1, 1), labeled=True)}
        options = {"foreground_share": 1.0, "class_balance": balance}
        batches = Loader(made, plan, batch_size=100, steps=4, seed=0, **options)
        centres = torch.cat([batch.views["crop"][0].label_BDHW.flatten() for batch in batches])
        assert set(centres.tolist()) == {1, 2}
        shares[balance] = float((centres == 2).float().mean())
    assert shares[True] == pytest.approx(0.5, abs=0.075)  # 3 standard errors of 400 draws
    assert shares[False] == pytest.approx(0.01, abs=0.015)
