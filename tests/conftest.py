"""What every test may ask for."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Two workers on two cores: more threads than that only wait for each other. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What else runs on the machine must not fail a test: a hang is pytest-timeout's.
settings.register_profile("cadx", deadline=None)
settings.load_profile("cadx")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The mirror of public data sets; tests that need it are skipped where it is not at hand."""
    folder = Path(os.environ.get("CADX_DATA_MIRROR") or ROOT.parent / "shared" / "data")
    if not (folder / "md5sums.txt").is_file():
        pytest.skip("no mirror of public data: set CADX_DATA_MIRROR")
    return folder
