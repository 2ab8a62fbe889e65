"""The one training loop: from a dataset folder and its splits to the weights that did best on val.

Invariants: the order of the data is a pure function of (seed, epoch), an augmentation of (seed, epoch,
sample), every other random number of (seed, step). So a run that was killed at any step and resumed gives
the weights of one that was not, bit for bit on a CPU with the same number of threads, whatever the number
of loader workers.
"""

import copy
import dataclasses
import io
import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from cadx import metrics
from cadx.bundle import versions
from cadx.datasets import DatasetFolder
from cadx.files import canonical_json, digest_bytes, digest_path, replacing
from cadx.loading.images import ImageDataset
from cadx.losses import LossConfig, count_labels
from cadx.models import ModelConfig
from cadx.sampling import BalancedSampler, EpochSampler
from cadx.transforms import Augmentation, Preprocessing
from cadx.types import Config, Digest

SamplerName = Literal["natural", "balanced"]
History = list[dict[str, Any]]

# Losses are read off the device this often: each reading makes a GPU wait.
_STEPS_PER_CHECK = 25
_CALMER = "lower train.learning_rate, or set train.grad_clip: 1 or train.precision: fp32"
# These change how fast a run goes and what survives a kill, never its weights.
_WITHOUT_EFFECT = {"num_workers", "cache_mb", "checkpoint_steps"}


