"""MONAI's 3D networks as extractors of feature maps, and their pretrained weights.

Imported where a network is built and nowhere else: importing MONAI takes six seconds.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from monai.networks.nets import densenet, resnet
from torch import Tensor, nn

from cadx.models.volume import STEM_PX
from cadx.models.weights import read_state_dict

if TYPE_CHECKING:
    from cadx.models.volume import DenseNet3DConfig, ResNet3DConfig, Stem, VolumeConfig


class Conv3DBlock(nn.Sequential):
    """A 3D convolution without a bias, batch norm, and ReLU, with max pooling in between where it is asked for.

    Pooling before ReLU and not after it: the same numbers, as both keep the order, but ReLU then has a fraction of
    the places to go through.

    Args:
        in_channels: channels of the input, N C D H W.
        out_channels: channels of the output.
        kernel_size: voxels along every axis.
        stride: voxels along every axis, or along D, H, W.
        padding: voxels on every side; by default the output is as large as the input, divided by the stride.
        pool_stride: the stride of 3x3x3 max pooling; None: no pooling.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int | tuple[int, int, int] = 1,
        padding: int | None = None,
        pool_stride: int | tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm = nn.BatchNorm3d(out_channels)
        if pool_stride is not None:
            self.pool = nn.MaxPool3d(3, pool_stride, padding=1)
        self.act = nn.ReLU(inplace=True)


class ResNet3DBlock(resnet.ResNetBlock):
    """Two 3x3x3 convolutions beside a shortcut; the output has `planes * expansion` channels, and expansion is 1.

    MONAI's block, which here makes its own shortcut, a strided 1x1x1 convolution, where the shape changes and
    none is given.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", fig. 5 left, in 3D.
    """

    def __init__(
        self,
        in_planes: int,
        planes: int,
        spatial_dims: int = 3,
        stride: int = 1,
        downsample: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if downsample is None and (stride != 1 or in_planes != planes * self.expansion):
            projection = nn.Conv3d(in_planes, planes * self.expansion, 1, stride, bias=False)
            downsample = nn.Sequential(projection, nn.BatchNorm3d(planes * self.expansion))
        super().__init__(in_planes, planes, spatial_dims, stride, downsample, **kwargs)


class DenseBlock3D(densenet._DenseBlock):
    """`num_layers` layers, each of which sees all before it and adds `growth_rate` channels to them.

    MONAI's block. From N C D H W it makes N (C + num_layers * growth_rate) D H W, of which the first C channels
    are the input.

    Source: Huang et al. 2017, "Densely Connected Convolutional Networks", eq. 2, with bottlenecks of four times
    the growth rate.
    """

    def __init__(self, num_layers: int, in_channels: int, growth_rate: int) -> None:
        super().__init__(
            3, num_layers, in_channels, bn_size=4, growth_rate=growth_rate, dropout_prob=0.0, norm="batch"
        )


_RESNETS: dict[int, tuple[type[resnet.ResNetBlock | resnet.ResNetBottleneck], list[int]]] = {
    10: (ResNet3DBlock, [1, 1, 1, 1]),
    18: (ResNet3DBlock, [2, 2, 2, 2]),
    34: (ResNet3DBlock, [3, 4, 6, 3]),
    50: (resnet.ResNetBottleneck, [3, 4, 6, 3]),
}


class ResNet3DBackbone(nn.Module):
    """A 3D ResNet without its head: a `Backbone`."""

    def __init__(self, channels: int, config: "ResNet3DConfig") -> None:
        super().__init__()
        block, num_blocks = _RESNETS[config.depth]
        planes = [max(8, round(planes * config.width / 8) * 8) for planes in (64, 128, 256, 512)]
        network = resnet.ResNet(
            block, num_blocks, planes, conv1_t_size=1, feed_forward=False, bias_downsample=False
        )
        self.stem = _Stem(channels, planes[0], config.stem)
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4
        self.feature_dim = network.in_planes
        _finish(self, config, ("conv1", "bn1"))

    def extract_features(self, volumes: Tensor) -> Tensor:
        """The feature map, N F d h w, of `volumes`, N C D H W."""
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(volumes)))))
        return features

    def stages(self) -> list[nn.Module]:
        """The parts of the stem, then each residual block of the first layer; of the second too for bottlenecks.

        Each layer keeps a quarter of what the one before keeps, for half or more of its work: to recompute the
        later ones saves little and costs much. Bottlenecks keep four times as much for the same work.
        """
        bottlenecks = isinstance(self.layer2[0], resnet.ResNetBottleneck)
        return [*self.stem, *self.layer1, *(self.layer2 if bottlenecks else ())]


