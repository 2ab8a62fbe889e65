"""Classifiers of radiographs, and the faults of the chapter's sketches of them."""

import hashlib
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
import torchvision
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torchvision.models import convnext

from cadx.files import digest_path
from cadx.models import (
    ConvNeXtConfig,
    DenseNetConfig,
    ModelConfig,
    PretrainedOrigin,
    ResNetConfig,
    pretrained_origin,
)
from cadx.models.radiograph import ConvNeXtMedical, DenseNetMedical, MedicalClassificationModel, MedicalResNet

SMALL = [
    ResNetConfig(width=0.25),
    ResNetConfig(depth=34, width=0.25, stem="small", dropout=0.3, pooling="average", norm="group"),
    ResNetConfig(depth=50, width=0.25),
    DenseNetConfig(growth_rate=8, block_config=(2, 2, 2, 2)),
    DenseNetConfig(growth_rate=8, block_config=(2, 2, 2, 2), stem="small", norm="group"),
    ConvNeXtConfig(width=0.25, depths=(1, 1, 2, 1)),
    ConvNeXtConfig(width=0.25, depths=(1, 1, 2, 1), stem="small", stochastic_depth=0.0),
]
FAMILIES = [SMALL[0], SMALL[3], SMALL[5]]
"""The first of each family."""


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


def test_every_family_of_radiographs_is_tested_here() -> None:
    takes_images = {config for config in get_args(get_args(ModelConfig)[0]) if config.takes == "images"}
    assert {type(config) for config in FAMILIES} == takes_images


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_every_configuration_builds_and_trains(config: ModelConfig, images: Tensor) -> None:
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
    with pytest.raises(ValidationError, match=r"norm\n.*not permitted"):
        adapter.validate_python({"family": "convnext", "norm": "batch"})  # it has layer norms and no others


@pytest.mark.parametrize("pretrained", ["torchvision:IMAGENET1K_V1", Path("weights/resnet.pth")], ids=str)
def test_where_weights_come_from_survives_json(pretrained: str | Path) -> None:
    config = ResNetConfig(pretrained=pretrained)
    assert ResNetConfig(pretrained=str(pretrained)) == config
    assert ResNetConfig.model_validate_json(config.model_dump_json()) == config
    assert type(config.pretrained) is type(pretrained)


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


def test_full_convnext_is_torchvisions_network() -> None:
    reference = _trained(torchvision.models.convnext_tiny(weights=None))
    model = ConvNeXtConfig(pooling="average").build(1000, 3).eval()
    state = reference.state_dict()
    model.backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier.2.")})
    model.classifier.load_state_dict({k[13:]: v for k, v in state.items() if k.startswith("classifier.2.")})
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x).logits, reference(x), rtol=1e-4, atol=1e-4)


def test_half_width_halves_a_convnext_and_depths_are_its_blocks() -> None:
    model = ConvNeXtConfig(width=0.5, depths=(1, 2, 3, 1)).build(2, 1)
    dims = [block.block[0].in_channels for block in model.stages() if isinstance(block, convnext.CNBlock)]
    assert dims == [48, 96, 96, 192, 192, 192, 384]
    assert model.classifier.in_features == 384


def test_stochastic_depth_skips_late_blocks_in_training_alone(images: Tensor) -> None:
    config = ConvNeXtConfig(width=0.25, depths=(1, 1, 1, 1), stochastic_depth=0.9)
    model = config.build(2, 1)
    *_, last = model.stages()
    nn.init.ones_(last.layer_scale)
    x = torch.randn(200, 192, 1, 1)
    skipped = (last.train()(x) == x).flatten(1).all(1)
    assert 0.8 < skipped.float().mean() < 0.97
    assert not (last.eval()(x) == x).flatten(1).all(1).any()
    first = model.stages()[0].train()
    nn.init.ones_(first.layer_scale)
    x = torch.randn(200, 24, 2, 2)
    assert not (first(x) == x).flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("config", "least_px"), [(SMALL[3], 29), (SMALL[4], 8), (SMALL[5], 32), (SMALL[6], 8)]
)
def test_an_image_too_small_for_a_cell_is_refused_in_one_line(config: ModelConfig, least_px: int) -> None:
    model = config.build(2, 1).eval()
    assert model(torch.randn(1, 1, least_px, least_px)).attention.shape == (1, 1, 1)
    with pytest.raises(ValueError, match=rf"^images of 64 x {least_px - 1} px: [^\n]*$"):
        model(torch.randn(1, 1, 64, least_px - 1))


