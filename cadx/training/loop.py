"""The one training loop: from a dataset folder and its splits to the weights that did best on val.

Invariants: the order of the data is a pure function of (seed, epoch), an augmentation of (seed, epoch,
sample), every other random number of (seed, step). So a run that was killed at any step and resumed gives
the weights of one that was not, bit for bit on a CPU with the same number of threads, whatever the number
of loader workers.

A batch may be shared out: in parts that follow each other (`accumulation`), and among processes that `torchrun`
starts. Each part's losses are weighted as if the batch were whole, so that the weights are the same within the noise of
float32, with three exceptions. Batch normalisation sees its own part alone, in each process; use `norm: group`, or
frozen statistics, where parts are small. Dropout, stochastic depth and the places that Faster R-CNN samples are drawn
for each part by itself. And Faster R-CNN divides each loss by a number of places of its own, for which a part's images
or lesions stand.
"""

import copy
import dataclasses
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from cadx.bundle import versions
from cadx.datasets import DatasetFolder
from cadx.files import canonical_json, digest_bytes, digest_path, replacing
from cadx.loading import FeaturePreprocessing, TilePreprocessing, VolumePreprocessing, input_text
from cadx.memory import peak_memory_bytes, tune_allocator
from cadx.models import overruns_channels_last, pretrained_origin, to_device
from cadx.models.checkpointing import enable_checkpointing
from cadx.sampling import BalancedSampler, EpochSampler
from cadx.training.bags import FeatureWorkload, SlideWorkload
from cadx.training.boxes import BoxWorkload
from cadx.training.display import EPOCHS, Curves, Display
from cadx.training.images import ImageWorkload
from cadx.training.recipe import WITHOUT_EFFECT, TrainingConfig, monitored
from cadx.training.volumes import VolumeWorkload
from cadx.training.workload import Draw, Forward, Setting, Workload
from cadx.transforms import Preprocessing
from cadx.types import Digest

CHECKPOINT = "checkpoint.pt"
History = list[dict[str, Any]]

# Losses are read off the device this often: each reading makes a GPU wait.
_STEPS_PER_CHECK = 25
_CALMER = "lower train.learning_rate, or set train.grad_clip: 1 or train.precision: fp32"


@dataclass(frozen=True)
class Fitted:
    """What training gives.

    Attributes:
        state_dict: the best epoch's weights, on the CPU.
        averaged: they are an exponential moving average.
        best_epoch: 1-based.
        history: a record per epoch: epoch, step, learning_rate, train_loss, `val_<monitor>` for each monitor of
            the workload (None where undefined), seconds, peak_memory_mb (of the device, or of the process on a
            CPU).
        train_counts: class -> how often it is labelled present in train.
        num_parameters: of the network.
        device: what it was trained on, in words.
        threads: of this process, that compute on a CPU.
        precision: fp32, bf16 or fp16.
    """

    state_dict: dict[str, Tensor]
    averaged: bool
    best_epoch: int
    history: History
    train_counts: dict[str, int]
    num_parameters: int
    device: str
    threads: int
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
    best_loss: float = math.inf  # on val, of the best epoch


