"""The registry of model families: one name in the union each. A configuration builds its network, on request."""

from typing import Annotated

from pydantic import Field

from cadx.models.detector_config import FasterRCNNConfig, RetinaNetConfig
from cadx.models.interface import (
    Detections,
    Output,
    PretrainedOrigin,
    overruns_channels_last,
    pretrained_origin,
    to_device,
)
from cadx.models.radiograph_config import ConvNeXtConfig, DenseNetConfig, ResNetConfig
from cadx.models.slide_config import EncoderConfig, MILConfig
from cadx.models.volume_config import DenseNet3DConfig, ResNet3DConfig
from cadx.models.yolo_config import YOLOConfig

ModelConfig = Annotated[
    ResNetConfig
    | DenseNetConfig
    | ConvNeXtConfig
    | ResNet3DConfig
    | DenseNet3DConfig
    | MILConfig
    | FasterRCNNConfig
    | RetinaNetConfig
    | YOLOConfig,
    Field(discriminator="family"),
]

__all__ = [
    "ConvNeXtConfig",
    "DenseNet3DConfig",
    "DenseNetConfig",
    "Detections",
    "EncoderConfig",
    "FasterRCNNConfig",
    "MILConfig",
    "ModelConfig",
    "Output",
    "PretrainedOrigin",
    "ResNet3DConfig",
    "ResNetConfig",
    "RetinaNetConfig",
    "YOLOConfig",
    "overruns_channels_last",
    "pretrained_origin",
    "to_device",
]
