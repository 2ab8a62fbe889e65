"""Training on several machines: `cadx train` under torchrun on each, as a TrainJob of Kubeflow's Trainer v2.

    python -m pipelines.nodes IMAGE PLACEMENT cadx train --dataset ...

is what the task of `train` runs in place of the command behind it, where resources.yaml gives it `nodes`. It hands the
inputs over on a volume that all nodes see, starts the job, waits for its end and takes the outputs back, so that tasks
before and after see no difference. What lies on the volume is named by the digest of all that decides it; nobody else
reads it.

The command on the nodes is the step's own. The runtime `torch-distributed` gives every node its rank and the first
one's address; `torchrun` inside reads them, starts a process for each device, and the processes share each batch out
(`cadx/training/loop.py`): the weights are those of one process, within the noise of float32. Batch normalisation is the
exception: use `norm: group` or `frozen_batch`.

Checkpoints lie on the volume too, and only the first process writes. A lost node ends the job, and Kubeflow tries the
task again: the job that it starts goes on from the last checkpoint.
"""

import json
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from kubeflow.trainer.constants import constants
from kubeflow_trainer_api import models

from cadx.files import digest_bytes, digest_path, replacing
from components.contract import Step, report_outputs, source_digests
from pipelines.placement import SHARED_MEMORY_PATH, THREADS, VOLUME_PATH, Placement

POLL_S = 5
OWN = "cadx train: "
"""Begins the line in which the step says what stopped it."""


def train_job(
    name: str,
    arguments: Sequence[str],
    *,
    image: str,
    placement: Placement,
    volume: PurePosixPath = VOLUME_PATH,
) -> models.TrainerV1alpha1TrainJob:
    """The TrainJob that runs `cadx train` on several nodes.

    Args:
        name: of the job: lower-case letters, digits and hyphens.
        arguments: of `cadx train`, its paths under `volume`.
        image: the training image.
        placement: where the step runs, with `nodes`; all else that it asks for holds for each node, but for retries
            and the time limit, which are the waiting task's. An accelerator is a process each; without any, a node is
            one process on its CPU.
        volume: where the nodes mount the claim.

    Raises:
        ValueError: if a path lies outside of the volume.
    """
    assert placement.nodes is not None
    for word in arguments:
        if word.startswith("/") and not PurePosixPath(word).is_relative_to(volume):
            raise ValueError(f"{word}: not on the volume that all nodes see; give a path under {volume}")
    asked: dict[str, str] = {
        resource: amount
        for resource, amount in (("cpu", placement.cpu), ("memory", placement.memory))
        if amount is not None
    }
    if placement.accelerator is not None:
        asked[placement.accelerator.kind] = str(placement.accelerator.count)
    job = {
        "apiVersion": constants.API_VERSION,
        "kind": constants.TRAINJOB_KIND,
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"name": placement.nodes.runtime},
            "trainer": {
                "image": image,
                "numNodes": placement.nodes.count,
                "numProcPerNode": placement.accelerator.count if placement.accelerator else 1,
                "command": ["torchrun", "-m", "--", "cadx", "train"],
                "args": list(arguments),
                "env": _environment(placement),
                "resourcesPerNode": {"requests": asked, "limits": asked},
            },
            "runtimePatches": [_patch(placement.nodes.claim, placement, volume)],
        },
    }
    made = models.TrainerV1alpha1TrainJob.from_dict(job)
    assert made is not None
    return made


def _environment(placement: Placement) -> list[dict[str, Any]]:
    """What the section's secrets and config maps hold, and how many threads a process may start."""
    processes = placement.accelerator.count if placement.accelerator else 1
    threads = placement.threads(processes)
    return [
        *(
            {"name": variable, "valueFrom": {f"{kind}KeyRef": {"name": name, "key": key}}}
            for variable, (kind, name, key) in placement.variables.items()
        ),
        *([{"name": THREADS, "value": str(threads)}] if threads is not None else []),
    ]


def _patch(claim: str, placement: Placement, volume: PurePosixPath) -> dict[str, Any]:
    """What the runtime's pods get beside the trainer's own fields: volumes and the nodes that they may run on."""
    volumes: list[dict[str, Any]] = [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]
    mounts = [{"name": "data", "mountPath": str(volume)}]
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


