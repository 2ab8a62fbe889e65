"""Why an answer: maps of a few cases, how faithful each is, and whether it depends on what the network has learnt.

    attention   the weights by which the prediction pools
    Grad-CAM    relu(sum_c a_c A_c) over the channels A_c of the last feature map, where a_c is the mean slope of the
                class's log-odds in A_c (Selvaraju et al. 2017, "Grad-CAM", eq. 1-2; in 3D the mean is over D H W)

A map is judged by what the network itself says when the places that it names are taken away, or brought in, first
(Petsiuk, Das and Saenko 2018, "RISE", section 4.1): the area under the probability of the class over the share of
places. Deletion: the lower the better; insertion: the higher the better. A place of an image or a volume is taken away
by giving it the median of the network's input. (Theirs is blurred for insertion: a nodule that fills half of a window
outlasts a blur, and both areas are 1.) A tile of a slide is taken out of its bag. Beside each map stands a control: the
same map moved by half of the picture. A map that does no better than its control says nothing of the place.

The second check is whether a map changes when every weight is drawn anew (Adebayo et al. 2018, "Sanity checks for
saliency maps": all layers at once, the encoder of a slide's tiles among them, frozen or not): one that stays the same
shows the picture's edges and not what was learnt.

A volume is looked at in the window that decides, the one in which the class is likeliest, and of its mirror images
(`VolumePreprocessing.mirrors`) only as it lies.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cadx import calibration
from cadx.datasets import DatasetFolder
from cadx.explaining import overlay, visualize_attention_map
from cadx.loading import TilePreprocessing, VolumePreprocessing
from cadx.loading.volumes import GridPatches
from cadx.models import Output
from cadx.models.head import AttentionPoolingClassifier
from cadx.models.radiograph import RadiographConfig
from cadx.models.volume import VolumeConfig
from cadx.predicting.bags import SlideTiles, embed_tiles
from cadx.predicting.predictor import Predictor, pool_logits
from cadx.predicting.table import Arrays, PredictionsInfo
from cadx.reporting import Page
from cadx.transforms import Cells, Preprocessing

FloatArray = NDArray[np.float64]

STEPS = 8
"""Parts in which places are taken away or brought in."""
CASES = 2
"""Cases of each kind, hits, misses and false alarms, that are explained."""
CONTROL = "the first map, moved by half of the picture"
_WINDOWS_AT_ONCE = 8


class Case(NamedTuple):
    """An answer about one class, and how it turned out: found, missed or false alarm."""

    sample_id: str
    name: str
    outcome: str
    probability: float


class Map(NamedTuple):
    """One map of a case.

    Attributes:
        method: attention or Grad-CAM; `CONTROL` for the control.
        deletion: area, 0..1, the lower the better.
        insertion: area, 0..1, the higher the better.
        when_random: rank correlation with the map of the same network with random weights; None for the control.
    """

    method: str
    deletion: float
    insertion: float
    when_random: float | None = None


class Explanation(NamedTuple):
    """A case, its maps with the control as the last one, and a picture: the sample, then the sample under each map."""

    case: Case
    maps: tuple[Map, ...]
    picture: np.ndarray


def deletion_and_insertion(
    importance: np.ndarray, ask: Callable[[np.ndarray], FloatArray], steps: int = STEPS
) -> tuple[float, float]:
    """The areas under the probability while the most important places are taken away, and while they are brought in.

    Args:
        importance: P, of each place; of equal ones the first goes first.
        ask: from which places are shown, S P bool, to S probabilities.
        steps: how many equal parts the places go in; trapezoids between.

    >>> weights = np.array([0.1, 0.6, 0.3])
    >>> areas = deletion_and_insertion(weights, lambda shown: shown @ weights, steps=3)
    >>> [round(area, 3) for area in areas]
    [0.333, 0.667]
    """
    rank = np.empty(len(importance), dtype=np.intp)
    rank[np.argsort(-importance, kind="stable")] = np.arange(len(importance))
    gone = np.round(np.linspace(0, len(importance), steps + 1)).astype(np.intp)[:, None]
    # All of them and none of them are asked about once.
    said = ask(np.concatenate([rank >= gone, rank < gone[1:-1]]))
    deletion = said[: steps + 1]
    insertion = np.concatenate([deletion[-1:], said[steps + 1 :], deletion[:1]])
    share = gone[:, 0] / len(importance)
    return float(np.trapezoid(deletion, share)), float(np.trapezoid(insertion, share))


def grad_cam(network: AttentionPoolingClassifier, inputs: Tensor, column: int) -> Tensor:
    """Grad-CAM of one class, N h w for images, N d h w for volumes, 0 or more.

    The slope is that of the class's log-odds: of its logit against all others in tasks with one class, of its logit
    alone where there is but one or each class stands for itself (`column` of a sigmoid's logits is its log-odds).

    Args:
        network: any classifier of images or volumes.
        inputs: N C H W or N C D H W.
        column: of the class.
    """
    with torch.enable_grad(), _recorded_features(network) as recorded:
        logits = network(inputs).logits
        others = [other for other in range(logits.shape[1]) if other != column]
        odds = logits[:, column] - (logits[:, others].logsumexp(1) if others else 0)
        (features,) = recorded
        (slopes,) = torch.autograd.grad(odds.sum(), features)
    places = tuple(range(2, features.ndim))
    weighted = (slopes.mean(places, keepdim=True) * features).sum(1)
    return weighted.detach().clamp_min(0)


@contextmanager
def _recorded_features(network: AttentionPoolingClassifier) -> Iterator[list[Tensor]]:
    """The last feature maps of what the network is asked inside the block, each a leaf that slopes are taken in."""
    recorded: list[Tensor] = []
    extract = network.backbone.extract_features

    def extract_and_keep(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            recorded.append(extract(inputs).requires_grad_())
        return recorded[-1]

    network.backbone.extract_features = extract_and_keep  # type: ignore[method-assign]
    try:
        yield recorded
    finally:
        del network.backbone.extract_features


def with_random_weights(network: nn.Module, seed: int) -> nn.Module:
    """A copy in which every weight is drawn anew, a frozen encoder's too; normalisations forget what they counted.

    Layers are drawn as before training; what stands in no such layer (a class token, a scale) from a normal
    distribution of the spread that it has.
    """
    fresh = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in fresh.modules():
            draw = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            if callable(draw):
                draw()
                continue
            for parameter in module.parameters(recurse=False):
                parameter.normal_(std=float(parameter.square().mean().sqrt()))
    return fresh.eval()


class _Probe(ABC):
    """One sample before a bundle's networks: maps over its places, and what they say when only some are shown."""

    def __init__(self, predictor: Predictor, random: Sequence[nn.Module], column: int) -> None:
        self.manifest = predictor.bundle.manifest
        self.networks, self.random = predictor.networks, random
        self.column = column

    @abstractmethod
    def maps(self, networks: Sequence[nn.Module]) -> dict[str, np.ndarray]:
        """Method -> its map on the networks' own grid, the mean over the networks."""

    @abstractmethod
    def over_places(self, grid: np.ndarray) -> np.ndarray:
        """A map over the places that are shown or not."""

    @abstractmethod
    def logits(self, network: nn.Module, shown: np.ndarray) -> Tensor:
        """S K, when only the places of each row are shown, S ... bool."""

    @abstractmethod
    def draw(self, grids: Sequence[np.ndarray]) -> np.ndarray:
        """The sample, and to its right the sample under each map."""

    def ask(self, shown: np.ndarray) -> FloatArray:
        """The class's probability, S; without an isotonic curve, whose steps would hide small changes."""
        with torch.inference_mode():
            said = torch.stack([self.logits(network, shown).double().cpu() for network in self.networks])
        logits = pool_logits(said, self.manifest.task).numpy()
        assert self.manifest.temperature is not None, "evaluation asks for complete bundles"
        p = calibration.apply(logits, self.manifest.temperature, self.manifest.task, self.manifest.bias)
        return np.asarray(p[:, self.column], dtype=np.float64)


class _Places(_Probe):
    """An image, or the window of a volume that decides; a place is a pixel or voxel of the network's input."""

    def __init__(
        self,
        predictor: Predictor,
        random: Sequence[nn.Module],
        column: int,
        inputs: Tensor,
        cells: Sequence[Cells],
        picture: np.ndarray,
    ) -> None:
        super().__init__(predictor, random, column)
        self.device = next(self.networks[0].parameters()).device
        self.inputs, self.cells, self.picture = inputs, cells, picture
        self.background = inputs.median()

    def maps(self, networks: Sequence[nn.Module]) -> dict[str, np.ndarray]:
        batch = self.inputs[None].to(self.device)
        with torch.inference_mode():
            attention = [network(batch).attention[0] for network in networks]
        cams = [grad_cam(network, batch, self.column)[0] for network in networks]  # type: ignore[arg-type]
        return {
            "attention": torch.stack(attention).mean(0).cpu().numpy(),
            "Grad-CAM": torch.stack(cams).mean(0).cpu().numpy(),
        }

    def over_places(self, grid: np.ndarray) -> np.ndarray:
        # Linear between the cells' centres, and held beyond the outermost.
        axes = [
            (np.arange(side) + 0.5 - cell.first_centre_px) / cell.stride_px
            for side, cell in zip(self.inputs.shape[1:], self.cells, strict=True)
        ]
        places = np.meshgrid(*axes, indexing="ij")
        spread: np.ndarray = scipy.ndimage.map_coordinates(
            grid.astype(np.float64), places, order=1, mode="nearest"
        )
        return spread

    def logits(self, network: nn.Module, shown: np.ndarray) -> Tensor:
        masks = torch.from_numpy(shown).view(-1, 1, *self.inputs.shape[1:])
        parts = torch.split(masks, _WINDOWS_AT_ONCE)
        hidden = (torch.where(part, self.inputs, self.background).to(self.device) for part in parts)
        return torch.cat([network(part).logits for part in hidden])

    def draw(self, grids: Sequence[np.ndarray]) -> np.ndarray:
        if self.inputs.ndim == 3:
            preprocessing = self.manifest.preprocessing
            assert isinstance(preprocessing, Preprocessing)
            height_px, width_px = self.picture.shape[:2]
            plane = self.picture
            drawn = [preprocessing.to_raw(grid, height_px, width_px, self.cells[0]) for grid in grids]
        else:
            volumes = [self.over_places(grid) for grid in grids]
            # The slice where the first map is largest, as radiologists look at it.
            depth = int(np.unravel_index(volumes[0].argmax(), volumes[0].shape)[0])
            drawn = [volume[depth, ::-1, ::-1] for volume in volumes]
            plane = _as_picture(self.inputs[0].numpy())[depth, ::-1, ::-1]
        nothing = np.zeros(plane.shape[:2])
        return np.concatenate([overlay(plane, one) for one in (nothing, *drawn)], axis=1)


class _Bag(_Probe):
    """A slide's tiles; a place is a tile. Each encoder is asked once, and the tiles are read once for all of them."""

    def __init__(
        self,
        predictor: Predictor,
        random: Sequence[nn.Module],
        column: int,
        tiles: SlideTiles,
        thumbnail: np.ndarray,
        spacing_um: tuple[float, float],
    ) -> None:
        super().__init__(predictor, random, column)
        made = self.manifest.preprocessing
        assert isinstance(made, TilePreprocessing)
        self.thumbnail, self.spacing_um, self.tile_um = thumbnail, spacing_um, made.tile_px * made.mpp
        device = next(self.networks[0].parameters()).device
        networks = [*self.networks, *random]

        def encode(tiles: Tensor) -> Tensor:
            return torch.cat([network.encode(tiles).float() for network in networks], dim=1)  # type: ignore[operator]

        with torch.inference_mode():
            embeddings, positions_um = embed_tiles(encode, tiles.stream, device)
        self.embeddings = dict(zip(networks, embeddings.chunk(len(networks), dim=1), strict=True))
        for network in random:
            # The moments that training found are those of the encoder that it had.
            network.fit_inputs([self.embeddings[network]])  # type: ignore[operator]
        self.positions_um = positions_um.numpy()

    def maps(self, networks: Sequence[nn.Module]) -> dict[str, np.ndarray]:
        shown = np.ones((1, len(self.positions_um)), dtype=bool)
        with torch.inference_mode():
            attention = [
                self._answer(network, self.embeddings[network], shown).attention[0] for network in networks
            ]
        return {"attention": torch.stack(attention).mean(0).cpu().numpy()}

    def over_places(self, grid: np.ndarray) -> np.ndarray:
        return grid

    def logits(self, network: nn.Module, shown: np.ndarray) -> Tensor:
        # A bag has at least one tile: where none is left, the first one stays.
        shown = shown.copy()
        shown[~shown.any(1), 0] = True
        said = [self._answer(network, self.embeddings[network], row[None]).logits for row in shown]
        return torch.cat(said)

    def draw(self, grids: Sequence[np.ndarray]) -> np.ndarray:
        drawn = [
            visualize_attention_map(
                self.thumbnail,
                grid / grid.max(),
                self.positions_um,
                tile_um=self.tile_um,
                spacing_um=self.spacing_um,
            )
            for grid in grids
        ]
        plain = overlay(self.thumbnail, np.zeros(self.thumbnail.shape[:2]))
        return np.concatenate([plain, *drawn], axis=1)

    def _answer(self, network: nn.Module, embeddings: Tensor, shown: np.ndarray) -> Output:
        mask = torch.from_numpy(shown).to(embeddings.device)
        answer: Output = network(embeddings[None], mask)
        return answer


def explain(
    predictor: Predictor, folder: DatasetFolder, cases: Sequence[Case], *, steps: int = STEPS
) -> list[Explanation]:
    """The maps of some cases; none of bags of features, which no picture shows.

    Args:
        predictor: with a complete bundle of labels.
        folder: where the cases stand.
        cases: few: each costs about 50 answers of its window or image.
        steps: of `deletion_and_insertion`.
    """
    manifest = predictor.bundle.manifest
    if folder.info.kind == "features":
        return []
    random = [with_random_weights(network, manifest.seed) for network in predictor.networks]
    found = []
    for case in cases:
        probe = _probe(predictor, random, folder, case.sample_id, manifest.classes.index(case.name))
        # Where nothing is preferred, or no slope is left, there is no map: equal pooling, a bag of one tile.
        grids = {name: grid for name, grid in probe.maps(probe.networks).items() if np.ptp(grid) > 0}
        if not grids:
            continue
        others = probe.maps(probe.random)
        maps = []
        for method, grid in grids.items():
            places = probe.over_places(grid)
            areas = deletion_and_insertion(places.ravel(), probe.ask, steps)
            maps.append(Map(method, *areas, when_random=_rank_correlation(grid, others[method])))
        places = probe.over_places(next(iter(grids.values())))
        moved = np.roll(places, [side // 2 for side in places.shape], range(places.ndim))
        maps.append(Map(CONTROL, *deletion_and_insertion(moved.ravel(), probe.ask, steps)))
        found.append(Explanation(case, tuple(maps), probe.draw(list(grids.values()))))
    return found


def _probe(
    predictor: Predictor, random: Sequence[nn.Module], folder: DatasetFolder, sample_id: str, column: int
) -> _Probe:
    manifest = predictor.bundle.manifest
    item = next(predictor.stored(folder, [sample_id]))
    made, model = manifest.preprocessing, manifest.model
    if isinstance(made, TilePreprocessing):
        row = folder.samples.iloc[int(folder.rows([sample_id])[0])]
        spacing_um = (1000 * float(row["spacing_row_mm"]), 1000 * float(row["spacing_column_mm"]))
        return _Bag(predictor, random, column, item, folder.pixels(sample_id), spacing_um)
    if isinstance(made, VolumePreprocessing):
        assert isinstance(model, VolumeConfig)
        window = _deciding_window(predictor, GridPatches(item, made), column)
        return _Places(predictor, random, column, window, model.cells, np.empty(0))
    assert isinstance(made, Preprocessing)
    assert isinstance(model, RadiographConfig)
    return _Places(predictor, random, column, made.apply(item), (model.cells,) * 2, item)


def _deciding_window(predictor: Predictor, windows: GridPatches, column: int) -> Tensor:
    """The window, 1 D H W, in which the class is likeliest."""
    device = next(predictor.networks[0].parameters()).device
    said = []
    with torch.inference_mode():
        for start in range(0, len(windows), _WINDOWS_AT_ONCE):
            stop = min(start + _WINDOWS_AT_ONCE, len(windows))
            batch = torch.stack([windows[index] for index in range(start, stop)]).to(device)
            logits = torch.stack([network(batch).logits for network in predictor.networks]).double().cpu()
            pooled = pool_logits(logits, predictor.bundle.manifest.task)
            others = [other for other in range(pooled.shape[1]) if other != column]
            said.append(pooled[:, column] - (pooled[:, others].logsumexp(1) if others else 0))
    return windows[int(torch.cat(said).argmax())]


def _as_picture(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values, (0.5, 99.5))
    scaled = (values - low) * (255 / max(high - low, 1e-12))
    picture: np.ndarray = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return picture


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Spearman's, None where one of the maps is level."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(scipy.stats.spearmanr(one.ravel(), other.ravel()).statistic)


def cases_of(
    info: PredictionsInfo, rows: Arrays, sample_ids: Sequence[str], count: int = CASES
) -> list[Case]:
    """The most confident hits, misses and false alarms about the positive class, or else over all classes."""
    columns = [info.classes.index(info.positive)] if info.positive else range(len(info.classes))
    found: list[Case] = []
    for outcome, label, called in (("found", 1, True), ("missed", 1, False), ("false alarm", 0, True)):
        held = [
            Case(sample_ids[row], info.classes[column], outcome, float(rows.probabilities[row, column]))
            for column in columns
            for row in np.flatnonzero(
                (rows.labels[:, column] == label) & (rows.decisions[:, column] == called)
            ).tolist()
        ]
        sign = 1 if outcome == "missed" else -1
        found += sorted(held, key=lambda case: (sign * case.probability, case.sample_id))[:count]
    return found


def _scores(explanation: Explanation, method: str) -> str:
    for one in explanation.maps:
        if one.method == method:
            return f"{method} {one.deletion:.2f} / {one.insertion:.2f}"
    return f"no {method}"


def show_explanations(page: Page, found: Sequence[Explanation]) -> None:
    """Add the section: the pictures with their scores, and what the checks say of the methods."""
    if not found:
        return
    page.section("Explanations")
    methods = list(dict.fromkeys(one.method for case in found for one in case.maps))
    shown = [method for method in methods if method != CONTROL]
    page.text(
        f"Each picture shows the sample, then the same under {' and under '.join(shown)}. A map is scored by taking "
        f"away what it names first, in {STEPS} parts, while the probability of the class is watched (deletion: the "
        "lower the area, the better), and by bringing it in first (insertion: the higher, the better). Places that are "
        "taken away get the median of the picture; tiles of a slide are taken out. A volume is shown in the window "
        "that decides, as it lies and not mirrored, at the slice where the first map is largest."
    )
    page.images(
        [
            (
                explanation.picture,
                f"{explanation.case.sample_id}: {explanation.case.name} {explanation.case.probability:.3f}, "
                f"{explanation.case.outcome}. " + "; ".join(_scores(explanation, method) for method in shown),
            )
            for explanation in found
        ],
        "After each map's name: deletion / insertion. Where there is no map, nothing in the picture speaks for the "
        "class, or all of it does to the same degree.",
        max_px=540,
    )
    rows = []
    for method in methods:
        maps = [one for explanation in found for one in explanation.maps if one.method == method]
        random = [abs(one.when_random) for one in maps if one.when_random is not None]
        rows.append(
            {
                "map": method,
                "deletion": float(np.mean([one.deletion for one in maps])),
                "insertion": float(np.mean([one.insertion for one in maps])),
                "insertion less deletion": float(np.mean([one.insertion - one.deletion for one in maps])),
                "like the map of random weights": float(np.mean(random)) if random else None,
                "maps": len(maps),
            }
        )
    page.table(
        rows,
        "Means over the pictures above: few, and no test. A method whose insertion less deletion is not above that of "
        "the moved map does not say where the evidence lies. Last: the size of the rank correlation with the map that "
        "the same network gives with random weights; near 1, a map shows the picture and not what was learnt (of a map "
        "of few cells some correlation is chance).",
    )
