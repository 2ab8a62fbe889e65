"""Classifiers of bags: tiles of a slide, or any vectors of which a bag has a varying number.

Every instance is embedded alone and the bag is pooled; positions of tiles are not seen, so the order of instances
means nothing. Memory grows with the number of instances and never with its square.

What a pooling may learn differs. Under the standard assumption of multiple instances, a bag is positive if and only
if it holds a positive instance, so that no instance speaks for "negative". Of these poolings `max` with a
`negative_class` alone cannot break it; the others may come to hold a bag for positive because something is missing
from it. The three algorithmic unit tests of Raff and Holt 2023, "Reproducibility in Multiple Instance Learning: A
Case For Algorithmic Unit Tests" (arXiv:2310.17867), train on bags where a marker tempts the network and score others
where it misleads. `tests/test_models_slide.py` trains each pooling on each and holds this table:

| pooling | single concept | two concepts | false frequency |
|---|---|---|---|
| attention | misled | misled | unlearned |
| gated_attention | misled | misled | unlearned |
| max | holds | unlearned | unlearned |
| mean | misled | misled | unlearned |
| transformer | misled | misled | holds |

- single concept: one kind of instance makes a bag positive. In training, negative bags bear a marker; in the test,
  positive bags do. What breaks the assumption ranks the bags upside down.
- two concepts: a bag is positive if it holds both of two kinds; the marker as above.
- false frequency: as two concepts, without a marker, but negative bags of the test hold very many of one kind.

"holds" is an AUC of 0.9 or more in the test; "misled" one below 0.9 where other bags like those of the training have
0.9 or more; "unlearned", below 0.9 on these too. By the largest of instances' scores two concepts cannot be told.
"""

import math
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from cadx.models.interface import Output
from cadx.models.slide_config import NUM_HEADS, EncoderConfig, MILConfig, Pooling

__all__ = ["AttentionMIL", "DeepMIL", "EncoderConfig", "MILConfig", "Pooling"]


_NUM_BLOCKS = 2


