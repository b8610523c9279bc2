"""What the tests of commands share."""

import inspect

import pytest

from medseg_ssl.analysis import figures


@pytest.fixture(scope="package", autouse=True)
def _undrawn_curves():
    """What a curve would be drawn of, in place of the picture: drawing takes a third of a small comparison's time.

    ``tests/analysis/test_report.py`` draws them.
    """
    real = inspect.signature(figures.curve_png)

    def undrawn(*what, **how):
        return repr(real.bind(*what, **how)).encode()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "curve_png", undrawn)
        yield
