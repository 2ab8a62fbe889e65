"""Classifiers of 2D radiographs: torchvision's ResNet and DenseNet under an attention-pooling head.

The attention map that is shown is the very set of weights by which the prediction pools its features; it
starts uniform, so that training starts from average pooling.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol

import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.models import densenet, resnet

from cadx.transforms import Cells
from cadx.types import Config

Stem = Literal["standard", "small"]
Pooling = Literal["attention", "average"]
Norm = Literal["batch", "group"]


class Output(NamedTuple):
    """What a classifier says of a batch.

    Attributes:
        logits: N K, raw scores of the K classes.
        attention: N h w, the share of each position in the prediction; each map sums to 1.
        features: N F, the pooled features that the classifier sees.
    """

    logits: Tensor
    attention: Tensor
    features: Tensor


class Backbone(Protocol):
    """What `MedicalClassificationModel` asks of a module that extracts features."""

    feature_dim: int

    def extract_features(self, images: Tensor) -> Tensor:
        """The feature map, N F h w, of `images`, N C H W."""
        ...


class _RadiographConfig(Config):
    """What both families share.

    Attributes:
        stem: "standard", 7x7 stride 2 and max pooling: the map is 1/32 of the image; "small", 3x3 stride 1
            and no pooling, for images of about 32 px: the map is 1/8.
        dropout: share of pooled features that are dropped in training.
        pooling: how the prediction pools the feature map.
        norm: "group" does not depend on the batch: for batches of a few images.
        pretrained: a local state dict under torchvision's names, `.safetensors` or torch's own format.
    """

    stem: Stem = "standard"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pooling: Pooling = "attention"
    norm: Norm = "batch"
    pretrained: Path | None = None


class ResNetConfig(_RadiographConfig):
    """A ResNet: `depth` layers, `width` as a share of the usual channels (0.5 = half)."""

    family: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50] = 18
    width: Annotated[float, Field(gt=0, le=4)] = 1.0

    @property
    def cells(self) -> Cells:
        """Where the attention map's cells lie: every stride of a ResNet starts at the first pixel."""
        return Cells(stride_px=32 if self.stem == "standard" else 8, first_centre_px=0.5)

    def build(self, num_classes: int, channels: int) -> "MedicalResNet":
        """The network for images of `channels` channels; random weights come from torch's global generator.

        Raises:
            ValueError: if `pretrained` cannot be read or does not fit.
        """
        return MedicalResNet(num_classes, channels, self)


class DenseNetConfig(_RadiographConfig):
    """A DenseNet: layers per dense block, each of which adds `growth_rate` channels."""

    family: Literal["densenet"] = "densenet"
    growth_rate: Annotated[int, Field(ge=1)] = 32
    block_config: tuple[int, int, int, int] = (6, 12, 24, 16)

    @property
    def cells(self) -> Cells:
        """Where the attention map's cells lie: each transition averages two, and moves the first by half a one."""
        stem_px = 4 if self.stem == "standard" else 1
        return Cells(stride_px=8 * stem_px, first_centre_px=0.5 + stem_px * (1 + 2 + 4) / 2)

    def build(self, num_classes: int, channels: int) -> "DenseNetMedical":
        """The network for images of `channels` channels; random weights come from torch's global generator.

        Raises:
            ValueError: if `pretrained` cannot be read or does not fit.
        """
        return DenseNetMedical(num_classes, channels, self)


