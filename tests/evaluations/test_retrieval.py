"""Retrieval: a perfect encoder reaches 1, a blind one chance, and nothing but the crop's content can leak."""

import numpy as np
import pytest
import torch
from torch import nn

from medseg_ssl.config import ConfigError, UserError, find
from medseg_ssl.evaluations.base import Evaluation
from medseg_ssl.evaluations.retrieval import Retrieval, _common_middles, _ranks
from medseg_ssl.inference.frozen import FrozenEncoder, network_crop
from medseg_ssl.inference.predictor import Predictor
from tests.evaluations.fakes import MemoryArchive, PooledEncoder, Threshold, affine, card

SUBJECTS = 12
PLAIN = dict(modalities=("CT", "MR"), crop_size=(8, 8, 8), draws=3)


def paired_archive(*, link=True):
    """CT and MR of each subject share a texture frequency (seen by a spectral encoder) or nothing."""
    archive = MemoryArchive(classes=())
    rng = np.random.default_rng(0)
    for i in range(SUBJECTS):
        for modality, unit, sign in (("CT", "HU", 1.0), ("MR", "raw", -1.0)):
            shape = tuple(14 + rng.integers(0, 6, 3))
            phase = rng.uniform(0, 2 * np.pi)
            slope = i if link else rng.integers(0, SUBJECTS)
            wave = np.sin(phase + np.arange(shape[2]) * np.pi * (slope + 1) / (SUBJECTS + 1))
            volume = np.broadcast_to(wave, shape) * sign
            volume = volume * 100 + (0 if modality == "CT" else 300) + rng.normal(0, 5, shape)
            archive.add_scan(
                f"{modality}{i}", volume.astype(np.float32), subject=f"p{i:02d}", modality=modality, unit=unit
            )
    archive.set_split(test=tuple(f"p{i:02d}" for i in range(SUBJECTS)))
    return archive


class Spectrum(nn.Module):
    """Deepest map: power along W per frequency: the subject's texture, blind to sign and phase."""

    channels = (1, 17)
    strides = ((1, 1, 1), (8, 8, 8))

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        image = image_BCDHW - image_BCDHW.mean(dim=(2, 3, 4), keepdim=True)
        power = torch.fft.rfft(image, n=32, dim=-1).abs().mean(dim=(2, 3))
        power = power / power.sum(dim=-1, keepdim=True)
        return [image_BCDHW, power.transpose(1, 2)[..., None, None]]


class Blind(nn.Module):
    channels, strides = (3,), ((8, 8, 8),)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        return [image_BCDHW.new_ones(len(image_BCDHW), 3, 1, 1, 1)]


def scores(encoder, archive, **options):
    evaluation = Retrieval(Retrieval.Config(**{**PLAIN, **options}))
    found = evaluation.run(FrozenEncoder(encoder, card(kind="encoder")), archive)
    return {s.name: s for s in found}


def test_an_encoder_that_sees_the_shared_texture_finds_the_subject():
    found = scores(Spectrum(), paired_archive())
    assert found["chance"].value == pytest.approx(1 / SUBJECTS)
    for pair in ("CT-MR", "MR-CT"):
        assert found[f"top1/{pair}"].value > 0.6
        assert found[f"top1_low/{pair}"].value > found["chance"].value
        assert (
            found[f"top1_low/{pair}"].value < found[f"top1/{pair}"].value < found[f"top1_high/{pair}"].value
        )
        assert found[f"outline/top1/{pair}"].value < 0.4
        assert found[f"intensity/top1/{pair}"].value < 0.5
    assert {row["subject"] for row in found["top1/CT-MR"].per_case} == {f"p{i:02d}" for i in range(SUBJECTS)}


class Peaks(Spectrum):
    """The same power once up and once down: its mean is 0 for everyone, its maximum is not."""

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        image, power = super().forward(image_BCDHW, spacing_mm_B3)
        return [image, torch.cat([power, -power], dim=2)]


def test_pooling_with_the_maximum_sees_what_a_mean_hides():
    mean, both = (scores(Peaks(), paired_archive(), pool=how) for how in ("mean", "mean_max"))
    assert mean["top1/CT-MR"].value < 0.2
    assert both["top1/CT-MR"].value > 0.6


