"""Members' disagreement: whose it is, what it costs, and that risk and coverage are what a slow walk finds."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_bundle import train_bundle, write_dataset
from test_evaluate import Run

from cadx.datasets import DatasetFolder, read_splits
from cadx.evaluating import Classification, Settings
from cadx.evaluating.uncertainty import (
    _estimate,
    aurc,
    member_probabilities,
    mutual_information,
    risk_by_coverage,
)
from cadx.predicting.predictor import Predictor
from cadx.predicting.table import read_predictions
from components.calibrate import CalibrateParams, calibrate


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three networks that saw few batches, so that they err, and not all on the same images."""
    folder = tmp_path_factory.mktemp("ensemble")
    dataset, splits = write_dataset(folder)
    trained = train_bundle(folder / "trained", dataset, splits, steps=12, members=3)
    params = CalibrateParams(sensitivity=0.9)
    calibrate(dataset=dataset, splits=splits, trained=trained, bundle=folder / "bundle", params=params)
    return Run(dataset, splits, folder / "bundle")


def asked(run: Run) -> tuple[Predictor, DatasetFolder, list[str]]:
    splits = read_splits(run.splits)
    ids = splits.loc[splits["split"] == "test", "sample_id"].tolist()
    return Predictor(run.bundle, device="cpu"), DatasetFolder(run.dataset), ids


def test_risk_and_its_area_equal_a_walk_over_every_order_of_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        errors, doubt = rng.integers(0, 2, 6).astype(float), rng.integers(0, 4, 6).astype(float)
        orders = [
            order
            for order in itertools.permutations(range(6))
            if all(doubt[a] <= doubt[b] for a, b in itertools.pairwise(order))
        ]
        walks = [
            [sum(errors[i] for i in order[: k + 1]) / (k + 1) for k in range(6)]
            for order in orders
        ]  # fmt: skip
        np.testing.assert_allclose(risk_by_coverage(errors, doubt), np.mean(walks, axis=0), atol=1e-12)
        assert aurc(errors, doubt) == pytest.approx(np.mean(walks), abs=1e-12)
        assert aurc(errors, errors) <= aurc(errors, doubt) + 1e-12
        assert aurc(errors, np.zeros(6)) == pytest.approx(errors.mean())


def test_mutual_information_is_the_mean_divergence_from_the_mean() -> None:
    from scipy.stats import entropy

    p = np.random.default_rng(0).dirichlet([1, 1, 1], size=(5, 7))
    expected = entropy(p, np.broadcast_to(p.mean(0), p.shape), axis=-1).mean(axis=0)
    np.testing.assert_allclose(mutual_information(p, multilabel=False), expected, atol=1e-12)
    each = p[..., 0]
    both = mutual_information(np.stack([each, 1 - each], -1), multilabel=False)
    np.testing.assert_allclose(mutual_information(each[..., None], multilabel=True), both, atol=1e-12)
    assert mutual_information(np.repeat(p[:1], 4, axis=0), multilabel=False).max() == 0


def test_members_are_the_networks_each_asked_alone(ensemble: Run) -> None:
    predictor, folder, ids = asked(ensemble)
    logits, features = predictor.logits(predictor.stored(folder, ids))
    members = member_probabilities(predictor, logits, features)
    assert members is not None
    assert members.shape == (3, len(ids), 2)
    made, manifest = predictor.bundle.manifest.preprocessing, predictor.bundle.manifest
    images = torch.stack([made.apply(folder.pixels(name)) for name in ids])
    for network, found in zip(predictor.networks, members, strict=True):
        with torch.inference_mode():
            one = network(images).logits.double()
        shifted = one / manifest.temperature + torch.tensor(manifest.bias)
        np.testing.assert_allclose(found, shifted.softmax(1).numpy(), atol=1e-5)


def test_dropout_spreads_as_whole_passes_with_dropout_do(ensemble: Run) -> None:
    predictor, folder, ids = asked(ensemble)
    (network, *_) = predictor.networks
    predictor._networks = [network]
    network.dropout.p = 0.4
    logits, features = predictor.logits(predictor.stored(folder, ids))
    one, same = (member_probabilities(predictor, logits, features, passes=200) for _ in range(2))
    assert one is not None
    np.testing.assert_array_equal(one, same)
    images = torch.stack([predictor.bundle.manifest.preprocessing.apply(folder.pixels(name)) for name in ids])
    torch.manual_seed(0)
    network.dropout.train()
    with torch.inference_mode():
        features_whole = network(images).features
        manifest = predictor.bundle.manifest
        passes = [network.classifier(network.dropout(features_whole)).double() for _ in range(200)]
        whole = torch.stack(
            [(p / manifest.temperature + torch.tensor(manifest.bias)).softmax(1) for p in passes]
        )
    network.dropout.eval()
    spread, expected = one[:, :, 1].std(axis=0), whole[:, :, 1].numpy().std(axis=0)
    np.testing.assert_allclose(spread, expected, rtol=0.25, atol=0.01)
    np.testing.assert_allclose(one[:, :, 1].mean(0), whole[:, :, 1].numpy().mean(0), atol=0.05)
    network.dropout.p = 0.0
    assert member_probabilities(predictor, logits, features) is None, "one member disagrees with nobody"


def test_where_the_answer_is_not_the_last_layers_nothing_is_made_up(ensemble: Run) -> None:
    """Windows that are averaged, instances pooled by their maximum: features say another thing than the answer."""
    predictor, folder, ids = asked(ensemble)
    logits, features = predictor.logits(predictor.stored(folder, ids))
    assert member_probabilities(predictor, logits + 0.1, features) is None


def test_an_ensembles_report_shows_that_it_disagrees_where_it_errs(ensemble: Run, tmp_path: Path) -> None:
    found = ensemble.evaluate(tmp_path)["uncertainty"]
    assert found["members"] == 3
    assert found["on_errors"] > found["on_others"]
    assert found["auc"]["low"] < found["auc"]["value"] > 0.5
    assert found["best"] <= found["aurc"]["disagreement"]["value"] <= found["aurc"]["disagreement"]["high"]
    assert found["curve"]["disagreement"][-1] == pytest.approx(found["error_rate"]["value"], abs=1e-6)
    html = (tmp_path / "report.html").read_text()
    assert "Risk and coverage" in html
    # The file of answers keeps its form: what the members said stays out of it.
    frame, info = read_predictions(tmp_path / "predictions.parquet")
    assert list(frame.columns) == info.columns
    again = Classification(frame, info, Settings(resamples=0, subgroups=(), minimum_n=20))
    assert again.record()["uncertainty"] == {}


def test_the_answer_of_an_ensemble_is_what_it_was(ensemble: Run) -> None:
    predictor, folder, ids = asked(ensemble)
    frame = Classification.predict(predictor, folder, ids)
    expected = predictor.probabilities(predictor.stored(folder, ids))
    np.testing.assert_array_equal(frame[["prob_normal", "prob_opacity"]], expected)
    assert isinstance(frame, pd.DataFrame)


def test_the_area_under_risk_and_coverage_says_where_it_rests_on_few_errors() -> None:
    for num_errors, word in ((4, "; too few errors (4): holds the truth less often than 95 %"), (5, "")):
        errors, doubt = np.r_[np.ones(num_errors), np.zeros(40)], np.linspace(0, 1, 40 + num_errors)
        found = _estimate(errors, doubt, [np.arange(errors.size)] * 3)
        assert found.method == f"patient bootstrap, percentile, 3 resamples{word}"
