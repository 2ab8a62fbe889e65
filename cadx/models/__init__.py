"""The registry of model families: one name in the union each."""

from typing import Annotated

from pydantic import Field

from cadx.models.detector import FasterRCNNConfig, MedicalFasterRCNN, MedicalRetinaNet, RetinaNetConfig
from cadx.models.interface import Detections, Output, PretrainedOrigin, pretrained_origin
from cadx.models.radiograph import (
    ConvNeXtConfig,
    ConvNeXtMedical,
    DenseNetConfig,
    DenseNetMedical,
    MedicalClassificationModel,
    MedicalResNet,
    ResNetConfig,
)
from cadx.models.slide import AttentionMIL, DeepMIL, EncoderConfig, MILConfig
from cadx.models.volume import DenseNet3DConfig, Medical3DDenseNet, Medical3DResNet, ResNet3DConfig
from cadx.models.yolo import MedicalYOLO, YOLOConfig

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
    "AttentionMIL",
    "ConvNeXtConfig",
    "ConvNeXtMedical",
    "DeepMIL",
    "DenseNet3DConfig",
    "DenseNetConfig",
    "DenseNetMedical",
    "Detections",
    "EncoderConfig",
    "FasterRCNNConfig",
    "MILConfig",
    "Medical3DDenseNet",
    "Medical3DResNet",
    "MedicalClassificationModel",
    "MedicalFasterRCNN",
    "MedicalResNet",
    "MedicalRetinaNet",
    "MedicalYOLO",
    "ModelConfig",
    "Output",
    "PretrainedOrigin",
    "ResNet3DConfig",
    "ResNetConfig",
    "RetinaNetConfig",
    "YOLOConfig",
    "pretrained_origin",
]
