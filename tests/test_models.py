"""Classifiers of radiographs, and the faults of the chapter's sketches of them."""

import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from cadx.models import (
    DenseNetConfig,
    DenseNetMedical,
    MedicalClassificationModel,
    MedicalResNet,
    ModelConfig,
    ResNetConfig,
)

SMALL = [
    ResNetConfig(width=0.25),
    ResNetConfig(depth=34, width=0.25, stem="small", dropout=0.3, pooling="average", norm="group"),
    ResNetConfig(depth=50, width=0.25),
    DenseNetConfig(growth_rate=8, block_config=(2, 2, 2, 2)),
    DenseNetConfig(growth_rate=8, block_config=(2, 2, 2, 2), stem="small", norm="group"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 1, 64, 96)


def _with_attention(model: MedicalClassificationModel) -> MedicalClassificationModel:
    assert model.attention is not None
    nn.init.normal_(model.attention.weight)
    return model.eval()


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_every_configuration_builds_and_trains(config: ResNetConfig | DenseNetConfig, images: Tensor) -> None:
    model = config.build(4, channels=1)
    output = model(images)
    assert output.logits.shape == (3, 4)
    assert output.features.shape == (3, model.classifier.in_features)
    assert output.attention.shape == ((3, 8, 12) if config.stem == "small" else (3, 2, 3))
    torch.testing.assert_close(output.attention.sum((1, 2)), torch.ones(3))
    output.logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_configuration_survives_json() -> None:
    adapter: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)
    for config in SMALL:
        assert adapter.validate_json(adapter.dump_json(config)) == config
    with pytest.raises(ValidationError, match="depth"):
        adapter.validate_python({"family": "resnet", "depth": 19})


def test_half_width_halves_the_channels() -> None:
    whole, half = ResNetConfig().build(2, 1), ResNetConfig(width=0.5).build(2, 1)
    assert half.classifier.in_features * 2 == whole.classifier.in_features == 512
    count = [sum(p.numel() for p in m.parameters()) for m in (half, whole)]
    assert count[0] / count[1] == pytest.approx(0.25, abs=0.01)


def test_full_width_is_torchvisions_network() -> None:
    reference = torchvision.models.resnet18(weights=None).eval()
    model = ResNetConfig(pooling="average").build(1000, 3).eval()
    state = reference.state_dict()
    model.backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    model.classifier.load_state_dict({k[3:]: v for k, v in state.items() if k.startswith("fc.")})
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x).logits, reference(x), rtol=1e-4, atol=1e-5)


def test_pooling_starts_as_an_average(images: Tensor) -> None:
    model = ResNetConfig(width=0.25, stem="small").build(2, 1).eval()
    output = model(images)
    torch.testing.assert_close(output.attention, torch.full((3, 8, 12), 1 / 96))
    torch.testing.assert_close(output.features, model.backbone.extract_features(images).mean((2, 3)))


# Faults of the chapter's sketches


def test_attention_is_used_by_the_prediction(images: Tensor) -> None:
    model = _with_attention(ResNetConfig(width=0.25, stem="small").build(2, 1))
    output = model(images)
    (gradient,) = torch.autograd.grad(output.logits[:, 1].sum(), model.attention.weight)
    assert gradient.abs().max() > 0
    assert output.attention.std() > 0


def test_attention_is_used_from_the_first_step_on(images: Tensor) -> None:
    model = ResNetConfig(width=0.25, stem="small").build(2, 1)
    (gradient,) = torch.autograd.grad(model(images).logits[:, 1].sum(), model.attention.weight)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("pooling", ["attention", "average"])
def test_shown_attention_is_the_pooling_weights(pooling: str, images: Tensor) -> None:
    model = ResNetConfig(width=0.25, stem="small", pooling=pooling).build(2, 1).eval()
    if pooling == "attention":
        _with_attention(model)
    output = model(images)
    feature_map = model.backbone.extract_features(images)
    pooled = torch.einsum("nfhw,nhw->nf", feature_map, output.attention)
    torch.testing.assert_close(model.classifier(pooled), output.logits)


def test_any_backbone_with_features_serves() -> None:
    class Backbone(nn.Module):
        feature_dim = 5

        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(2, 5, 3)

        def extract_features(self, images: Tensor) -> Tensor:
            return self.convolution(images)

    model = MedicalClassificationModel(Backbone(), num_classes=3)
    assert model(torch.randn(4, 2, 7, 6)).attention.shape == (4, 5, 4)
    assert any(name.startswith("backbone.") for name in model.state_dict())


def test_resnet_forward_does_not_raise_on_a_flat_tensor() -> None:
    output = MedicalResNet(num_classes=2)(torch.randn(2, 1, 64, 64))
    assert output.logits.shape == (2, 2)
    assert output.features.shape == (2, 2048)


