"""Classifiers of bags: masks, shares, inputs, encoders; what each pooling may learn; the chapter's faults."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from pydantic import ValidationError
from torch import Tensor

from cadx.metrics import auc
from cadx.models import slide
from cadx.models.checkpointing import enable_checkpointing
from cadx.models.slide import AttentionMIL, DeepMIL, EncoderConfig, MILConfig, Pooling

POOLINGS: tuple[Pooling, ...] = ("attention", "gated_attention", "max", "mean", "transformer")
DIM = 6
LENGTHS = (7, 3, 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network(pooling: Pooling, **fields: object) -> DeepMIL:
    """A small one, off its initial equal shares; the same for each call."""
    torch.manual_seed(0)
    made = MILConfig(pooling=pooling, hidden_dim=16, attention_dim=8, **fields).build(3, DIM)  # type: ignore[arg-type]
    for name, parameter in made.named_parameters():
        if "scores" in name or "token" in name:
            torch.nn.init.normal_(parameter, std=2)
    return made.eval()


@pytest.fixture
def bags() -> list[Tensor]:
    return [torch.randn(length, DIM) for length in LENGTHS]


def padded(bags: list[Tensor], fill: float = 0.0, length: int | None = None) -> tuple[Tensor, Tensor]:
    length = length or max(map(len, bags))
    instances = torch.full((len(bags), length, *bags[0].shape[1:]), fill)
    mask = torch.zeros(len(bags), length, dtype=torch.bool)
    for row, bag in enumerate(bags):
        instances[row, : len(bag)] = bag
        mask[row, : len(bag)] = True
    return instances, mask


# Masks and shares


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("fill", [0.0, 1e6, math.nan])
def test_a_bag_answers_the_same_alone_and_padded_with_anything(
    pooling: Pooling, fill: float, bags: list[Tensor]
) -> None:
    model = network(pooling)
    instances, mask = padded(bags, fill, length=11)
    together = model(instances, mask)
    for row, bag in enumerate(bags):
        alone = model(*padded([bag]))
        for ours, theirs in (
            (together.logits[row], alone.logits[0]),
            (together.features[row], alone.features[0]),
            (together.attention[row, : len(bag)], alone.attention[0]),
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert together.attention[row, len(bag) :].eq(0).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_gradient_ignores_the_padding_too(pooling: Pooling, bags: list[Tensor]) -> None:
    weight = {"entropy_weight": 0.5} if pooling not in ("max", "mean") else {}
    gradients = []
    for fill, length in ((0.0, 7), (math.nan, 12)):
        model = network(pooling, **weight)
        instances, mask = padded(bags, fill, length)
        output = model(instances, mask)
        (output.logits.square().sum() + model.regularisation(output, mask)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_order_of_instances_means_nothing(pooling: Pooling, bags: list[Tensor]) -> None:
    model, order = network(pooling), torch.randperm(LENGTHS[0])
    first, second = model(*padded(bags[:1])), model(*padded([bags[0][order]]))
    torch.testing.assert_close(first.logits, second.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.attention[:, order], second.attention, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_shares_sum_to_one_and_all_is_float32(
    pooling: Pooling, precision: torch.dtype, bags: list[Tensor]
) -> None:
    model, (instances, mask) = network(pooling).train(), padded(bags)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        output = model(instances, mask)
    assert {part.dtype for part in output} == {torch.float32}
    assert (output.logits.shape, output.attention.shape, output.features.shape) == ((3, 3), (3, 7), (3, 16))
    tolerance = 1e-5 if precision == torch.float32 else 1e-2
    torch.testing.assert_close(output.attention.sum(1), torch.ones(3), rtol=0, atol=tolerance)


@pytest.mark.parametrize("pooling", ["attention", "gated_attention"])
def test_attention_follows_the_papers_equations(pooling: Pooling, bags: list[Tensor]) -> None:
    model = network(pooling)
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    output = model(*padded(bags))
    for row, bag in enumerate(bags):
        weight, bias = state["embedding.0.weight"], state["embedding.0.bias"]
        h = np.maximum(bag.double().numpy() @ weight.T + bias, 0)
        hidden = np.tanh(h @ state["pooling.values.weight"].T + state["pooling.values.bias"])
        if pooling == "gated_attention":
            gates = h @ state["pooling.gates.weight"].T + state["pooling.gates.bias"]
            hidden = hidden / (1 + np.exp(-gates))
        scores = np.exp(hidden @ state["pooling.scores.weight"][0])
        shares = scores / scores.sum()
        np.testing.assert_allclose(output.attention[row, : len(bag)].detach(), shares, atol=1e-5)
        logits = shares @ h @ state["pooling.classifier.weight"].T + state["pooling.classifier.bias"]
        np.testing.assert_allclose(output.logits[row].detach(), logits, atol=1e-4)


def test_max_takes_each_class_from_the_instance_that_is_most_for_it(bags: list[Tensor]) -> None:
    model = network("max")
    single, mask = padded([row[None] for row in bags[0]])
    each = model(single, mask).logits
    output = model(*padded(bags[:1]))
    torch.testing.assert_close(output.logits[0], each.amax(0))
    expected = F.one_hot(each.argmax(0), len(each)).float().mean(0)
    torch.testing.assert_close(output.attention[0], expected)


def test_mean_of_features_is_mean_of_instances_logits(bags: list[Tensor]) -> None:
    model = network("mean")
    each = model(*padded([row[None] for row in bags[0]])).logits
    torch.testing.assert_close(model(*padded(bags[:1])).logits[0], each.mean(0))


def test_attention_starts_from_equal_shares(bags: list[Tensor]) -> None:
    model = MILConfig().build(2, DIM)
    torch.testing.assert_close(model(*padded(bags[:1])).attention, torch.full((1, 7), 1 / 7))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_memory_grows_with_the_tiles_not_with_their_square(pooling: Pooling) -> None:
    """10,000 tiles: one square of float32 would be 400 MB, the largest tensor kept is the embeddings'."""
    kept = []
    model = MILConfig(pooling=pooling, hidden_dim=16, attention_dim=8).build(2, DIM)
    instances = torch.randn(1, 10_000, DIM)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        model(instances, torch.ones(1, 10_000, dtype=torch.bool)).logits.sum().backward()
    assert max(kept) <= 10_000 * 2 * 16


