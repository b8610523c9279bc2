"""A template of scans whose true correspondence is known, since one formula painted them all."""

import numpy as np
import pytest
import torch

from medseg_ssl.config import UserError
from medseg_ssl.data import groupwise
from medseg_ssl.objectives.template import _Places
from tests.data.small_archive import make_archive, scan_row

CENTRES = np.random.default_rng(3).uniform(-14, 14, (40, 3))
HEIGHTS = np.random.default_rng(4).uniform(-300, 300, 40)
SHAPES = {"a": ((34, 38, 36), (1.0, 1.0, 1.0)), "b": ((30, 38, 24), (1.2, 1.0, 1.5))}


def anatomy(mm_P3: np.ndarray) -> np.ndarray:
    """Blobs of tissue at fixed places in millimetres."""
    apart_PK = ((mm_P3[:, None] - CENTRES) ** 2).sum(-1)
    return 300 + (HEIGHTS * np.exp(-apart_PK / (2 * 3.0**2))).sum(-1)


def to_anatomy(number: int) -> np.ndarray:
    """Affine from the millimetres of scan ``number`` to those of the anatomy."""
    generator = np.random.default_rng(number)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(generator.uniform(0.9, 1.1, 3)) + generator.uniform(-0.06, 0.06, (3, 3))
    affine[:3, 3] = generator.uniform(-3, 3, 3)
    return affine


def scan_of(number: int, kind: str = "a"):
    shape, spacing = SHAPES[kind]
    grid_44 = np.zeros((4, 4))
    grid_44[0, 2], grid_44[1, 1], grid_44[2, 0], grid_44[3, 3] = spacing[2], spacing[1], spacing[0], 1.0
    grid_44[:3, 3] = -grid_44[:3, :3] @ ((np.array(shape) - 1) / 2)
    row = scan_row(f"scan{number}", shape, subject=f"s{number}", spacing_mm=spacing, affine_44=grid_44)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    mm = index @ grid_44[:3, :3].T + grid_44[:3, 3]
    move = to_anatomy(number)
    return row, anatomy(mm @ move[:3, :3].T + move[:3, 3]).reshape(shape)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    scans = [scan_of(number, "b" if number == 4 else "a") for number in range(6)]
    return make_archive(tmp_path_factory.mktemp("groupwise"), scans)


@pytest.fixture(scope="module")
def template(archive):
    return groupwise.build(list(archive.scans.values()), archive)


def places(template, points_N3, *, registered=True):
    """Template voxels of anatomical points, seen through every scan: (S, N, 3), and which scans see them."""
    found, seen = [], []
    sites = _Places(template, every=3)
    for number, key in enumerate(template.keys):
        back = np.linalg.inv(to_anatomy(int(key.removeprefix("scan"))))
        mm = torch.from_numpy(points_N3 @ back[:3, :3].T + back[:3, 3]).float()
        place, there = sites.of(number, torch.eye(4, dtype=torch.float64), mm)
        found.append(place if registered else mm)
        seen.append(there)
    return torch.stack(found), torch.stack(seen)


def test_one_anatomical_point_has_one_place_whatever_the_scan(template):
    points = np.random.default_rng(0).uniform(-9, 9, (200, 3))
    place_SN3, seen_SN = places(template, points)
    before_SN3, _ = places(template, points, registered=False)
    assert seen_SN.float().mean() > 0.9
    spread = place_SN3.std(dim=0).square().sum(-1).sqrt() * template.spacing_mm
    apart = before_SN3.std(dim=0).square().sum(-1).sqrt()
    assert apart.median() > 2.0  # mm: so far apart were they before
    assert spread.median() < 0.5


def test_the_template_is_sharper_than_the_mean_of_the_unregistered_scans(template, archive):
    size = tuple(template.reference_DHW.shape)
    inner = tuple(slice(n // 2 - 10, n // 2 + 10) for n in size)  # where the blobs are
    images = []
    for row in archive.scans.values():
        grid_44 = groupwise._centred(row, template.spacing_mm, size)
        images.append(groupwise._normalised(archive, row, size, grid_44)[0][inner])
    blurred = np.mean(images, axis=0).std()
    assert template.reference_DHW.numpy()[inner].std() > 1.1 * blurred


def test_the_same_scans_give_the_same_file_and_others_a_new_one(archive, template, tmp_path):
    path, told = tmp_path / "t.npz", []
    keys = sorted(archive.scans)
    first = groupwise.load_or_build(
        path, archive, keys, report=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (30, 30)
    told.clear()
    again = groupwise.load_or_build(path, archive, keys[::-1], report=lambda *n: told.append(n))
    assert not told
    for name in groupwise.ARRAYS:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name), getattr(template, name))
    groupwise.load_or_build(path, archive, keys[:3], report=lambda *n: told.append(n))
    assert told[-1] == (15, 15)
    path.write_bytes(path.read_bytes()[:100])
    told.clear()
    groupwise.load_or_build(path, archive, keys[:3], report=lambda *n: told.append(n))
    assert told
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_one_scan_is_no_template(archive):
    with pytest.raises(UserError, match="at least 2 scans with data, got 1 of 1"):
        groupwise.build([archive.scans["scan0"]], archive)


def test_a_scan_without_data_is_left_out(tmp_path):
    scans = [scan_of(0), scan_of(1), scan_of(2)]
    scans[1] = (scans[1][0], np.full(scans[1][1].shape, -32768))
    made = make_archive(tmp_path, scans)
    assert groupwise.build(list(made.scans.values()), made).keys == ("scan0", "scan2")


def test_large_anatomies_are_registered_on_a_coarser_grid():
    rows = [scan_row(f"s{n}", (400, 500, 512), spacing_mm=(1.5, 0.8, 0.8)) for n in range(3)]
    spacing, size = groupwise.working_grid(rows)
    assert np.prod(size) < 1.3 * groupwise.LARGEST_GRID
    assert all(n % 2 == 0 for n in size)
    assert np.array(size) * spacing == pytest.approx(np.array([600, 400, 409.6]), rel=0.15)


def test_a_full_disk_is_one_line(template, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UserError, match=r"cannot write .*t\.npz: No space left on device"):
        groupwise._save(tmp_path / "t.npz", template, "x")
    assert not list(tmp_path.iterdir())
