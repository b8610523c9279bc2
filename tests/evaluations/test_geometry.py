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
