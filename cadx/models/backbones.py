"""torchvision's 2D networks as extractors of feature maps, and their pretrained weights.

Imported where a network is built and nowhere else: importing torchvision takes five seconds.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import WeightsEnum, convnext, densenet, get_model_weights, resnet
from torchvision.ops import FrozenBatchNorm2d

from cadx.files import digest_path
from cadx.models.weights import read_state_dict

if TYPE_CHECKING:  # radiograph.py imports this module when it builds
    from cadx.models.interface import ImageNorm, PretrainedOrigin
    from cadx.models.radiograph import ConvNeXtConfig, DenseNetConfig, Stem

_RESNETS = {
    18: (resnet.BasicBlock, [2, 2, 2, 2]),
    34: (resnet.BasicBlock, [3, 4, 6, 3]),
    50: (resnet.Bottleneck, [3, 4, 6, 3]),
}
_TORCHVISION_TERMS = (
    "BSD-3-Clause for torchvision; for the images, ImageNet's terms of access:"
    " non-commercial research and education"
)


class ResNetShape(Protocol):
    """What `ResNetBackbone` reads of a configuration: see `ResNetConfig`, which other families' may follow."""

    @property
    def depth(self) -> int: ...  # noqa: D102
    @property
    def width(self) -> float: ...  # noqa: D102
    @property
    def stem(self) -> "Stem": ...  # noqa: D102
    @property
    def norm(self) -> "ImageNorm": ...  # noqa: D102
    @property
    def pretrained(self) -> "Path | str | None": ...  # noqa: D102


class ResNetBackbone(resnet.ResNet):
    """A ResNet without its head: a `Backbone`."""

    def __init__(self, channels: int, config: ResNetShape) -> None:
        self._width = config.width  # first: torchvision's constructor calls _make_layer
        block, layers = _RESNETS[config.depth]
        super().__init__(block, layers)
        del self.fc, self.avgpool
        planes = _scaled(64, config.width)
        self.conv1 = _stem_convolution(channels, planes, config.stem)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(planes)
        if config.stem == "small":
            self.maxpool = nn.Identity()
        self.feature_dim = _scaled(512, config.width) * block.expansion
        _load_and_norm(self, config.pretrained, f"resnet{config.depth}", stem="conv1", norm=config.norm)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):  # type: ignore[no-untyped-def]
        if planes == 64:
            self.inplanes = _scaled(64, self._width)
        return super()._make_layer(block, _scaled(planes, self._width), blocks, stride, dilate)

    def extract_features(self, images: Tensor) -> Tensor:
        """The feature map, N F h w, of `images`, N C H W."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        return features

    def stages(self) -> list[nn.Module]:
        """The residual blocks, in order."""
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]


class DenseNetBackbone(densenet.DenseNet):
    """A DenseNet without its head: a `Backbone`."""

    def __init__(self, channels: int, config: "DenseNetConfig") -> None:
        super().__init__(config.growth_rate, config.block_config, num_init_features=2 * config.growth_rate)
        self.feature_dim = self.classifier.in_features
        del self.classifier
        self.features.conv0 = _stem_convolution(channels, 2 * config.growth_rate, config.stem)
        nn.init.kaiming_normal_(self.features.conv0.weight)
        if config.stem == "small":
            self.features.pool0 = nn.Identity()
        self._least_px = 29 if config.stem == "standard" else 8  # the stem rounds up, transitions round down
        _load_and_norm(self, config.pretrained, config.architecture, stem="features.conv0", norm=config.norm)

    def extract_features(self, images: Tensor) -> Tensor:
        """The feature map, N F h w, of `images`, N C H W.

        Raises:
            ValueError: if the images are too small for a map of one cell.
        """
        _refuse_below(self._least_px, images)
        return F.relu(self.features(images))

    def stages(self) -> list[nn.Module]:
        """The dense blocks and transitions, in order."""
        # Not the layers: a block appends to the very list that it calls them with, which a second call would see.
        wanted = (densenet._DenseBlock, densenet._Transition)
        return [module for module in self.features.children() if isinstance(module, wanted)]


class ConvNeXtBackbone(convnext.ConvNeXt):
    """A ConvNeXt without its linear layer: a `Backbone`, with a normalisation for the pooled features."""

    def __init__(self, channels: int, config: "ConvNeXtConfig") -> None:
        widths = [_scaled(planes, config.width) for planes in (96, 192, 384, 768)]
        settings = [
            convnext.CNBlockConfig(planes, following, layers)
            for planes, following, layers in zip(widths, [*widths[1:], None], config.depths, strict=True)
        ]
        super().__init__(settings, config.stochastic_depth, num_classes=1)
        self.feature_dim = widths[-1]
        del self.avgpool
        # torchvision's name, and a norm for N F.
        self.classifier = nn.Sequential(nn.LayerNorm(self.feature_dim, eps=1e-6))
        kernel, stride, padding = (4, 4, 0) if config.stem == "standard" else (3, 1, 1)
        self.features[0][0] = nn.Conv2d(channels, widths[0], kernel, stride=stride, padding=padding)
        nn.init.trunc_normal_(self.features[0][0].weight, std=0.02)
        nn.init.zeros_(self.features[0][0].bias)
        self._least_px = 32 if config.stem == "standard" else 8
        if config.pretrained is not None:
            _load_pretrained(self, _locate(config.pretrained, config.architecture)[0], "features.0.0")

    def extract_features(self, images: Tensor) -> Tensor:
        """The feature map, N F h w, of `images`, N C H W.

        Raises:
            ValueError: if the images are too small for a map of one cell.
        """
        _refuse_below(self._least_px, images)
        features: Tensor = self.features(images)
        return features

    def normalise(self, pooled: Tensor) -> Tensor:
        """Pooled features, N F, each image's to mean 0 and variance 1, then scaled as learned."""
        normalised: Tensor = self.classifier(pooled)
        return normalised

    def stages(self) -> list[nn.Module]:
        """The blocks, and the merging of patches between stages, in order."""
        _, *parts = self.features
        return [stage for number, part in enumerate(parts) for stage in (part if number % 2 == 0 else [part])]


