"""Explanations: scores of maps, Grad-CAM in 2D and 3D, and whether a map depends on what was learnt."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from test_bundle import operating_point
from test_evaluate import Run, prepare
from test_loading_slides import section, slide_dataset, write_slide
from test_predicting_kinds import write_trained
from torch import nn

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.evaluating.explanations import (
    CONTROL,
    Case,
    deletion_and_insertion,
    explain,
    grad_cam,
    with_random_weights,
)
from cadx.files import digest_bytes
from cadx.models import ModelConfig
from cadx.models.radiograph import ConvNeXtConfig, DenseNetConfig, ResNetConfig
from cadx.models.slide import EncoderConfig, MILConfig
from cadx.models.volume import DenseNet3DConfig, ResNet3DConfig
from cadx.predicting.bags import embed_tiles
from cadx.predicting.predictor import Predictor
from cadx.training import TrainingConfig
from cadx.training.loop import fit
from serving.demo import write_demo_bundle


def test_areas_equal_a_walk_place_by_place() -> None:
    rng = np.random.default_rng(0)
    for num_places in (3, 7, 12):
        importance, weights = rng.integers(0, 4, num_places), rng.normal(size=num_places)
        order = sorted(range(num_places), key=lambda place: (-importance[place], place))
        deletion, insertion = [], []
        for count in range(num_places + 1):
            first = set(order[:count])
            deletion.append(np.tanh(sum(weights[place] for place in range(num_places) if place not in first)))
            insertion.append(np.tanh(sum(weights[place] for place in first)))
        expected = [
            sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / num_places
            for curve in (deletion, insertion)
        ]
        found = deletion_and_insertion(
            importance.astype(float), lambda shown, w=weights: np.tanh(shown @ w), steps=num_places
        )
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_no_map_beats_the_true_contributions() -> None:
    """Of a model that adds its places up, the true weights have the least deletion and the largest insertion."""
    rng = np.random.default_rng(1)
    weights = rng.exponential(size=9)
    weights /= weights.sum()

    def ask(shown: np.ndarray) -> np.ndarray:
        return shown @ weights

    deletion, insertion = deletion_and_insertion(weights, ask, steps=9)
    for _ in range(100):
        other = deletion_and_insertion(rng.random(9), ask, steps=9)
        assert other[0] >= deletion - 1e-12
        assert other[1] <= insertion + 1e-12


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (ResNetConfig(width=0.25, stem="small", pooling="average"), (32, 40)),
        (DenseNetConfig(growth_rate=4, block_config=(1, 1, 1, 1), stem="small", pooling="average"), (32, 40)),
        (ResNet3DConfig(depth=10, width=0.125, stem="small", pooling="average"), (16, 24, 16)),
        (DenseNet3DConfig(growth_rate=4, block_config=(1, 1, 1, 1), stem="small", pooling="average"), (16, 24, 16)),
    ],
    ids=lambda value: getattr(value, "family", ""),
)  # fmt: skip
def test_grad_cam_under_average_pooling_is_the_class_activation_map(config, size: tuple[int, ...]) -> None:
    """There the slope is known without any gradient: the classifier's weights, over the number of cells."""
    torch.manual_seed(0)
    network = config.build(2, 1).eval()
    inputs = torch.randn(3, 1, *size)
    with torch.no_grad():
        features = network.backbone.extract_features(inputs)
        weights = network.classifier.weight[1] - network.classifier.weight[0]
        expected = torch.einsum("f,nf...->n...", weights, features).relu() / features[0, 0].numel()
    found = grad_cam(network, inputs, 1)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert "extract_features" not in network.backbone.__dict__, "the network is left as it was"


def test_grad_cam_knows_attention_and_normalised_features() -> None:
    """By finite differences of the log-odds, cell by cell, in a family whose head is not linear."""
    torch.manual_seed(0)
    network = ConvNeXtConfig(width=0.125, depths=(1, 1, 1, 1), stem="small").build(3, 1).eval().double()
    nn.init.normal_(network.attention.weight)
    inputs = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        features = network.backbone.extract_features(inputs)

        def odds(moved: torch.Tensor) -> torch.Tensor:
            attention = network.attention(moved).float().flatten(1).softmax(1).view(1, 1, 2, 2)
            pooled = network.backbone.normalise((moved * attention).sum((2, 3)))
            logits = network.classifier(pooled)[0]
            return logits[0] - logits[1:].logsumexp(0)

        slopes = torch.zeros_like(features)
        step = 1e-3  # attention is float32
        for place in itertools.product(*map(range, features.shape)):
            moved = features.clone()
            moved[place] += step
            above = odds(moved)
            moved[place] -= 2 * step
            slopes[place] = (above - odds(moved)) / (2 * step)
        expected = (slopes.mean((2, 3), keepdim=True) * features).sum(1).relu()
    torch.testing.assert_close(grad_cam(network, inputs, 0), expected, rtol=2e-2, atol=1e-4)


