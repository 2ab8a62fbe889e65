"""What a training run is a function of, beside its data and its seed."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cadx.loading import Input, VolumePreprocessing
from cadx.models import ModelConfig
from cadx.transforms import Augmentation
from cadx.types import Config, Task
from cadx.weighting import LossConfig

SamplerName = Literal["natural", "balanced"]
Monitor = Literal["auc", "ap50", "loss"]
Keep = Literal["best", "last"]

WITHOUT_EFFECT = {"num_workers", "cache_mb", "checkpoint_steps", "checkpointing", "tracking"}
"""Fields of a recipe that change how a run goes and what survives a kill, never its weights."""


class Recipe(Config):
    """How to train, but for what may be left to the imbalance of the data: the loss and the sampler.

    Attributes:
        preprocessing: of an image, a volume (`patch_px`), a slide (`tile_px`) or a bag of features (`channels`
            alone): how it becomes the network's input.
        patches_per_sample: random patches of a volume, or crops of an image with boxes (`fit: tile`), in an epoch.
        positive_fraction: share of those that is centred on a finding, where there is one.
        mining_epochs: null, or after how many epochs, again and again, a detector of tiles is asked for what it
            takes for a lesion in the training images: crops of that are shown it later.
        max_instances: most instances of a bag in one epoch, drawn anew each; null for all.
        batch_size: samples for one step of the optimizer, over all processes.
        accumulation: parts in which each process computes its share of a batch, to save memory.
        warmup_epochs: the learning rate rises linearly over these, then falls to 0 as a cosine.
        ema_decay: of an exponential moving average of weights and batch statistics, which is then what is
            validated and kept; null for none.
        monitor: what the best epoch is chosen by, on val: "auc" is the mean over classes of one against
            the rest; "ap50" of boxes the average precision at an IoU of .5; null is the one that fits the task.
        keep: the epoch whose weights are kept: "best" by `monitor`, or the "last", so that val chooses nothing and
            may judge (`folds`).
        patience: epochs without a better `monitor` after which training stops; null for never.
        grad_clip: largest norm of the gradient; null for any.
        precision: "auto" is bf16 on a GPU that has it, fp16 on another, fp32 on a CPU.
        channels_last: keep weights and feature maps in the memory order in which convolutions take least time, where
            `cadx.models.to_device` finds it safe and measured.
        compile: let torch.compile fuse the network: minutes at the start, a faster step after.
        checkpointing: keep few activations and recompute the rest: less memory, more time, the same weights.
        deterministic: only algorithms on a GPU that give the same bits each time, where there are any.
        num_workers: processes that load samples; 0 suffices when they fit into the cache.
        cache_mb: memory for preprocessed images, for train and val each.
        checkpoint_steps: steps between checkpoints within an epoch; each epoch's end has one anyway.
        tracking: where curves go beside the terminal and the log: "tensorboard" writes them into the folder
            of checkpoints, "mlflow" sends them to the server that MLFLOW_TRACKING_URI names.
        ensemble: networks whose probabilities are averaged; `fit` trains one of them.
        folds: null, or K for cross-validation: train and val are joined and parted by patient into K folds, and
            there is one ensemble for each, which that fold validates.
    """

    model: ModelConfig
    preprocessing: Input
    augmentation: Augmentation = Augmentation()
    patches_per_sample: Annotated[int, Field(ge=1)] = 4
    positive_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    mining_epochs: Annotated[int, Field(ge=1)] | None = None
    max_instances: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] = 16
    batch_size: Annotated[int, Field(ge=1)] = 64
    accumulation: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    monitor: Monitor | None = None
    keep: Keep = "best"
    patience: Annotated[int, Field(ge=1)] | None = None
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool = True
    compile: bool = False
    checkpointing: bool = False
    deterministic: bool = True
    num_workers: Annotated[int, Field(ge=0)] = 0
    cache_mb: Annotated[float, Field(ge=0)] = 2048
    checkpoint_steps: Annotated[int, Field(ge=1)] = 500
    tracking: Literal["tensorboard", "mlflow"] | None = None
    ensemble: Annotated[int, Field(ge=1, le=100)] = 1
    folds: Annotated[int, Field(ge=2, le=100)] | None = None

    @model_validator(mode="after")
    def _frozen_statistics_exist(self) -> Self:
        for part in (self.model, getattr(self.model, "encoder", None)):
            if getattr(part, "norm", None) == "frozen_batch" and getattr(part, "pretrained", None) is None:
                raise ValueError(
                    "model.norm: frozen_batch keeps statistics that nobody measured; set pretrained, or group"
                )
        return self

    @model_validator(mode="after")
    def _val_chooses_or_does_not(self) -> Self:
        if self.keep == "last" and self.patience is not None:
            raise ValueError("patience: stops by what val says; leave it out where keep is last")
        return self

    @model_validator(mode="after")
    def _slices_are_turned_of_volumes(self) -> Self:
        if self.augmentation.depth_flip and not isinstance(self.preprocessing, VolumePreprocessing):
            raise ValueError("augmentation.depth_flip: is for volumes; leave it out")
        return self

    @model_validator(mode="after")
    def _patches_are_drawn(self) -> Self:
        is_tile = getattr(self.preprocessing, "fit", None) == "tile"
        if not is_tile and not isinstance(self.preprocessing, VolumePreprocessing):
            for name in ("patches_per_sample", "positive_fraction"):
                if getattr(self, name) != Recipe.model_fields[name].default:
                    raise ValueError(f"{name}: is for volumes and for boxes in tiles; leave it out")
        return self

    @model_validator(mode="after")
    def _detectors_bring_their_loss(self) -> Self:
        loss = getattr(self, "loss", "auto")
        if self.model.takes == "boxes" and loss not in ("auto", LossConfig()):
            raise ValueError("loss: a detector's losses are its model's own; leave it out, and see model")
        return self


class TrainingConfig(Recipe):
    """A whole recipe: the weights are a function of it, the data, the splits and the seed.

    Attributes:
        loss: of a classifier; those of a detector are its model's.
        sampler: "natural" draws each sample once, "balanced" each class equally often.
    """

    loss: LossConfig = LossConfig()
    sampler: SamplerName = "natural"


def monitored(config: Recipe, task: Task) -> Monitor:
    """What the best epoch is chosen by: as asked for, else what fits the task."""
    return config.monitor or ("ap50" if task == "detection" else "auc")
