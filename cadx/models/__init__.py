"""The registry of model families: one name in the union each."""

from typing import Annotated

from pydantic import Field

from cadx.models.radiograph import (
    DenseNetConfig,
    DenseNetMedical,
    MedicalClassificationModel,
    MedicalResNet,
    Output,
    ResNetConfig,
)

ModelConfig = Annotated[ResNetConfig | DenseNetConfig, Field(discriminator="family")]

__all__ = [
    "DenseNetConfig",
    "DenseNetMedical",
    "MedicalClassificationModel",
    "MedicalResNet",
    "ModelConfig",
    "Output",
    "ResNetConfig",
]
