import base64
import json

import numpy as np
import pytest

from medseg_ssl.data import appearance as module
from medseg_ssl.data import intensity, nifti, resample
from medseg_ssl.data.appearance import SIMILARITY, appearance, look, near_pairs, similarity
from medseg_ssl.data.manifest import ScanRow
from tests.data.heads import head, seen
from tests.data.scans import affine, save

ONE_MM = (1.0, 1.0, 1.0)


def seen_at(volume, spacing_mm=ONE_MM):
    return appearance(volume, None, spacing_mm)


def coarser(volume, factor, order, valid=None, spacing_mm=ONE_MM):
    """The volume on a grid of ``factor`` times the spacing, and that spacing."""
    grid = affine(spacing_mm)
    shape, to = resample.grid_for_spacing(volume.shape, grid, tuple(factor * mm for mm in spacing_mm))
    values, valid = resample.resample_valid(volume, valid, grid, shape, to, order)
    return values, valid, resample.spacing_of(to)


def test_a_copy_looks_the_same_and_another_head_does_not():
    original = seen_at(head(0))
    rescaled = np.rint(head(0) * 3.7 + 11).astype(np.int16)
    assert similarity(original, original) == pytest.approx(1)
    assert similarity(original, seen_at(rescaled)) > 0.999
    for order in (1, 3):
        values, _, spacing_mm = coarser(head(0), 1.3, order)
        assert similarity(original, seen_at(values, spacing_mm)) > SIMILARITY
    # the same outline, as of two subjects on one template
    assert max(similarity(original, seen_at(head(seed))) for seed in range(1, 6)) < 0.5


def test_the_orientation_of_the_file_does_not_matter(tmp_path):
    volume = head(3)
    plain = affine()
    turned = plain.copy()
    turned[:, 2] *= -1  # the file's x runs from right to left
    turned[0, 3] = volume.shape[2] - 1
    paths = [save(tmp_path / "a.nii.gz", volume, plain), save(tmp_path / "b.nii.gz", volume, turned)]
    first, second = (nifti.read_nifti(path) for path in paths)
    assert (first.original.to_file(volume) != second.original.to_file(volume)).any()
    texts = [appearance(v.array, v.valid, v.spacing_mm) for v in (first, second)]
    assert texts[0] == texts[1]
    # a mirror image that claims the same orientation is another scan
    assert similarity(texts[0], seen_at(volume[:, :, ::-1])) < 0.5


def test_voxels_without_data_count_as_darkest():
    volume, valid = head(1) + 5, np.ones((40, 44, 36), dtype=bool)
    valid[:, :, :6] = False
    other = volume.copy()
    other[~valid] = 1e6
    volume[~valid] = volume[valid].min()
    assert appearance(other, valid, ONE_MM) == seen_at(volume)


@pytest.mark.parametrize("volume", [np.full((9, 9, 9), 7.0), np.zeros((4, 1, 30))])
def test_a_flat_volume_has_no_look(volume):
    assert seen_at(volume) == ""
    assert appearance(head(0), np.zeros((40, 44, 36), dtype=bool), ONE_MM) == ""


def test_it_is_compact_and_damage_is_no_match():
    text = seen_at(head(0))
    assert len(text) < 800
    found = look(text)
    assert found is not None
    assert found.extent_mm == (40.0, 44.0, 36.0)
    for broken in (
        "",
        "0" + text[1:],
        text[:-8],
        text.replace("x", "y"),
        "1:1x2x3:!!!!",
        "1:0x2x3:" + text[-744:],
    ):
        assert look(broken) is None
        assert similarity(text, broken) == 0


def test_another_field_of_view_is_no_copy():
    assert similarity(seen_at(head(0)), seen_at(head(0), (1.2, 1.0, 1.0))) == 0
    assert similarity(seen_at(head(0)), seen_at(head(0), (1.02, 1.0, 1.0))) == pytest.approx(1)


