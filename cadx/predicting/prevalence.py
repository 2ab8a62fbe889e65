"""The shares of classes that answers are for, where a model is used; without torch."""

from collections.abc import Mapping

import numpy as np

from cadx import calibration
from cadx.bundle import Bundle


def prevalence_of(bundle: Bundle, wanted: Mapping[str, float]) -> dict[str, float]:
    """The shares to answer for, of every class they concern; empty for those of the calibration split.

    Raises:
        ValueError: if they are not shares of the bundle's classes, or it does not know its own.
    """
    if not wanted:
        return {}
    manifest, shares = bundle.manifest, dict(wanted)
    if not manifest.prevalence:
        raise ValueError(
            f"{bundle.path}: does not know the prevalence it was calibrated at; run `cadx calibrate` of this version"
        )
    if manifest.task == "binary" and set(shares) == {manifest.positive}:
        (share,) = shares.values()
        shares |= {name: 1 - share for name in manifest.classes if name != manifest.positive}
    if manifest.task != "multilabel" and (
        set(shares) != set(manifest.classes) or not np.isclose(sum(shares.values()), 1)
    ):
        raise ValueError(
            f"prevalence {shares}: give the shares of {', '.join(manifest.classes)}, which sum to 1"
        )
    calibration.at_prevalence(  # refuses what is no share
        np.full(len(manifest.classes), 0.5), manifest.prevalence, shares, manifest.task, manifest.classes
    )
    return shares
