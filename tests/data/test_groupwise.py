"""A template of scans whose true correspondence is known, since one formula painted them all."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_ssl.config import UserError
from medseg_ssl.data import groupwise
from medseg_ssl.nets.correspondence import read_features
from medseg_ssl.objectives.template import _Places
from tests.data.small_archive import make_archive, scan_row

CENTRES = np.random.default_rng(3).uniform(-10, 10, (25, 3))
HEIGHTS = np.random.default_rng(4).uniform(-300, 300, 25)
SHAPES = {"a": ((26, 28, 26), (1.0, 1.0, 1.0)), "b": ((22, 28, 18), (1.2, 1.0, 1.5))}


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


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """What a few blobs in a small cube need, so that these tests take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groupwise, "ROUNDS", ((30, 0), (10, 20), (10, 30)))
        patch.setattr(groupwise, "FINAL", (20, 40, 15))
        yield


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
    points = np.random.default_rng(0).uniform(-7, 7, (200, 3))
    place_SN3, seen_SN = places(template, points)
    before_SN3, _ = places(template, points, registered=False)
    assert seen_SN.float().mean() > 0.9
    spread = place_SN3.std(dim=0).square().sum(-1).sqrt() * template.spacing_mm
    apart = before_SN3.std(dim=0).square().sum(-1).sqrt()
    assert apart.median() > 2.0  # mm: so far apart were they before
    assert spread.median() < 0.5


def test_the_template_is_sharper_than_the_mean_of_the_unregistered_scans(template, archive):
    size = tuple(template.reference_DHW.shape)
    inner = tuple(slice(n // 2 - 8, n // 2 + 8) for n in size)  # where the blobs are
    images = []
    for row in archive.scans.values():
        grid_44 = groupwise.centred_grid(row, spacing_mm=template.spacing_mm, size=size)
        images.append(groupwise.normalised_on(archive, row, size=size, affine_44=grid_44)[0][inner])
    blurred = np.mean(images, axis=0).std()
    assert template.reference_DHW.numpy()[inner].std() > 1.1 * blurred


@pytest.mark.slow
def test_the_same_scans_give_the_same_file_and_others_a_new_one(archive, template, tmp_path):
    path, told = tmp_path / "t.npz", []
    keys = sorted(archive.scans)
    first = groupwise.load_or_build(path, archive, keys, report=lambda *n: told.append(n))
    assert told[-1] == (24, 24)
    told.clear()
    again = groupwise.load_or_build(path, archive, keys[::-1], report=lambda *n: told.append(n))
    assert not told
    for name in groupwise.ARRAYS:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name), getattr(template, name))
    with pytest.raises(UserError, match="of other scans"):
        groupwise.load_or_build(path, archive, keys[:3], build_missing=False)
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

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match=r"cannot write .*t\.npz: No space left on device"):
        groupwise._save(tmp_path / "t.npz", template, identity="x")
    assert not list(tmp_path.iterdir())


def test_without_a_step_a_voxels_place_is_itself(archive, monkeypatch):
    """Half a voxel lost on the way through grids, lattice and affines would show here."""
    monkeypatch.setattr(groupwise, "ROUNDS", ())
    monkeypatch.setattr(groupwise, "FINAL", (0, 0, 0))
    made = groupwise.build(list(archive.scans.values()), archive)
    sites, size = _Places(made, every=3), tuple(made.reference_DHW.shape)
    index = np.random.default_rng(0).uniform(1, np.array(size) - 2, (300, 3))
    for number, key in enumerate(made.keys):
        grid_44 = groupwise.centred_grid(archive.scans[key], spacing_mm=made.spacing_mm, size=size)
        mm = torch.from_numpy(index @ grid_44[:3, :3].T + grid_44[:3, 3]).float()
        place, _ = sites.of(number, torch.eye(4, dtype=torch.float64), mm)
        assert torch.allclose(place.double(), torch.from_numpy(index), atol=1e-3)


def test_the_template_shows_at_a_place_what_the_scan_shows_there(archive, template):
    sites, number = _Places(template, every=3), 1
    row = archive.scans[template.keys[number]]
    index = torch.from_numpy(np.random.default_rng(0).uniform(4, 21, (4000, 3))).float()
    place, seen = sites.of(number, torch.tensor(row.affine_44, dtype=torch.float64), index)
    stored = torch.from_numpy(archive.read(row.key, (0, 0, 0), row.shape).astype(np.float32))
    scan_N = read_features(stored[None, None], index[None], (1, 1, 1))[0, :, 0]

    def fit(shift):
        shown = read_features(template.reference_DHW[None, None], (place + shift)[None], (1, 1, 1))[0, :, 0]
        return torch.corrcoef(torch.stack([scan_N[seen], shown[seen]]))[0, 1].item()

    for axis in range(3):
        one = torch.eye(3)[axis]
        assert fit(0 * one) > max(fit(one), fit(-one))


