"""The page of an archive: what it counts, what it shows, and what it must not tell."""

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from medseg_ssl.data.overview import middle_slices, overview_page, sheets
from tests.train.archives import write_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("overview") / "archive")


def cells(archive, title):
    return next(sheet for sheet in sheets(archive) if sheet.title == title).rows


def test_counts_are_those_of_the_archive(archive):
    assert cells(archive, "scans") == (
        ("CT", "HU", "8", "8", "4", "2", "2"),
        ("MR", "raw", "8", "8", "4", "2", "2"),
    )
    assert cells(archive, "pairs") == (("registered", "CT – MR", "8", "", ""),)
    assert cells(archive, "labels")[1] == ("1 organ", "8 of 8", "4", "2", "2")


def test_the_page_holds_every_part_and_fetches_nothing(archive):
    html = overview_page(archive, sample=5)
    for title in ("Scans", "Pairs", "Labels", "Geometry", "Distributions", "Middle slices of 5 scans"):
        assert f"<h2>{title}</h2>" in html
    assert html.count("<figure>") == 5
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert str(archive.path) not in html
    assert html == overview_page(archive, sample=5)


def test_slices_are_upright_and_in_proportion(archive):
    """A bright voxel at the patient's head, front and right is at the top left of its tile."""
    key = next(key for key, row in archive.scans.items() if row.modality == "CT")
    row = archive.scans[key].model_copy(update={"shape": (8, 10, 12), "spacing_mm": (2.0, 1.0, 1.0)})
    volume = np.full((8, 10, 12), -1000, dtype=np.int16)
    volume[7, 9, 11] = volume[4, 9, 11] = volume[7, 5, 11] = volume[7, 9, 6] = 1000

    def read(_, start, size):
        return volume[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]

    shown = SimpleNamespace(scans={key: row}, linear=lambda _: archive.linear(key), read=read)
    picture = np.asarray(Image.open(io.BytesIO(middle_slices(shown, key))).convert("L"))
    # 12 mm, 12 mm and 10 mm wide, 16 mm high at most: 200 pixels are 16 mm
    widths = (150, 150, 125)
    left = 0
    for width in widths:
        tile = picture[:, left : left + width]
        bright = np.argwhere(tile > 150)
        assert len(bright)
        assert bright[:, 1].max() < 0.2 * width
        left += width + 4
    assert picture.shape == (200, sum(widths) + 8)