def test_unrelated_scans_stay_at_chance():
    found = scores(Spectrum(), paired_archive(link=False), draws=4)
    assert found["top1/CT-MR"].value < 0.45


def test_a_blind_encoder_is_at_chance_not_at_one():
    found = scores(Blind(), paired_archive(), normalise="none")
    assert found["top1/CT-MR"].value == 0.0
    assert found["median_rank/CT-MR"].value == pytest.approx((SUBJECTS + 1) / 2)


def test_every_draw_has_its_own_independent_offsets_and_is_repeatable():
    archive = paired_archive()
    starts = []
    read = archive.read
    archive.read = lambda key, start, size: starts.append((key, start)) or read(key, start, size)
    first = scores(Spectrum(), archive)
    count = len(starts)
    again = scores(Spectrum(), archive)
    assert starts[:count] == starts[count:]
    assert first["top1/CT-MR"].value == again["top1/CT-MR"].value
    by_key = {}
    for key, start in starts[:count]:
        by_key.setdefault(key, set()).add(start)
    assert sum(len(s) > 1 for s in by_key.values()) > len(by_key) // 2
    offsets = {key: sorted(s) for key, s in by_key.items()}
    assert any(offsets[f"CT{i}"] != offsets[f"MR{i}"] for i in range(SUBJECTS))
    scores(Spectrum(), archive, seed=1)
    assert starts[:count] != starts[-count:]


def test_crops_lie_inside_their_scan():
    archive = paired_archive()
    read = archive.read

    def inside(key, start, size):
        assert all(
            a >= 0 and a + s <= n for a, s, n in zip(start, size, archive.scans[key].shape, strict=True)
        )
        return read(key, start, size)

    archive.read = inside
    scores(Spectrum(), archive, jitter=4.0)


def test_offsets_with_too_little_data_are_drawn_again():
    archive = paired_archive()
    for volume in archive.volumes.values():
        volume[:5] = -32768
    seen = []
    encoder = FrozenEncoder(Spectrum(), card(kind="encoder"))
    pooled = encoder.pooled
    encoder.pooled = lambda crops, **options: seen.append(crops) or pooled(crops, **options)
    list(Retrieval(Retrieval.Config(**PLAIN, minimum_valid=0.9, jitter=1.0, tries=50)).run(encoder, archive))
    empty_planes = [(crop == 0).all(axis=(1, 2)).sum() for batch in seen for crop in batch[:, 0]]
    assert max(empty_planes) <= 1


def test_ties_are_no_hits():
    assert np.array_equal(_ranks(np.ones((4, 2)), np.ones((4, 2))), np.full(4, 2.5))
    eye = np.eye(4)
    assert np.array_equal(_ranks(eye, eye), np.ones(4))
    assert np.array_equal(_ranks(eye, eye[::-1]), np.full(4, 3.0))


def test_middle_is_that_of_what_the_scans_share():
    archive = MemoryArchive(classes=())
    volume = np.random.default_rng(0).uniform(50, 80, (20, 20, 20)).astype(np.float32)
    archive.add_scan("CT", volume, subject="p")
    archive.add_scan(
        "MR", volume[:10, :10, :10].copy(), subject="p", modality="MR", unit="raw", spacing=(2.0, 2.0, 2.0),
        grid=affine((2.0, 2.0, 2.0), origin=(10.0, 0.0, 0.0)),
    )  # fmt: skip
    found = _common_middles(archive, {"CT": "CT", "MR": "MR"})
    # x is the W axis: the MR starts at 10 mm, the CT ends at 19 mm
    assert np.allclose(found["CT"], (9.0, 9.0, 14.5))
    assert np.allclose(found["MR"], (4.5, 4.5, 2.25))


def renamed(archive, suffix):
    """The same data prepared once more: other keys and subjects, and so another order of both."""
    other = MemoryArchive(classes=())

    def name(text):
        return f"{sum(map(ord, text + suffix)) * 7919 % 1000:03d}{text}"

    for key, row in archive.scans.items():
        other.scans[name(key)] = row.model_copy(update={"key": name(key), "subject": name(row.subject)})
        other.volumes[name(key)] = archive.volumes[key]
    other.set_split(test=tuple(sorted({row.subject for row in other.scans.values()})))
    return other


