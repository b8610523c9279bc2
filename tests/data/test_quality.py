import re

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.data import intensity
from medseg_ssl.data.quality import CHECKED, SEVERITY, Quality, badness, findings, worst_first
from medseg_ssl.data.recipe import Recipe
from tests.data.small_archive import scan_row

SHAPE = (40, 44, 48)


def body_of(modality="CT"):
    """A soft ellipsoid with texture in air; nothing is wrong with it."""
    rng = np.random.default_rng(0)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    inside = gaussian_filter(np.float32(np.square(grid).sum(axis=0) < 0.7), 1.0)
    noise = gaussian_filter(rng.normal(0, 1, SHAPE), 1.0) * 60 + rng.normal(0, 5, SHAPE)
    values = {
        "CT": -1000 + inside * (1040 + noise),
        "PT": inside * (1.2 + noise / 100),
        "MR": inside * (300 + noise),
    }
    return values[modality].astype(np.float32)


def found(
    volume, modality="CT", *, valid=None, unit=None, spacing_mm=(3.0, 3.0, 3.0), archive_shape=None, **limits
):
    unit = unit or {"CT": "HU", "PT": "SUV", "MR": "raw"}[modality]
    return findings(
        volume,
        valid,
        modality=modality,
        unit=unit,
        spacing_mm=spacing_mm,
        archive_shape=archive_shape or volume.shape,
        threshold=intensity.foreground_threshold(volume, valid, modality=modality, unit=unit),
        limits=Quality(**limits),
    )


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_nothing_is_wrong_with_a_good_scan(modality):
    assert found(body_of(modality), modality) == {}


def test_tiny_thin_and_odd_voxels():
    volume = body_of("MR")
    assert found(volume[:10, :10, :10], "MR")["tiny"] == "tiny: 1000 voxels (tiny_voxels: 8000)"
    narrow = found(volume, "MR", spacing_mm=(0.3, 3.0, 3.0))
    assert narrow["tiny"] == "tiny: a field of view of 12.0 mm along an axis (tiny_mm: 15)"
    assert "anisotropic" not in narrow
    flags = found(volume, "MR", archive_shape=(7, 44, 48), spacing_mm=(12.0, 1.0, 1.0))
    assert flags["thin"] == "thin: 7 voxels along an axis (thin_voxels: 8)"
    assert flags["extreme_spacing"] == "extreme_spacing: a voxel size of 12 mm (spacing_range_mm: 0.1 to 10)"
    assert flags["anisotropic"] == "anisotropic: voxels 12.0 times as long as wide (anisotropy: 10)"
    assert set(flags) == {"thin", "extreme_spacing", "anisotropic"}


def test_a_cut_range_is_saturated():
    volume = body_of("MR")
    cut = np.minimum(volume, np.percentile(volume[volume > 100], 90))
    flags = found(cut, "MR")
    assert list(flags) == ["saturated"]
    assert flags["saturated"].startswith("saturated: 9.")
    assert found(cut, "MR", saturated_share=0.2) == {}


@pytest.mark.parametrize(
    ("volume", "reason"),
    [
        (
            lambda ct: ct + 1024,
            r"no air: the CT's 0.5th percentile is \d+ HU|median is \d+ HU .*; with 1024 less it would fit",
        ),
        (lambda ct: (ct + 1000) / 1200, r"CT values span [\d.]+ from .*ct_spread_hu: 50"),
        (lambda ct: ct - 1024, "no voxel of the CT is body|median is -"),
        (lambda ct: (ct + 1000) * 20, "no air: the CT's 0.5th percentile is"),
    ],
)
def test_a_ct_that_is_not_in_hu(volume, reason):
    flags = found(volume(body_of()), spacing_mm=(6.0, 6.0, 6.0))
    assert re.search(reason, flags["wrong_scale"])
    # numbers that are no HU are not measured against HU
    assert "wrong_scale" not in found(volume(body_of()), unit="raw")


def test_a_crop_inside_the_body_needs_no_air():
    inside = body_of()[15:25, 15:30, 15:30]
    assert "wrong_scale" not in found(inside)
    assert "wrong_scale" in found(inside, spacing_mm=(30.0, 30.0, 30.0))


