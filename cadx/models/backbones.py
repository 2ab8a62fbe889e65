"""torchvision's 2D networks as extractors of feature maps, and their pretrained weights.

Imported where a network is built and nowhere else: importing torchvision takes five seconds.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import densenet, resnet

if TYPE_CHECKING:  # radiograph.py imports this module when it builds
    from cadx.models.radiograph import DenseNetConfig, RadiographConfig, ResNetConfig, Stem

_RESNETS = {
    18: (resnet.BasicBlock, [2, 2, 2, 2]),
    34: (resnet.BasicBlock, [3, 4, 6, 3]),
    50: (resnet.Bottleneck, [3, 4, 6, 3]),
}


class ResNetBackbone(resnet.ResNet):
    """A ResNet without its head: a `Backbone`."""

    def __init__(self, channels: int, config: "ResNetConfig") -> None:
        self._width = config.width  # first: torchvision's constructor calls _make_layer
        block, layers = _RESNETS[config.depth]
        super().__init__(block, layers)
        del self.fc, self.avgpool
        self.conv1 = _stem_convolution(channels, self._scaled(64), config.stem)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(self._scaled(64))
        if config.stem == "small":
            self.maxpool = nn.Identity()
        self.feature_dim = self._scaled(512) * block.expansion
        _finish(self, config, stem="conv1")

    def _scaled(self, planes: int) -> int:
        return max(8, round(planes * self._width / 8) * 8)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):  # type: ignore[no-untyped-def]
        if planes == 64:
            self.inplanes = self._scaled(64)
        return super()._make_layer(block, self._scaled(planes), blocks, stride, dilate)

    def extract_features(self, images: Tensor) -> Tensor:
        """The feature map, N F h w, of `images`, N C H W."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        return features


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
        _finish(self, config, stem="features.conv0")

    def extract_features(self, images: Tensor) -> Tensor:
        """The feature map, N F h w, of `images`, N C H W."""
        return F.relu(self.features(images))


def _stem_convolution(channels: int, planes: int, stem: "Stem") -> nn.Conv2d:
    kernel, stride = (7, 2) if stem == "standard" else (3, 1)
    return nn.Conv2d(channels, planes, kernel, stride=stride, padding=kernel // 2, bias=False)


def _finish(backbone: nn.Module, config: "RadiographConfig", stem: str) -> None:
    """Load the pretrained weights and exchange the normalisation, as `config` asks."""
    if config.pretrained is not None:
        if config.norm == "group":
            raise ValueError(f"pretrained {config.pretrained}: carries batch statistics; set norm: batch")
        _load_pretrained(backbone, config.pretrained, stem)
    if config.norm == "group":
        for parent in list(backbone.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    groups = math.gcd(8, child.num_features)
                    setattr(parent, name, nn.GroupNorm(groups, child.num_features))


def _load_pretrained(backbone: nn.Module, path: Path, stem: str) -> None:
    weights = _read_state_dict(path)
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


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
    except FileNotFoundError:
        raise ValueError(f"pretrained {path}: no such file; give a local state dict, or null") from None
    except Exception as error:  # each reader has its own zoo of errors for a broken file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"pretrained {path}: no state dict of tensors ({reason})") from None
