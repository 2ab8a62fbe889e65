"""How long the catalogue's synthetic cohorts take to draw: seconds of one core, at the pace of their first patients.

The peer of each claim is its limit: ten minutes for a whole cohort.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks._claim import claim
from cadx.catalog import PhantomEntry, load_catalog
from cadx.phantom import PHANTOM

_CATALOG = Path("data/catalog.yaml")
_LIMIT_S = 600.0
_PART = 25
"""The patients of a cohort divided by those that are drawn here."""


def claims() -> Iterator[dict[str, Any]]:
    for name, entry in load_catalog(_CATALOG).items():
        if isinstance(entry, PhantomEntry):
            whole = PHANTOM.validate_python(entry.parameters)
            part = whole.model_copy(update={"num_patients": whole.num_patients // _PART})
            with TemporaryDirectory(prefix="cadx-phantoms-") as folder:
                # Of the processor and not of the clock: what else runs on the machine does not count.
                started = time.process_time()
                part.write(Path(folder) / "cohort")
                seconds = (time.process_time() - started) * whole.num_patients / part.num_patients
            yield claim(f"phantoms.{name}", seconds, _LIMIT_S, "s", ratio=_LIMIT_S / seconds)
