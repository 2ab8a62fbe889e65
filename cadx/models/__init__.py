"""The registry of model families: one name in the union each."""

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from cadx.models.detector_config import FasterRCNNConfig, RetinaNetConfig
from cadx.models.interface import Detections, Output, PretrainedOrigin, pretrained_origin
from cadx.models.radiograph_config import ConvNeXtConfig, DenseNetConfig, ResNetConfig
from cadx.models.slide_config import EncoderConfig, MILConfig
from cadx.models.volume_config import DenseNet3DConfig, ResNet3DConfig
from cadx.models.yolo_config import YOLOConfig

if TYPE_CHECKING:  # importing torch takes two seconds
    from cadx.models.detector import MedicalFasterRCNN, MedicalRetinaNet
    from cadx.models.radiograph import (
        ConvNeXtMedical,
        DenseNetMedical,
        MedicalClassificationModel,
        MedicalResNet,
    )
    from cadx.models.slide import AttentionMIL, DeepMIL
    from cadx.models.volume import Medical3DDenseNet, Medical3DResNet
    from cadx.models.yolo import MedicalYOLO

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

_NETWORKS = {
    "AttentionMIL": "slide",
    "ConvNeXtMedical": "radiograph",
    "DeepMIL": "slide",
    "DenseNetMedical": "radiograph",
    "Medical3DDenseNet": "volume",
    "Medical3DResNet": "volume",
    "MedicalClassificationModel": "radiograph",
    "MedicalFasterRCNN": "detector",
    "MedicalResNet": "radiograph",
    "MedicalRetinaNet": "detector",
    "MedicalYOLO": "yolo",
}


def __getattr__(name: str) -> Any:
    """The networks, each imported when it is asked for: a step that reads configurations needs no torch."""
    if name in _NETWORKS:
        return getattr(import_module(f"{__name__}.{_NETWORKS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