class Recipe(Config):
    """How to train, but for what may be left to the imbalance of the data: the loss and the sampler.

    Attributes:
        warmup_epochs: the learning rate rises linearly over these, then falls to 0 as a cosine.
        ema_decay: of an exponential moving average of weights and batch statistics, which is then what is
            validated and kept; null for none.
        monitor: what the best epoch is chosen by, on val: "auc" is the mean over classes of one against
            the rest.
        patience: epochs without a better `monitor` after which training stops; null for never.
        grad_clip: largest norm of the gradient; null for any.
        precision: "auto" is bf16 on a GPU that has it, fp16 on another, fp32 on a CPU.
        deterministic: only algorithms on a GPU that give the same bits each time, where there are any.
        num_workers: processes that load images; 0 suffices when they fit into the cache.
        cache_mb: memory for preprocessed images, for train and val each.
        checkpoint_steps: steps between checkpoints within an epoch; each epoch's end has one anyway.
        ensemble: networks whose probabilities are averaged; `fit` trains one of them.
    """

    model: ModelConfig
    preprocessing: Preprocessing
    augmentation: Augmentation = Augmentation()
    epochs: Annotated[int, Field(ge=1)] = 16
    batch_size: Annotated[int, Field(ge=2)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    monitor: Literal["auc", "loss"] = "auc"
    patience: Annotated[int, Field(ge=1)] | None = None
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    deterministic: bool = True
    num_workers: Annotated[int, Field(ge=0)] = 0
    cache_mb: Annotated[float, Field(ge=0)] = 2048
    checkpoint_steps: Annotated[int, Field(ge=1)] = 500
    ensemble: Annotated[int, Field(ge=1, le=100)] = 1


class TrainingConfig(Recipe):
    """A whole recipe: the weights are a function of it, the data, the splits and the seed."""

    loss: LossConfig = LossConfig()
    sampler: SamplerName = "natural"


@dataclass(frozen=True)
class Fitted:
    """What training gives.

    Attributes:
        state_dict: the best epoch's weights, on the CPU.
        averaged: they are an exponential moving average.
        best_epoch: 1-based.
        history: a record per epoch: epoch, step, learning_rate, train_loss, val_loss, val_auc (None where
            undefined), seconds, peak_memory_mb (of the device, or of the process on a CPU).
        train_counts: class -> labelled samples of train that have it.
        num_parameters: of the network.
        device: what it was trained on, in words.
        precision: fp32, bf16 or fp16.
    """

    state_dict: dict[str, Tensor]
    averaged: bool
    best_epoch: int
    history: History
    train_counts: dict[str, int]
    num_parameters: int
    device: str
    precision: str


@dataclass
class _Progress:
    """Where a run stands, beside its network and optimizer: plain values, as the checkpoint holds them."""

    epoch: int = 0
    step: int = 0  # within the epoch
    loss_sum: float = 0.0
    seconds: float = 0.0  # within the epoch, before the last resume
    history: History = dataclasses.field(default_factory=list)
    best_epoch: int = 0
    best_value: float = -math.inf


def fit(
    config: TrainingConfig,
    folder: DatasetFolder,
    splits: pd.DataFrame,
    *,
    seed: int,
    checkpoints: Path,
    code: Digest | None = None,
) -> Fitted:
    """Train on the train split, choose the epoch on val; go on from a checkpoint of this very run, if any.

    The checkpoint stays behind, so that a failure after training costs nothing: see `discard_checkpoint`.

    Args:
        config: the recipe.
        folder: the dataset.
        splits: columns sample_id and split.
        seed: of weights, order, augmentation and dropout; 0 or more.
        checkpoints: folder for checkpoint.pt.
        code: digest of the sources, which a checkpoint must share to be gone on from; None: whatever they are.

    Raises:
        ValueError: if a split cannot serve, the loss is not finite, or the GPU's memory does not suffice.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(_deterministic(config.deterministic))
        try:
            return _Run(config, folder, splits, seed, checkpoints, code).fit()
        except torch.cuda.OutOfMemoryError:
            raise ValueError(
                f"out of GPU memory: lower train.batch_size (now {config.batch_size}), the image's size"
                f" (now {config.preprocessing.height_px} x {config.preprocessing.width_px} px) or the model's"
                " width, or set train.precision: bf16"
            ) from None


def discard_checkpoint(checkpoints: Path) -> None:
    """Remove what `fit` left in `checkpoints`, once its result is safe."""
    (checkpoints / "checkpoint.pt").unlink(missing_ok=True)


def run_key(
    config: TrainingConfig,
    folder: DatasetFolder,
    splits: pd.DataFrame,
    *,
    seed: int,
    code: Digest | None = None,
) -> Digest:
    """The digest of all that decides a run's weights: a checkpoint of another is not gone on from."""
    pretrained = config.model.pretrained
    return digest_bytes(
        canonical_json(
            {
                "config": config.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
                "seed": seed,
                "dataset": digest_path(folder.path / "dataset.json"),
                "splits": digest_bytes(splits[["sample_id", "split"]].to_csv(index=False).encode()),
                "pretrained": digest_path(pretrained) if pretrained and pretrained.is_file() else None,
                "code": code,
                "versions": versions(),
            }
        ).encode()
    )


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate at a 0-based step of `steps`: linear warm-up, then cosine to 0.

    Source: Loshchilov and Hutter 2017, "SGDR", eq. 5, without restarts.

    >>> [round(learning_rate_factor(step, steps=6, warmup_steps=2), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def macro_auc(labels: np.ndarray, logits: np.ndarray, *, multilabel: bool) -> float | None:
    """The mean over classes of the AUC of one against the rest; None if no class has both outcomes.

    Args:
        labels: N K, NaN = unlabelled.
        logits: N K.
        multilabel: scores are the logits as they are; otherwise the log-odds of their softmax.
    """
    scores = logits.astype(np.float64)
    if not multilabel:
        # Log-odds of a class against the rest: no ties where a probability would round to 1.
        others = np.stack([np.delete(scores, k, 1) for k in range(scores.shape[1])], 1)
        scores = scores - np.logaddexp.reduce(others, axis=2)
    values = [
        metrics.auc(labels[:, k], scores[:, k]).value for k in np.flatnonzero(_has_both(count_labels(labels)))
    ]
    return float(np.mean([value for value in values if value is not None])) if values else None


def _has_both(counts: np.ndarray) -> np.ndarray:
    """Which classes have samples with and without them, by `count_labels`."""
    return np.asarray((counts > 0).all(1))


class _Batches(Sampler[list[int]]):
    """The batches of one epoch from a step on; a last short one is dropped unless it is the only one.

    Loader workers persist over epochs and ask this one object for each epoch's batches.
    """

    def __init__(self, sampler: EpochSampler | BalancedSampler, batch_size: int) -> None:
        self._sampler = sampler
        self._batch_size = batch_size
        self.num_steps = max(1, len(sampler) // batch_size)

    def start(self, epoch: int, step: int) -> None:
        """Let the next iteration yield the batches of `epoch` from `step` on."""
        order = self._sampler.epoch_indices(epoch)[: self.num_steps * self._batch_size]
        # A sample drawn again within an epoch is augmented anew: as sample + its number of earlier draws * N.
        repeats = pd.Series(order).groupby(order).cumcount().to_numpy()
        self._order, self._draws, self._step = order, order + repeats * (order.max() + 1), step

    def draws(self, step: int) -> list[int]:
        """What tells the draws of a step's batch apart, for the augmentation."""
        draws: list[int] = self._draws[step * self._batch_size : (step + 1) * self._batch_size].tolist()
        return draws

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._step, self.num_steps):
            yield self._order[step * self._batch_size : (step + 1) * self._batch_size].tolist()


class _Run:
    """One training run: what it works with, and the loop."""

    def __init__(
        self,
        config: TrainingConfig,
        folder: DatasetFolder,
        splits: pd.DataFrame,
        seed: int,
        checkpoints: Path,
        code: Digest | None,
    ) -> None:
        from accelerate import Accelerator

        self.config, self.seed = config, seed
        self.multilabel = folder.info.task == "multilabel"
        self.checkpoint = checkpoints / "checkpoint.pt"
        self.key = run_key(config, folder, splits, seed=seed, code=code)
        self.train, self.val = (_dataset(config, folder, splits, split) for split in ("train", "val"))
        counts = count_labels(self.train.labels)
        _check_splits(config, folder, counts, self.val.labels)
        self.train_counts = dict(zip(folder.info.classes, counts[:, 1].tolist(), strict=True))

        use_cuda = torch.cuda.is_available()
        self.precision = _resolve_precision(config.precision, use_cuda)
        names = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
        self.accelerator = Accelerator(mixed_precision=names[self.precision], cpu=not use_cuda)
        self.device = self.accelerator.device

        torch.manual_seed(seed)
        self.network = config.model.build(len(folder.info.classes), config.preprocessing.channels)
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.criterion = config.loss.build(folder.info.task, counts).to(self.device)
        optimizer = torch.optim.AdamW(_parameter_groups(self.network, config.weight_decay), fused=True)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.averaged = copy.deepcopy(self.network) if config.ema_decay else None
        self.best: dict[str, Tensor] = {}
        self.progress = _Progress()

        sampler_class = BalancedSampler if config.sampler == "balanced" else EpochSampler
        self.batches = _Batches(sampler_class(self.train.labels, seed=seed), config.batch_size)
        workers: dict[str, Any] = {
            "num_workers": config.num_workers,
            "persistent_workers": config.num_workers > 0,
            "pin_memory": use_cuda,
        }
        self.train_loader = DataLoader(self.train, batch_sampler=self.batches, **workers)
        self.val_loader = DataLoader(self.val, batch_size=config.batch_size, **workers)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and kept."""
        return self.network if self.averaged is None else self.averaged

    @property
    def done(self) -> bool:
        patience = self.config.patience or math.inf
        return (
            self.progress.epoch >= self.config.epochs
            or self.progress.epoch - self.progress.best_epoch >= patience
        )

    def fit(self) -> Fitted:
        self._load()
        with _Display(self.config.epochs, self.batches.num_steps) as display:
            while not self.done:
                self._train_epoch(display)
                display.epoch(self.progress.history[-1], best=self.progress.best_epoch == self.progress.epoch)
                self._save()
        return Fitted(
            state_dict={name: tensor.cpu().contiguous() for name, tensor in self.best.items()},
            averaged=self.averaged is not None,
            best_epoch=self.progress.best_epoch,
            history=self.progress.history,
            train_counts=self.train_counts,
            num_parameters=sum(parameter.numel() for parameter in self.network.parameters()),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            precision=self.precision,
        )

    def _train_epoch(self, display: "_Display") -> None:
        progress, num_steps = self.progress, self.batches.num_steps
        started = time.perf_counter() - progress.seconds
        self.network.train()
        self.batches.start(progress.epoch, progress.step)
        unread: list[tuple[int, Tensor, Tensor]] = []
        for images, targets, indices in self.train_loader:
            loss = self._train_step(images, targets)
            unread.append((progress.step, indices, loss))
            progress.step += 1
            checkpoint = progress.step % self.config.checkpoint_steps == 0 and progress.step < num_steps
            if checkpoint or progress.step == num_steps or len(unread) == _STEPS_PER_CHECK:
                self._read(unread)
                display.step(progress.epoch, progress.step, progress.loss_sum / progress.step)
            if checkpoint:
                progress.seconds = time.perf_counter() - started
                self._save()
        self._validate(time.perf_counter() - started)

    def _train_step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step of the optimizer; the loss before it, still on the device."""
        config, epoch, step = self.config, self.progress.epoch, self.progress.step
        total_step = epoch * self.batches.num_steps + step
        self._seed_step(total_step)
        images, targets = self._to_device(images), targets.to(self.device, non_blocking=True)
        images = config.augmentation.apply(
            images,
            seed=self.seed,
            epoch=epoch,
            samples=self.batches.draws(step),
            background=config.preprocessing.background,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(total_step)
        with self.accelerator.autocast():
            logits = self.network(images).logits
        loss: Tensor = self.criterion(logits, targets)
        # Here and not after the step: gradients freed just before they are made anew reuse their memory.
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if config.grad_clip:
            self.accelerator.clip_grad_norm_(self.network.parameters(), config.grad_clip)
        self.optimizer.step()
        if self.averaged is not None and config.ema_decay:
            _average(self.averaged, self.network, config.ema_decay, total_step)
        return loss.detach()

    def _seed_step(self, total_step: int) -> None:
        # Not torch.manual_seed, which formats the stack for a GPU not in use: a millisecond each time.
        seed = int(np.random.SeedSequence((self.seed, total_step)).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _learning_rate(self, total_step: int) -> float:
        config, num_steps = self.config, self.batches.num_steps
        warmup_steps = round(config.warmup_epochs * num_steps)
        factor = learning_rate_factor(total_step, steps=config.epochs * num_steps, warmup_steps=warmup_steps)
        return config.learning_rate * factor

    def _read(self, unread: list[tuple[int, Tensor, Tensor]]) -> None:
        """Add up the losses not yet read.

        Raises:
            ValueError: if one is not finite.
        """
        values = torch.stack([loss for *_, loss in unread]).tolist()
        for (step, indices, _), value in zip(unread, values, strict=True):
            if not math.isfinite(value):
                names = ", ".join(self.train.sample_ids[index] for index in indices.tolist())
                raise ValueError(
                    f"loss is {value} at epoch {self.progress.epoch + 1}, step {step + 1}: {_CALMER};"
                    f" samples of that batch: {names}"
                )
            self.progress.loss_sum += value
        unread.clear()

    @torch.no_grad()
    def _validate(self, seconds: float) -> None:
        """Score val, record the epoch and keep its weights if they are the best yet."""
        progress, network = self.progress, self.evaluated.eval()
        outputs: list[Tensor] = []
        for images, _, _ in self.val_loader:
            with self.accelerator.autocast():
                outputs.append(network(self._to_device(images)).logits)
        logits = torch.cat(outputs)
        labels = self.val.labels
        loss = self.criterion(logits, torch.from_numpy(labels).to(self.device)).item()
        scores = logits.cpu().numpy()
        auc = macro_auc(labels, scores, multilabel=self.multilabel) if np.isfinite(scores).all() else None
        value = {"auc": -math.inf if auc is None else auc, "loss": -loss}[self.config.monitor]
        if not math.isfinite(value):
            raise ValueError(
                f"val {self.config.monitor} is not finite after epoch {progress.epoch + 1}: {_CALMER}"
            )
        progress.history.append(
            {
                "epoch": progress.epoch + 1,
                "step": (progress.epoch + 1) * progress.step,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "train_loss": progress.loss_sum / progress.step,
                "val_loss": loss,
                "val_auc": auc,
                "seconds": round(seconds, 3),
                "peak_memory_mb": round(_peak_memory_mb(self.device)),
            }
        )
        progress.epoch, progress.step, progress.loss_sum, progress.seconds = progress.epoch + 1, 0, 0.0, 0.0
        if value > progress.best_value:
            progress.best_value, progress.best_epoch = value, progress.epoch
            self.best = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def _to_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True, memory_format=torch.channels_last)

    def _save(self) -> None:
        scaler = self.accelerator.scaler
        state = io.BytesIO()  # torch's own writer reports a full disk as a broken archive
        torch.save(
            {
                "key": self.key,
                "progress": dataclasses.asdict(self.progress),
                "network": self.network.state_dict(),
                "averaged": None if self.averaged is None else self.averaged.state_dict(),
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            },
            state,
        )
        with replacing(self.checkpoint) as partial:
            partial.write_bytes(state.getbuffer())

    def _load(self) -> None:
        """Take up the run where its checkpoint left it, if there is one and it is of this run."""
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except FileNotFoundError:
            return
        except Exception:  # a damaged file: the run starts anew and replaces it
            return
        if state.get("key") != self.key:
            return
        self.progress = _Progress(**state["progress"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = state["best"]
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


class _Display:
    """One live line on a terminal; elsewhere a plain line per epoch."""

    def __init__(self, epochs: int, num_steps: int) -> None:
        self._epochs = epochs
        self._console = Console(stderr=True)
        self._auc = ""
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("train", total=epochs * num_steps)
            self._num_steps = num_steps

    def __enter__(self) -> "_Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Show a step, both 0-based."""
        if self._bar:
            text = f"epoch {epoch + 1}/{self._epochs}  loss {loss:.4f}{self._auc}"
            self._bar.update(self._task, completed=epoch * self._num_steps + step, description=text)

    def epoch(self, record: dict[str, Any], *, best: bool) -> None:
        """Show an epoch's record."""
        self._auc = "" if record["val_auc"] is None else f"  val AUC {record['val_auc']:.4f}"
        if not self._bar:
            self._console.print(
                f"epoch {record['epoch']}/{self._epochs}  train loss {record['train_loss']:.4f}"
                f"  val loss {record['val_loss']:.4f}{self._auc}  {record['seconds']:.1f} s"
                f"{'  best' if best else ''}",
                highlight=False,
            )


def _dataset(config: TrainingConfig, folder: DatasetFolder, splits: pd.DataFrame, split: str) -> ImageDataset:
    sample_ids = splits.loc[splits["split"] == split, "sample_id"].tolist()
    if not sample_ids:
        raise ValueError(f"splits: no sample in {split}; give {split} a share in split.fractions")
    return ImageDataset(folder, sample_ids, config.preprocessing, config.cache_mb)


def _check_splits(
    config: TrainingConfig, folder: DatasetFolder, counts: np.ndarray, val_labels: np.ndarray
) -> None:
    """Refuse what cannot be learned, or cannot be monitored."""
    if not _has_both(counts).any():
        classes = ", ".join(folder.info.classes)
        raise ValueError(f"splits: train has samples of fewer than two outcomes ({classes}); split again")
    if config.monitor == "auc" and not _has_both(count_labels(val_labels)).any():
        raise ValueError("splits: monitor auc needs both classes in val; use monitor: loss, or a larger val")


def _resolve_precision(precision: str, use_cuda: bool) -> str:
    if precision != "auto":
        if precision == "fp16" and not use_cuda:
            raise ValueError("train.precision fp16 needs a GPU; use auto, fp32 or bf16")
        return precision
    if not use_cuda:
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and normalisation scales do not."""
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network; early on by more, so that the random start is forgotten."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    pairs = zip(averaged.state_dict().values(), network.state_dict().values(), strict=True)
    floating = [(mean, now) for mean, now in pairs if mean.is_floating_point()]
    torch._foreach_lerp_([mean for mean, _ in floating], [now for _, now in floating], share)


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic GPU algorithms inside the block, where there are any."""
    if not (wanted and torch.cuda.is_available()):
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