@pytest.mark.slow
def test_an_unlike_scan_gets_no_place(tmp_path, caplog):
    scans = [scan_of(number) for number in range(5)]
    noise = np.random.default_rng(0).normal(300, 80, scans[3][1].shape)
    scans[3] = (scans[3][0], noise)
    made = make_archive(tmp_path, scans)
    found = groupwise.build(list(made.scans.values()), made)
    assert found.keys == ("scan0", "scan1", "scan2", "scan4")
    assert len(found.place_S3DHW) == len(found.to_lattice_S44) == len(found.likeness_S) == 4
    assert "1 of 5 scans are unlike the template" in caplog.text


@pytest.mark.slow
def test_air_stays_air_in_the_template(tmp_path):
    """Skin and lungs are the strongest edges of a CT: what is outside the body is averaged too."""
    scans = []
    for number in range(3):
        row, painted = scan_of(number)
        row = row.model_copy(
            update={"modality": "CT", "unit": "HU"}
            | {"statistics": row.statistics.model_copy(update={"foreground_threshold": -500.0})}
        )
        far = (
            np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in painted.shape], indexing="ij")) ** 2
        ).sum(0)
        scans.append((row, np.where(far < 0.9, painted - 300, -1000.0)))
    made = make_archive(tmp_path, scans)
    found = groupwise.build(list(made.scans.values()), made)
    d, h, w = (n // 2 for n in found.reference_DHW.shape)
    assert found.weight_DHW[3, 5, 5] < 0.1
    assert found.reference_DHW[3, 5, 5] == pytest.approx(found.reference_DHW.min().item(), abs=0.1)
    assert found.reference_DHW[3, 5, 5] < found.reference_DHW[d, h, w] - 1


@pytest.mark.parametrize("damage", ["empty", "cut", "scrambled"])
def test_a_damaged_file_is_named_or_made_again(archive, template, tmp_path, damage, monkeypatch):
    path, keys, made = tmp_path / "t.npz", sorted(archive.scans), []
    monkeypatch.setattr(groupwise, "build", lambda *args, **options: made.append(1) or template)
    groupwise.load_or_build(path, archive, keys)
    content = bytearray(path.read_bytes())
    if damage == "scrambled":
        content[300:-300:7] = bytes(len(content[300:-300:7]))
    path.write_bytes({"empty": b"", "cut": bytes(content[:5000]), "scrambled": bytes(content)}[damage])
    with pytest.raises(
        UserError, match=r"t\.npz is missing, damaged or of other scans, but training has begun"
    ):
        groupwise.load_or_build(path, archive, keys, build_missing=False)
    groupwise.load_or_build(path, archive, keys)
    assert len(made) == 2
    assert groupwise.load_or_build(path, archive, keys, build_missing=False).keys == template.keys


@pytest.mark.realdata
def test_real_hippocampi_meet_in_their_template(real_data, tmp_path, monkeypatch):
    from medseg_ssl.config import parse, read_yaml
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.prepare import PrepareConfig, prepare

    tree = read_yaml(Path(__file__).parents[2] / "configs" / "prepare" / "hippocampus.yaml")
    archive = Archive.open(
        prepare(parse(PrepareConfig, tree), [real_data / "msd_hippocampus"], tmp_path / "archive")
    )
    cases = {case.scans[0]: case.case for case in archive.cases.values() if case.labeled}
    rows = sorted((archive.scans[key] for key in cases), key=lambda row: row.content_hash)[:12]

    def overlap(template):
        """Mean Dice of the whole hippocampus between scans, each seen in the template's voxels."""
        sites, shown = _Places(template, every=3), []
        for number, key in enumerate(template.keys):
            row = archive.scans[key]
            label = torch.from_numpy(archive.read_label(cases[key], (0, 0, 0), row.shape).astype(np.float32))
            index = (label > 0).nonzero().float()
            place, _ = sites.of(number, torch.tensor(row.affine_44, dtype=torch.float64), index)
            volume = torch.zeros(template.reference_DHW.shape)
            top = torch.tensor(volume.shape) - 1
            volume[tuple(place.round().long().clamp(min=torch.zeros(3, dtype=torch.long), max=top).T)] = 1.0
            shown.append(volume)
        pairs = [(a, b) for i, a in enumerate(shown) for b in shown[:i]]
        return float(np.mean([2 * (a * b).sum() / (a.sum() + b.sum()) for a, b in pairs]))

    for name, steps in (("ROUNDS", ((40, 0), (20, 30), (20, 50))), ("FINAL", (30, 80, 30))):
        monkeypatch.setattr(groupwise, name, steps)
    registered = overlap(groupwise.build(rows, archive))
    monkeypatch.setattr(groupwise, "ROUNDS", ())
    monkeypatch.setattr(groupwise, "FINAL", (0, 0, 0))
    centred = overlap(groupwise.build(rows, archive))
    assert registered > centred + 0.1
    assert registered > 0.5
