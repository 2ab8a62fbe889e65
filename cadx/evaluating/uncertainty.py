"""How far the members of a model disagree on a case, and whether they disagree more where the model is wrong.

Members are the networks of an ensemble and, where a network drops units before its last layer, that layer asked again
and again with other units left out (Gal and Ghahramani 2016, "Dropout as a Bayesian Approximation"). Both act on the
features that an answer is made of, so nothing is computed twice, and the answer itself stays as it is.

Disagreement is the mutual information of the answer and the member, in nats: the entropy of the members' mean
probability less the mean of their entropies (Houlsby et al. 2011, arXiv:1112.5745, eq. 2). It is judged by what a
reader gains who takes over the cases of largest disagreement: the risk-coverage curve and the area under it (AURC;
Geifman and El-Yaniv 2017, "Selective Classification for Deep Neural Networks"), beside that of the distance from the
threshold, which every model has.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from cadx import calibration
from cadx.doubts import HOLDS_LESS
from cadx.evaluating.evaluation import dump
from cadx.metrics import auc, share_of
from cadx.metrics.proportions import MIN_ERRORS
from cadx.predicting.table import Arrays, PredictionsInfo
from cadx.reporting import MUTED, Page, panels
from cadx.types import Estimate

if TYPE_CHECKING:  # imported where a network is asked: a summary asks none, and torch takes two seconds
    from torch import nn

    from cadx.predicting.predictor import Predictor

FloatArray = NDArray[np.float64]

PASSES = 50
"""Times that a network with dropout is asked."""
_RESAMPLES = 200
_SAME = 1e-3  # of a logit: what float32 may differ by between a batch and its parts


def member_probabilities(
    predictor: "Predictor", logits: np.ndarray, features: np.ndarray, *, passes: int = PASSES
) -> FloatArray | None:
    """What each member says, S N K, calibrated as the answer is; None where there is but one, or the family forbids.

    It forbids where the answer is not the last layer's of the features: instances that are pooled by their maximum,
    volumes whose windows are averaged.

    Args:
        predictor: with a complete bundle.
        logits: N K, as `Predictor.logits` gives them.
        features: N F, likewise.
        passes: for each network with dropout; seeded by the bundle's seed.
    """
    import torch

    from cadx.predicting.predictor import pool_logits

    manifest = predictor.bundle.manifest
    layers = [_last_layer(network) for network in predictor.networks]
    if features.shape[1] != sum(layer.in_features for layer, _ in layers) or not len(logits):
        return None
    parts = np.split(features, np.cumsum([layer.in_features for layer, _ in layers])[:-1], axis=1)
    generator = torch.Generator().manual_seed(manifest.seed)
    plain, members = [], []
    with torch.inference_mode():
        for (layer, share), part in zip(layers, parts, strict=True):
            seen, layer = torch.from_numpy(part), layer.cpu()
            plain.append(layer(seen).double())
            for _ in range(passes if share > 0 else 1):
                kept = torch.rand(seen.shape, generator=generator) >= share
                members.append(layer(seen * kept / (1 - share)).double())
        rebuilt = pool_logits(torch.stack(plain), manifest.task).numpy()
    if len(members) == 1 or np.abs(rebuilt - logits).max() > _SAME:
        return None
    assert manifest.temperature is not None, "evaluation asks for complete bundles"
    return np.stack(
        [
            calibration.apply(one.numpy(), manifest.temperature, manifest.task, manifest.bias)
            for one in members
        ]
    )


def _last_layer(network: "nn.Module") -> "tuple[nn.Linear, float]":
    """The layer that makes logits of features, a copy, and the share of features that training drops before it."""
    from torch import nn

    from cadx.models.head import AttentionPoolingClassifier
    from cadx.models.slide import DeepMIL

    if isinstance(network, AttentionPoolingClassifier):
        layer, share = network.classifier, network.dropout.p
    else:
        assert isinstance(network, DeepMIL)
        layer, share = network.pooling.classifier, 0.0
    copied = nn.Linear(layer.in_features, layer.out_features)
    copied.load_state_dict(layer.state_dict())
    return copied, share


def mutual_information(members: FloatArray, *, multilabel: bool) -> FloatArray:
    """The disagreement of S members on N cases, in nats, N, from S N K probabilities; of multilabel the classes' sum.

    >>> mutual_information(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), multilabel=False).round(3).tolist()
    [0.693]
    """

    def entropy(p: FloatArray) -> FloatArray:
        bits = scipy.special.entr(p) + (scipy.special.entr(1 - p) if multilabel else 0)
        return np.asarray(bits.sum(axis=-1), dtype=np.float64)

    # Rounding alone may make it negative.
    return np.maximum(entropy(members.mean(axis=0)) - entropy(members).mean(axis=0), 0.0)


def margin(info: PredictionsInfo, rows: Arrays) -> FloatArray:
    """How near each case is to another call, N: minus the distance in log-odds, of the class that is nearest."""
    p = np.clip(rows.probabilities, 1e-12, 1 - 1e-12)
    if info.task == "multiclass":
        first, second = np.sort(p, axis=1)[:, :-3:-1].T
        return np.asarray(np.log(second) - np.log(first), dtype=np.float64)
    columns = [info.classes.index(name) for name in info.thresholds]
    limits = np.clip([info.thresholds[info.classes[column]] for column in columns], 1e-12, 1 - 1e-12)
    return np.asarray(-np.abs(scipy.special.logit(p[:, columns]) - scipy.special.logit(limits)).min(axis=1))


def risk_by_coverage(errors: np.ndarray, doubt: np.ndarray) -> FloatArray:
    """The share of errors among the k cases of least doubt, for k = 1..N; equal doubts in every order, on average.

    >>> risk_by_coverage(np.array([1, 0, 0, 0]), np.array([3.0, 1.0, 2.0, 0.0])).tolist()
    [0.0, 0.0, 0.0, 0.25]
    """
    _, group, size = np.unique(doubt, return_inverse=True, return_counts=True)
    shared = np.bincount(group, errors, len(size)) / size
    counts = np.arange(1, len(errors) + 1)
    return np.asarray(np.cumsum(shared[np.sort(group)]) / counts, dtype=np.float64)


def aurc(errors: np.ndarray, doubt: np.ndarray) -> float:
    """The area under `risk_by_coverage`: the lower the better."""
    return float(risk_by_coverage(errors, doubt).mean())


def disagreement(
    predictor: "Predictor", logits: np.ndarray, features: np.ndarray
) -> dict[str, NDArray[np.float64]]:
    """Two columns, N: `disagreement` in nats, and `members`, how many disagree; empty where there is but one."""
    said = member_probabilities(predictor, logits, features)
    if said is None:
        return {}
    found = mutual_information(said, multilabel=predictor.bundle.manifest.task == "multilabel")
    return {"disagreement": found, "members": np.full(len(found), float(len(said)))}


def uncertainty(info: PredictionsInfo, rows: Arrays, frame: pd.DataFrame) -> dict[str, Any]:
    """How disagreement and errors go together, as estimates and lists; empty where nobody can disagree.

    Args:
        info: what the rows are.
        rows: the answers.
        frame: the same with the columns of `disagreement`, if there are any.

    Returns:
        members; error_rate; on_errors and on_others, mean disagreement; auc, how often a wrong case is disagreed on
        more than a right one; aurc of disagreement and of the margin, with the values of no order at all (chance) and
        of the best one; curve, their risks by coverage.
    """
    labelled = ~np.isnan(rows.labels).any(axis=1)
    if "disagreement" not in frame or frame["disagreement"].isna().any() or not labelled.any():
        return {}
    truth = rows.labels[labelled] == 1
    errors = (rows.decisions[labelled] != truth).any(axis=1).astype(np.float64)
    patients = None if rows.patients is None else rows.patients[labelled]
    doubts = {
        "disagreement": frame["disagreement"].to_numpy(np.float64)[labelled],
        "margin": margin(info, rows)[labelled],
    }
    places = np.unique(np.linspace(0, len(errors) - 1, min(len(errors), 101)).round().astype(np.intp))
    resampled = list(_resamples(len(errors), patients, info.seed))
    return {
        "members": int(frame["members"].max()),
        "error_rate": share_of(errors == 1, patients),
        "on_errors": _mean(doubts["disagreement"][errors == 1]),
        "on_others": _mean(doubts["disagreement"][errors == 0]),
        "auc": auc(errors, doubts["disagreement"], patients),
        "aurc": {name: _estimate(errors, doubt, resampled) for name, doubt in doubts.items()},
        "chance": _mean(errors),
        "best": aurc(errors, errors),
        "curve": {
            "coverage": ((places + 1) / len(errors)).round(6).tolist(),
            **{
                name: risk_by_coverage(errors, doubt)[places].round(6).tolist()
                for name, doubt in doubts.items()
            },
        },
    }


def _resamples(n: int, patients: np.ndarray | None, seed: int) -> Any:
    """Rows of the cases of patients drawn with replacement."""
    code = np.arange(n) if patients is None else np.unique(patients, return_inverse=True)[1]
    rows_of = np.split(np.argsort(code, kind="stable"), np.cumsum(np.bincount(code))[:-1])
    generator = np.random.default_rng(seed)
    for _ in range(_RESAMPLES):
        yield np.concatenate([rows_of[i] for i in generator.integers(len(rows_of), size=len(rows_of))])


def _estimate(errors: np.ndarray, doubt: np.ndarray, resampled: list[np.ndarray]) -> Estimate:
    value = aurc(errors, doubt)
    low, high = np.percentile([aurc(errors[rows], doubt[rows]) for rows in resampled], [2.5, 97.5])
    method = f"patient bootstrap, percentile, {len(resampled)} resamples"
    if errors.sum() < MIN_ERRORS:
        method += f"; too few errors ({errors.sum():.0f}): {HOLDS_LESS}"
    return Estimate(
        value=value, low=min(float(low), value), high=max(float(high), value), n=len(errors), method=method
    )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def uncertainty_record(found: Mapping[str, Any]) -> dict[str, Any]:
    """`uncertainty` as JSON holds it."""
    if not found:
        return {}
    parts = {name: found[name].model_dump(mode="json") for name in ("error_rate", "auc")}
    return {**found, **parts, "aurc": dump(found["aurc"])}


def show_uncertainty(page: Page, found: Mapping[str, Any]) -> None:
    """Add the section on disagreement."""
    if not found:
        return
    page.section("Uncertainty")
    page.text(
        f"{found['members']} members were asked about each case: the networks of the ensemble and, where units are "
        "dropped in training, the last layer with other units left out. How far they disagree is measured by the "
        "mutual information, in nats. The answer itself is as it is served."
    )
    if found["on_errors"] is None or found["on_others"] is None:
        page.callout("ok", "No case is called wrong, or none right: disagreement has nothing to tell apart.")
        return
    page.table(
        [
            {"what": "cases called wrong", "value": found["error_rate"]},
            {"what": "mean disagreement on them", "value": found["on_errors"]},
            {"what": "mean disagreement on the others", "value": found["on_others"]},
            {"what": "AUC of disagreement for errors (0.5: says nothing)", "value": found["auc"]},
            {"what": "AURC, handing over by disagreement", "value": found["aurc"]["disagreement"]},
            {
                "what": "AURC, handing over by the distance from the threshold",
                "value": found["aurc"]["margin"],
            },
            {"what": "AURC, in no order", "value": found["chance"]},
            {"what": "AURC, errors first (the best there is)", "value": found["best"]},
        ],
        "AURC: the share of wrong calls among the cases that the model keeps, averaged over how many it keeps; the "
        "lower, the better.",
    )
    drawing, (axes,) = panels(4.6, 3.2, columns=1)
    coverage = found["curve"]["coverage"]
    axes.plot(coverage, found["curve"]["disagreement"], label="by disagreement")
    axes.plot(coverage, found["curve"]["margin"], label="by distance from the threshold")
    axes.axhline(found["chance"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), label="in no order")
    axes.set(
        xlim=(0, 1.01),
        ylim=(0, None),
        xlabel="share of cases that the model keeps",
        ylabel="share of wrong calls",
        title="Risk and coverage",
    )
    axes.legend(loc="upper left", fontsize=8)
    page.figure(
        drawing,
        "Cases of largest doubt are handed over first, from right to left.",
        alt="Risk-coverage curves; metrics.json holds the numbers",
    )
