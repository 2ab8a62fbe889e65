"""Metrics of detections, each with a 95 % interval that knows which images share a patient.

    average precision   as COCO defines it: detections of one class are matched to lesions image by image, by
                        falling score, each lesion once; precision is made to fall with recall and read at 101
                        recalls; the mean over 10 IoU thresholds and then over classes.
    average recall      share of lesions found at any score, the mean over the same 10 IoU thresholds and classes.
    FROC                share of lesions found against false positives per image, over all score thresholds.
    at a threshold      sensitivity, precision and false positives per image of what scores at least so much.
    image               AUC of the highest score in an image, against whether it holds a lesion.

A second detection of one lesion is a false positive. Intervals of AP, AR, FROC and false positives per image come
from a bootstrap of whole patients: detections are matched once, and a resample weights images by how often it drew
their patient, which gives what a set with these images repeated would give. Shares at a threshold and the AUC have
closed forms (`cadx.metrics`). Several seeds are several models on the same images: the value is the mean over them,
and each resample of patients is applied to all.

Invariants: what is undefined (a class without lesions, an area range without any) is None with a method that says
why, never -1 or NaN; images and classes never mix; equal inputs and seed give equal output.
"""

from cadx.detection.average_precision import IOU_THRESHOLDS, calculate_map
from cadx.detection.froc import (
    FROC_RATES,
    FrocCurve,
    OperatingPoint,
    froc_curve,
    froc_limits,
    operating_point,
)
from cadx.detection.matching import AREAS_PX2, match_boxes
from cadx.detection.scoring import (
    METRICS,
    DetectionScores,
    calculate_detection_metrics,
    paired_differences,
)

__all__ = [
    "AREAS_PX2",
    "FROC_RATES",
    "IOU_THRESHOLDS",
    "METRICS",
    "DetectionScores",
    "FrocCurve",
    "OperatingPoint",
    "calculate_detection_metrics",
    "calculate_map",
    "froc_curve",
    "froc_limits",
    "match_boxes",
    "operating_point",
    "paired_differences",
]
