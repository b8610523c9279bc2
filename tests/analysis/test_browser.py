"""The report in headless Chromium: offline, without an error, left and right where they belong."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from finetune import report
from finetune.comparison_tables import write_comparison
from finetune.transfer import transfer
from finetune.volumes import case_volume
from medseg_ssl.analysis.page import page
from medseg_ssl.analysis.viewer import ViewedCase, fill, viewer_html
from medseg_ssl.analysis.volumes import CasePrediction, CaseVolume, box_around, grey_channel
from medseg_ssl.data.archive_writer import ArchiveWriter
from medseg_ssl.data.manifest import CaseRow, Split
from medseg_ssl.data.nifti import read_nifti
from medseg_ssl.data.store import write_label, write_volume
from tests.browser import Page
from tests.commands import fake_transfer
from tests.commands.fake_folder import write_folder
from tests.data.small_archive import RECIPE, scan_row

pytestmark = pytest.mark.slow

VIEWER = "document.querySelector('.viewer').viewer"


BRIGHT = """(canvas => {
  const f = canvas.frame, left = Math.ceil(f.x), top = Math.ceil(f.y), wide = Math.floor(f.width) - 1;
  const all = canvas.getContext('2d').getImageData(left, top, wide, Math.floor(f.height) - 1).data;
  let n = 0, x = 0, y = 0;
  for (let i = 0; i < all.length / 4; i++) {
    if (Math.min(...all.slice(4 * i, 4 * i + 3)) > 200) { n++; x += i % wide; y += Math.floor(i / wide); }
  }
  return [n / (f.width * f.height), x / n / f.width - 0.5, 0.5 - y / n / f.height, f.width / f.height];
})(document.querySelector('.plane[data-plane=PLANE] canvas'))"""
"""Share of bright pixels, how far right and how far up of the middle they lie, and width by height of the picture."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The page of a made-up comparison."""
    folder = tmp_path_factory.mktemp("browser")
    out = write_folder(folder / "out", draws=2, cases=6)
    write_comparison(out)
    with Page(out / "report.html", folder / "profile") as found:
        found.wait(f"document.querySelector('.viewer') && {VIEWER}")
        found.run(f"{VIEWER}.ready.then(() => 1)")
        yield found


def test_it_asks_for_nothing_and_complains_about_nothing(opened):
    assert opened.problems == []
    outside = [a for a in opened.asked if not a.startswith(("file:", "data:", "blob:"))]
    assert outside == []
    assert [a for a in opened.asked if a.startswith("file:")] == opened.asked[:1]


def test_wheel_slider_and_keys_scroll(opened):
    where = opened.run(f"{VIEWER}.at")
    canvas = "document.querySelector('.plane[data-plane=axial] canvas')"
    opened.run(f"{canvas}.scrollIntoView({{block: 'center'}})")
    box = opened.run(
        f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({canvas}.getBoundingClientRect())"
    )
    picture = f"{canvas}.toDataURL()"
    before = opened.run(picture)
    opened.mouse("mouseWheel", *box, deltaX=0, deltaY=-100)
    opened.wait(f"{VIEWER}.at[0] === {where[0] + 1}")
    assert opened.run(picture) != before
    assert f"slice {where[0] + 2} of" in opened.run("document.querySelector('.plane figcaption').textContent")
    opened.run(f"{canvas}.focus()")
    opened.key("ArrowDown")
    opened.wait(f"{VIEWER}.at[0] === {where[0]}")
    assert opened.run(picture) == before
    slider = "document.querySelector('.plane[data-plane=coronal] input')"
    opened.run(f"(s => {{ s.value = 2; s.dispatchEvent(new Event('input')); }})({slider})")
    assert opened.run(f"{VIEWER}.at[1]") == 2
    opened.key("Home")
    assert opened.run(f"{VIEWER}.at[0]") == 0


def test_controls_change_what_is_shown(opened):
    opened.run(f"{VIEWER}.open(2).then(() => 1)")  # the best case, whose prediction lies on the label
    canvas = "document.querySelector('.plane canvas').toDataURL()"
    seen = {opened.run(canvas)}
    for role, value in (
        ("style", "'errors'"),
        ("style", "'filled'"),
        ("opacity", "'0.9'"),
        ("level", "'-100'"),
    ):
        opened.run(
            f"(c => {{ c.value = {value}; c.dispatchEvent(new Event('input')); }})({VIEWER}.controls['{role}'])"
        )
        seen.add(opened.run(canvas))
    opened.run(f"{VIEWER}.controls.truth.click()")
    seen.add(opened.run(canvas))
    assert len(seen) == 6
    opened.run(f"{VIEWER}.choose('init', 'mae').then(() => 1)")
    assert opened.run("document.querySelector('.viewer .numbers').textContent").startswith("mae, 1 label")
    opened.run("document.querySelector('.strip').open = true")
    opened.wait("document.querySelectorAll('.small canvas').length === 3")
    assert opened.problems == []


