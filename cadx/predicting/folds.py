"""Cross-validation's answers: each sample's from those networks of a bundle that were not trained on it."""

from collections.abc import Iterator
from pathlib import Path

from cadx.datasets import DatasetFolder, read_splits
from cadx.files import digest_path
from cadx.predicting.predictor import Predictor
from cadx.splitting import cross_validation


def out_of_fold(
    predictor: Predictor, folder: DatasetFolder, splits: Path
) -> Iterator[tuple[Predictor, list[str]]]:
    """Each fold's ensemble, often one network, of a cross-validated bundle, with the samples that it did not see.

    Args:
        predictor: of a bundle that was trained with `folds`.
        folder: the dataset that it was trained on.
        splits: the file of splits that it was trained with; its train and val parts made the folds.

    Raises:
        ValueError: if the bundle has no folds, or other data or splits are given: a sample might have been seen.
    """
    manifest, path = predictor.bundle.manifest, predictor.bundle.path
    trained = manifest.provenance
    if trained.folds is None:
        raise ValueError(f"{path}: was not cross-validated; set train.folds, or score a split")
    if trained.dataset != digest_path(folder.path / "dataset.json") or trained.splits != digest_path(splits):
        raise ValueError(
            f"{path}: was trained on another dataset or other splits, so its folds are not these; train again"
        )
    folds = cross_validation(
        folder.samples,
        read_splits(splits),
        num_folds=trained.folds,
        seed=manifest.seed,
        labels=list(folder.info.label_columns),
    )
    for number, fold in enumerate(folds):
        yield (
            predictor.members(slice(number, None, trained.folds)),
            fold.loc[fold["split"] == "val", "sample_id"].tolist(),
        )