@pytest.mark.parametrize(
    ("volume", "reason"),
    [
        (lambda suv: suv * 3000, "a PET value of"),
        (lambda suv: suv * 30, "the PET body's median is"),
        (lambda suv: suv - 5, "a PET value of -5 is no SUV"),
        (lambda suv: suv * 0, "no voxel of the PET is body"),
    ],
)
def test_a_pet_that_is_not_in_suv(volume, reason):
    pet = volume(body_of("PT"))
    assert reason in found(pet, "PT")["wrong_scale"]
    assert "wrong_scale" not in found(pet, "PT", unit="raw")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_repeated_and_blank_planes(axis):
    volume = body_of("MR")
    planes = np.moveaxis(volume, axis, 0)
    planes[21] = planes[20]
    flags = found(volume, "MR")
    assert (
        flags["repeated_slices"] == "repeated_slices: 1 planes equal to their neighbour (repeated_slices: 0)"
    )
    assert "repeated_slices" not in found(volume, "MR", repeated_slices=1)
    planes[21] = 0
    flags = found(volume, "MR")
    assert flags["blank_slices"] == "blank_slices: 1 planes without contrast inside (blank_slices: 0)"
    assert "repeated_slices" not in flags


def test_empty_planes_around_a_body_are_no_fault():
    volume = body_of("MR")
    volume[:6], volume[-4:] = 0, 0
    assert found(volume, "MR") == {}
    # neither is a field of view that ends inside the grid
    valid = np.ones(SHAPE, dtype=bool)
    valid[:12], volume[:12] = False, 0
    assert found(volume, "MR", valid=valid) == {}


def test_missing_slices_show_as_a_jump():
    # a slow drift from plane to plane, as of a long structure
    z = np.arange(60)[:, None, None]
    volume = (
        gaussian_filter(np.random.default_rng(1).normal(0, 1, (60, 40, 40)), 6) * 4000 + 500 + z
    ).astype(np.float32)
    assert "slice_gap" not in found(volume, "MR")
    gap = np.delete(volume, np.s_[25:40], axis=0)
    assert found(gap, "MR")["slice_gap"].startswith("slice_gap: one plane to the next changes")
    # along the coarse axis, where there is one
    turned, spacing_mm = np.moveaxis(gap, 0, 2).copy(), (1.0, 1.0, 5.0)
    assert "slice_gap" in found(turned, "MR", spacing_mm=spacing_mm)
    assert "slice_gap" not in found(turned, "MR")


def test_wrong_limits():
    with pytest.raises(ConfigError, match="no check named 'ugly'; known: tiny, thin"):
        parse(Recipe, {"source": {"name": "msd"}, "quality": {"drop": ["ugly"]}})
    with pytest.raises(ConfigError, match="'near_duplicate' is dropped by the key 'drop_duplicates'"):
        parse(Recipe, {"source": {"name": "msd"}, "quality": {"drop": ["near_duplicate"]}})
    with pytest.raises(ConfigError, match=r"unknown key 'quality.tiny_voxel' \(did you mean 'tiny_voxels'"):
        parse(Recipe, {"source": {"name": "msd"}, "quality": {"tiny_voxel": 3}})
    with pytest.raises(ValidationError, match="must rise"):
        Quality(suv_range=(3, 1))


def test_thresholds_decide_volumes_and_the_search_for_copies_does_not():
    base = Recipe.model_validate({"source": {"name": "msd"}})
    assert base.model_copy(update={"near_duplicate": 0.9}).voxel_hash() == base.voxel_hash()
    assert base.model_copy(update={"quality": Quality(drop=("tiny",))}).voxel_hash() != base.voxel_hash()


def test_worst_first():
    def row(key, *flags):
        return scan_row(key, (4, 4, 4)).model_copy(update={"quality": flags})

    rows = [
        row("a"),
        row("b", "thin", "no_data"),
        row("c", "wrong_scale"),
        row("d", "tiny", "thin"),
        row("e", "new"),
    ]
    assert [r.key for r in worst_first(rows)] == ["c", "d", "b", "e", "a"]
    assert [badness(r) for r in rows] == [0, 1, 5, 3, 1]
    assert badness(row("f", "thin", "thin")) == 1
    assert set(CHECKED) <= set(SEVERITY)
