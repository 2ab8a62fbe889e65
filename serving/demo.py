"""Models of every kind that answer in the right form and mean nothing: to build a client against, before there is one.

Their weights are random. Their releases say so, and `cadx deploy` would refuse them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from cadx.files import digest_bytes
from cadx.types import Task
from serving.archive import Release, Verdict, release_of, write_archive
from serving.client import RESPONSE_TIMEOUTS_S
from serving.management import Management
from serving.server import TorchServe

DemoKind = Literal["radiograph", "volume", "slide", "detection"]
NOTICE = "random weights: its answers mean nothing"

_CLASSES = ("normal", "finding")
_MODELS: dict[DemoKind, tuple[dict[str, Any], dict[str, Any]]] = {
    "radiograph": ({"family": "resnet", "depth": 18, "width": 0.25}, {"height_px": 224, "width_px": 224}),
    "volume": (
        {"family": "resnet3d", "depth": 10, "width": 0.125, "stem": "small"},
        {"patch_px": (32, 32, 32), "spacing_mm": (2.0, 2.0, 2.0), "window_hu": (-1000, 400)},
    ),
    "slide": (
        {"family": "mil", "hidden_dim": 16, "encoder": {"depth": 18, "width": 0.125, "norm": "group"}},
        {"tile_px": 256, "height_px": 64, "width_px": 64, "channels": 3},
    ),
    "detection": (
        {"family": "yolo", "width": 0.125, "depth": 0.34, "score_threshold": 0.005},
        {"height_px": 256, "width_px": 256},
    ),
}


def write_demo_bundle(
    path: Path,
    kind: DemoKind,
    *,
    model: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> Path:
    """A complete bundle with random weights, the same each time.

    Args:
        path: the folder to make.
        kind: what it takes.
        model: the family and its sizes; None for a small one.
        preprocessing: of that model; None for a small one's.
    """
    import pandas as pd
    import torch
    from pydantic import TypeAdapter

    from cadx.bundle import Manifest, OperatingPoint, Provenance, write_bundle
    from cadx.datasets import SourceInfo
    from cadx.loading import Input
    from cadx.models import ModelConfig

    # That of a detector lies amid its scores: some boxes are called, some are not.
    threshold = 0.0053 if kind == "detection" else 0.5
    digest = digest_bytes(NOTICE.encode())
    task: Task = "detection" if kind == "detection" else "binary"
    config = TypeAdapter[Any](ModelConfig).validate_python(model or _MODELS[kind][0])
    made = TypeAdapter[Any](Input).validate_python(preprocessing or _MODELS[kind][1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = config.build(len(_CLASSES), made.channels)
    manifest = Manifest(
        experiment=f"demo-{kind}",
        seed=0,
        task=task,
        classes=_CLASSES,
        positive=None if task == "detection" else "finding",
        modality="any",
        model=config,
        preprocessing=made,
        temperature=1.0,
        operating_point=OperatingPoint(
            target_metric="sensitivity",
            target_value=0.9,
            thresholds=dict.fromkeys(_CLASSES if task == "detection" else ("finding",), threshold),
            split="calibration",
            n=1,
        ),
        clustered=False,
        source=SourceInfo(title=NOTICE, licence="CC0-1.0", citation="none"),
        assumptions=(NOTICE,),
        provenance=Provenance(
            dataset=digest, splits=digest, parameters=digest, code=digest, seed=0, versions={}
        ),
    )
    write_bundle(path, manifest, [network.state_dict()], pd.DataFrame({"stat_mean": [0.0, 1.0]}))
    return path


def demo_release(bundle: Path, name: str) -> Release:
    """The release of a bundle that no gate has seen."""
    from cadx.bundle import Bundle

    opened = Bundle(bundle)
    verdict = Verdict(promote=False, reasons=(NOTICE,))
    return release_of(name, opened.manifest, opened.digest, verdict, digest_bytes(NOTICE.encode()))


def register_demos(server: TorchServe) -> None:
    """Put a model of each kind into service at a running server: demo-radiograph, demo-volume and so on.

    Each is named on stdout once it answers.
    """
    management = Management(server.management, key_file=server.key_file)
    for kind in get_args(DemoKind):
        name = f"demo-{kind}"
        with TemporaryDirectory() as folder:
            bundle = write_demo_bundle(Path(folder) / "bundle", kind)
            write_archive(server.model_store / f"{name}.mar", bundle, demo_release(bundle, name))
        timeout_s = RESPONSE_TIMEOUTS_S.get(kind, RESPONSE_TIMEOUTS_S["image"])
        management.register(f"{name}.mar", response_timeout_s=timeout_s)
        print(f"{name} answers", flush=True)