def find_origin(pretrained: Path | str, architecture: str | None) -> "PretrainedOrigin":
    """See `radiograph.pretrained_origin`; `architecture` is torchvision's name for the network."""
    from cadx.models.interface import PretrainedOrigin

    path, published = _locate(pretrained, architecture)
    if published is not None:
        return PretrainedOrigin(
            name=str(published), digest=digest_path(path), licence=_TORCHVISION_TERMS, url=published.url
        )
    try:
        beside = path.with_name(f"{path.name}.licence").read_text("utf-8", "replace").strip()
    except FileNotFoundError:
        beside = ""
    licence = beside.splitlines()[0].strip() if beside else "unknown, stated by nobody"
    return PretrainedOrigin(name=path.name, digest=digest_path(path), licence=licence)


def _locate(pretrained: Path | str, architecture: str | None) -> tuple[Path, WeightsEnum | None]:
    """The file of the weights, and torchvision's entry if they are one of its own."""
    if isinstance(pretrained, Path):
        if not pretrained.is_file():
            raise ValueError(f"pretrained {pretrained}: no such file; give a local state dict, or null")
        return pretrained, None
    if architecture is None:
        raise ValueError(
            f"pretrained {pretrained}: torchvision publishes no network of this shape; give a file"
        )
    known = get_model_weights(architecture).__members__
    published = known.get(pretrained.removeprefix("torchvision:"))
    if published is None:
        names = ", ".join(f"torchvision:{name}" for name in known)
        raise ValueError(f"pretrained {pretrained}: unknown for {architecture}; there are: {names}")
    return _download(pretrained, published.url), published


def _download(name: str, url: str) -> Path:
    """The file of `url` in the user's cache, downloaded if need be; its name carries the start of its digest."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    prefix = path.stem.rpartition("-")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:  # no network, no room; another digest than the name's
            raise ValueError(
                f"pretrained {name}: no download ({error}); put {url} into {path.parent}"
            ) from None
    # torch.hub checks what it downloads, but not what it finds.
    elif not digest_path(path).startswith(f"sha256:{prefix}"):
        raise ValueError(f"pretrained {name}: {path} is damaged: its SHA-256 is not {prefix}...; remove it")
    return path


def _scaled(planes: int, width: float) -> int:
    return max(8, round(planes * width / 8) * 8)


def _stem_convolution(channels: int, planes: int, stem: "Stem") -> nn.Conv2d:
    kernel, stride = (7, 2) if stem == "standard" else (3, 1)
    return nn.Conv2d(channels, planes, kernel, stride=stride, padding=kernel // 2, bias=False)


def _refuse_below(least_px: int, images: Tensor) -> None:
    height_px, width_px = images.shape[2:]
    if min(height_px, width_px) < least_px:
        raise ValueError(
            f"images of {height_px} x {width_px} px: the network needs {least_px} px either way; set"
            " preprocessing.height_px and width_px, or model.stem: small"
        )


def _load_and_norm(
    backbone: nn.Module,
    pretrained: Path | str | None,
    architecture: str | None,
    *,
    stem: str,
    norm: "ImageNorm",
) -> None:
    """Load the pretrained weights, then exchange the normalisation."""
    if pretrained is not None:
        if norm == "group":
            raise ValueError(
                f"pretrained {pretrained}: carries batch statistics; set norm: batch or frozen_batch"
            )
        _load_pretrained(backbone, _locate(pretrained, architecture)[0], stem)
    if norm == "batch":
        return
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _frozen(child) if norm == "frozen_batch" else _grouped(child))


def _grouped(batch_norm: nn.BatchNorm2d) -> nn.Module:
    return nn.GroupNorm(math.gcd(8, batch_norm.num_features), batch_norm.num_features)


def _frozen(batch_norm: nn.BatchNorm2d) -> nn.Module:
    frozen = FrozenBatchNorm2d(batch_norm.num_features, eps=batch_norm.eps)
    frozen.load_state_dict(batch_norm.state_dict())
    return frozen


def _load_pretrained(backbone: nn.Module, path: Path, stem: str) -> None:
    weights = read_state_dict(path)
    wanted = backbone.state_dict()
    # torchvision's published DenseNets were saved before module names lost their inner dots.
    old_name = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
    weights = {old_name.sub(r"\1\2", name): tensor for name, tensor in weights.items()}
    kernel, shape = weights.get(f"{stem}.weight"), wanted[f"{stem}.weight"].shape
    if kernel is not None and kernel.shape[1] != shape[1]:
        # A gray image then has the same features as its colour copy.
        weights[f"{stem}.weight"] = kernel.sum(1, keepdim=True).expand(-1, shape[1], -1, -1) / shape[1]
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, tensor)
        elif name not in weights or weights[name].shape != tensor.shape:
            found = tuple(weights[name].shape) if name in weights else "missing"
            raise ValueError(
                f"pretrained {path}: {name} is {found}, the model needs {tuple(tensor.shape)};"
                " set family, depth, width and stem as the weights were trained"
            )
    backbone.load_state_dict({name: weights[name] for name in wanted})
