"""Leakage: an embedding that codes the modality or the subject is found out, one that is constant is at chance."""

import numpy as np
import pytest
from torch import nn

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.manifest import PairRow
from medseg_ssl.draws import numpy_generator
from medseg_ssl.evaluations.leakage import Leakage
from medseg_ssl.inference.frozen import FrozenEncoder
from medseg_ssl.inference.predictor import Predictor
from tests.evaluations.fakes import MemoryArchive, PooledEncoder, Threshold, affine, card

SUBJECTS = 8
SHAPE = (18, 20, 26)


class Blind(nn.Module):
    channels, strides = (3,), ((8, 8, 8),)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        return [image_BCDHW.new_ones(len(image_BCDHW), 3, 1, 1, 1)]


def archive_of(level, *, modalities=(("CT", "HU"), ("MR", "raw"))):
    """Noise around a level per subject and modality, in CT within the policy's window."""
    archive = MemoryArchive(classes=())
    for i in range(SUBJECTS):
        for number, (modality, unit) in enumerate(modalities):
            rng = np.random.default_rng(i * 10 + number)
            noise = rng.normal(0, 10, SHAPE) if modality == "CT" else rng.uniform(500, 2500, SHAPE)
            volume = (level(i, modality) + noise).astype(np.float32)
            archive.add_scan(f"{modality}{i}", volume, subject=f"p{i}", modality=modality, unit=unit)
    archive.set_split(development=tuple(f"p{i}" for i in range(SUBJECTS)))
    return archive


def scores(encoder, archive, **options):
    evaluation = Leakage(Leakage.Config(**{"crop_size": (8, 6, 8), "crops": 6, **options}))
    return {s.name: s for s in evaluation.run(FrozenEncoder(encoder, card(kind="encoder")), archive)}


def test_an_embedding_that_codes_the_modality_is_found_out():
    found = scores(PooledEncoder(), archive_of(lambda i, modality: 140.0))
    assert found["linear/modality"].value == 1.0
    assert found["intensity/linear/modality"].value == 1.0
    assert found["chance/modality"].value == pytest.approx(0.5)
    low, high = found["linear_low/modality"].value, found["linear_high/modality"].value
    assert 0.6 < low < 0.7, "Wilson's interval of 8 of 8 subjects, however many crops"
    assert high == 1.0
    assert found["subjects"].value == SUBJECTS
    assert {row["subject"] for row in found["linear/modality"].per_case} == {f"p{i}" for i in range(SUBJECTS)}


def test_an_embedding_that_codes_the_subject_is_found_out():
    found = scores(PooledEncoder(), archive_of(lambda i, modality: 30.0 * i - 110))
    assert found["identity/CT"].value == 1.0
    assert found["chance/identity-CT"].value < 0.2
    assert found["identity_low/CT"].value > found["chance/identity-CT"].value


def test_an_embedding_that_is_constant_is_at_chance():
    found = scores(Blind(), archive_of(lambda i, modality: 0.0))
    assert found["linear/modality"].value == pytest.approx(0.5)
    assert found["identity/CT"].value == pytest.approx(found["chance/identity-CT"].value)


def test_equal_answers_count_as_their_share():
    """Three classes, features that say nothing, folds that hold each class alike: every crop is a third named."""
    class_N, fold_N = np.tile([0, 1, 2], 4), np.repeat([0, 1, 2, 3], 3)
    hit_N = Leakage(Leakage.Config())._cross_validated(np.ones((12, 5)), class_N, fold_N)
    assert hit_N == pytest.approx(np.full(12, 1 / 3))
    telling = class_N[:, None] * np.ones((1, 5))
    assert (Leakage(Leakage.Config())._cross_validated(telling, class_N, fold_N) == 1).all()


def test_columns_of_the_manifest_within_a_modality():
    archive = archive_of(lambda i, modality: 80.0 * (i % 2), modalities=(("CT", "HU"),))
    for i in range(SUBJECTS):
        which = {"contrast": "late" if i % 2 else "", "scanner": f"maker model {i % 2}"}
        archive.scans[f"CT{i}"] = archive.scans[f"CT{i}"].model_copy(update=which)
    found = scores(PooledEncoder(), archive)
    assert found["linear/contrast-CT"].value == 1.0
    assert found["linear/scanner-CT"].value == 1.0
    for i in range(SUBJECTS):
        archive.scans[f"CT{i}"] = archive.scans[f"CT{i}"].model_copy(
            update={"scanner": "maker" if i % 2 else ""}
        )
    assert "linear/scanner-CT" not in scores(PooledEncoder(), archive), "one scanner is known"
    assert "linear/modality" not in found, "there is one"
    assert "linear/source-CT" not in found, "it has one value"


