"""Classifiers of volumes, and the faults of the chapter's sketches of them."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from monai.networks.nets import densenet, resnet
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from cadx.models.volume import (
    STEM_PX,
    DenseNet3DConfig,
    Medical3DDenseNet,
    Medical3DResNet,
    ResNet3DConfig,
    Stem,
)
from cadx.models.volume_networks import Conv3DBlock, DenseBlock3D, ResNet3DBlock

BLOCKS = (2, 2, 2, 2)
SMALL = [
    ResNet3DConfig(depth=10, width=0.125),
    ResNet3DConfig(depth=18, width=0.125, stem="small", dropout=0.3, pooling="average", norm="group"),
    ResNet3DConfig(depth=34, width=0.125, stem="thick_slices", norm="group"),
    ResNet3DConfig(depth=50, width=0.125),
    DenseNet3DConfig(growth_rate=4, block_config=BLOCKS),
    DenseNet3DConfig(growth_rate=5, block_config=BLOCKS, stem="small", norm="group"),
    DenseNet3DConfig(growth_rate=4, block_config=BLOCKS, stem="thick_slices"),
    ResNet3DConfig(depth=10, width=0.125, stem="medium"),
    DenseNet3DConfig(growth_rate=4, block_config=BLOCKS, stem="medium"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("config", SMALL, ids=str)
def test_every_configuration_builds_and_trains(
    config: ResNet3DConfig | DenseNet3DConfig, channels: int
) -> None:
    model = config.build(4, channels)
    output = model(torch.randn(2, channels, 32, 32, 64))
    assert output.logits.shape == (2, 4)
    assert output.features.shape == (2, model.classifier.in_features)
    cells = [size // cells.stride_px for size, cells in zip((32, 32, 64), config.cells, strict=True)]
    assert output.attention.shape == (2, *cells)
    torch.testing.assert_close(output.attention.sum((1, 2, 3)), torch.ones(2))
    output.logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__} == {
        "GroupNorm" if config.norm == "group" else "BatchNorm3d"
    }


@pytest.mark.parametrize("config", [ResNet3DConfig(width=0.125), DenseNet3DConfig(growth_rate=4)], ids=str)
@pytest.mark.parametrize(
    ("size_px", "stem"), [(16, "small"), (24, "small"), (28, "medium"), (48, "standard"), (96, "standard")]
)
def test_patches_of_16_to_96_voxels_fit(
    config: ResNet3DConfig | DenseNet3DConfig, size_px: int, stem: Stem
) -> None:
    model = config.model_copy(update={"stem": stem}).build(2, 1).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 1, size_px, size_px, size_px))
    assert output.logits.isfinite().all()
    # An edge that strides do not divide: a convolution rounds up, a DenseNet's averages round down.
    stride_px = {"standard": 32, "medium": 16, "small": 8}[stem]
    edge = math.ceil(size_px / stride_px) if config.family == "resnet3d" else size_px // stride_px
    assert output.attention.shape == (1, edge, edge, edge)


def test_a_patch_too_small_for_a_densenet_is_refused_in_one_line() -> None:
    model = DenseNet3DConfig(growth_rate=4, block_config=BLOCKS).build(2, 1)
    with pytest.raises(
        ValueError, match=r"^volume of 16x32x32 voxels: [^\n]* needs 32x32x32 \(D H W\)[^\n]*$"
    ):
        model(torch.randn(1, 1, 16, 32, 32))


def test_a_configuration_survives_json() -> None:
    adapter: TypeAdapter[ResNet3DConfig | DenseNet3DConfig] = TypeAdapter(ResNet3DConfig | DenseNet3DConfig)
    for config in SMALL:
        assert adapter.validate_json(adapter.dump_json(config)) == config
    with pytest.raises(ValidationError, match="depth"):
        ResNet3DConfig(depth=19)


def test_the_registry_can_list_the_families_without_monai() -> None:
    """MONAI takes seconds to import: only `build` may."""
    code = "import sys, cadx.models.volume; sys.exit('monai' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_follow_the_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(SMALL[0].build(2, 1).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["backbone.stem.0.conv.weight"], states[2]["backbone.stem.0.conv.weight"])


@pytest.mark.parametrize("config", [SMALL[0], SMALL[5]], ids=str)
def test_a_batch_is_learnt_by_heart(config: ResNet3DConfig | DenseNet3DConfig) -> None:
    model = config.model_copy(update={"stem": "small"}).build(2, 1).train()
    volumes, classes = torch.randn(4, 1, 16, 16, 16), torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(40):
        loss = F.cross_entropy(model(volumes).logits, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert (model(volumes).logits.argmax(1) == classes).all()


# The attention map


def _with_attention(model: Medical3DResNet | Medical3DDenseNet) -> Medical3DResNet | Medical3DDenseNet:
    assert model.attention is not None
    nn.init.normal_(model.attention.weight)
    return model.eval()


def test_pooling_starts_as_an_average_and_attention_is_used_from_the_first_step_on() -> None:
    model = ResNet3DConfig(depth=10, width=0.125, stem="small").build(2, 1).eval()
    volumes = torch.randn(2, 1, 16, 16, 24)
    output = model(volumes)
    torch.testing.assert_close(output.attention, torch.full((2, 2, 2, 3), 1 / 12))
    torch.testing.assert_close(output.features, model.backbone.extract_features(volumes).mean((2, 3, 4)))
    (gradient,) = torch.autograd.grad(output.logits[:, 1].sum(), model.attention.weight)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("config", [SMALL[0], SMALL[4]], ids=str)
def test_shown_attention_is_the_pooling_weights(config: ResNet3DConfig | DenseNet3DConfig) -> None:
    model = _with_attention(config.model_copy(update={"stem": "small"}).build(2, 1))
    volumes = torch.randn(2, 1, 16, 24, 16)
    output = model(volumes)
    assert output.attention.std() > 0
    pooled = torch.einsum("nfdhw,ndhw->nf", model.backbone.extract_features(volumes), output.attention)
    torch.testing.assert_close(model.classifier(pooled), output.logits)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("stem", STEM_PX)
@pytest.mark.parametrize(
    "config",
    [ResNet3DConfig(depth=10, width=0.125), DenseNet3DConfig(growth_rate=4, block_config=(1, 1, 1, 1))],
    ids=["resnet3d", "densenet3d"],
)
def test_a_voxel_moves_the_cell_that_lies_over_it(
    config: ResNet3DConfig | DenseNet3DConfig, stem: Stem, axis: int
) -> None:
    """At both edges and in the middle; a map whose cells are taken as even tiles of the volume is half a cell off."""
    config = config.model_copy(update={"stem": stem})
    model = config.build(2, 1).eval()
    cells, num_cells = config.cells[axis], 7
    shape = [round(c.stride_px) for c in config.cells]
    shape[axis] *= num_cells
    volume = torch.randn(1, 1, *shape, requires_grad=True)
    feature_map = model.backbone.extract_features(volume)
    assert feature_map.shape[2 + axis] == num_cells
    others = [a for a in range(3) if a != axis]

    def moved(cell: int) -> Tensor:
        """How much each slice along the axis moves a cell."""
        target = feature_map.select(2 + axis, cell).square().sum()
        (gradient,) = torch.autograd.grad(target, volume, retain_graph=True)
        return gradient[0, 0].square().sum(others)

    # In the middle: what the cell sees is centred where it is said to lie.
    weight = moved(3)
    places = torch.arange(len(weight)) + 0.5
    centre_px = float((weight * places).sum() / weight.sum())
    assert abs(centre_px - (cells.first_centre_px + 3 * cells.stride_px)) < 0.25 * cells.stride_px
    # At the edges, where what it sees is cut off: voxels near the centre of a cell move it more than its neighbour.
    for cell, neighbour in ((0, 1), (num_cells - 1, num_cells - 2)):
        own = cells.first_centre_px + cell * cells.stride_px
        near = (places - own).abs() < 0.25 * cells.stride_px
        assert moved(cell)[near].sum() > moved(neighbour)[near].sum()


# The networks, against MONAI's own


def _trained(network: nn.Module) -> nn.Module:
    """Norms and their statistics off their initial values: what is not loaded shows."""
    for tensor in network.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.add_(torch.rand_like(tensor) * 0.1)
    return network.eval()


def _monai_resnet(depth: int, channels: int = 1) -> nn.Module:
    build = {10: resnet.resnet10, 18: resnet.resnet18, 50: resnet.resnet50}[depth]
    return _trained(
        build(n_input_channels=channels, conv1_t_stride=2, feed_forward=False, bias_downsample=False)
    )


def _monai_densenet(channels: int = 1) -> nn.Module:
    return _trained(densenet.DenseNet(3, channels, 2, init_features=16, growth_rate=8, block_config=BLOCKS))


@pytest.fixture(scope="module")
def resnet10(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(3)
    network, path = _monai_resnet(10), tmp_path_factory.mktemp("weights") / "resnet10.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return network, path


def test_pretrained_resnet_is_monais(resnet10: tuple[nn.Module, Path]) -> None:
    """Our stem is in parts, pools before it cuts off at 0, and has other names: all that changes no number."""
    reference, path = resnet10
    model = ResNet3DConfig(depth=10, pretrained=path).build(2, 1).eval()
    volumes = torch.randn(2, 1, 40, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(volumes).features, reference(volumes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [18, 50])
def test_every_depth_has_monais_weights(depth: int, tmp_path: Path) -> None:
    reference = _monai_resnet(depth)
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    model = ResNet3DConfig(depth=depth, pretrained=tmp_path / "w.pth").build(2, 1).eval()
    count = [sum(p.numel() for p in m.parameters()) for m in (model.backbone, reference)]
    assert count[0] == count[1]
    with torch.no_grad():
        volumes = torch.randn(1, 1, 32, 32, 32)
        torch.testing.assert_close(model(volumes).features, reference(volumes), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 2])
def test_pretrained_densenet_is_monais(channels: int, tmp_path: Path) -> None:
    reference = _monai_densenet()
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    config = DenseNet3DConfig(growth_rate=8, block_config=BLOCKS, pretrained=tmp_path / "w.pth")
    model = config.build(2, channels).eval()
    volumes = torch.randn(2, 1, 32, 48, 64)
    with torch.no_grad():
        expected = F.relu(reference.features(volumes)).mean((2, 3, 4))
        copies = volumes.expand(-1, channels, -1, -1, -1)
        torch.testing.assert_close(model(copies).features, expected, rtol=1e-4, atol=1e-5)


def test_the_default_densenet_is_the_121(tmp_path: Path) -> None:
    counts = [
        sum(p.numel() for name, p in network.named_parameters() if "class" not in name)
        for network in (DenseNet3DConfig().build(2, 1).backbone, densenet.DenseNet121(3, 1, 2))
    ]
    assert counts[0] == counts[1]


def test_medicalnets_files_are_understood(resnet10: tuple[nn.Module, Path], tmp_path: Path) -> None:
    reference, _ = resnet10
    old = {
        f"module.{name}": tensor
        for name, tensor in reference.state_dict().items()
        if "num_batches" not in name
    }
    torch.save({"state_dict": old}, tmp_path / "resnet_10.pth")
    model = ResNet3DConfig(depth=10, pretrained=tmp_path / "resnet_10.pth").build(2, 3).eval()
    volumes = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        features = model(volumes.expand(-1, 3, -1, -1, -1)).features
        torch.testing.assert_close(features, reference(volumes), rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit_are_refused_in_one_line(
    resnet10: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    _, path = resnet10
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for config, message in (
        (ResNet3DConfig(pretrained=path, depth=18), "layer1.1.conv1.weight is missing"),
        (
            ResNet3DConfig(pretrained=path, depth=10, width=0.5),
            r"conv1.weight is \(64, 1, 7, 7, 7\), the model needs \(32,",
        ),
        (ResNet3DConfig(pretrained=path, depth=10, stem="small"), "conv1.weight is"),
        (DenseNet3DConfig(pretrained=path), "features.conv0.weight is missing"),
        (ResNet3DConfig(pretrained=path, depth=10, norm="group"), "set norm: batch"),
        (ResNet3DConfig(pretrained=tmp_path / "none.pth"), "no such file"),
        (ResNet3DConfig(pretrained=tmp_path / "text.safetensors"), "no state dict"),
        (ResNet3DConfig(pretrained=tmp_path / "list.pth"), "no state dict"),
    ):
        with pytest.raises(ValueError, match=rf"^pretrained [^\n]*{message}[^\n]*$"):
            config.build(2, 1)


def test_group_norm_over_the_parts_of_the_stem_is_group_norm_over_all() -> None:
    model = ResNet3DConfig(depth=10, width=0.5, norm="group").build(2, 1)
    volumes = torch.randn(2, 1, 32, 32, 32)
    weight = torch.cat([part.conv.weight for part in model.backbone.stem])
    whole = F.group_norm(F.conv3d(volumes, weight, stride=2, padding=3), num_groups=8)
    expected = F.max_pool3d(F.relu(whole), 3, 2, 1)
    torch.testing.assert_close(model.backbone.stem(volumes), expected, rtol=1e-4, atol=1e-5)


# Faults of the chapter's sketches


def test_a_residual_block_has_an_expansion_and_its_network_can_be_constructed() -> None:
    """The sketch's network asked its block for an expansion that it did not have: construction raised."""
    assert ResNet3DBlock.expansion == 1
    model = Medical3DResNet(num_classes=2)
    assert sum(isinstance(module, ResNet3DBlock) for module in model.modules()) == 8
    assert model(torch.randn(2, 1, 32, 32, 32)).logits.shape == (2, 2)


