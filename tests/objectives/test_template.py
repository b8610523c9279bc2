import pytest
import torch

from medseg_ssl.config import UserError, parse
from medseg_ssl.objectives.template import TemplatePlaces, _Places
from medseg_ssl.types import Facts, Template
from tests.objectives.conftest import make_batch, make_view

SIZE, SPACING = (16, 20, 24), (3.0, 2.0, 1.0)


def make_template(*, keys=("x", "y"), shown=True, shift=2.0):
    """A template in which scan millimetre (x, y, z) shows voxel (z, y, x) + shift·number, on a lattice of 4 mm."""
    lattice = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij")) * 4.0
    to_lattice = torch.zeros(4, 4, dtype=torch.float64)
    to_lattice[0, 2], to_lattice[1, 1], to_lattice[2, 0], to_lattice[3, 3] = 0.25, 0.25, 0.25, 1.0
    return Template(
        keys=keys,
        to_lattice_S44=to_lattice.repeat(len(keys), 1, 1),
        place_S3DHW=torch.stack([lattice + shift * number for number in range(len(keys))]),
        reference_DHW=torch.zeros(48, 40, 24),
        weight_DHW=torch.full((48, 40, 24), 1.0 if shown else 0.2),
        likeness_S=torch.ones(len(keys)),
        spacing_mm=1.5,
    )


def build(encoder, *, templates=None, seed=0, **options):
    torch.manual_seed(0)
    config = parse(TemplatePlaces.Config, {"size": SIZE, "points": 64, "site_voxels": 6, **options})
    objective = TemplatePlaces(config, encoder, Facts())
    objective.use_templates({"CT": make_template()} if templates is None else templates, seed=seed)
    return objective


def batch_of(*scans, **options):
    batch = make_batch({"crop": [make_view(SIZE, spacing=SPACING, batch=len(scans), **options)]})
    batch.scans_B = [(scan,) for scan in scans]
    return batch


def test_a_voxels_place_known_answer():
    places, view = _Places(make_template(), every=6), make_view(SIZE, spacing=SPACING, shift=(1, 2, 3))
    index = torch.tensor([[0.0, 0, 0], [2, 3, 4], [5.5, 1, 7]])
    mm = (index + torch.tensor([1.0, 2, 3])) * torch.tensor(SPACING)
    for number in (0, 1):
        place, seen = places.of(number, view.affine_B44[0], index)
        assert torch.allclose(place, mm + 2.0 * number, atol=1e-4)
        assert seen.all()


def test_a_mirrored_and_rotated_crop_names_the_same_places():
    places, view = _Places(make_template(), every=6), make_view(SIZE, spacing=SPACING)
    turned = view.affine_B44[0].clone()
    # index (d, h, w) of the new crop is (d, w', h') of the old, mirrored along its last axis
    turned[:, 1], turned[:, 2] = view.affine_B44[0][:, 2], -view.affine_B44[0][:, 1]
    turned[:, 3] += 19 * view.affine_B44[0][:, 1]
    index = torch.tensor([[3.0, 4, 5], [1, 0, 19]])
    same = torch.stack([index[:, 0], 19 - index[:, 2], index[:, 1]], dim=1)
    assert torch.allclose(
        places.of(0, turned, index)[0], places.of(0, view.affine_B44[0], same)[0], atol=1e-4
    )


def test_beyond_the_lattice_or_the_body_nothing_is_known():
    places = _Places(make_template(), every=6)
    inside, outside = [5.0, 5, 5], [70.0, 5, 5]
    view = make_view((80, 20, 24), spacing=(1.0, 1.0, 1.0))
    assert places.of(0, view.affine_B44[0], torch.tensor([inside, outside]))[1].tolist() == [True, False]
    nowhere = _Places(make_template(shown=False), every=6)
    assert not nowhere.of(0, view.affine_B44[0], torch.tensor([inside]))[1].any()


def test_loss_is_least_where_every_point_names_its_site(encoder):
    objective = build(encoder, blur_voxels=0.5)
    batch = batch_of("x", "y")
    with torch.no_grad():
        before = objective(batch, 0.0)
    sites = objective._places["CT"].site_P3
    assert before.loss.item() > 0.6 * torch.log(torch.tensor(float(len(sites)))).item()

    def right(features, index_BN3, stride):
        """Perfect features: the place itself, which the replaced projection turns into the site's vector."""
        return torch.stack(
            [
                objective._places["CT"].of(i, batch.views["crop"][0].affine_B44[i], p)[0]
                for i, p in enumerate(index_BN3)
            ]
        )

    class Nearest(torch.nn.Module):
        def forward(self, place_BN3):
            nearest = torch.cdist(place_BN3, sites.expand(len(place_BN3), -1, -1)).argmin(-1)
            return torch.nn.functional.normalize(objective.sites["CT"], dim=-1)[nearest]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("medseg_ssl.objectives.template.read_features", _only_crop(right))
        objective.project = Nearest()
        after = objective(batch, 0.0)
    assert after.loss < 0.6 * before.loss
    assert after.logs["place_error_mm"] < 6 * 1.5 * 0.9  # within a site's cell


def _only_crop(right):
    from medseg_ssl.nets.correspondence import read_features

    def read(map_BCDHW, index_BN3, stride):
        return (
            read_features(map_BCDHW, index_BN3, stride)
            if map_BCDHW.shape[1] == 3
            else right(map_BCDHW, index_BN3, stride)
        )

    return read


def test_points_outside_the_body_or_of_a_scan_without_template_teach_nothing(encoder):
    objective = build(encoder)
    batch = batch_of("unknown", "x")
    batch.views["crop"][0].foreground_BDHW[1] = False
    out = objective(batch, 0.0)
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in objective.parameters())


def test_each_modality_has_its_own_sites(encoder):
    objective = build(encoder, templates={"CT": make_template(), "MR": make_template(keys=("m",))})
    assert set(objective.sites) == {"CT", "MR"}
    objective(batch_of("x", "m"), 0.0).loss.backward()
    assert all(objective.sites[m].grad.abs().max() > 0 for m in ("CT", "MR"))


def test_ships_encoder_and_decoder_without_sites(encoder):
    exported = build(encoder).export()
    assert exported.encoder is encoder
    names = [*exported.encoder.state_dict(), *exported.decoder.state_dict()]
    assert not any("site" in name or "project" in name for name in names)


def test_a_template_that_shows_nothing_is_refused(encoder):
    with pytest.raises(UserError, match="template of CT has no voxel that half of its scans show"):
        build(encoder, templates={"CT": make_template(shown=False)})


def test_sites_begin_where_the_seed_says(encoder):
    first, again, other = (build(encoder, seed=seed).sites["CT"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