def test_scatter_draws_and_its_axes_are_chosen(opened):
    shown = "document.querySelector('.two-inits .points')"
    assert opened.run(f"{shown}.data[0].x.length") == 6
    assert opened.run(f"{shown}.layout.xaxis.title.text") == "Dice, scratch"
    assert opened.run(f"{shown}.querySelectorAll('.scatterlayer path.point').length") == 6
    across = "document.querySelector('.two-inits [data-role=x]')"
    opened.run(f"(s => {{ s.value = 1; s.dispatchEvent(new Event('change')); }})({across})")
    assert opened.run(f"{shown}.layout.xaxis.title.text") == "Dice, scratch_long"
    assert "mae is better in" in opened.run("document.querySelector('.two-inits .numbers').textContent")
    assert opened.run("document.querySelectorAll('.figure .main-svg').length") >= 1
    assert opened.problems == []


def test_tables_sort_and_open_cases(opened):
    first = "[...document.querySelectorAll('.sortable tbody')[0].rows].map(r => r.cells[2].textContent)"
    ascending = opened.run(first)
    assert ascending == sorted(ascending)
    heads = "document.querySelectorAll('.sortable thead')[0].querySelectorAll('button')"
    opened.run(f"({heads}[2].click(), {heads}[2].click())")
    assert opened.run(first) == sorted(ascending, reverse=True)
    opened.run("document.querySelector('.pane:not([hidden]) button.view').click()")
    opened.run(f"{VIEWER}.ready.then(() => 1)")
    key = opened.run("document.querySelector('.pane:not([hidden]) button.view').dataset.case")
    assert opened.run(f"{VIEWER}.data.case") == key


def test_a_scan_never_shows_the_prediction_of_the_case_before(opened):
    """The new scan is unpacked, its prediction is not yet: nothing but the scan and its truth may be drawn."""
    opened.run("document.querySelector('.strip').open = true")
    opened.run(f"{VIEWER}.open(0).then(() => 1)")
    opened.wait("document.querySelectorAll('.small canvas').length === 3")
    held = (
        """(async (viewer) => {
      const late = new Set(viewer.cases[1].fits.flatMap((f) => [f.label, f.saliency])), get = viewer.get;
      let free; const waiting = new Promise((done) => { free = done; });
      viewer.get = (words) => late.has(words) ? waiting.then(() => get.call(viewer, words)) : get.call(viewer, words);
      const before = [viewer.label, viewer.small], ready = viewer.open(1);
      while (!viewer.image) await new Promise((done) => setTimeout(done));
      const between = [viewer.label, viewer.heat, viewer.small];
      await viewer.draw();
      free(); viewer.get = get; await ready;
      return [before, between, [viewer.label, viewer.small]].map((parts) => parts.map((part) => !!part));
    })"""
        + f"({VIEWER})"
    )
    assert opened.run(held) == [[True, True], [False] * 3, [True, True]]
    assert opened.problems == []


def test_a_narrow_screen_is_not_wider_than_itself(opened):
    opened.resize(390, 844, phone=True)
    opened.wait("innerWidth === 390")
    assert opened.run("document.documentElement.scrollWidth") <= 390
    opened.resize(1200, 900)


@pytest.fixture(scope="module")
def two_comparisons(tmp_path_factory):
    """A page of two comparisons on the same cases; the second one has an init that the first has not."""
    folder = tmp_path_factory.mktemp("two")
    sizes = {"draws": 1, "cases": 3}
    write_folder(folder / "a", **sizes)
    write_folder(folder / "b", inits=("scratch", "moco"), **sizes)
    report.main([str(folder / "a"), str(folder / "b"), "--out", str(folder / "page.html")])
    with Page(folder / "page.html", folder / "profile") as found:
        found.wait("[...document.querySelectorAll('.viewer')].filter((box) => box.viewer).length === 2")
        found.run(f"{BOTH}.map((v) => v.ready)[1].then(() => 1)")
        yield found


BOTH = "[...document.querySelectorAll('.viewer')].map((box) => box.viewer)"
STANDS = f"{BOTH}.map((v) => [v.cases[v.controls.case.value].case, v.controls.init.value, v.controls.budget.value])"
"""Case, init and number of labels of both viewers."""