def made_up(number, copies):
    """Rows with random fingerprints; ``copies`` of them come again with a cosine of about 0.97."""
    rng = np.random.default_rng(5)
    codes = rng.normal(0, 40, (number, module._selection().size))
    codes = np.vstack([codes, codes[:copies] + rng.normal(0, 10, codes[:copies].shape)])
    coded = [base64.b64encode(np.rint(c).clip(-127, 127).astype(np.int8).tobytes()).decode() for c in codes]
    extents = [f"{200 + i % 7:.1f}x180.0x{150 * (1 + i % 2):.1f}" for i in [*range(number), *range(copies)]]
    row = seen("a", head(0))
    texts = [f"1:{extent}:{code}" for extent, code in zip(extents, coded, strict=True)]
    return [row.model_copy(update={"key": str(i), "appearance": text}) for i, text in enumerate(texts)]


def archive_of_heads(number=14):
    """Heads of different subjects; those of seed 3, 11 and 12 have a copy (one of them as CT, which is none)."""
    rows = [seen(f"s{i}", head(i)) for i in range(number)]
    values, _, spacing_mm = coarser(head(3), 1.3, 1)
    rows += [seen("copy3", values, spacing_mm=spacing_mm), seen("copy11", np.rint(head(11) * 2))]
    return [*rows, seen("ct12", head(12), modality="CT")]


def test_near_pairs_known_answer():
    rows = archive_of_heads()
    found = [(rows[a].key, rows[b].key) for a, b, _ in near_pairs(rows)]
    assert found == [("s3", "copy3"), ("s11", "copy11")]
    training, protected = rows[:10], rows[10:]
    assert [(training[a].key, protected[b].key) for a, b, _ in near_pairs(training, protected)] == [
        ("s3", "copy3")
    ]


def test_buckets_find_what_comparing_all_finds_and_look_at_far_fewer(monkeypatch):
    rows = made_up(600, 40)
    everything = near_pairs(rows)
    assert [(a, b) for a, b, _ in everything] == [(i, 600 + i) for i in range(40)]
    looked = []
    verified = module._verified

    def counted(a, b, pairs, **named):
        pairs = list(pairs)
        looked.append(sum(len(i) for i, _ in pairs))
        return verified(a, b, iter(pairs), **named)

    monkeypatch.setattr(module, "_EXACT", 0)
    monkeypatch.setattr(module, "_verified", counted)
    assert near_pairs(rows) == everything
    assert near_pairs(rows[:600], rows[600:]) == [p._replace(b=p.b - 600) for p in everything]
    assert looked[0] < 0.01 * 640**2 / 2


def test_many_equal_scans_make_few_pairs():
    row = seen("a", head(0))
    rows = [row.model_copy(update={"key": str(i)}) for i in range(1000)]
    assert [(p.a, p.b) for p in near_pairs(rows)] == [(0, i) for i in range(1, 1000)]
    assert len(near_pairs(rows[:500], rows[500:])) == 500


def test_rows_of_older_archives_match_nothing():
    row = seen("a", head(0))
    tree = json.loads(row.model_dump_json())
    del tree["appearance"]
    older = ScanRow.model_validate(tree)
    assert older.appearance == ""
    assert near_pairs([older, older, row]) == []


@pytest.mark.realdata
def test_real_copies_and_real_strangers(real_data):
    """OpenKBP (one scanner, one posture) and hippocampus crops on one grid; figures of all sets stand in LOG.md."""
    files = sorted((real_data / "openkbp_ct" / "imagesTr").glob("*.nii.gz"))[1::4]
    files += sorted((real_data / "msd_hippocampus" / "imagesTr").glob("*.nii.gz"))[1::12]
    assert len(files) > 20
    originals, copies = [], []
    for path in files:
        modality = "CT" if "openkbp" in str(path) else "MR"
        volume = nifti.read_nifti(path)
        outside = intensity.no_data_region(volume.array, modality)
        valid = None if outside is None else ~outside
        values, inside, spacing_mm = coarser(volume.array, 1.3, 3, valid, volume.spacing_mm)
        originals.append(appearance(volume.array, valid, volume.spacing_mm))
        copies.append(appearance(np.rint(values * 2 + 30), inside, spacing_mm))
    for i, original in enumerate(originals):
        assert similarity(original, copies[i]) > SIMILARITY
        strangers = [text for j, text in enumerate(originals) if j != i]
        assert max(similarity(original, text) for text in strangers) < SIMILARITY