def test_densenet_can_be_constructed_and_is_densely_connected() -> None:
    model = DenseNetMedical(num_classes=3)
    assert model(torch.randn(2, 1, 64, 64)).logits.shape == (2, 3)
    # Layer j of a block sees what every earlier layer gave: 32 channels each, after the 64 that came in.
    block = model.backbone.features.denseblock1
    assert [layer.conv1.in_channels for layer in block.values()] == [64 + 32 * j for j in range(6)]
    assert model.classifier.in_features == 1024


# Pretrained weights


def _trained(network: nn.Module) -> nn.Module:
    """Off its initial values, batch statistics included: what is not loaded shows."""
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.1)
    return network.eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("family", ["resnet", "densenet"])
def test_a_gray_image_gives_the_features_of_its_colour_copy(family: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    reference: nn.Module
    if family == "resnet":
        reference = _trained(torchvision.models.resnet18(weights=None))
        config = ResNetConfig(pretrained=path)
    else:
        reference = _trained(torchvision.models.DenseNet(8, (2, 2, 2, 2), num_init_features=16))
        config = DenseNetConfig(growth_rate=8, block_config=(2, 2, 2, 2), pretrained=path)
    if suffix == ".pth":
        torch.save(reference.state_dict(), path)
    else:
        safetensors.torch.save_file(reference.state_dict(), path)
    gray = torch.randn(2, 1, 64, 64)
    colour = gray.expand(-1, 3, -1, -1)
    features = config.build(2, channels=1).eval()(gray).features
    torch.testing.assert_close(
        features, config.build(2, channels=3).eval()(colour).features, rtol=1e-4, atol=1e-5
    )
    if family == "resnet":
        reference.fc = nn.Identity()
        expected = reference(colour)
    else:
        reference.classifier = nn.Identity()
        expected = reference(colour)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_published_densenet_names_are_understood(tmp_path: Path) -> None:
    reference = _trained(torchvision.models.DenseNet(8, (2, 2, 2, 2), num_init_features=16))
    old = {}
    for name, tensor in reference.state_dict().items():
        for part in ("norm", "conv"):
            for number in "12":
                name = (
                    name.replace(f".{part}{number}.", f".{part}.{number}.") if "denselayer" in name else name
                )
        if not name.endswith("num_batches_tracked"):  # older than that field
            old[name] = tensor
    assert any(".norm.1." in name for name in old)
    torch.save(old, tmp_path / "old.pth")
    config = DenseNetConfig(growth_rate=8, block_config=(2, 2, 2, 2), pretrained=tmp_path / "old.pth")
    model = config.build(2, channels=3).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.backbone.features(x), reference.features(x))


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(torchvision.models.resnet18(weights=None).state_dict(), path)
    for config in (
        ResNetConfig(pretrained=path, depth=34),
        ResNetConfig(pretrained=path, width=0.5),
        ResNetConfig(pretrained=path, stem="small"),
        ResNetConfig(pretrained=path, norm="group"),
        ResNetConfig(pretrained=tmp_path / "none.pth"),
    ):
        with pytest.raises(ValueError, match=r"^pretrained [^\n]*$"):
            config.build(2, channels=1)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"no state dict of tensors"):
        ResNetConfig(pretrained=tmp_path / "evil.pth").build(2, channels=1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stem", ["standard", "small"])
@pytest.mark.parametrize(
    "config", [ResNetConfig(width=0.25), DenseNetConfig(growth_rate=8, block_config=(2, 2, 2, 2))]
)
def test_a_cell_of_the_map_lies_where_the_network_looks(config: ModelConfig, stem: str) -> None:
    """The centre of what a cell answers to, as the gradient shows it; a map taken as even tiles is 15 px off."""
    torch.manual_seed(0)
    config = config.model_copy(update={"stem": stem})
    network = config.build(2, 1).eval()
    # A large image and cells near its middle: what a cell sees is cut off at the border, and cut off unevenly.
    size_px = 13 * round(config.cells.stride_px)
    images = torch.randn(4, 1, size_px, size_px, requires_grad=True)
    row, column = 6, 5
    network.backbone.extract_features(images)[:, :, row, column].square().sum().backward()
    assert images.grad is not None
    weight = images.grad.square().sum((0, 1))
    places = torch.arange(size_px) + 0.5
    for cell, mass in ((row, weight.sum(1)), (column, weight.sum(0))):
        centre_px = float((mass * places).sum() / mass.sum())
        expected_px = config.cells.first_centre_px + cell * config.cells.stride_px
        assert abs(centre_px - expected_px) < 0.15 * config.cells.stride_px
