"""Every name of the source text built so far can be imported; the faults of its sketch are tested beside ours."""

from importlib import import_module

import pytest

NAMES = {
    "analyze_class_imbalance": "cadx.sampling",
    "BalancedSampler": "cadx.sampling",
    "Patch3DDataset": "cadx.loading.volumes",
    "MILDataset": "cadx.loading.slides",
    "visualize_attention_map": "cadx.explaining",
    "MedicalClassificationModel": "cadx.models.radiograph",
    "MedicalResNet": "cadx.models.radiograph",
    "DenseNetMedical": "cadx.models.radiograph",
    "Conv3DBlock": "cadx.models.volume_networks",
    "ResNet3DBlock": "cadx.models.volume_networks",
    "DenseBlock3D": "cadx.models.volume_networks",
    "Medical3DResNet": "cadx.models.volume",
    "MemoryEfficient3DNet": "cadx.models.volume",
    "create_medical_3d_resnet": "cadx.models.volume",
    "AttentionMIL": "cadx.models.slide",
    "DeepMIL": "cadx.models.slide",
    "MedicalFasterRCNN": "cadx.models.detector",
    "MedicalYOLO": "cadx.models.yolo",
    "train_medical_detector": "cadx.training.loop",
    "FocalLossForDetection": "cadx.losses",
    "HardNegativeMiner": "cadx.mining",
    "calculate_detection_metrics": "cadx.detection",
    "calculate_map": "cadx.detection",
    "FocalLoss": "cadx.losses",
    "BalancedCrossEntropyLoss": "cadx.losses",
    "calculate_medical_classification_metrics": "cadx.metrics",
}


@pytest.mark.parametrize(("name", "module"), NAMES.items())
def test_the_name_is_importable_and_documented(name: str, module: str) -> None:
    assert getattr(import_module(module), name).__doc__
