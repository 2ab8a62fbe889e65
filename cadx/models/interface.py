"""What every family gives, and nothing of any one of them.

A configuration has `build(num_classes, channels)`; the network that it builds is called with a batch and has
`stages()`. A classifier of images, volumes or bags answers with an `Output`. A detector answers, while it is
trained and given targets, with its losses by name, else with a `Detections` for each image.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field, StringConstraints

from cadx.types import Config, Digest

if TYPE_CHECKING:  # importing torch takes two seconds
    from torch import Tensor, device, nn

Norm = Literal["batch", "group"]
ImageNorm = Norm | Literal["frozen_batch"]
Pooling = Literal["attention", "average"]
"""How a classifier of images or volumes pools its feature map."""
TorchvisionName = Annotated[str, StringConstraints(pattern=r"^torchvision:\w+$")]
Pretrained = Annotated[TorchvisionName | Path, Field(union_mode="left_to_right")]
"""A local state dict, or torchvision's published one by name, as "torchvision:IMAGENET1K_V1"."""


class Output(NamedTuple):
    """What a classifier says of a batch, all of it float32.

    Attributes:
        logits: N K, raw scores of the K classes.
        attention: the share of each position in the prediction; each map sums to 1. N h w for images, N d h w
            for volumes, N T for bags (0 where there is no instance).
        features: N F, the pooled features that the classifier sees.
    """

    logits: "Tensor"
    attention: "Tensor"
    features: "Tensor"


class Detections(NamedTuple):
    """The boxes of one image: as a target, or as an answer.

    Attributes:
        boxes_xyxy: B 4 float32, in pixels of the network's input, half-open.
        labels: B int64, 0-based classes; there is no class for the background.
        scores: B float32, 0..1, falling; all 1 in a target.
    """

    boxes_xyxy: "Tensor"
    labels: "Tensor"
    scores: "Tensor"


class PretrainedOrigin(Config):
    """Where weights that training starts from come from, and under which terms.

    Attributes:
        name: torchvision's, as "ResNet18_Weights.IMAGENET1K_V1", or the file's, without its folder.
        digest: of the file.
        licence: of a local file, the first line of the text beside it, `<file>.licence`.
        url: where torchvision publishes the file; None for a local one.
    """

    name: str
    digest: Digest
    licence: str
    url: str | None = None


def to_device(network: "nn.Module", device: "device", *, channels_last: bool) -> None:
    """Move a network to where it computes.

    Args:
        network: of any family.
        device: where.
        channels_last: lay its weights in the order in which convolutions take least time: values differ by rounding
            alone, and a convolution hands the order on to what follows. On a GPU the weights of volumes keep torch's
            order, as channels last was not measured there; so do those of a network that `overruns_channels_last`.
    """
    import torch

    axes = max((parameter.ndim for parameter in network.parameters()), default=0)
    order = torch.preserve_format
    if channels_last and not overruns_channels_last(network, device):
        if axes == 4:
            order = torch.channels_last
        elif axes == 5 and device.type == "cpu":
            order = torch.channels_last_3d
    network.to(device, memory_format=order)  # type: ignore[call-overload]


def overruns_channels_last(network: "nn.Module", device: "device") -> bool:
    """Whether a convolution would write beyond its memory channels last: a crash, or numbers that are wrong.

    On a CPU, the weight gradient of a strided 1 x 1 convolution does so if it has fewer input channels than oneDNN's
    block: 8 with AVX2, 16 with AVX-512. Source: https://github.com/uxlfoundation/oneDNN/issues/6035
    """
    from torch import nn

    return device.type == "cpu" and any(
        module.in_channels // module.groups < 16 and max(module.kernel_size) == 1 and max(module.stride) > 1
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Conv3d)
    )


def pretrained_origin(config: Config) -> PretrainedOrigin | None:
    """The origin of the weights that `config.pretrained`, or its encoder's, names; None if it names none.

    Weights that are named as torchvision's are downloaded if they are not yet in the user's cache.

    Raises:
        ValueError: if there is no such file, or torchvision knows no such weights or cannot be reached.
    """
    config = getattr(config, "encoder", None) or config
    pretrained: str | Path | None = getattr(config, "pretrained", None)
    if pretrained is None:
        return None
    from cadx.models.backbones import find_origin

    return find_origin(pretrained, getattr(config, "architecture", None))
