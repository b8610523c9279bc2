"""Fixtures every test shares."""

import os
from pathlib import Path

import pytest

os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("WANDB_SILENT", "true")


@pytest.fixture(autouse=True, scope="session")
def _two_cores():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """Files of tests need not outlive a power cut; tests of a full disk put in a ``fsync`` of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real volumes; the test is skipped, with the reason, where there is none."""
    folder = Path(os.environ.get("MEDSEG_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(
            f"no real volumes: set MEDSEG_DATA or put them at ../shared/data ({folder.name} not found)"
        )
    return folder


@pytest.fixture(autouse=True)
def _plain_overview(request, monkeypatch):
    """No histograms in the overview page of an archive: they take most of the time of preparing a tiny one."""
    if request.module.__name__ != "tests.data.test_overview":
        monkeypatch.setattr("medseg_ssl.data.overview._distributions", lambda archive: "")
