"""Training on several machines: `cadx train` under torchrun on each, as a TrainJob of Kubeflow's Trainer v2.

The command is the step's own. The runtime `torch-distributed` gives every node its rank and the first one's address;
`torchrun` inside reads them, starts a process for each device, and the processes share each batch out
(`cadx/training/loop.py`): the weights are those of one process, within the noise of float32. Batch normalisation is the
exception: use `norm: group` or `frozen_batch`.

Inputs, outputs and checkpoints lie on one volume that all nodes see; only the first process writes. A lost node ends
the job; started again under the same name of checkpoints, it goes on from the last epoch.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from kubeflow.trainer.constants import constants
from kubeflow_trainer_api import models

from pipelines.placement import SHARED_MEMORY_PATH, Placement

RUNTIME = "torch-distributed"
"""The cluster's training runtime, as Kubeflow's Trainer installs it."""
VOLUME_PATH = PurePosixPath("/data")


def train_job(
    name: str,
    arguments: Sequence[str],
    *,
    image: str,
    nodes: int,
    devices: int,
    claim: str,
    placement: Placement,
    runtime: str = RUNTIME,
) -> models.TrainerV1alpha1TrainJob:
    """The TrainJob that runs `cadx train` on several nodes.

    Args:
        name: of the job: lower-case letters, digits and hyphens.
        arguments: of `cadx train`, its paths under `VOLUME_PATH`.
        image: the training image.
        nodes: machines.
        devices: accelerators, and so processes, on each; 0 trains one process a node on its CPU.
        claim: the volume that all nodes mount at `VOLUME_PATH`.
        placement: where the step runs; its memory, CPU, /dev/shm, selectors and tolerations hold for each node.
        runtime: the cluster's training runtime.

    Raises:
        ValueError: if there is no node, a negative number of devices, or a path outside of the volume.
    """
    if nodes < 1 or devices < 0:
        raise ValueError(f"nodes {nodes}, devices {devices}: give at least one node, and 0 or more devices")
    for word in arguments:
        if word.startswith("/") and not PurePosixPath(word).is_relative_to(VOLUME_PATH):
            raise ValueError(f"{word}: not on the volume that all nodes see; give a path under {VOLUME_PATH}")
    asked: dict[str, str] = {
        resource: amount
        for resource, amount in (("cpu", placement.cpu), ("memory", placement.memory))
        if amount is not None
    }
    if devices:
        kind = placement.accelerator.kind if placement.accelerator else "nvidia.com/gpu"
        asked[kind] = str(devices)
    job = {
        "apiVersion": constants.API_VERSION,
        "kind": constants.TRAINJOB_KIND,
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"name": runtime},
            "trainer": {
                "image": image,
                "numNodes": nodes,
                "numProcPerNode": devices or 1,
                "command": ["torchrun", "-m", "--", "cadx", "train"],
                "args": list(arguments),
                "resourcesPerNode": {"requests": asked, "limits": asked},
            },
            "runtimePatches": [_patch(claim, placement)],
        },
    }
    made = models.TrainerV1alpha1TrainJob.from_dict(job)
    assert made is not None
    return made


def _patch(claim: str, placement: Placement) -> dict[str, Any]:
    """What the runtime's pods get beside the trainer's own fields: volumes and the nodes that they may run on."""
    volumes: list[dict[str, Any]] = [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]
    mounts = [{"name": "data", "mountPath": str(VOLUME_PATH)}]
    if placement.shared_memory is not None:
        volumes.append(
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": placement.shared_memory}}
        )
        mounts.append({"name": "shm", "mountPath": SHARED_MEMORY_PATH})
    pod: dict[str, Any] = {"volumes": volumes, "containers": [{"name": "node", "volumeMounts": mounts}]}
    if placement.node_selector:
        pod["nodeSelector"] = dict(placement.node_selector)
    if placement.tolerations:
        pod["tolerations"] = [one.model_dump(exclude_none=True) for one in placement.tolerations]
    return {
        "manager": "cadx.io/nodes",
        "trainingRuntimeSpec": {
            "template": {
                "spec": {
                    "replicatedJobs": [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]
                }
            }
        },
    }


def launch(job: models.TrainerV1alpha1TrainJob, namespace: str, *, timeout_s: int = 7 * 86400) -> None:
    """Create a job in the cluster and wait until it is complete. No cluster has seen this function yet.

    Raises:
        RuntimeError: if it failed.
        TimeoutError: if it did not end in time.
    """
    from kubeflow.trainer import KubernetesBackendConfig, TrainerClient
    from kubernetes import client

    trainer = TrainerClient(KubernetesBackendConfig(namespace=namespace))  # also reads where the cluster is
    assert job.metadata is not None
    # The SDK's own `train` knows no command beside an image: it would leave out ours.
    client.CustomObjectsApi().create_namespaced_custom_object(
        constants.GROUP, constants.VERSION, namespace, constants.TRAINJOB_PLURAL, job.to_dict()
    )
    trainer.wait_for_job_status(job.metadata.name, timeout=timeout_s)
