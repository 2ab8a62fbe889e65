"""The configurations of `cadx.models.slide`, without torch."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cadx.models.interface import ImageNorm, Pretrained
from cadx.types import Config

if TYPE_CHECKING:  # importing torch takes two seconds
    from cadx.models.slide import DeepMIL

Pooling = Literal["attention", "gated_attention", "max", "mean", "transformer"]
NUM_HEADS = 4
"""Of the transformer pooling."""
_LEARNED_WEIGHTS = ("attention", "gated_attention", "transformer")


class EncoderConfig(Config):
    """A ResNet that turns a tile into a vector: the mean over its feature map.

    Attributes:
        depth: layers.
        width: as a share of the usual channels.
        stem: "standard", or "small" (3x3, stride 1, no pooling) for tiles of about 32 px.
        norm: of a trained encoder "group" or "frozen_batch" does not depend on which tiles are encoded together.
        pretrained: a local state dict under torchvision's names, or torchvision's own by name, as
            "torchvision:IMAGENET1K_V1"; null for random weights.
        frozen: its weights and batch statistics stay as they are, so that a tile needs to be encoded once only.
        chunk_tiles: most tiles that are encoded at a time.
    """

    depth: Literal[18, 34, 50] = 18
    width: Annotated[float, Field(gt=0, le=4)] = 1.0
    stem: Literal["standard", "small"] = "standard"
    norm: ImageNorm = "batch"
    pretrained: Pretrained | None = None
    frozen: bool = True
    chunk_tiles: Annotated[int, Field(ge=1)] = 64

    @property
    def architecture(self) -> str:
        """The name that torchvision gives it."""
        return f"resnet{self.depth}"


class MILConfig(Config):
    """A classifier of bags of vectors, or with an `encoder` of bags of tiles.

    Attributes:
        pooling: how instances become a bag. "attention" and "gated_attention" learn each one's share; "mean" gives
            all the same; "max" takes each class's score from the instance that speaks most for it; in "transformer"
            a class token reads the bag twice, so that what it looks for may depend on what it saw.
        hidden_dim: numbers per instance after its embedding.
        attention_dim: hidden units of the two attentions.
        dropout: share of embedded numbers that are dropped in training.
        entropy_weight: of `DeepMIL.regularisation` in the loss: above 0, attention spreads over more instances.
        negative_class: of "max" alone: the class of a bag in which nothing is found. Its logit is 0 whatever the
            instances, so that each of them speaks for other classes or for none. Null: every class has its own
            score, as several labels at a time need.
        encoder: of tiles; null where instances are vectors.
    """

    takes: ClassVar = "bags"

    family: Literal["mil"] = "mil"
    pooling: Pooling = "gated_attention"
    hidden_dim: Annotated[int, Field(ge=1)] = 256
    attention_dim: Annotated[int, Field(ge=1)] = 128
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25
    entropy_weight: Annotated[float, Field(ge=0)] = 0.0
    negative_class: Annotated[int, Field(ge=0)] | None = None
    encoder: EncoderConfig | None = None

    @model_validator(mode="after")
    def _fields_fit_pooling(self) -> Self:
        if self.entropy_weight > 0 and self.pooling not in _LEARNED_WEIGHTS:
            raise ValueError(
                f"entropy_weight {self.entropy_weight:g}: pooling {self.pooling} learns no shares to spread; set 0"
            )
        if self.negative_class is not None and self.pooling != "max":
            raise ValueError(f"negative_class: means nothing to pooling {self.pooling}; set it to null")
        if self.pooling == "transformer" and self.hidden_dim % NUM_HEADS:
            raise ValueError(f"hidden_dim {self.hidden_dim}: a transformer needs a multiple of {NUM_HEADS}")
        return self

    def build(self, num_classes: int, channels: int) -> "DeepMIL":
        """The network for instances of `channels` numbers, or with an encoder for tiles of `channels` channels.

        Random weights come from torch's global generator.

        Raises:
            ValueError: if `negative_class` is none of the classes, or `encoder.pretrained` cannot be read or does
                not fit.
        """
        from cadx.models.slide import DeepMIL

        return DeepMIL(num_classes, channels, self)