# What gradient checkpointing and tiny batches ask for


def _gradients(model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], int]:
    """Of one loss, with the bytes of activations that its graph held."""
    held: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(1)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images).logits.square().sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, sum(held.values())


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.family)
def test_stages_can_be_recomputed_one_by_one(config: ModelConfig, images: Tensor) -> None:
    """Each is called once, with one tensor, in order; recomputed, they give the same gradients from less memory."""
    model = config.build(2, channels=1)
    calls: list[nn.Module] = []

    def record(stage: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert len(inputs) == 1
        assert isinstance(inputs[0], Tensor)
        calls.append(stage)

    hooks = [stage.register_forward_pre_hook(record) for stage in model.stages()]
    expected, whole = _gradients(model, images)
    assert calls == model.stages()
    for hook in hooks:
        hook.remove()
    for stage in model.stages():
        stage.forward = _recomputed(stage.forward)
    gradients, rest = _gradients(model, images)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name
    assert rest < 0.7 * whole


@pytest.mark.parametrize("norm", ["batch", "frozen_batch"])
@pytest.mark.parametrize("config", FAMILIES[:2], ids=lambda config: config.family)
def test_frozen_norms_answer_alone_as_in_a_batch(
    config: ModelConfig, norm: str, images: Tensor, tmp_path: Path
) -> None:
    """Trained one image at a time, the network sees what it sees of a batch; with batch norms it does not."""
    trained = _trained(config.build(2, channels=1))
    safetensors.torch.save_file(trained.backbone.state_dict(), tmp_path / "weights.safetensors")
    changes = {"norm": norm, "pretrained": tmp_path / "weights.safetensors"}
    model = config.model_copy(update=changes).build(2, channels=1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    together = model.backbone.extract_features(images)
    alone = torch.cat([model.backbone.extract_features(image[None]) for image in images])
    if norm == "batch":
        assert (together - alone).abs().max() > 0.1
        return
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    expected = trained.backbone.extract_features(images)
    torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


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


def test_shown_attention_pools_what_a_convnext_normalises(images: Tensor) -> None:
    model = _with_attention(ConvNeXtMedical(3, 1, SMALL[6]))
    output = model(images)
    pooled = torch.einsum("nfhw,nhw->nf", model.backbone.extract_features(images), output.attention)
    torch.testing.assert_close(model.backbone.normalise(pooled), output.features)
    torch.testing.assert_close(model.classifier(output.features), output.logits)


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
            tensor.add_(torch.randn_like(tensor) * 0.02)
    return network.eval()


def _small_reference(family: str) -> nn.Module:
    """torchvision's own network, small."""
    if family == "resnet":
        return _trained(torchvision.models.resnet18(weights=None))
    if family == "densenet":
        return _trained(torchvision.models.DenseNet(8, (2, 2, 2, 2), num_init_features=16))
    dims = [(24, 48), (48, 96), (96, 192), (192, None)]
    return _trained(convnext.ConvNeXt([convnext.CNBlockConfig(*pair, 1) for pair in dims]))


def _headless(reference: nn.Module) -> nn.Module:
    """The reference, giving the features that its linear layer sees."""
    if isinstance(reference, convnext.ConvNeXt):
        reference.classifier[2] = nn.Identity()
    else:
        setattr(reference, "fc" if hasattr(reference, "fc") else "classifier", nn.Identity())
    return reference


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("family", ["resnet", "densenet", "convnext"])
def test_an_image_of_equal_channels_has_the_features_of_its_colour_copy(
    family: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    reference = _small_reference(family)
    config = {
        "resnet": ResNetConfig(pretrained=path),
        "densenet": DenseNetConfig(growth_rate=8, block_config=(2, 2, 2, 2), pretrained=path),
        "convnext": ConvNeXtConfig(width=0.25, depths=(1, 1, 1, 1), pretrained=path),
    }[family]
    if suffix == ".pth":
        torch.save(reference.state_dict(), path)
    else:
        safetensors.torch.save_file(reference.state_dict(), path)
    gray = torch.randn(2, 1, 64, 64)
    expected = _headless(reference)(gray.expand(-1, 3, -1, -1))
    for channels in (1, 3, 4, 7):
        model = config.build(2, channels).eval()
        features = model(gray.expand(-1, channels, -1, -1)).features
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


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
        ConvNeXtConfig(pretrained=path),
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, without a network."""

    def refuse(request: object, *_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "hub" / "checkpoints"


def _publish(weights: Any, network: nn.Module, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a network's weights into the cache, under the name that torchvision would give to that file."""
    cache.mkdir(parents=True)
    torch.save(network.state_dict(), cache / "new")
    digest = hashlib.sha256((cache / "new").read_bytes()).hexdigest()
    stem = Path(weights.url).stem.rpartition("-")[0]
    path = (cache / "new").rename(cache / f"{stem}-{digest[:8]}.pth")
    monkeypatch.setattr(weights.value, "url", f"https://download.pytorch.org/models/{path.name}")
    return path


@pytest.mark.parametrize(
    ("config", "weights", "network"),
    [
        (ResNetConfig(), torchvision.models.ResNet18_Weights.IMAGENET1K_V1, torchvision.models.resnet18),
        (
            DenseNetConfig(),
            torchvision.models.DenseNet121_Weights.IMAGENET1K_V1,
            torchvision.models.densenet121,
        ),
        (
            ConvNeXtConfig(),
            torchvision.models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1,
            torchvision.models.convnext_tiny,
        ),
    ],
    ids=["resnet", "densenet", "convnext"],
)
def test_published_weights_are_loaded_by_name_with_digest_and_licence(
    config: ModelConfig, weights: Any, network: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = _trained(network(weights=None))
    path = _publish(weights, reference, cache, monkeypatch)
    config = config.model_copy(update={"pretrained": "torchvision:IMAGENET1K_V1", "pooling": "average"})
    x = torch.randn(1, 3, 64, 64)
    features = config.build(2, channels=3).eval()(x).features
    torch.testing.assert_close(features, _headless(reference)(x), rtol=1e-4, atol=1e-4)
    origin = pretrained_origin(config)
    assert origin is not None
    assert origin.name == str(weights)
    assert origin.digest == digest_path(path)
    assert origin.url == f"https://download.pytorch.org/models/{path.name}"
    assert "BSD-3-Clause" in origin.licence
    assert "ImageNet" in origin.licence

    path.write_bytes(path.read_bytes() + b"\n")
    for ask in (pretrained_origin, lambda config: config.build(2, channels=3)):
        with pytest.raises(ValueError, match=rf"^pretrained [^\n]*{path.name} is damaged[^\n]*remove it$"):
            ask(config)


def test_without_a_network_it_says_which_file_to_put_where(cache: Path) -> None:
    config = ResNetConfig(depth=50, pretrained="torchvision:IMAGENET1K_V2")
    url = "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
    with pytest.raises(ValueError, match=rf"^pretrained [^\n]*put {url} into {cache}$"):
        config.build(2, channels=1)
    assert not list(cache.glob("*.pth"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ResNetConfig(pretrained="torchvision:V9"),
            "there are: torchvision:IMAGENET1K_V1, torchvision:DEFAULT",
        ),
        (DenseNetConfig(growth_rate=8, pretrained="torchvision:IMAGENET1K_V1"), "no network of this shape"),
        (ConvNeXtConfig(depths=(1, 1, 1, 1), pretrained="torchvision:DEFAULT"), "no network of this shape"),
    ],
    ids=["name", "densenet", "convnext"],
)
def test_weights_that_nobody_publishes_are_refused_in_one_line(
    config: ModelConfig, message: str, cache: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^pretrained torchvision:[^\n]*{message}[^\n]*$"):
        config.build(2, channels=1)


def test_a_local_files_origin_is_its_name_digest_and_stated_licence(tmp_path: Path) -> None:
    path = tmp_path / "site" / "weights.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"any")
    config = ResNetConfig(pretrained=path)
    digest = f"sha256:{hashlib.sha256(b'any').hexdigest()}"
    expected = PretrainedOrigin(
        name="weights.safetensors", digest=digest, licence="unknown, stated by nobody"
    )
    assert pretrained_origin(config) == expected
    path.with_name("weights.safetensors.licence").write_text("\nCC-BY-4.0 \nin full: ...\n")
    assert pretrained_origin(config) == expected.model_copy(update={"licence": "CC-BY-4.0"})
    assert pretrained_origin(ResNetConfig()) is None
    path.unlink()
    with pytest.raises(ValueError, match=r"no such file"):
        pretrained_origin(config)


@pytest.mark.parametrize("stem", ["standard", "small"])
@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.family)
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