def test_a_case_opens_in_the_viewer_of_its_own_comparison_with_its_own_budget(two_comparisons):
    opened = two_comparisons
    first, second = opened.run(STANDS)
    assert (first[1:], second[1:]) == (["scratch", "1"], ["scratch", "1"])
    pane = "[...document.querySelectorAll('.pane[data-pane=\"4 labels\"]')][1]"
    key = opened.run(
        f"[...{pane}.querySelectorAll('button.view')].map(b => b.dataset.case).find(k => k !== '{second[0]}')"
    )
    opened.run(f"{pane}.querySelector('button.view[data-case=\"{key}\"]').click()")
    assert opened.run(STANDS) == [first, [key, "scratch", "4"]]

    opened.run(f"{BOTH}[1].choose('budget', '1').then(() => 1)")
    scatter = "document.querySelectorAll('.two-inits')[1]"
    budget = f"{scatter}.querySelector('[data-role=budget]')"
    opened.run(f"(s => {{ s.value = 1; s.dispatchEvent(new Event('change')); }})({budget})")
    key = opened.run(f"{scatter}.keys.points[2]")
    opened.run(f"{scatter}.querySelector('.points').emit('plotly_click', {{points: [{{pointIndex: 2}}]}})")
    assert opened.run(STANDS) == [first, [key, "moco", "4"]]
    # what a viewer does not offer leaves its lists as they are
    opened.run(f"{BOTH}[0].show('{key}', 'moco', 16)")
    assert opened.run(STANDS)[0] == [key, "scratch", "1"]
    assert opened.problems == []


ORANGE = """((canvas) => {
  const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let orange = 0, grey = 0;
  for (let i = 0; i < all.length; i += 4) {
    const [r, g, b] = all.slice(i, i + 3);
    orange += r > 240 && g > 120 && g < 160 && b < 70;
    grey += r === 150 && g === 150 && b === 150;
  }
  return [orange > 500, grey > 500];
})(document.querySelector('.plane[data-plane=axial] canvas'))"""
"""Whether a slice has much of what is wrong, and of what nobody stated."""


def test_a_class_that_nobody_stated_is_not_shown_as_wrong(tmp_path):
    truth = np.zeros((6, 20, 20), np.uint8)
    truth[2:4, 2:5, 2:5] = 1
    said = truth.copy()
    said[:, 10:, :] = 2
    box = box_around(truth, (3.0, 1.0, 1.0), voxels=10**6)
    channel = grey_channel("CT", "HU", np.full(truth.shape, -500.0), None, limits=(0, 1))
    stated = CaseVolume(
        "k", ("background", "a", "b"), (channel,), truth, (3.0, 1.0, 1.0), box, (0.0, 0.1, 0.0)
    )
    fits = {("mae", 1): CasePrediction(said, 0.0)}
    cases = [
        ViewedCase("all stated", stated, fits),
        ViewedCase("b is not", replace(stated, known=(True, True, False)), fits),
    ]
    (tmp_path / "page.html").write_text(page("t", [viewer_html(fill(cases, limit_bytes=10**7), name="v")]))
    with Page(tmp_path / "page.html", tmp_path / "profile") as shown:
        shown.wait(f"document.querySelector('.viewer') && {VIEWER}")
        shown.run(f"(v => {{ v.controls.style.value = 'errors'; v.controls.opacity.value = 1; }})({VIEWER})")
        told = "document.querySelector('.viewer .numbers').textContent + document.querySelector('.legend').textContent"
        for case, (orange, grey) in enumerate([(True, False), (False, True)]):
            shown.run(f"{VIEWER}.open({case}).then(() => 1)")
            assert shown.run(ORANGE) == [orange, grey]
            assert ("nobody stated b here" in shown.run(told)) is grey
            assert ("nobody stated it" in shown.run(told)) is grey
        shown.run(f"(v => {{ v.hidden.add(2); v.draw(); }})({VIEWER})")
        assert shown.run(ORANGE) == [False, False]
        assert shown.problems == []


HOVERED = """((figure, point) => {
  Plotly.Fx.hover(figure, 'curveNumber' in point ? [point] : point, 'xy');
  const said = [...figure.querySelectorAll('.hoverlayer text')].map(t => t.textContent).join(' ');
  Plotly.Fx.unhover(figure);
  return said;
})"""
"""What a figure says of a point under the mouse."""