# Inputs and the loss


def test_inputs_are_standardised_by_the_training_sets_moments() -> None:
    model = network("mean")
    bags = [torch.randn(length, DIM) * 50 + 1e4 for length in (5, 1, 400)]
    for bag in bags:
        bag[:, 2] = 0.1
    instances, mask = padded(bags)
    torch.testing.assert_close(  # identity until fitted
        model(instances, mask), model.pooling(model.embedding(instances), mask)
    )
    model.fit_inputs(bag for bag in bags)  # a generator: one pass
    joined = torch.cat(bags).double()
    std = joined.std(0, correction=0)
    std[2] = 1
    torch.testing.assert_close(model.input_mean, joined.mean(0).float())
    torch.testing.assert_close(model.input_std, std.float())
    fresh = network("mean")
    fresh.load_state_dict(model.state_dict())
    whitened = [((bag.double() - joined.mean(0)) / std).float() for bag in bags]
    plain = network("mean")
    plain.load_state_dict(
        {**model.state_dict(), "input_mean": torch.zeros(DIM), "input_std": torch.ones(DIM)}
    )
    torch.testing.assert_close(
        fresh(*padded(bags)).logits, plain(*padded(whitened)).logits, rtol=1e-3, atol=1e-3
    )


def test_instances_of_another_width_or_none_are_refused_in_one_line() -> None:
    model = network("mean")
    for call in (
        lambda: model(torch.zeros(1, 2, DIM + 1), torch.ones(1, 2, dtype=torch.bool)),
        lambda: model.fit_inputs([torch.zeros(2, DIM - 1)]),
        lambda: model.fit_inputs([]),
        lambda: model(torch.zeros(1, 2, 3, 8, 8), torch.ones(1, 2, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]+;[^\n]+$"):
            call()


def test_regularisation_is_minus_the_share_of_the_largest_entropy(bags: list[Tensor]) -> None:
    model, (instances, mask) = network("attention"), padded(bags)
    uniform = model.regularisation(network("mean")(instances, mask), mask)
    torch.testing.assert_close(uniform, torch.tensor(-2 / 3))  # a bag of one has no entropy
    output = model(instances, mask)
    expected = []
    for row, length in enumerate(LENGTHS):
        p = output.attention[row, :length].double()
        expected.append(-(p * p.log()).sum().item() / math.log(max(2, length)))
    torch.testing.assert_close(model.regularisation(output, mask).item(), -float(np.mean(expected)))


def test_entropy_weight_spreads_attention(bags: list[Tensor]) -> None:
    model, (instances, mask) = network("attention"), padded(bags)
    torch.nn.init.normal_(model.pooling.scores.weight, std=5)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    history = []
    for _ in range(100):
        loss = model.regularisation(model(instances, mask), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] > -0.4
    assert history[-1] < -0.6


def test_shares_that_underflow_leave_the_gradient_finite(bags: list[Tensor]) -> None:
    model, (instances, mask) = network("attention"), padded(bags)
    torch.nn.init.normal_(model.pooling.scores.weight, std=200)
    output = model(instances, mask)
    assert output.attention[mask].eq(0).any()
    model.regularisation(output, mask).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_fields_that_mean_nothing_together_are_refused() -> None:
    for fields in (
        {"pooling": "mean", "entropy_weight": 0.1},
        {"pooling": "attention", "negative_class": 0},
        {"pooling": "transformer", "hidden_dim": 30},
    ):
        with pytest.raises(ValidationError, match=r"; set|needs a multiple"):
            MILConfig.model_validate(fields)
    with pytest.raises(ValueError, match=r"negative_class 3: there are 3 classes"):
        MILConfig(pooling="max", negative_class=3).build(3, DIM)
    config = MILConfig(encoder=EncoderConfig(pretrained="torchvision:IMAGENET1K_V1"))  # type: ignore[arg-type]
    assert MILConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_batch_can_be_learned_by_heart(pooling: Pooling) -> None:
    """One instance of each of three bags is moved: every pooling can tell them apart."""
    made = [torch.randn(length, DIM) for length in (5, 9, 4, 6, 7, 3)]
    classes = torch.arange(6) % 3
    for bag, number in zip(made, classes.tolist(), strict=True):
        bag[1, number] += 4
    instances, mask = padded(made)
    model = MILConfig(pooling=pooling, hidden_dim=32, attention_dim=16, dropout=0).build(3, DIM)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(instances, mask).logits, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("pooling", POOLINGS)
def test_checkpointing_gives_the_same_gradients(pooling: Pooling, bags: list[Tensor]) -> None:
    plain = network(pooling).train()
    recomputed = copy.deepcopy(plain)
    enable_checkpointing(recomputed)
    instances, mask = padded(bags)
    for model in (plain, recomputed):
        torch.manual_seed(1)  # the same dropout
        model(instances, mask).logits.square().sum().backward()
    for ours, theirs in zip(recomputed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


# Encoders


def small_encoder(**fields: object) -> EncoderConfig:
    return EncoderConfig(width=0.125, stem="small", **fields)  # type: ignore[arg-type]


def tile_network(**fields: object) -> DeepMIL:
    return MILConfig(hidden_dim=16, attention_dim=8, dropout=0, encoder=small_encoder(**fields)).build(2, 3)


def test_tiles_and_their_embeddings_give_the_same_answer() -> None:
    model = tile_network(chunk_tiles=2).eval()
    tiles, mask = padded([torch.randn(length, 3, 16, 16) for length in (3, 2)], fill=math.nan)
    embeddings = torch.full((2, 3, model.embedding_dim), math.nan)
    embeddings[mask] = model.encode(tiles[mask])
    for ours, theirs in zip(model(tiles, mask), model(embeddings, mask), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_encoder_is_torchvisions_network_of_the_given_weights(tmp_path: object) -> None:
    reference = torchvision.models.resnet18(weights=None).eval()
    path = f"{tmp_path}/encoder.safetensors"
    safetensors.torch.save_file(reference.state_dict(), path)
    model = MILConfig(encoder=EncoderConfig(pretrained=path)).build(2, 3)  # type: ignore[arg-type]
    reference.fc = torch.nn.Identity()
    tiles = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(model.encode(tiles), reference(tiles), rtol=1e-4, atol=1e-5)


def test_a_frozen_encoder_stays_as_it_is() -> None:
    model = tile_network().train()
    state = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    tiles, mask = padded([torch.randn(length, 3, 16, 16) for length in (3, 2)])
    model(tiles, mask).logits.square().sum().backward()
    optimizer.step()
    assert not model.encode(tiles[mask]).requires_grad
    assert not model.encoder.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.encoder.state_dict().items())
    assert all(p.grad is None for p in model.encoder.parameters())


def test_an_encoder_that_is_not_frozen_learns_from_all_chunks() -> None:
    gradients = []
    tiles, mask = padded([torch.randn(length, 3, 16, 16) for length in (3, 2)])
    for chunk_tiles, checkpointing in ((64, False), (2, False), (2, True)):
        torch.manual_seed(0)
        model = tile_network(frozen=False, norm="group", chunk_tiles=chunk_tiles).train()
        if checkpointing:
            enable_checkpointing(model)
        model(tiles, mask).logits.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0]["encoder.backbone.conv1.weight"].abs().max() > 0
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5)


def test_chunks_that_are_recomputed_leave_the_running_statistics_of_those_that_are_not() -> None:
    """The encoder is one stage that is called for each chunk: each counts once, in its order."""
    tiles, mask = padded([torch.randn(length, 3, 16, 16) for length in (5, 3)])
    plain = tile_network(frozen=False, norm="batch", chunk_tiles=3).train()
    recomputed = copy.deepcopy(plain)
    enable_checkpointing(recomputed)
    for model in (plain, recomputed):
        model(tiles, mask).logits.square().sum().backward()
    assert plain.encoder.backbone.bn1.num_batches_tracked == 3
    for (name, ours), theirs in zip(recomputed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    for ours, theirs in zip(recomputed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


# Faults of the chapter's sketches


def test_instances_are_embedded_not_flattened_raw_pixels() -> None:
    """The sketch's first layer took 256 * 256 * 3 pixels: it fits no other tile, and has 100 million weights."""
    config = MILConfig(pooling="attention", encoder=small_encoder())
    model = AttentionMIL(2, 3, config).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    mask = torch.ones(1, 2, dtype=torch.bool)
    for side_px in (16, 24):
        assert model(torch.randn(1, 2, 3, side_px, side_px), mask).logits.shape == (1, 2)
    # A pixel more to the right is no other picture: flattened, it would be.
    spot = torch.zeros(1, 1, 3, 64, 64)
    spot[..., 24:28, 24:28] = 5
    moved = model.encode(spot.roll(8, -1)[0]) - model.encode(spot[0])
    assert moved.norm() < 0.05 * model.encode(spot[0]).norm()
    assert AttentionMIL()(torch.randn(1, 4, 512), torch.ones(1, 4, dtype=torch.bool)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="use DeepMIL"):
        AttentionMIL(config=MILConfig(pooling="max"))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_takes_the_embeddings_themselves(pooling: Pooling, bags: list[Tensor]) -> None:
    """The sketch passed a dictionary to a module of tensors, and 5-D tensors to 2D max and mean: it raised."""
    output = network(pooling)(*padded(bags))
    assert output.logits.shape == (3, 3)
    assert output.logits.isfinite().all()
    assert not torch.allclose(output.logits[0], output.logits[1])


# The algorithmic unit tests of Raff and Holt 2023

BagMaker = Callable[[np.random.Generator, bool, bool], list[np.ndarray]]
CONCEPT_DIM = 16
MARKER = -10.0


def normal(rng: np.random.Generator, number: int, mean: float, std: float) -> np.ndarray:
    return rng.normal(mean, std, (number, CONCEPT_DIM))


def single_concept(rng: np.random.Generator, positive: bool, test: bool) -> list[np.ndarray]:
    parts = [normal(rng, 10, 0, 1)]
    if positive:
        parts.append(normal(rng, rng.integers(1, 4), 0, 3))
    if positive == test:
        parts.append(normal(rng, 1, MARKER, 0.1))
    return parts


def two_concepts(rng: np.random.Generator, positive: bool, test: bool) -> list[np.ndarray]:
    parts = [normal(rng, rng.integers(1, 10), 0, 1)]
    kinds = (2, 3) if positive else (rng.choice((2, 3)),)
    parts += [normal(rng, rng.integers(1, 4), kind, 0.1) for kind in kinds]
    if positive == test:
        parts.append(normal(rng, 1, MARKER, 0.1))
    return parts


def false_frequency(rng: np.random.Generator, positive: bool, test: bool) -> list[np.ndarray]:
    parts = [normal(rng, rng.integers(1, 10), 0, 1)]
    for kind in (2, 3) if positive else (rng.choice((2, 3)),):
        number = rng.integers(35, 45) if test and not positive else rng.integers(1, 3)
        parts.append(normal(rng, number, kind, 0.1))
    return parts


UNIT_TESTS: dict[str, tuple[BagMaker, int]] = {
    "single concept": (single_concept, 150),
    "two concepts": (two_concepts, 150),
    "false frequency": (false_frequency, 500),
}
"""Name in the table -> how a bag is drawn, and steps of training."""


def draw(make: BagMaker, number: int, *, test: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    made = [np.concatenate(make(rng, bool(index % 2), test)) for index in range(number)]
    return *padded([torch.from_numpy(bag).float() for bag in made]), torch.arange(number) % 2


def verdict(pooling: Pooling, make: BagMaker, steps: int) -> str:
    negative_class = 0 if pooling == "max" else None
    config = MILConfig(
        pooling=pooling, hidden_dim=64, attention_dim=32, dropout=0, negative_class=negative_class
    )
    model = config.build(2, CONCEPT_DIM)
    instances, mask, classes = draw(make, 500, test=False, seed=0)
    model.fit_inputs([instances[mask]])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        batch = torch.randperm(len(classes))[:64]
        loss = F.cross_entropy(model(instances[batch], mask[batch]).logits, classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = []
    for test in (False, True):
        instances, mask, classes = draw(make, 200, test=test, seed=1)
        with torch.no_grad():
            logits = model.eval()(instances, mask).logits
        value = auc(classes.double().numpy(), (logits[:, 1] - logits[:, 0]).numpy()).value
        assert value is not None
        values.append(value)
    like_training, in_test = values
    return "unlearned" if like_training < 0.9 else "holds" if in_test >= 0.9 else "misled"


def documented() -> dict[tuple[str, str], str]:
    """(pooling, unit test) -> verdict, from the table in the module's own words."""
    assert slide.__doc__ is not None
    rows = [line.strip("| ").split(" | ") for line in slide.__doc__.splitlines() if line.startswith("| ")]
    (_, *names), *body = rows
    return {(row[0], name): cell for row in body for name, cell in zip(names, row[1:], strict=True)}


def test_the_table_is_complete() -> None:
    assert set(documented()) == {(pooling, name) for pooling in POOLINGS for name in UNIT_TESTS}


@pytest.mark.parametrize("name", UNIT_TESTS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_a_pooling_may_learn_is_as_documented(pooling: Pooling, name: str) -> None:
    assert verdict(pooling, *UNIT_TESTS[name]) == documented()[pooling, name]


@pytest.mark.parametrize("negative_class", [0, None])
def test_with_a_negative_class_no_instance_speaks_for_negative(negative_class: int | None) -> None:
    """The structure behind the table: without one, an instance more can lower the positive's probability."""
    model = MILConfig(pooling="max", negative_class=negative_class, hidden_dim=16).build(2, DIM).eval()
    lowered = 0
    for _ in range(100):
        bag = torch.randn(5, DIM)
        fewer, more = (model(*padded([part])).logits.softmax(1)[0, 1] for part in (bag[:4], bag))
        lowered += int(more < fewer - 1e-6)
    assert lowered == 0 if negative_class == 0 else lowered > 5