def fit(
    config: TrainingConfig,
    folder: DatasetFolder,
    splits: pd.DataFrame,
    *,
    seed: int,
    checkpoints: Path,
    code: Digest | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Fitted:
    """Train on the train split, choose the epoch on val; go on from a checkpoint of this very run, if any.

    The checkpoint stays behind, so that a failure after training costs nothing: see `discard_checkpoint`. Beside
    it stands epochs.jsonl, a record per epoch as it ends. Under `torchrun`, every process calls this with the same
    arguments and gets the same result.

    Args:
        config: the recipe.
        folder: the dataset.
        splits: columns sample_id and split.
        seed: of weights, order, augmentation and dropout; 0 or more.
        checkpoints: folder for the checkpoint; beside it stands what several runs share.
        code: digest of the sources, which a checkpoint must share to be gone on from; None: whatever they are.
        on_epoch: called with each epoch's record, those before a resume included; what it raises ends the run.

    Raises:
        ValueError: if a split cannot serve, the loss is not finite, the memory does not suffice, or batch normalisation
            is given a single value per channel.
    """
    tune_allocator()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(_deterministic(config.deterministic))
        try:
            return _Run(config, folder, splits, seed, checkpoints, code).fit(on_epoch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise ValueError(_out_of_memory(config, isinstance(error, torch.cuda.OutOfMemoryError))) from None
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(_single_value(config)) from None


train_medical_detector = fit
"""The source text's name: a detector has the same trainer as every other family."""


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _out_of_memory(config: TrainingConfig, of_gpu: bool) -> str:
    """What to change, of that which the recipe leaves to be changed."""
    ways = [] if config.checkpointing else ["set train.checkpointing: true"]
    # Batch normalisation may have no variance in a part of one sample.
    least = 2 if getattr(config.model, "norm", None) == "batch" else 1
    if config.batch_size >= least * (config.accumulation + 1):
        ways.append(f"raise train.accumulation (now {config.accumulation})")
    if config.batch_size > least * config.accumulation:
        ways.append(f"lower train.batch_size (now {config.batch_size})")
    ways.append(f"make the input smaller (now {input_text(config.preprocessing)})")
    if _resolve_precision(config.precision, of_gpu) == "fp32":
        ways.append("set train.precision: bf16")
    if not of_gpu:
        ways.append(f"lower train.cache_mb (now {config.cache_mb:g})")
    return f"out of {'GPU ' if of_gpu else ''}memory: {', or '.join(ways)}"


def _single_value(config: TrainingConfig) -> str:
    """What to change where batch normalisation is given one sample whose map is a single cell."""
    ways = [f"lower train.accumulation (now {config.accumulation})"] if config.accumulation > 1 else []
    ways.append(f"raise train.batch_size (now {config.batch_size})")
    encoder = getattr(config.model, "encoder", None)
    where = "train.model.encoder" if encoder else "train.model"
    # Pretrained weights carry batch statistics, which group normalisation has no use for; volumes' cannot be frozen.
    if not getattr(encoder or config.model, "pretrained", None):
        ways.append(f"set {where}.norm: group")
    elif config.model.takes != "volumes":
        ways.append(f"set {where}.norm: frozen_batch")
    ways.append(f"make the input larger (now {input_text(config.preprocessing)})")
    return f"batch normalisation: a single value per channel has no variance: {', or '.join(ways)}"


def discard_checkpoint(checkpoints: Path) -> None:
    """Remove what `fit` left in `checkpoints`, once its result is safe."""
    for name in (CHECKPOINT, EPOCHS):
        (checkpoints / name).unlink(missing_ok=True)


def run_key(
    config: TrainingConfig,
    folder: DatasetFolder,
    splits: pd.DataFrame,
    *,
    seed: int,
    code: Digest | None = None,
) -> Digest:
    """The digest of all that decides a run's weights: a checkpoint of another is not gone on from."""
    origin = pretrained_origin(config.model)
    return digest_bytes(
        canonical_json(
            {
                "config": config.model_dump(mode="json", exclude=WITHOUT_EFFECT),
                "seed": seed,
                "dataset": digest_path(folder.path / "dataset.json"),
                "splits": digest_bytes(splits[["sample_id", "split"]].to_csv(index=False).encode()),
                "pretrained": origin.digest if origin else None,
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


class _Batches(Sampler[list[int]]):
    """The batches of one epoch from a step on, in this process's parts of each.

    A last short batch is dropped unless it is the only one. Loader workers persist over epochs and ask this one
    object for each epoch's batches.

    Args:
        sampler: the order of the items, over all processes.
        batch_size: items of a batch, over all processes.
        accumulation: parts in which each process takes its share of a batch.
        rank: of this process.
        num_processes: among which a batch is shared out.
    """

    def __init__(
        self,
        sampler: EpochSampler | BalancedSampler,
        batch_size: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self._sampler = sampler
        self.num_steps = max(1, len(sampler) // batch_size)
        self._batch_size = min(batch_size, len(sampler))
        num_parts = accumulation * num_processes
        if self._batch_size < num_parts:
            raise ValueError(
                f"train.batch_size: {self._batch_size} samples of a step are too few for {num_parts} parts;"
                " raise it, or lower train.accumulation or the number of processes"
            )
        edges = np.linspace(0, self._batch_size, num_parts + 1).round().astype(int).tolist()
        self._parts = list(pairwise(edges))[rank * accumulation : (rank + 1) * accumulation]

    def start(self, epoch: int, step: int) -> None:
        """Let the next iteration yield the batches of `epoch` from `step` on."""
        order = self._sampler.epoch_indices(epoch)[: self.num_steps * self._batch_size]
        # A sample drawn again within an epoch is augmented anew: as sample + its number of earlier draws * N.
        repeats = pd.Series(order).groupby(order).cumcount().to_numpy()
        self._order, self._draws, self._step = order, order + repeats * (order.max() + 1), step

    def draws(self, step: int, part: int = 0) -> list[int]:
        """What tells the draws of a part of a step's batch apart, for the augmentation."""
        draws: list[int] = self._draws[self._places(step, part)].tolist()
        return draws

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._step, self.num_steps):
            for part in range(len(self._parts)):
                yield self._order[self._places(step, part)].tolist()

    def _places(self, step: int, part: int) -> slice:
        first, last = self._parts[part]
        return slice(step * self._batch_size + first, step * self._batch_size + last)


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
        from accelerate.state import AcceleratorState

        self.config, self.seed = config, seed
        self.checkpoint = checkpoints / CHECKPOINT
        self.key = run_key(config, folder, splits, seed=seed, code=code)
        use_cuda = torch.cuda.is_available()
        self.precision = _resolve_precision(config.precision, use_cuda)
        names = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
        AcceleratorState._reset_state()  # else the first run of a process decides the precision of all
        self.accelerator = Accelerator(mixed_precision=names[self.precision], cpu=not use_cuda)
        self.device = self.accelerator.device
        self.rank, self.num_processes = self.accelerator.process_index, self.accelerator.num_processes

        setting = Setting.of(config, folder, splits, seed, self.device, checkpoints.parent)
        self.workload = workload_for(setting)
        self.monitor = monitored(config, folder.info.task)
        if self.monitor not in self.workload.monitors:
            known = " or ".join(self.workload.monitors)
            raise ValueError(
                f"train.monitor {self.monitor}: not for a task of {folder.info.task}; use {known}"
            )
        self.batches = _Batches(
            self.workload.sampler(),
            config.batch_size,
            accumulation=config.accumulation,
            rank=self.rank,
            num_processes=self.num_processes,
        )
        torch.manual_seed(seed)
        self.network = self.workload.build()
        to_device(self.network, self.device, channels_last=config.channels_last)
        self.averaged = copy.deepcopy(self.network) if config.ema_decay else None
        if config.checkpointing:
            enable_checkpointing(self.network)  # type: ignore[arg-type]
        if config.compile:
            # On a CPU inductor lays every convolution channels last, unless it is told not to.
            overruns = overruns_channels_last(self.network, self.device)
            self.network.compile(options={"layout_optimization": False} if overruns else None)
        self.trained: nn.Module = self.network
        if self.num_processes > 1:
            self.trained = nn.parallel.DistributedDataParallel(
                self.network, device_ids=[self.device] if use_cuda else None
            )
        optimizer = torch.optim.AdamW(_parameter_groups(self.network, config.weight_decay), fused=True)
        # Accelerate looks around in each call, a hundredth of a small network's step: for fp16's scaler alone.
        self.optimizer = self.accelerator.prepare(optimizer) if self.accelerator.scaler else optimizer
        self.best: dict[str, Tensor] = {}
        self.progress = _Progress()

        workers: dict[str, Any] = {
            "collate_fn": self.workload.collate,
            "num_workers": config.num_workers,
            # Workers see what was mined when they start.
            "persistent_workers": config.num_workers > 0 and config.mining_epochs is None,
            "pin_memory": use_cuda,
        }
        self.train_loader = DataLoader(self.workload.train, batch_sampler=self.batches, **workers)
        mine = range(self.rank, len(self.workload.val), self.num_processes)
        size = self.workload.val_batch_size or max(
            1, config.batch_size // (config.accumulation * self.num_processes)
        )
        self.val_loader: DataLoader[Any] = DataLoader(
            self.workload.val,
            batch_sampler=[list(mine[start : start + size]) for start in range(0, len(mine), size)],
            **workers,
        )

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

    def fit(self, on_epoch: Callable[[dict[str, Any]], None] | None) -> Fitted:
        self._load()
        curves = self._curves()
        try:
            with Display(self.config.epochs, self.batches.num_steps, silent=self.rank > 0) as display:
                if on_epoch:
                    for record in self.progress.history:
                        on_epoch(record)
                while not self.done:
                    self._train_epoch(display)
                    record = self.progress.history[-1]
                    display.epoch(record, best=self.progress.best_epoch == self.progress.epoch)
                    self._save()
                    if curves:
                        curves.add(record)
                    if on_epoch:
                        on_epoch(record)
        finally:
            if curves:
                curves.close()
        return Fitted(
            state_dict={name: tensor.cpu().contiguous() for name, tensor in self.best.items()},
            averaged=self.averaged is not None,
            best_epoch=self.progress.best_epoch,
            history=self.progress.history,
            train_counts=self.workload.train_counts,
            num_parameters=sum(parameter.numel() for parameter in self.network.parameters()),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            threads=torch.get_num_threads(),
            precision=self.precision,
        )

    def _curves(self) -> Curves | None:
        if self.rank > 0:
            return None
        name = f"{self.workload.folder.info.name}-{self.seed}"
        settings = {k: str(v) for k, v in self.config.model_dump(mode="json", exclude=WITHOUT_EFFECT).items()}
        curves = Curves(self.checkpoint.parent, self.config.tracking, name, settings | {"seed": self.seed})
        curves.restart(self.progress.history)
        return curves

    def _train_epoch(self, display: Display) -> None:
        progress, num_steps, num_parts = self.progress, self.batches.num_steps, self.config.accumulation
        started = time.perf_counter() - progress.seconds
        self.trained.train()
        self.workload.set_epoch(progress.epoch)
        self.batches.start(progress.epoch, progress.step)
        unread: list[tuple[int, list[int], Tensor]] = []
        parts: list[Any] = []
        for part in self.train_loader:
            parts.append(part)
            if len(parts) < num_parts:
                continue
            loss = self._train_step(parts)
            unread.append(
                (progress.step, [item for part in parts for item in self.workload.items(part)], loss)
            )
            parts = []
            progress.step += 1
            checkpoint = progress.step % self.config.checkpoint_steps == 0 and progress.step < num_steps
            if checkpoint or progress.step == num_steps or len(unread) == _STEPS_PER_CHECK:
                self._read(unread)
                display.step(progress.epoch, progress.step, progress.loss_sum / progress.step)
            if checkpoint:
                progress.seconds = time.perf_counter() - started
                self._save()
        self._mine()
        self._validate(time.perf_counter() - started)

    @torch.no_grad()
    def _mine(self) -> None:
        """Let the workload learn from the epoch what it shows in those that follow."""
        if self.num_processes > 1:
            # Statistics are each process's own: the first one's are validated and kept.
            for module in (self.network, *([self.averaged] if self.averaged is not None else [])):
                for buffer in module.buffers():
                    torch.distributed.broadcast(buffer, src=0)
        network = Forward(self.evaluated.eval(), self.accelerator.autocast)
        found = self.workload.finish_epoch(network, self.progress.epoch, self.rank, self.num_processes)
        everywhere = [found]
        if self.num_processes > 1:
            everywhere = [None] * self.num_processes
            torch.distributed.all_gather_object(everywhere, found)
        self.workload.take_up(everywhere)

    def _train_step(self, parts: list[Any]) -> Tensor:
        """One step of the optimizer, in as many parts; the loss before it, still on the device."""
        config, workload, progress = self.config, self.workload, self.progress
        total_step = progress.epoch * self.batches.num_steps + progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(total_step)
        parts = [workload.to_device(part) for part in parts]
        shares = self._shares(parts)
        divisors: list[Tensor] = []
        loss: Tensor | None = None
        for number, part in enumerate(parts):
            self._seed_step(total_step, number)
            draw = Draw(self.seed, progress.epoch, self.batches.draws(progress.step, number))
            # Between processes, gradients are added up once a step.
            waits = self.num_processes > 1 and number < len(parts) - 1
            with self.trained.no_sync() if waits else nullcontext():  # type: ignore[operator]
                losses = workload.losses(Forward(self.trained, self.accelerator.autocast), part, draw)
                if shares is not None:
                    divisor = workload.divisor(self.network)
                    if divisor is None:
                        losses = {name: value * shares[number][name] for name, value in losses.items()}
                    else:
                        divisors.append(divisor)
                        losses = {name: value * divisor.clamp_min(1.0) for name, value in losses.items()}
                total = torch.stack([*losses.values()]).sum()
                if number == 0:
                    # Here and no earlier: gradients freed just before they are made anew reuse their memory.
                    self.optimizer.zero_grad()
                if self.accelerator.scaler:
                    self.accelerator.backward(total)
                else:
                    total.backward()  # type: ignore[no-untyped-call]
            loss = total.detach() if loss is None else loss + total.detach()
        assert loss is not None
        if divisors:
            # Sums so far: what the whole batch is divided by is known only after the last part.
            scale = self.num_processes / self._over_processes(torch.stack(divisors).sum()).clamp_min(1.0)
            loss = loss * scale
            torch._foreach_mul_([p.grad for p in self.network.parameters() if p.grad is not None], scale)
        if config.grad_clip:
            self.accelerator.clip_grad_norm_(self.network.parameters(), config.grad_clip)
        self.optimizer.step()
        if self.averaged is not None and config.ema_decay:
            _average(self.averaged, self.network, config.ema_decay, total_step)
        return loss

    def _shares(self, parts: list[Any]) -> list[dict[str, Tensor]] | None:
        """By what each part's losses are multiplied, so that the mean over processes is the whole batch's loss."""
        if len(parts) == self.num_processes == 1:
            return None
        weights = [self.workload.weights(part) for part in parts]
        total = {
            name: self._over_processes(torch.stack([part[name].float() for part in weights]).sum())
            for name in weights[0]
        }
        return [
            {
                name: value * self.num_processes / total[name].clamp_min(torch.finfo(torch.float32).tiny)
                for name, value in part.items()
            }
            for part in weights
        ]

    def _over_processes(self, value: Tensor) -> Tensor:
        """The sum of what every process has, in place."""
        if self.num_processes > 1:
            torch.distributed.all_reduce(value)
        return value

    def _seed_step(self, total_step: int, part: int) -> None:
        place = self.rank * self.config.accumulation + part
        entropy = (self.seed, total_step, place) if place else (self.seed, total_step)
        # Not torch.manual_seed, which formats the stack for a GPU not in use: a millisecond each time.
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _learning_rate(self, total_step: int) -> float:
        config, num_steps = self.config, self.batches.num_steps
        warmup_steps = round(config.warmup_epochs * num_steps)
        factor = learning_rate_factor(total_step, steps=config.epochs * num_steps, warmup_steps=warmup_steps)
        return config.learning_rate * factor

    def _read(self, unread: list[tuple[int, list[int], Tensor]]) -> None:
        """Add up the losses not yet read.

        Raises:
            ValueError: if one is not finite.
        """
        losses = self._over_processes(torch.stack([loss for *_, loss in unread]))
        values = (losses / self.num_processes).tolist()
        for (step, items, _), value in zip(unread, values, strict=True):
            if not math.isfinite(value):
                everywhere = [items]
                if self.num_processes > 1:
                    everywhere = [[]] * self.num_processes
                    torch.distributed.all_gather_object(everywhere, items)
                names = dict.fromkeys(self.workload.name(item) for part in everywhere for item in part)
                raise ValueError(
                    f"loss is {value} at epoch {self.progress.epoch + 1}, step {step + 1}: {_CALMER};"
                    f" samples of that batch: {', '.join(names)}"
                )
            self.progress.loss_sum += value
        unread.clear()

    @torch.no_grad()
    def _validate(self, seconds: float) -> None:
        """Score val, record the epoch and keep its weights if they are the best yet, or the last are wanted."""
        progress, network = self.progress, self.evaluated.eval()
        answers = self.workload.answers(Forward(network, self.accelerator.autocast), self.val_loader)
        scores = self.workload.score(self._gathered(answers))
        monitored = scores[self.monitor]
        value = -math.inf if monitored is None else -monitored if self.monitor == "loss" else monitored
        if not math.isfinite(value):
            raise ValueError(f"val {self.monitor} is not finite after epoch {progress.epoch + 1}: {_CALMER}")
        progress.history.append(
            {
                "epoch": progress.epoch + 1,
                "step": (progress.epoch + 1) * progress.step,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "train_loss": progress.loss_sum / progress.step,
                **{f"val_{name}": score for name, score in scores.items()},
                "seconds": round(seconds, 3),
                "peak_memory_mb": round(_peak_memory_mb(self.device)),
            }
        )
        progress.epoch, progress.step, progress.loss_sum, progress.seconds = progress.epoch + 1, 0, 0.0, 0.0
        # Of equal epochs, as where every case of a small val is ranked right, the surer one.
        loss = scores.get("loss")
        loss = math.inf if loss is None else loss
        is_better = (value, -loss) > (progress.best_value, -progress.best_loss)
        if is_better or self.config.keep == "last":
            progress.best_value, progress.best_loss, progress.best_epoch = value, loss, progress.epoch
            self.best = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def _gathered(self, answers: dict[int, Any]) -> dict[int, Any]:
        """The answers of all processes."""
        if self.num_processes == 1:
            return answers
        everywhere: list[dict[int, Any]] = [{} for _ in range(self.num_processes)]
        torch.distributed.all_gather_object(everywhere, answers)
        return {number: answer for one in everywhere for number, answer in one.items()}

    def _save(self) -> None:
        if self.rank > 0:
            return
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
                "workload": self.workload.state_dict(),
            },
            state,
        )
        with replacing(self.checkpoint) as partial:
            partial.write_bytes(state.getbuffer())

    def _load(self) -> None:
        """Take up the run where its checkpoint left it, if there is one and it is of this run."""
        self.accelerator.wait_for_everyone()
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
        # The step walks through a weight and its moments side by side; the run may have been on another device, where
        # weights lie in another order.
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)
        self.best = state["best"]
        self.workload.load_state_dict(state["workload"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def workload_for(setting: Setting) -> Workload:
    """The samples of a dataset, as the loop sees them: the registry of kinds.

    Raises:
        ValueError: if the recipe's preprocessing is for another kind of sample, or the splits cannot serve.
    """
    info, config = setting.folder.info, setting.config
    if info.task == "detection" and type(config.preprocessing) is Preprocessing:
        workload: type[Workload] = BoxWorkload
    elif isinstance(config.preprocessing, VolumePreprocessing):
        workload = VolumeWorkload
    elif isinstance(config.preprocessing, TilePreprocessing):
        workload = SlideWorkload
    elif isinstance(config.preprocessing, FeaturePreprocessing):
        workload = FeatureWorkload
    else:
        workload = ImageWorkload
    if info.kind not in workload.kinds or (info.task == "detection" and workload is not BoxWorkload):
        raise ValueError(
            f"train.preprocessing: not for samples of kind {info.kind}; give height_px and width_px for images,"
            " patch_px for volumes, tile_px for slides, channels alone for features"
        )
    if config.model.takes != workload.takes:
        raise ValueError(
            f"train.model.family {config.model.family}: takes {config.model.takes}, the data are {workload.takes};"
            " choose another family"
        )
    return workload(setting)


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
    return peak_memory_bytes() / 2**20


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