def test_hovering_over_the_curve_shows_numbers(opened):
    curve = "document.querySelector('.figure .js-plotly-plot')"
    name, value = opened.run(f"[{curve}.data[0].name, {curve}.data[0].y[0]]")
    said = opened.run(f"{HOVERED}({curve}, {{curveNumber: 0, pointNumber: 0}})")
    assert name in said
    assert f"{value:.3f}" in said
    assert "1 label" in said


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """The page of a made-up transfer benchmark, and its summary."""
    folder = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        fake_transfer.use_fakes(patch.setattr)
        transfer(
            fake_transfer.config(),
            folder / "out",
            archives=fake_transfer.ARCHIVES,
            workers=1,
            quiet=True,
            fit=fake_transfer.fake_fit,
            pretrain=fake_transfer.fake_pretrain,
        )
    with Page(folder / "out" / "report.html", folder / "profile") as found:
        found.wait("document.querySelector('.figure .js-plotly-plot')")
        yield found, json.loads((folder / "out" / "summary.json").read_text())


def test_the_heat_map_holds_the_gains_and_says_them_under_the_mouse(matrix):
    opened, summary = matrix
    figure = "document.querySelector('.figure .js-plotly-plot')"
    columns, rows, values = opened.run(f"(d => [d.x, d.y, d.z])({figure}.data[0])")
    gains = {(c["source"], c["target"]): c for c in summary["cells"]}
    assert len(gains) == 6
    for (source, target), cell in gains.items():
        row, column = rows.index(target), columns.index(source)
        assert values[row][column] == pytest.approx(cell["mean"], abs=1e-4)
        said = opened.run(f"{HOVERED}({figure}, {{xval: {column}, yval: {row}}})")
        assert source in said
        assert f"{cell['mean']:+.3f}" in said
    assert opened.problems == []
    assert [a for a in opened.asked if not a.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("stored", ["RAS", "LPS", "PIR"])
def test_left_is_right_and_up_is_up(tmp_path, stored):
    """A marker at the patient's left, front and top, from a file of any orientation to the pixels of the screen."""
    # 2 × 3 × 4 mm in x, y, z; the marker lies left (−x), anterior (+y), superior (+z) of the middle
    ras = np.full((20, 16, 12), 10.0, np.float32)
    ras[2:5, 11:14, 8:11] = 200.0
    ras[0, 0, 0] = 0.0
    image = nib.Nifti1Image(ras, np.diag([2.0, 3.0, 4.0, 1.0]))
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(stored)
    )
    nib.save(image.as_reoriented(turn), tmp_path / "scan.nii.gz")
    volume = read_nifti(tmp_path / "scan.nii.gz")
    label = (volume.array > 100).astype(np.uint8)
    writer = ArchiveWriter.open(tmp_path / "archive", RECIPE, ("background", "marker"))
    row = scan_row("mr", label.shape, affine_44=volume.affine_44, spacing_mm=(4.0, 3.0, 2.0))
    write_volume(writer.path, np.round(volume.array).astype(np.int16), row, recipe=RECIPE, stamp="")
    given = {"original_DHW": label, "original_affine_44": volume.affine_44, "recipe": RECIPE, "stamp": ""}
    write_label(writer.path, "c", label, **given)
    case = CaseRow(case="c", subject="s0", scans=("mr",), labeled=True, known_classes=(True, True))
    split = Split(name="default", seed=0, train=(), development=(), test=("s0",))
    found = case_volume(writer.commit([row], [case], [], splits=[split]), "c")
    fits = {("mae", 1): CasePrediction(found.truth_DHW * 0, 0.0)}
    html = page("t", [viewer_html(fill([ViewedCase("c", found, fits)], limit_bytes=10**7), name="v")])
    (tmp_path / "page.html").write_text(html)
    with Page(tmp_path / "page.html", tmp_path / "profile") as shown:
        shown.wait(f"document.querySelector('.viewer') && {VIEWER}")
        shown.run(f"{VIEWER}.ready.then(() => 1)")
        shown.run(f"(v => {{ v.controls.truth.click(); v.controls.opacity.value = 1; v.draw(); }})({VIEWER})")
        assert shown.problems == []
        for plane, (right, up) in {"axial": (1, 1), "coronal": (1, 1), "sagittal": (-1, 1)}.items():
            place = shown.run(BRIGHT.replace("PLANE", plane))
            share, across, above, aspect = place
            assert 0.01 < share < 0.1, plane
            assert across * right > 0.1, f"{plane}: the marker lies on the wrong side"
            assert above * up > 0.1, f"{plane}: the marker is upside down"
            shape_mm = dict(zip("zyx", np.multiply(found.truth_DHW.shape, found.spacing_mm), strict=True))
            wide, high = {"axial": "xy", "coronal": "xz", "sagittal": "yz"}[plane]
            assert aspect == pytest.approx(shape_mm[wide] / shape_mm[high], rel=0.02)