def test_random_weights_are_seeded_and_leave_the_network_and_torch_alone() -> None:
    network = ResNetConfig(width=0.25).build(2, 1).eval()
    before, state = [p.clone() for p in network.parameters()], torch.random.get_rng_state()
    one, same, other = (with_random_weights(network, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(one(image).attention, same(image).attention)
        assert not torch.allclose(one(image).attention, other(image).attention)
        # An attention that starts from zero would be level, and comparable with nothing.
        assert one(image).attention.std() > 0


ENCODER = EncoderConfig(depth=18, width=0.125, stem="small")


WITH_MAPS = [
    (ResNetConfig(width=0.25), 1),
    (DenseNetConfig(growth_rate=4, block_config=(1, 1, 1, 1)), 1),
    (ConvNeXtConfig(width=0.125, depths=(1, 1, 1, 1)), 1),
    (ResNet3DConfig(depth=10, width=0.125), 1),
    (DenseNet3DConfig(growth_rate=4, block_config=(1, 1, 1, 1)), 1),
    *((MILConfig(pooling=pooling, encoder=ENCODER), 3) for pooling in ("gated_attention", "transformer")),
]
"""Of each family but the detectors, whose boxes explain themselves: a network, and the channels of what it sees."""


def test_every_family_with_a_map_is_tested_here() -> None:
    with_maps = {config for config in get_args(get_args(ModelConfig)[0]) if config.takes != "boxes"}
    assert {type(config) for config, _ in WITH_MAPS} == with_maps


@pytest.mark.parametrize(
    ("config", "channels"),
    WITH_MAPS,
    ids=lambda value: f"{getattr(value, 'family', '')} {getattr(value, 'pooling', '')}".strip(),
)
def test_no_weight_of_any_family_outlives_the_check(config, channels: int) -> None:
    """Nor what a normalisation counted; a frozen encoder is no exception, nor a class token or a layer's scale."""
    network = config.build(2, channels)
    learnt = dict(network.named_parameters()) | {
        name: buffer
        for name, buffer in network.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }
    with torch.no_grad():
        for values in learnt.values():
            values.add_(0.05 * torch.rand_like(values) + 0.01)
    fresh = with_random_weights(network, 0).state_dict()
    assert not [name for name, values in learnt.items() if torch.equal(values, fresh[name])]


def test_the_check_of_a_slide_draws_its_encoder_anew(tmp_path: Path) -> None:
    """As if a network with random weights had been asked about the slide from its file on."""
    slide = write_slide(tmp_path / "a.tiff", section(400, 500, np.s_[64:320, 64:448]))
    folder = slide_dataset(tmp_path / "dataset", {"a": slide})
    encoder = ENCODER.model_dump() | {"frozen": True}
    path = write_demo_bundle(
        tmp_path / "bundle",
        "slide",
        model={"family": "mil", "pooling": "transformer", "hidden_dim": 32, "encoder": encoder},
        preprocessing={"tile_px": 64, "height_px": 32, "width_px": 32, "channels": 3},
    )
    predictor = Predictor(path, device="cpu")
    (explained,) = explain(predictor, folder, [Case("a", "finding", "found", 0.9)])

    (network,) = predictor.networks
    random = with_random_weights(network, predictor.bundle.manifest.seed)
    tiles = next(iter(predictor.stored(folder, ["a"]))).stream
    maps = []
    for one in (network, random):
        with torch.no_grad():
            embeddings, _ = embed_tiles(one.encode, tiles, torch.device("cpu"))
            if one is random:
                one.fit_inputs([embeddings])
            maps.append(
                one(embeddings[None], torch.ones(1, len(embeddings), dtype=torch.bool)).attention[0].numpy()
            )
    assert len(maps[0]) == 24
    expected = stats.spearmanr(*maps).statistic
    assert explained.maps[0].when_random == pytest.approx(expected, abs=1e-6)
    assert abs(expected) < 0.9


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare(tmp_path_factory.mktemp("run"), steps=30)


def test_maps_that_name_the_evidence_beat_the_moved_map_and_forget_with_the_weights(ready: Run) -> None:
    predictor, folder = Predictor(ready.bundle, device="cpu"), DatasetFolder(ready.dataset)
    samples = folder.samples
    ids = samples.loc[samples["label_opacity"] == 1, "sample_id"].tolist()[:8]
    found = explain(predictor, folder, [Case(name, "opacity", "found", 0.9) for name in ids])
    gain = {
        method: np.mean([m.insertion - m.deletion for one in found for m in one.maps if m.method == method])
        for method in ("attention", "Grad-CAM", CONTROL)
    }
    assert gain["attention"] > gain[CONTROL] + 0.05
    assert gain["Grad-CAM"] > gain[CONTROL] + 0.05
    random = [m.when_random for one in found for m in one.maps if m.when_random is not None]
    assert abs(np.mean(random)) < 0.5
    for one in found:
        height, width = folder.pixels(one.case.sample_id).shape
        assert one.picture.shape == (height, len(one.maps) * width, 3)
        assert all(0 <= area <= 1 for m in one.maps for area in (m.deletion, m.insertion))


VOLUME_PX = 24


def planted_volumes(path: Path) -> DatasetFolder:
    """Noise; every other volume has a bright block of 8 voxels a side in one of its eight corners."""
    rng = np.random.default_rng(3)
    with DatasetWriter(
        path, name="noise", kind="volume", task="binary", classes=("none", "nodule"), positive="nodule",
        modality="CT", clustered=False, source=SourceInfo(title="noise", licence="CC0-1.0", citation="none"),
    ) as writer:  # fmt: skip
        for number in range(40):
            sick = number % 2
            voxels = rng.integers(0, 60, (VOLUME_PX,) * 3).astype(np.int16)
            block = tuple(slice(start, start + 8) for start in rng.choice([1, VOLUME_PX - 9], 3))
            voxels[block] += 60 * np.int16(sick)
            writer.add(Sample(
                sample_id=f"v{number:02}", pixels=voxels, labels={("none", "nodule")[sick]: 1}, patient=f"p{number}",
                sha256=digest_bytes(voxels.tobytes()), statistics={}, spacing_mm=(1.0, 1.0, 1.0),
            ))  # fmt: skip
    return DatasetFolder(path)


def planted_slides(path: Path) -> DatasetFolder:
    """Tissue of 6 x 4 tiles; every other slide has 2 x 2 dark ones, anywhere among them."""
    rng, files = np.random.default_rng(4), {}
    path.mkdir()
    for number in range(20):
        pixels = section(400, 500, np.s_[64:320, 64:448])
        pixels[300:310, 64:448, 2] = 120 + number  # no two slides are one file
        if number % 2:
            top, left = 64 * (1 + rng.integers(3)), 64 * (1 + rng.integers(5))
            pixels[top : top + 128, left : left + 128] = (110, 40, 140)
        files[f"s{number:02}"] = write_slide(path / f"{number}.tiff", pixels)
    return slide_dataset(path / "dataset", files)


PLANTED: dict[str, tuple[Callable[[Path], DatasetFolder], int, dict[str, Any]]] = {
    "volume": (
        planted_volumes,
        32,
        {
            "model": {"family": "resnet3d", "depth": 10, "width": 0.125, "stem": "small"},
            "preprocessing": {"patch_px": (VOLUME_PX,) * 3, "window_hu": (0, 120)},
            "patches_per_sample": 1,
            "batch_size": 8,
            "epochs": 10,
        },
    ),
    "slide": (
        planted_slides,
        12,
        {
            "model": {
                "family": "mil", "hidden_dim": 32, "attention_dim": 16, "dropout": 0.0, "entropy_weight": 0.01,
                "encoder": {"depth": 18, "width": 0.125, "norm": "group", "frozen": True},
            },
            "preprocessing": {"tile_px": 64, "height_px": 32, "width_px": 32, "channels": 3},
            "max_instances": 24,
            "batch_size": 4,
            "epochs": 40,
        },
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANTED)
def test_maps_of_volumes_and_slides_name_the_evidence_too(kind: str, tmp_path: Path) -> None:
    """In samples that training did not see, where nothing but what was planted speaks for the class."""
    plant, num_train, recipe = PLANTED[kind]
    folder = plant(tmp_path / "planted")
    ids = folder.samples["sample_id"].tolist()
    config = TrainingConfig.model_validate({"learning_rate": 3e-3, "warmup_epochs": 1, **recipe})
    seen, unseen = ids[:num_train], ids[num_train:]
    splits = pd.DataFrame({"sample_id": seen + seen[:8], "split": ["train"] * num_train + ["val"] * 8})
    fitted = fit(config, folder, splits, seed=0, checkpoints=tmp_path / "run" / "member")
    trained = write_trained(tmp_path / "trained", folder, config, fitted.state_dict)
    positive = folder.info.positive
    assert positive is not None
    point = operating_point(**{positive: 0.5})
    Bundle(trained).complete(tmp_path / "bundle", temperature=1.0, operating_point=point)
    predictor = Predictor(tmp_path / "bundle", device="cpu")

    found = explain(predictor, folder, [Case(name, positive, "found", 0.9) for name in unseen[1::2]])
    methods = ("attention", "Grad-CAM") if kind == "volume" else ("attention",)
    gain = {
        method: np.mean([m.insertion - m.deletion for one in found for m in one.maps if m.method == method])
        for method in (*methods, CONTROL)
    }
    assert len(found) == len(unseen) // 2
    for method in methods:
        assert gain[method] > gain[CONTROL] + 0.05, gain


def test_every_map_of_a_report_has_its_scores(ready: Run, tmp_path: Path) -> None:
    ready.evaluate(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "Explanations" in html
    assert "moved by half" in html
    assert "random weights" in html
    assert html.count("attention 0.") >= 2