def test_overlapping_crops_are_no_answers():
    archive = archive_of(lambda i, modality: 30.0 * i - 110, modalities=(("CT", "HU"),))
    with pytest.raises(UserError, match=r"nothing to tell apart .* take a smaller crop_size"):
        scores(PooledEncoder(), archive, crop_size=(16, 18, 24))


def aligned(*, shift_mm=0.0, transform=None, relation="registered"):
    """Two MR scans of each subject, alike but for the subject's own texture; nothing but one place of it tells them."""
    archive = MemoryArchive(classes=())
    for i in range(SUBJECTS):
        volume = np.random.default_rng(i).uniform(500, 2500, SHAPE).astype(np.float32)
        for name, origin in (("a", 0.0), ("b", shift_mm)):
            grid = affine((2.0, 1.0, 1.0), origin=(origin, 0.0, 0.0))
            key = f"MR{i}{name}"
            archive.add_scan(
                key, volume, subject=f"p{i}", modality="MR", unit="raw", spacing=(2, 1, 1), grid=grid
            )
            archive.scans[key] = archive.scans[key].model_copy(update={"content_hash": f"MR{i}"})
        pair = {"scan_a": f"MR{i}a", "scan_b": f"MR{i}b", "transform_44": transform}
        archive.pairs.append(PairRow(**pair, relation=relation))
    archive.set_split(development=tuple(f"p{i}" for i in range(SUBJECTS)))
    return archive


def moved(x_mm):
    matrix = np.eye(4)
    matrix[0, 3] = x_mm
    return tuple(map(tuple, matrix.tolist()))


def test_the_same_place_in_an_aligned_scan_is_no_answer():
    """Crops are drawn by content, so that those of both scans of a subject lie at the same voxels."""
    options = {"crops": 1, "subset": "development"}
    with pytest.raises(UserError, match="nothing to tell apart"):
        scores(PooledEncoder(), aligned(), **options)
    # by 40 mm the boxes lie beside one another, whatever the voxels; the transform takes that back
    found = scores(PooledEncoder(), aligned(shift_mm=40.0), **options)
    assert found["identity/MR"].value == 1.0
    with pytest.raises(UserError, match="nothing to tell apart"):
        scores(PooledEncoder(), aligned(shift_mm=40.0, transform=moved(-40.0)), **options)
    # crops are 8 voxels of 1 mm wide along x: at 8 mm they touch, at 7 they overlap
    assert "identity/MR" in scores(PooledEncoder(), aligned(shift_mm=8.0), **options)
    with pytest.raises(UserError, match="nothing to tell apart"):
        scores(PooledEncoder(), aligned(shift_mm=7.0), **options)
    # of scans that share no coordinates nobody knows which places meet
    assert "identity/MR" in scores(PooledEncoder(), aligned(relation="same_study"), **options)


def test_folds_hold_every_class_alike():
    """Two subjects of a rare class among twenty: in one fold together, nobody would have learned it."""
    subject_N = [f"p{i:02d}" for i in range(20) for _ in range(3)]
    rare, mixed = np.zeros(60, int), np.zeros(60, int)
    rare[9:15] = 1  # p03 and p04
    mixed[::3] = 1  # every subject has both
    for seed in range(12):
        leakage = Leakage(Leakage.Config(seed=seed))
        fold_N = leakage._folds(subject_N, rare)
        assert all(len(set(fold_N[i : i + 3])) == 1 for i in range(0, 60, 3)), "a subject stands in one"
        assert fold_N[9] != fold_N[12]
        assert np.bincount(fold_N).tolist() == [12] * 5
        plain = leakage._folds(subject_N, mixed)
        order = numpy_generator(seed, 0, "leakage folds").permutation(20)
        assert [plain[3 * i] for i in order] == [place % 5 for place in range(20)], (
            "as before where all are alike"
        )


def test_refusals_and_determinism():
    archive = archive_of(lambda i, modality: 20.0 * i)
    one, two = scores(PooledEncoder(), archive), scores(PooledEncoder(), archive)
    assert {n: s.value for n, s in one.items()} == {n: s.value for n, s in two.items()}
    with pytest.raises(ConfigError, match="leakage looks at an encoder's features"):
        list(Leakage(Leakage.Config()).run(Predictor(Threshold(), card()), archive))
    with pytest.raises(UserError, match="no scan in subset 'test'"):
        scores(PooledEncoder(), archive, subset="test")
