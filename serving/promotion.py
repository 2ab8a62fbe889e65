"""What may be put into service: an archive that the gate has let through, with what proves it."""

from pathlib import Path

import pandas as pd

from cadx.gating import read_decision
from cadx.predicting.table import PredictionsInfo, read_predictions
from serving.archive import Release, read_release, require_endpoint


class NotPromoted(ValueError):
    """The gate refused what was to be put into service."""


def read_promoted(
    archive: Path, decision: Path, predictions: Path
) -> tuple[Release, pd.DataFrame, PredictionsInfo]:
    """An archive's release, and the predictions that its answers must equal.

    Raises:
        NotPromoted: if the gate refused this bundle.
        ValueError: if no endpoint takes its samples, or the files do not belong together.
    """
    release, decided = read_release(archive), read_decision(decision)
    require_endpoint(archive)
    if decided.bundle != release.bundle:
        raise ValueError(
            f"{decision}: about another bundle than {archive}; run `cadx gate` and `cadx package`"
        )
    for promote, reasons in (
        (release.decision.promote, release.decision.reasons),
        (decided.promote, decided.reasons),
    ):
        if not promote:
            raise NotPromoted(f"{archive}: refused by the gate: {'; '.join(reasons)}")
    if decided.metrics != release.metrics:
        raise ValueError(f"{decision}: rests on other numbers than {archive}; run `cadx package` again")
    frame, info = read_predictions(predictions)
    if info.bundle != release.bundle:
        raise ValueError(f"{predictions}: answers of another bundle than the archive's; evaluate that one")
    return release, frame, info