def test_a_residual_block_adds_its_input() -> None:
    block = ResNet3DBlock(4, 4).eval()
    x = torch.randn(1, 4, 5, 6, 7)
    nn.init.zeros_(block.conv2.weight)
    torch.testing.assert_close(block(x), x.relu())
    assert ResNet3DBlock(4, 8, stride=2)(torch.randn(2, 4, 6, 8, 10)).shape == (2, 8, 3, 4, 5)


def test_a_convolution_block_normalises_and_cuts_off_at_0() -> None:
    block = Conv3DBlock(2, 6, kernel_size=5, stride=2)
    y = block(torch.randn(3, 2, 8, 8, 10))
    assert y.shape == (3, 6, 4, 4, 5)
    assert y.min() == 0
    expected = block.norm(block.conv(x := torch.randn(3, 2, 8, 8, 10))).relu()
    torch.testing.assert_close(block(x), expected)


def test_a_dense_block_is_densely_connected_and_there_is_a_whole_network_of_them() -> None:
    """The sketch printed the block alone."""
    block = DenseBlock3D(num_layers=3, in_channels=5, growth_rate=4)
    x = torch.randn(2, 5, 4, 5, 6)
    y = block(x)
    assert y.shape == (2, 5 + 3 * 4, 4, 5, 6)
    assert torch.equal(y[:, :5], x)
    assert [layer.layers.conv1.in_channels for layer in block] == [5, 9, 13]
    model = Medical3DDenseNet(num_classes=3)
    assert sum(isinstance(module, DenseBlock3D) for module in model.modules()) == 4
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 1, 32, 32, 32)).logits.shape == (1, 3)