class DeepMIL(nn.Module):
    """A classifier of bags, by any of five poolings, with or without an encoder of tiles.

    A bag's answer depends neither on what it is batched with, nor on what fills the padding, nor on the order of its
    instances, up to the rounding of sums. The attention that is shown is the share of each instance in the
    prediction: the weights of the pooled mean; for "max", equal shares of the instances whose scores are the logits,
    one for each class but the negative; for "transformer", where the class token looks, the mean over its heads and
    readings.

    Source: Ilse et al. 2018, "Attention-based Deep Multiple Instance Learning", eq. 7 to 9, for "attention" and
    "gated_attention", with one linear layer and ReLU before them; we start from equal shares. "max" is their
    instance-level approach. For "transformer" Touvron et al. 2021, "Going deeper with Image Transformers", section
    3 (class attention), where we leave the token itself out of what it reads.

    Args:
        num_classes: K.
        channels: E, the numbers of an instance; with an encoder, the channels of a tile.
        config: by default attention over the tiles of colour slides, encoded by a ResNet-50.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, num_classes: int = 2, channels: int = 3, config: MILConfig | None = None) -> None:
        super().__init__()
        config = config or MILConfig(encoder=EncoderConfig(depth=50))
        if config.negative_class is not None and not config.negative_class < num_classes > 1:
            raise ValueError(
                f"negative_class {config.negative_class}: there are {num_classes} classes, counted from 0; name one"
                " beside which there are others"
            )
        self.encoder = _build_encoder(channels, config.encoder) if config.encoder else None
        self.embedding_dim = channels if self.encoder is None else self.encoder.feature_dim
        self._frozen = config.encoder is not None and config.encoder.frozen
        self._chunk_tiles = config.encoder.chunk_tiles if config.encoder else 0
        self.register_buffer("input_mean", torch.zeros(self.embedding_dim))
        self.register_buffer("input_std", torch.ones(self.embedding_dim))
        self.embedding = nn.Sequential(
            nn.Linear(self.embedding_dim, config.hidden_dim), nn.ReLU(), nn.Dropout(config.dropout)
        )
        self.pooling = _build_pooling(num_classes, config)
        self.train()

    def forward(self, instances: Tensor, mask: Tensor) -> Output:
        """Logits, attention and features (all float32) of bags.

        Args:
            instances: N T E, or with an encoder also N T C H W.
            mask: N T bool, True where there is an instance; each bag has at least one.

        Raises:
            ValueError: if the instances are tiles and there is no encoder, or are not of this network's width.
        """
        if instances.ndim == 5:
            instances = self._encode_bags(instances, mask)
        self._check_width(instances)
        # First of all: what fills the padding may be anything, and 0 times NaN is NaN. Then in place: a batch of large
        # slides has hundreds of megabytes.
        instances = instances.masked_fill(~mask[..., None], 0).sub_(self.input_mean).div_(self.input_std)
        embeddings = self.embedding(instances)
        output: Output = self.pooling(embeddings, mask)
        return output

    def encode(self, tiles: Tensor) -> Tensor:
        """The vectors, B E float32, of `tiles`, B C H W; a frozen encoder keeps no gradient.

        Raises:
            ValueError: if there is no encoder.
        """
        if self.encoder is None:
            raise ValueError("model.encoder is null: this network takes vectors; set an encoder for tiles")
        # Parts of near equal size: batch statistics of a last part of one tile would be none.
        parts = tiles.tensor_split(max(1, math.ceil(len(tiles) / self._chunk_tiles)))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            return torch.cat([self.encoder(part).float() for part in parts])

    def fit_inputs(self, bags: Iterable[Tensor]) -> None:
        """Standardise instances by the moments of these bags from now on; each instance counts the same.

        The moments are exact whatever the number of bags, of which one at a time is in memory. They are part of the
        state dict; before, instances go in as they are. A feature that is constant is centred, and not scaled.

        Source: Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance", eq. 2.1.

        Args:
            bags: T E each, of the training set.

        Raises:
            ValueError: if there is no instance, or one of another width.
        """
        count, mean, squares = 0, torch.zeros(self.embedding_dim).double(), torch.zeros(1).double()
        for bag in bags:
            self._check_width(bag)
            if not len(bag):
                continue
            part = bag.detach().cpu().double()
            part_mean = part.mean(0)
            delta = part_mean - mean
            total = count + len(part)
            squares = squares + (part - part_mean).square_().sum(0) + delta**2 * (count * len(part) / total)
            mean = mean + delta * (len(part) / total)
            count = total
        if not count:
            raise ValueError("no instance to standardise by; give the bags of the training set")
        std = (squares / count).sqrt()
        # What rounding alone makes of a constant is no spread.
        std[std <= 1e-6 * mean.abs()] = 1
        self.input_mean.copy_(mean)
        self.input_std.copy_(std)

    def regularisation(self, output: Output, mask: Tensor) -> Tensor:
        """Minus the mean entropy of the bags' attention, -1 (equal shares) to 0 (one instance has all): a scalar.

        Training adds `entropy_weight` times this to the loss, which so rewards attention that is spread.

        Source: the handbook's `AttentionMIL.calculate_loss`; we divide each bag's entropy by the logarithm of its
        number of instances, so that one weight means the same to bags of 100 and of 10,000.

        Args:
            output: of `forward`.
            mask: as in `forward`.
        """
        # Clamped: the slope of -p log p is infinite at 0, which padding and shares that underflow have.
        shares = output.attention.clamp_min(torch.finfo(output.attention.dtype).tiny)
        entropy = torch.where(mask, torch.special.entr(shares), 0).sum(1)
        return -(entropy / mask.sum(1).clamp_min(2).log()).mean()

    def stages(self) -> list[nn.Module]:
        """Segments of gradient checkpointing: the encoder, if it is trained, once for each chunk; then the rest."""
        first = [] if self.encoder is None or self._frozen else [self.encoder]
        return [*first, self.embedding, self.pooling]

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder is not None and self._frozen:
            self.encoder.eval()
        return self

    def _encode_bags(self, tiles: Tensor, mask: Tensor) -> Tensor:
        encoded = self.encode(tiles[mask])
        return encoded.new_zeros(*mask.shape, self.embedding_dim).masked_scatter(mask[..., None], encoded)

    def _check_width(self, instances: Tensor) -> None:
        if instances.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"instances have {instances.shape[-1]} features, the network was built for {self.embedding_dim};"
                " use features of the same encoder, or train anew"
            )


class AttentionMIL(DeepMIL):
    """`DeepMIL` by attention, over vectors of 512 numbers by default, such as a ResNet-18 makes of tiles.

    Of the chapter's result, `attention_weights` is `Output.attention`.
    """

    def __init__(self, num_classes: int = 2, channels: int = 512, config: MILConfig | None = None) -> None:
        config = config or MILConfig(pooling="attention")
        if config.pooling not in ("attention", "gated_attention"):
            raise ValueError(f"pooling {config.pooling}: AttentionMIL pools by attention; use DeepMIL")
        super().__init__(num_classes, channels, config)


class _Encoder(nn.Module):
    def __init__(self, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim

    def forward(self, tiles: Tensor) -> Tensor:
        features: Tensor = self.backbone.extract_features(tiles)  # type: ignore[operator]
        return features.mean((2, 3))


def _build_encoder(channels: int, config: EncoderConfig) -> _Encoder:
    from cadx.models.backbones import ResNetBackbone

    backbone = ResNetBackbone(channels, config)
    encoder = _Encoder(backbone, backbone.feature_dim)
    return encoder.requires_grad_(not config.frozen)


class _MeanPooling(nn.Module):
    """Equal shares; as the classifier is linear, the mean of features and of instances' logits are one."""

    def __init__(self, num_classes: int, hidden_dim: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(hidden_dim, num_classes)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Output:
        attention = self.shares(embeddings, mask)
        # In float32 under mixed precision: bfloat16 has 8 bits for a sum over all instances.
        features = (embeddings * attention[..., None]).sum(1)
        return Output(self.classifier(features).float(), attention, features)

    def shares(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        return mask / mask.sum(1, keepdim=True)


class _AttentionPooling(_MeanPooling):
    def __init__(self, num_classes: int, hidden_dim: int, attention_dim: int, *, gated: bool) -> None:
        super().__init__(num_classes, hidden_dim)
        self.values = nn.Linear(hidden_dim, attention_dim)
        self.gates = nn.Linear(hidden_dim, attention_dim) if gated else None
        # Without a bias: softmax does not see one. Zero: training starts from the mean.
        self.scores = nn.Linear(attention_dim, 1, bias=False)
        nn.init.zeros_(self.scores.weight)

    def shares(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.values(embeddings))
        if self.gates is not None:
            hidden = hidden * torch.sigmoid(self.gates(embeddings))
        scores = self.scores(hidden).squeeze(-1).float()
        return scores.masked_fill(~mask, -math.inf).softmax(1)


class _MaxPooling(_MeanPooling):
    def __init__(self, num_classes: int, hidden_dim: int, negative_class: int | None) -> None:
        super().__init__(num_classes, hidden_dim)
        self._found = [k for k in range(num_classes) if k != negative_class]

    def forward(self, embeddings: Tensor, mask: Tensor) -> Output:
        scores = self.classifier(embeddings).float()[..., self._found]
        scores = scores.masked_fill(~mask[..., None], -math.inf)
        largest, places = scores.max(1)
        attention = scores.new_zeros(mask.shape)
        attention.scatter_add_(1, places, torch.full_like(largest, 1 / len(self._found)))
        logits = largest.new_zeros(len(mask), self.classifier.out_features)
        logits[:, self._found] = largest
        return Output(logits, attention, (embeddings * attention[..., None]).sum(1))


class _TransformerPooling(_MeanPooling):
    def __init__(self, num_classes: int, hidden_dim: int, dropout: float) -> None:
        super().__init__(num_classes, hidden_dim)
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, hidden_dim), std=0.02))
        self.norm = nn.LayerNorm(hidden_dim)
        self.blocks = nn.ModuleList(_ClassAttention(hidden_dim, dropout) for _ in range(_NUM_BLOCKS))
        self.last_norm = nn.LayerNorm(hidden_dim)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Output:
        token = self.token.expand(len(mask), -1, -1)
        instances = self.norm(embeddings)
        readings = []
        for block in self.blocks:
            token, weights = block(token, instances, mask)
            readings.append(weights.float())
        features = self.last_norm(token).squeeze(1).float()
        return Output(self.classifier(features).float(), torch.stack(readings).mean(0), features)


class _ClassAttention(nn.Module):
    """One query for the whole bag: its weights are one row for each head, not T x T."""

    def __init__(self, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(hidden_dim)
        # Without dropout, which would show shares that do not sum to 1.
        self.attention = nn.MultiheadAttention(hidden_dim, NUM_HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden_dim),
            nn.Linear(hidden_dim, 2 * hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * hidden_dim, hidden_dim),
        )

    def forward(self, token: Tensor, instances: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        read, weights = self.attention(self.token_norm(token), instances, instances, key_padding_mask=~mask)
        token = token + read
        return token + self.mlp(token), weights.squeeze(1)


def _build_pooling(num_classes: int, config: MILConfig) -> _MeanPooling:
    match config.pooling:
        case "mean":
            return _MeanPooling(num_classes, config.hidden_dim)
        case "max":
            return _MaxPooling(num_classes, config.hidden_dim, config.negative_class)
        case "transformer":
            return _TransformerPooling(num_classes, config.hidden_dim, config.dropout)
        case "attention" | "gated_attention":
            gated = config.pooling == "gated_attention"
            return _AttentionPooling(num_classes, config.hidden_dim, config.attention_dim, gated=gated)