class MedicalClassificationModel(nn.Module):
    """A classifier over any backbone; its attention map is the weights by which the prediction pools.

    The pooled features are sum_p a_p f_p over positions p, with a = softmax of a 1x1 convolution of the
    feature map f. Of the chapter's result, `predictions` is the softmax (or, for multilabel, the sigmoid) of
    `Output.logits`, `attention_maps` is `Output.attention`, and `features` is `Output.features`.

    Source: Ilse et al. 2018, "Attention-based Deep Multiple Instance Learning", eq. 7, with positions as
    instances and a linear score in place of its two-layer one.

    Args:
        backbone: a module with `feature_dim` and `extract_features` (see `Backbone`).
        num_classes: K.
        dropout: share of pooled features that are dropped in training.
        pooling: "average" keeps every position's weight equal.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, *, dropout: float = 0.0, pooling: Pooling = "attention"
    ) -> None:
        super().__init__()
        feature_dim = backbone.feature_dim
        self.backbone: Backbone = backbone
        self.attention: nn.Conv2d | None = None
        if pooling == "attention":
            # Without a bias: softmax does not see one. Zero: training starts from average pooling.
            self.attention = nn.Conv2d(feature_dim, 1, 1, bias=False)
            nn.init.zeros_(self.attention.weight)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(feature_dim, num_classes)

    def forward(self, images: Tensor) -> Output:
        """Logits, attention and features (all float32) of `images`, N C H W."""
        feature_map = self.backbone.extract_features(images)
        if self.attention is None:
            scores = torch.zeros_like(feature_map[:, :1])
        else:
            scores = self.attention(feature_map)
        # Pooling stays in float32 under mixed precision: bfloat16 has 8 bits for a sum over all positions.
        attention = scores.float().flatten(1).softmax(1).view_as(scores)
        features = (feature_map * attention).sum((2, 3))
        return Output(self.classifier(self.dropout(features)).float(), attention.squeeze(1), features)


class MedicalResNet(MedicalClassificationModel):
    """A ResNet classifier of radiographs; by default ResNet-50 on one gray channel.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", in torchvision's form (stride in
    the 3x3 convolution of a bottleneck).
    """

    def __init__(self, num_classes: int = 2, channels: int = 1, config: ResNetConfig | None = None) -> None:
        config = config or ResNetConfig(depth=50)
        super().__init__(
            _ResNetBackbone(channels, config), num_classes, dropout=config.dropout, pooling=config.pooling
        )


class DenseNetMedical(MedicalClassificationModel):
    """A DenseNet classifier of radiographs; by default DenseNet-121 on one gray channel.

    Source: Huang et al. 2017, "Densely Connected Convolutional Networks" (DenseNet-BC).
    """

    def __init__(self, num_classes: int = 2, channels: int = 1, config: DenseNetConfig | None = None) -> None:
        config = config or DenseNetConfig()
        super().__init__(
            _DenseNetBackbone(channels, config), num_classes, dropout=config.dropout, pooling=config.pooling
        )


_RESNETS = {
    18: (resnet.BasicBlock, [2, 2, 2, 2]),
    34: (resnet.BasicBlock, [3, 4, 6, 3]),
    50: (resnet.Bottleneck, [3, 4, 6, 3]),
}


class _ResNetBackbone(resnet.ResNet):
    def __init__(self, channels: int, config: ResNetConfig) -> None:
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
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        return features


class _DenseNetBackbone(densenet.DenseNet):
    def __init__(self, channels: int, config: DenseNetConfig) -> None:
        super().__init__(config.growth_rate, config.block_config, num_init_features=2 * config.growth_rate)
        self.feature_dim = self.classifier.in_features
        del self.classifier
        self.features.conv0 = _stem_convolution(channels, 2 * config.growth_rate, config.stem)
        nn.init.kaiming_normal_(self.features.conv0.weight)
        if config.stem == "small":
            self.features.pool0 = nn.Identity()
        _finish(self, config, stem="features.conv0")

    def extract_features(self, images: Tensor) -> Tensor:
        return F.relu(self.features(images))


def _stem_convolution(channels: int, planes: int, stem: Stem) -> nn.Conv2d:
    kernel, stride = (7, 2) if stem == "standard" else (3, 1)
    return nn.Conv2d(channels, planes, kernel, stride=stride, padding=kernel // 2, bias=False)


def _finish(backbone: nn.Module, config: _RadiographConfig, stem: str) -> None:
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
