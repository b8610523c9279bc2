"""What the tests of commands share."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def _undrawn_curves():
    """What a curve would be drawn of, in place of the picture: drawing takes a third of a small comparison's time.

    ``tests/analysis/test_report.py`` draws them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "medseg_ssl.analysis.figures.curve_png",
            lambda *what, **how: b"\x89PNG" + repr((what, how)).encode(),
        )
        yield
