"""Alignment and uniformity: known points on the sphere, and places of paired scans that meet through a transform."""

import numpy as np
import pytest
import torch
from torch import nn

from medseg_ssl.data.manifest import PairRow
from medseg_ssl.evaluations.geometry import Geometry, alignment, uniformity
from medseg_ssl.inference.frozen import FrozenEncoder
from tests.evaluations.fakes import MemoryArchive, affine, card
from tests.evaluations.test_leakage import Blind

SHAPE = (14, 17, 22)


def test_known_points():
    a, b = np.eye(4)[:2], np.eye(4)[2:]
    assert alignment(a, a) == 0.0
    assert alignment(a, b) == pytest.approx(2.0)
    assert alignment(a, b, power=1.0) == pytest.approx(np.sqrt(2))
    assert uniformity(np.ones((5, 1))) == 0.0
    assert uniformity(np.array([[1.0, 0], [-1.0, 0]])) == pytest.approx(-8.0)
    assert uniformity(np.array([[1.0, 0], [-1.0, 0]]), sharpness=0.5) == pytest.approx(-2.0)
    circle = np.exp(2j * np.pi * np.arange(32) / 32)
    spread = np.stack([circle.real, circle.imag], axis=1)
    assert uniformity(spread) < uniformity(np.abs(spread)) < 0


class Mean(nn.Module):
    """The mean of a crop as an angle."""

    channels, strides = (2,), ((1, 1, 1),)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        angle = image_BCDHW.mean(dim=(2, 3, 4), keepdim=True)
        return [torch.cat([angle.cos(), angle.sin()], dim=1)]


def ramps(*, shift_mm=(0.0, 0.0, 0.0), transform=None):
    """CT and MR of three subjects, both a ramp along x in RAS mm; the MR's header lies by ``shift_mm``."""
    archive = MemoryArchive(classes=())
    x = np.arange(SHAPE[2], dtype=np.float32) * 2.0
    for i in range(3):
        ct = np.broadcast_to(x * 6 - 130, SHAPE).astype(np.float32)
        grid = affine((3.0, 1.0, 2.0))
        archive.add_scan(f"CT{i}", ct, subject=f"p{i}", grid=grid, spacing=(3.0, 1.0, 2.0))
        moved = affine((3.0, 1.0, 2.0), origin=(4.0 + shift_mm[0], *shift_mm[1:]))
        mr = np.broadcast_to((x + 4) * 6 - 130, SHAPE).astype(np.float32)
        archive.add_scan(f"MR{i}", mr, subject=f"p{i}", grid=moved, spacing=(3.0, 1.0, 2.0))
        archive.scans[f"MR{i}"] = archive.scans[f"MR{i}"].model_copy(update={"modality": "MR"})
        archive.pairs.append(
            PairRow(scan_a=f"CT{i}", scan_b=f"MR{i}", relation="registered", transform_44=transform)
        )
    archive.set_split(development=("p0", "p1", "p2"))
    return archive


POLICY = {"kind": "window", "hu_range": (-150.0, 150.0)}


def scores(encoder, archive, **options):
    evaluation = Geometry(Geometry.Config(**{"crop_size": (4, 5, 6), "crops": 3, **options}))
    model = FrozenEncoder(encoder, card(kind="encoder", intensity={"CT": POLICY, "MR": POLICY}))
    return {s.name: s.value for s in evaluation.run(model, archive)}


def test_an_embedding_that_is_constant_is_one_point():
    found = scores(Blind(), ramps())
    assert {"alignment/CT", "apart/MR", "uniformity/all", "alignment/CT-MR"} <= set(found)
    assert [found.pop(f"places/{kind}") for kind in ("CT", "MR", "CT-MR")] == [9, 9, 9]
    assert all(value == pytest.approx(0, abs=1e-12) for value in found.values())


def test_pairs_meet_at_the_same_place_in_millimetres():
    found = scores(Mean(), ramps())
    assert found["alignment/CT-MR"] < 5e-3 < found["apart/CT-MR"]
    assert found["alignment/CT"] < found["apart/CT"]
    assert found["uniformity/CT"] < -0.05
    # the header of the MR lies by 12 mm; the transform that registration found takes it back
    wrong = scores(Mean(), ramps(shift_mm=(12.0, 0, 0)))
    back = tuple(map(tuple, np.array([[1.0, 0, 0, -12], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).tolist()))
    right = scores(Mean(), ramps(shift_mm=(12.0, 0, 0), transform=back))
    assert right["alignment/CT-MR"] < 5e-3 < 0.05 < wrong["alignment/CT-MR"]


def test_without_jitter_a_place_is_itself():
    found = scores(Mean(), ramps(), jitter=0.0)
    assert found["alignment/CT"] == 0.0
    assert found == scores(Mean(), ramps(), jitter=0.0)


def test_a_scan_no_larger_than_the_crop_gives_no_positives():
    """Both crops of it would be one and the same, at distance 0 whatever the encoder says."""
    found = scores(Mean(), ramps(), crop_size=SHAPE)
    assert (found["places/CT"], found["places/MR"]) == (0, 0)
    assert not {"alignment/CT", "alignment/MR"} & set(found)
    assert found["apart/CT"] == pytest.approx(0.0, abs=1e-12), "three equal ramps"
    large = ramps()
    rng = np.random.default_rng(0)
    wide = rng.uniform(-100, 100, (14, 17, 40)).astype(np.float32)
    large.add_scan("CT9", wide, subject="p0", grid=affine((3.0, 1.0, 2.0)), spacing=(3.0, 1.0, 2.0))
    found = scores(Mean(), large, crop_size=SHAPE)
    assert found["places/CT"] == 3, "of the one scan with room"
    assert found["alignment/CT"] > 0


def test_crops_of_a_scan_without_room_are_one_point_of_the_spread():
    archive = ramps()
    for i in range(3):
        archive.volumes[f"CT{i}"] = archive.volumes[f"CT{i}"] + np.int16(20 * i)
    one, many = (scores(Mean(), archive, crop_size=SHAPE, crops=n)["uniformity/CT"] for n in (1, 6))
    assert one == many < 0


def test_a_pair_counts_alike_whichever_scan_is_named_first():
    """Also through a transform, which is turned round with it; a list in which both orders stand is not mixed."""
    shift = (12.0, 0, 0)
    back = tuple(map(tuple, np.array([[1.0, 0, 0, -12], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).tolist()))
    there = tuple(map(tuple, np.linalg.inv(np.array(back)).tolist()))
    straight, mixed = ramps(shift_mm=shift, transform=back), ramps(shift_mm=shift, transform=back)
    mixed.pairs[1] = PairRow(scan_a="MR1", scan_b="CT1", relation="registered", transform_44=there)
    assert scores(Mean(), mixed) == scores(Mean(), straight)


def test_pairs_are_spread_over_subjects():
    archive = ramps()
    for number in range(3):  # two more scans of the first subject, whose pairs stand at the head of the list
        ct = archive.volumes["CT0"].astype(np.float32)
        archive.add_scan(
            f"CT0{number}", ct, subject="p0", grid=affine((3.0, 1.0, 2.0)), spacing=(3.0, 1.0, 2.0)
        )
        archive.pairs.insert(0, PairRow(scan_a=f"CT0{number}", scan_b="MR0", relation="registered"))
    found = scores(Mean(), archive, scans=3)
    assert found["places/CT-MR"] == 9
    assert "apart/CT-MR" in found, "with one subject there is nothing apart"