def launch(job: models.TrainerV1alpha1TrainJob, *, timeout_s: int = 7 * 86400) -> None:
    """Create a job in the cluster, or find it there, and wait until it has ended; then it is deleted.

    It is deleted as well if nobody waits for it any longer. What its first node has printed is printed here. No cluster
    has seen this function yet.

    Raises:
        ValueError: if it failed: with what the step said on its first node, or else the last line there; or if the
            cluster does not tell how it stands.
        TimeoutError: if it did not end in time.
    """
    from kubeflow.common.types import KubernetesBackendConfig
    from kubeflow.trainer import TrainerClient
    from kubernetes import client

    trainer = TrainerClient(KubernetesBackendConfig())  # also reads where the cluster is
    assert job.metadata is not None
    name, namespace = job.metadata.name, trainer.backend.namespace
    try:
        # The SDK's own `train` knows no command beside an image: it would leave out ours.
        client.CustomObjectsApi().create_namespaced_custom_object(
            constants.GROUP, constants.VERSION, namespace, constants.TRAINJOB_PLURAL, job.to_dict()
        )
    except client.ApiException as error:
        if error.status != 409:  # of a task that was lost while it waited: the job is the same by its name
            raise ValueError(f"TrainJob {name}: refused: {error.status} {error.reason}") from None
    except BaseException:  # told to end while the cluster was asked, which may have made it
        with _deleted_afterwards(trainer, name):
            raise
    said = ""
    with _deleted_afterwards(trainer, name):
        ended = trainer.wait_for_job_status(
            name,
            {constants.TRAINJOB_COMPLETE, constants.TRAINJOB_FAILED},
            timeout=timeout_s,
            polling_interval=POLL_S,
        )
        for line in trainer.get_job_logs(name):
            # The step's own word stands before that of `torchrun`, which tells where it failed and not why.
            if line.startswith(OWN) or (line.strip() and not said.startswith(OWN)):
                said = line.strip()
            print(line, flush=True)
    if ended.status == constants.TRAINJOB_FAILED:
        raise ValueError(said or f"TrainJob {name}: failed, and its first node has said nothing")


@contextmanager
def _deleted_afterwards(trainer: Any, name: str) -> Iterator[None]:
    """However the block ends, no job goes on that nobody waits for.

    Raises:
        ValueError: if the cluster does not tell how the job stands.
    """
    try:
        yield
    except RuntimeError as error:  # the SDK's, of whatever the cluster has answered
        raise ValueError(f"TrainJob {name}: {' '.join(str(error).split())}; it is deleted") from None
    finally:
        try:
            trainer.delete_job(name)
        except (RuntimeError, TimeoutError):
            print(f"TrainJob {name}: not deleted; `kubectl delete trainjob {name}`", file=sys.stderr)


def train_on_nodes(image: str, placement: Placement, words: Sequence[str], *, volume: Path) -> None:
    """Run a step's command on several nodes, as if it ran here.

    Args:
        image: the training image.
        placement: where the step runs, with `nodes`.
        words: the command, `cadx train --option value ...`.
        volume: where the claim is mounted, here and on the nodes.

    Raises:
        ValueError: if the nodes' own command fails: with its last line.
    """
    declared = Step(words[1]).declaration()
    options = {name[2:]: value for name, value in zip(words[2::2], words[3::2], strict=True)}
    executor_input = options.pop("executor-input", "")
    inputs = {name: Path(options[name]) for name in declared.inputs}
    outputs = {name: Path(options[name]) for name in declared.outputs}
    decides = {
        "image": image,
        "code": source_digests(words[1]),
        "options": {name: value for name, value in options.items() if name not in (*inputs, *outputs)},
        "inputs": {name: digest_path(path) for name, path in inputs.items()},
    }
    name = f"cadx-{words[1]}-{digest_bytes(json.dumps(decides).encode()).removeprefix('sha256:')[:12]}"
    folder = volume / name
    for option, path in inputs.items():
        if not (folder / option).exists():
            with replacing(folder / option) as partial:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, partial)
    there = {option: str(folder / option) for option in (*inputs, *outputs, *declared.keeps)}
    arguments = [word for option, value in (options | there).items() for word in (f"--{option}", value)]
    launch(train_job(name, arguments, image=image, placement=placement, volume=PurePosixPath(volume)))
    with ExitStack() as stack:
        for option, path in outputs.items():
            partial = stack.enter_context(replacing(path))
            made = folder / option
            (shutil.copytree if made.is_dir() else shutil.copyfile)(made, partial)
    if executor_input:
        report_outputs(json.loads(executor_input)["outputs"], outputs)
    shutil.rmtree(folder)


def main(words: Sequence[str]) -> None:
    """IMAGE PLACEMENT COMMAND ...; ends the process with the error's line and status 1."""
    # So that what a cancelled task has started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    image, placement, *command = words
    try:
        train_on_nodes(image, Placement.model_validate_json(placement), command, volume=Path(VOLUME_PATH))
    except (ValueError, TimeoutError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