class DenseNet3DBackbone(nn.Module):
    """A 3D DenseNet without its head: a `Backbone`."""

    def __init__(self, channels: int, config: "DenseNet3DConfig") -> None:
        super().__init__()
        self._min_px = tuple(8 * px for px in STEM_PX[config.stem])
        width = 2 * config.growth_rate
        self.stem = _Stem(channels, width, config.stem)
        self.features = nn.Sequential()
        for number, num_layers in enumerate(config.block_config, start=1):
            if number > 1:
                transition = densenet._Transition(3, width, width // 2)
                self.features.add_module(f"transition{number - 1}", transition)
                width //= 2
            self.features.add_module(
                f"denseblock{number}", DenseBlock3D(num_layers, width, config.growth_rate)
            )
            width += num_layers * config.growth_rate
        self.features.add_module("norm5", nn.BatchNorm3d(width))
        self.feature_dim = width
        for module in self.features.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)
        _finish(self, config, ("features.conv0", "features.norm0"))

    def extract_features(self, volumes: Tensor) -> Tensor:
        """The feature map, N F d h w, of `volumes`, N C D H W.

        Raises:
            ValueError: if the map would be empty.
        """
        if any(px < least for px, least in zip(volumes.shape[2:], self._min_px, strict=True)):
            given, least = ("x".join(map(str, size)) for size in (volumes.shape[2:], self._min_px))
            raise ValueError(
                f"volume of {given} voxels: a densenet3d with this stem needs {least} (D H W); "
                "set larger patches, or stem: small"
            )
        return F.relu(self.features(self.stem(volumes)))

    def stages(self) -> list[nn.Module]:
        """The parts of the stem, then each dense layer and each transition.

        By the layer, since a block's layers keep the concatenation of all before them twice over.
        """
        stages: list[nn.Module] = [*self.stem]
        for name, module in self.features.named_children():
            if name.startswith("denseblock"):
                stages += module.children()
            elif name.startswith("transition"):
                stages.append(module)
        return stages


class _Stem(nn.ModuleList):
    """The first block in parts, each of which makes a share of the channels.

    A channel of a convolution, of a batch norm and of pooling knows nothing of the others, so this is the one
    block; but its parts are recomputed one after the other, and the stem is where a volume takes most room.
    """

    def __init__(self, channels: int, planes: int, stem: "Stem") -> None:
        if stem in ("medium", "small"):  # nothing is pooled: to join parts would cost what parts save
            super().__init__([Conv3DBlock(channels, planes, stride=STEM_PX[stem])])
            return
        depth, height, width = (math.isqrt(px) for px in STEM_PX[stem])  # convolution and pooling share it
        stride = (depth, height, width)
        num_parts = math.gcd(4, planes)
        super().__init__(
            Conv3DBlock(channels, planes // num_parts, kernel_size=7, stride=stride, pool_stride=stride)
            for _ in range(num_parts)
        )

    def forward(self, volumes: Tensor) -> Tensor:
        parts = [part(volumes) for part in self]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _finish(
    backbone: "ResNet3DBackbone | DenseNet3DBackbone", config: "VolumeConfig", stem_names: tuple[str, str]
) -> None:
    """Load the pretrained weights and exchange the normalisation, as `config` asks.

    `stem_names` are MONAI's for the stem's convolution and norm.
    """
    if config.pretrained is not None:
        if config.norm == "group":
            raise ValueError(f"pretrained {config.pretrained}: carries batch statistics; set norm: batch")
        _load_pretrained(backbone, config.pretrained, stem_names)
    if config.norm == "group":
        stem_parts = set(backbone.stem)
        for parent in list(backbone.modules()):
            num_parts = len(backbone.stem) if parent in stem_parts else 1
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm3d):
                    # As many groups over the stem's parts as the whole would have.
                    groups = math.gcd(8, child.num_features * num_parts) // num_parts
                    setattr(parent, name, nn.GroupNorm(groups, child.num_features))


def _load_pretrained(backbone: nn.Module, path: Path, stem_names: tuple[str, str]) -> None:
    # MedicalNet's files were saved from a network in a DataParallel.
    weights = {name.removeprefix("module."): tensor for name, tensor in read_state_dict(path).items()}
    ours = backbone.state_dict()
    places: dict[str, list[str]] = {}  # MONAI's name -> ours, several for the parts of the stem
    for name in ours:
        stem = re.fullmatch(r"stem\.\d+\.(conv|norm)\.(\w+)", name)
        theirs = f"{stem_names[stem[1] == 'norm']}.{stem[2]}" if stem else name
        places.setdefault(theirs, []).append(name)
    for theirs, names in places.items():
        shape = list(ours[names[0]].shape)
        if not shape:  # num_batches_tracked, which older files lack
            continue
        shape[0] *= len(names)
        tensor = weights.get(theirs)
        if tensor is not None and theirs == f"{stem_names[0]}.weight" and tensor.shape[1:2] != (shape[1],):
            # A volume of one channel then has the same features as its copy into several.
            tensor = tensor.sum(1, keepdim=True).expand(-1, shape[1], *tensor.shape[2:]) / shape[1]
        if tensor is None or list(tensor.shape) != shape:
            found = "missing" if tensor is None else tuple(tensor.shape)
            raise ValueError(
                f"pretrained {path}: {theirs} is {found}, the model needs {tuple(shape)};"
                " set family, depth, width and stem as the weights were trained"
            )
        ours.update(zip(names, tensor.chunk(len(names)), strict=True))
    backbone.load_state_dict(ours)
