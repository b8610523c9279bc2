"""Bodies of the phantom archive: organs as implicit shapes in millimetres, varied and deformed smoothly per
subject.

A body is a function of position, not a grid, so any scan of it (another grid, another pose, another day) is
one more evaluation of the same function. x points right, y anterior, z superior, in millimetres from the
body's centre.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from medseg_ssl.draws import numpy_generator
from medseg_ssl.types import Triple

TISSUES = (
    "air", "fat", "muscle", "viscera", "bone", "lung", "bowel", "bladder",
    "liver", "spleen", "kidney", "stomach", "aorta", "lesion",
)  # fmt: skip
CLASSES = {1: "liver", 2: "spleen", 3: "kidneys", 4: "stomach", 5: "aorta"}
LESION_CLASS = 6
_OF_CLASS = {1: "liver", 2: "spleen", 3: "kidney", 4: "stomach", 5: "aorta"}
_SKIN_MM = (100.0, 74.0)
_WALL_MM = 9.0


@dataclass(frozen=True, eq=False)
class Ellipsoid:
    """A superellipsoid of one tissue.

    Attributes:
        tissue: one of ``TISSUES``.
        centre_mm: x, y, z.
        radii_mm: half axes along x, y, z.
        exponent: 2 is an ellipsoid, larger is boxier.
        tilt: rotation about the y axis in radians.
    """

    tissue: str
    centre_mm: np.ndarray
    radii_mm: np.ndarray
    exponent: float = 2.0
    tilt: float = 0.0

    def inside(self, at_3N: np.ndarray) -> np.ndarray:
        """Bool (N): which points lie inside."""
        x, y, z = (at_3N[i] - np.float32(self.centre_mm[i]) for i in range(3))
        if self.tilt:
            c, s = np.float32(np.cos(self.tilt)), np.float32(np.sin(self.tilt))
            x, z = c * x + s * z, c * z - s * x
        x, y, z = (np.abs(v) / np.float32(r) for v, r in zip((x, y, z), self.radii_mm, strict=True))
        if self.exponent == 2.0:
            return x * x + y * y + z * z <= 1.0
        exponent = np.float32(self.exponent)
        return x**exponent + y**exponent + z**exponent <= 1.0


@dataclass(frozen=True, eq=False)
class Waves:
    """A smooth field: a sum of plane waves, so that it is defined everywhere.

    Attributes:
        amplitudes_WC: of each wave, per component of the field.
        frequencies_W3: radians per mm.
        phases_W: radians.
    """

    amplitudes_WC: np.ndarray
    frequencies_W3: np.ndarray
    phases_W: np.ndarray

    @staticmethod
    def draw(
        generator: np.random.Generator,
        *,
        rms: float,
        wavelength_mm: tuple[float, float],
        components: int = 3,
        count: int = 10,
    ) -> Waves:
        """A random field of ``count`` waves with the root mean square ``rms`` per component."""
        directions = generator.normal(size=(count, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        lengths = generator.uniform(*wavelength_mm, size=(count, 1))
        amplitudes = generator.normal(size=(count, components)) * rms * np.sqrt(2.0 / count)
        return Waves(amplitudes, 2 * np.pi / lengths * directions, generator.uniform(0, 2 * np.pi, count))

    def on_grid(self, mm_from_index_44: np.ndarray, shape: Triple) -> np.ndarray:
        """The field (C, D, H, W), float32, on the grid whose indices an affine maps to mm.

        A plane wave on a grid is a product of one factor per axis, so the sum is one matrix product.
        """
        steps_W3 = self.frequencies_W3 @ mm_from_index_44[:3, :3]
        start_W = self.phases_W + self.frequencies_W3 @ mm_from_index_44[:3, 3]
        d, h, w = (np.exp(1j * np.outer(steps_W3[:, a], np.arange(shape[a]))) for a in range(3))
        left_CDHW = np.einsum("wc,wd,wh->cdhw", self.amplitudes_WC, d * np.exp(1j * start_W)[:, None], h)
        left = np.concatenate((np.real(left_CDHW), np.imag(left_CDHW)), axis=-1).astype(np.float32)
        right = np.concatenate((np.imag(w), np.real(w))).astype(np.float32)
        return left @ right


@dataclass(frozen=True, eq=False)
class Body:
    """One subject's anatomy.

    Attributes:
        scale: size of the body along x, y, z against the template.
        fat_mm: thickness of the fat below the skin.
        shapes: organs, later ones over earlier ones.
        deformation: displacements that make the body's shape its own; on another day a second field is added.
    """

    scale: np.ndarray
    fat_mm: float
    shapes: tuple[Ellipsoid, ...]
    deformation: tuple[Waves, ...]

    @staticmethod
    def draw(seed: int, subject: int, *, lesion_share: float) -> Body:
        """The body of a subject: a function of (seed, subject) alone."""
        generator = numpy_generator(seed, subject, "body")
        scale = generator.normal(1.0, 0.07, 3).clip(0.85, 1.12)
        shapes = _organs(generator)
        if generator.uniform() < lesion_share:
            liver = next(s for s in shapes if s.tissue == "liver")
            shapes += tuple(_lesions(generator, liver))
        deformation = Waves.draw(generator, rms=5.0, wavelength_mm=(90.0, 260.0))
        return Body(scale, float(generator.uniform(7.0, 20.0)), shapes, (deformation,))

    def other_day(self, seed: int, subject: int) -> Body:
        """The same subject later: breathing, filling and posture differ a little."""
        generator = numpy_generator(seed, subject, "other day")
        moved = Waves.draw(generator, rms=2.0, wavelength_mm=(90.0, 260.0))
        filled = generator.uniform(0.8, 1.2)
        shapes = tuple(
            replace(s, radii_mm=s.radii_mm * filled) if s.tissue in ("stomach", "bladder") else s
            for s in self.shapes
        )
        return replace(self, shapes=shapes, deformation=(*self.deformation, moved))

    def tissues(self, body_from_index_44: np.ndarray, shape: Triple) -> np.ndarray:
        """Tissue of each voxel of a grid as an index into ``TISSUES``, uint8 (D, H, W).

        Args:
            body_from_index_44: (D, H, W, 1) index to the body's own mm (x, y, z).
            shape: voxels (D, H, W).
        """
        place = _positions(body_from_index_44, shape) / self.scale.astype(np.float32).reshape(3, 1, 1, 1)
        for field in self.deformation:
            place += field.on_grid(body_from_index_44, shape)
        tissue = np.zeros(shape, dtype=np.uint8)
        for name, depth in (("fat", 0.0), ("muscle", self.fat_mm), ("viscera", self.fat_mm + _WALL_MM)):
            x, y = (np.abs(place[i]) / np.float32(_SKIN_MM[i] - depth) for i in range(2))
            tissue[x**2.4 + y**2.4 <= 1.0] = TISSUES.index(name)
        body = tissue != TISSUES.index("air")
        tissue[body] = self._with_organs(tissue[body], place[:, body])
        return tissue

    def _with_organs(self, tissue_N: np.ndarray, place_3N: np.ndarray) -> np.ndarray:
        wall = tissue_N <= TISSUES.index("muscle")
        for shape in self.shapes:
            where = shape.inside(place_3N)
            if shape.tissue not in ("bone", "aorta"):
                where &= ~wall  # organs end where the wall of the body begins
            if shape.tissue == "lesion":
                where &= tissue_N == TISSUES.index("liver")
            tissue_N[where] = TISSUES.index(shape.tissue)
        return tissue_N


def _positions(mm_from_index_44: np.ndarray, shape: Triple) -> np.ndarray:
    matrix = mm_from_index_44.astype(np.float32)
    d, h, w = (axis.astype(np.float32) for axis in np.ogrid[tuple(slice(n) for n in shape)])
    return np.stack([row[0] * d + row[1] * h + (row[2] * w + row[3]) for row in matrix[:3]])


def _organs(generator: np.random.Generator) -> tuple[Ellipsoid, ...]:
    """The organs of a subject, varied in place, size, form and tilt."""

    def organ(
        tissue: str,
        centre: tuple[float, ...],
        radii: tuple[float, ...],
        *,
        exponent: float = 2.0,
        jitter_mm: float = 5.0,
    ) -> Ellipsoid:
        return Ellipsoid(
            tissue,
            np.array(centre) + generator.normal(0.0, jitter_mm, 3),
            np.array(radii) * np.exp(generator.normal(0.0, 0.12, 3)),
            exponent,
            float(generator.normal(0.0, 0.2)),
        )

    bowel = tuple(
        organ(
            "bowel",
            (generator.uniform(-55, 55), generator.uniform(-5, 40), generator.uniform(-80, -5)),
            (15, 12, 13),
        )
        for _ in range(generator.integers(6, 12))
    )
    spine = Ellipsoid("bone", np.array([0.0, -44.0, 0.0]), np.array([17.0, 14.0, 400.0]))
    spinous = Ellipsoid("bone", np.array([0.0, -60.0, 0.0]), np.array([5.0, 12.0, 400.0]))
    aorta = Ellipsoid(
        "aorta",
        np.array([-6.0, -20.0, 0.0]) + np.array([*generator.normal(0, 3, 2), 0]),
        np.array([*(11.0 * np.exp(generator.normal(0, 0.1, 2))), 400.0]),
        tilt=float(generator.normal(0.0, 0.05)),
    )
    return (
        *bowel,
        organ("bladder", (0, 18, -84), (22, 18, 16)),
        organ("stomach", (-32, 26, 16), (30, 20, 26)),
        organ("spleen", (-58, -18, 24), (20, 27, 31), exponent=2.3),
        organ("kidney", (-38, -30, -20), (18, 19, 32)),
        organ("kidney", (40, -30, -28), (18, 19, 32)),
        organ("liver", (38, 8, 24), (46, 44, 38), exponent=2.5),
        organ("lung", (42, -4, 78), (36, 46, 38), exponent=2.6, jitter_mm=3.0),
        organ("lung", (-44, -4, 78), (34, 46, 38), exponent=2.6, jitter_mm=3.0),
        aorta,
        spine,
        spinous,
    )


def _lesions(generator: np.random.Generator, liver: Ellipsoid) -> list[Ellipsoid]:
    lesions = []
    for _ in range(generator.integers(1, 3)):
        offset = generator.uniform(-0.5, 0.5, 3) * liver.radii_mm
        lesions.append(Ellipsoid("lesion", liver.centre_mm + offset, generator.uniform(7.0, 13.0, 3)))
    return lesions


def labels(tissue_DHW: np.ndarray, *, lesions: bool) -> np.ndarray:
    """Label map of ``CLASSES`` from tissues; lesions are class 6, or else part of the liver."""
    values = np.zeros(len(TISSUES), dtype=np.uint8)
    for value, tissue in _OF_CLASS.items():
        values[TISSUES.index(tissue)] = value
    values[TISSUES.index("lesion")] = LESION_CLASS if lesions else values[TISSUES.index("liver")]
    return values[tissue_DHW]