def test_the_same_data_prepared_twice_scores_the_same():
    archive = paired_archive()
    first, again = (scores(PooledEncoder(), renamed(archive, suffix)) for suffix in ("a", "longer"))
    assert {n: s.value for n, s in first.items()} == {n: s.value for n, s in again.items()}
    assert first["top1/CT-MR"].per_case != again["top1/CT-MR"].per_case, "under other names"


def test_of_several_contrasts_the_one_that_most_subjects_have():
    archive = paired_archive()
    for i in range(SUBJECTS):
        row = archive.scans[f"MR{i}"] = archive.scans[f"MR{i}"].model_copy(update={"contrast": "T2"})
        if i < 5:  # T1 stands before T2 in the alphabet, and so do the keys
            more = {"key": f"A{i}", "contrast": "T1", "content_hash": f"A{i}"}
            archive.scans[f"A{i}"] = row.model_copy(update=more)
            archive.volumes[f"A{i}"] = archive.volumes[f"MR{i}"]
    found = Retrieval(Retrieval.Config(**PLAIN))._scans(
        archive, FrozenEncoder(Spectrum(), card(kind="encoder")), (8, 8, 8)
    )
    assert {by["MR"] for by in found.values()} == {f"MR{i}" for i in range(SUBJECTS)}
    for i in range(SUBJECTS - 2):  # now most have T1
        more = {"key": f"A{i}", "contrast": "T1", "content_hash": f"A{i}"}
        archive.scans[f"A{i}"] = archive.scans[f"MR{i}"].model_copy(update=more)
    for i in (0, 1, 2):
        del archive.scans[f"MR{i}"]
    found = Retrieval(Retrieval.Config(**PLAIN))._scans(
        archive, FrozenEncoder(Spectrum(), card(kind="encoder")), (8, 8, 8)
    )
    assert found["p05"]["MR"] == "A5"
    assert found["p11"]["MR"] == "MR11", "it has no other"


class Spacing(nn.Module):
    """The voxel size that it is told; remembers it."""

    channels, strides = (3,), ((8, 8, 8),)

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        self.seen += spacing_mm_B3.tolist()
        return [spacing_mm_B3[..., None, None, None]]


def test_each_crop_is_encoded_with_the_spacing_of_its_own_scan():
    archive, encoder = paired_archive(), Spacing()
    for i in range(SUBJECTS):
        own = {"spacing_mm": (1.0 + i % 3, 1.0, 1.0)}
        archive.scans[f"CT{i}"] = archive.scans[f"CT{i}"].model_copy(update=own)
    scores(encoder, archive, modalities=("CT", "MR"), draws=1)
    assert [sum(depth == d for depth, _, _ in encoder.seen) for d in (1, 2, 3)] == [SUBJECTS + 4, 4, 4]
    rows = [archive.scans[f"CT{i}"] for i in range(SUBJECTS)]
    model = FrozenEncoder(encoder, card(kind="encoder"))
    crops = [network_crop(archive, row.key, model.card, start=(0, 0, 0), size=(8, 8, 8)) for row in rows]
    told = Retrieval.Config(**PLAIN).pooled_each(model, crops, rows)
    assert told.tolist() == [list(row.spacing_mm) for row in rows], "in the order of the crops"


def test_refusals():
    archive = paired_archive()
    with pytest.raises(
        UserError, match=r"found 0 of 12; 24 scan\(s\) are smaller than crop_size \[99, 8, 8\]"
    ):
        scores(Spectrum(), archive, crop_size=(99, 8, 8))
    with pytest.raises(UserError, match="CT, PT"):
        scores(Spectrum(), archive, modalities=("CT", "PT"))
    with pytest.raises(ConfigError, match="evaluate"):
        list(Retrieval(Retrieval.Config(**PLAIN)).run(Predictor(Threshold(), card()), archive))
    assert find("medseg_ssl.evaluations", "retrieval", Evaluation) is Retrieval


def test_all_levels_join_their_features():
    found = scores(PooledEncoder(), paired_archive(), levels="all", normalise="standardise")
    assert "top1/CT-MR" in found
