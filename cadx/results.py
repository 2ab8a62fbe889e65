"""The results page (`cadx results`): every experiment with its curve, its failures, and what others report.

Reads what the steps left in data/reports, and for pictures the predictions and the dataset. A picture's name bears the
digest of the numbers that it belongs to: on a machine without predictions it is kept where these numbers still stand.
"""

import io
import math
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from cadx.catalog import Entry, Published, load_catalog
from cadx.datasets import DatasetFolder
from cadx.evaluating import HEADLINES, Evaluation, Mistake, Settings, evaluation_of, judged_on, meanings_of
from cadx.explaining import title
from cadx.files import digest_bytes, digest_path, read_json, read_json_lines, replacing
from cadx.gating import Decision, read_decision
from cadx.predicting.table import PredictionsInfo, read_predictions
from cadx.reporting import (
    INK,
    LEGEND,
    MARK,
    MISSING,
    MUTED,
    counted,
    estimate_text,
    panels,
    svg_file,
    thumbnail_png,
)
from cadx.settings import read_yaml
from cadx.types import Estimate, Task

PER_ROW = 5
"""Mistakes of each sort in a strip."""
_TILE_PX = 190
_GAP_PX = 14
_TEXT_PX = 17  # height of a line
_CROP = 4  # a mistaken box is shown in a window of at least so many of its sides
_WEBP_QUALITY = 80
_FREE_LICENCES = re.compile(r"the project's own|CC0(-1\.0)?|CC BY(-SA)?( \d\.\d)?|MIT|Apache-2\.0")
"""Under these a picture may be passed on with its source."""


@dataclass(frozen=True)
class _Experiment:
    """What is known of an experiment; `record` and `file` are those of all seeds joined, else of the first one."""

    name: str
    entry: Entry
    family: str
    aggregate: str
    record: dict[str, Any]
    file: Path
    seeds: tuple[int, ...]
    planned: tuple[int, ...]
    by_seed: dict[str, list[float | None]]
    decisions: tuple[Decision, ...]
    uses: tuple[int, int]

    @property
    def task(self) -> Task:
        return self.entry.task

    @property
    def metrics(self) -> dict[str, Estimate]:
        return {name: Estimate.model_validate(value) for name, value in self.record["metrics"].items()}

    @property
    def headline(self) -> str:
        """The metric of the summary: AP50 of boxes, else AUC; or what others report, if they do not report that."""
        usual = "ap50" if self.task == "detection" else "auc"
        reported = [name for one in self.entry.published for name in one.metrics if name in self.metrics]
        return usual if usual in reported or not reported else reported[0]

    @property
    def best_published(self) -> Published | None:
        known = [one for one in self.entry.published if self.headline in one.metrics]
        sign = -1 if meanings_of(self.task)[self.headline].better == "lower" else 1
        return max(known, key=lambda one: sign * one.metrics[self.headline], default=None)

    @property
    def bundles(self) -> list[str]:
        """Of the record: its predictions must be theirs."""
        return self.record.get("bundles") or [self.record["bundle"]]

    @property
    def noun(self) -> str:
        kind = getattr(self.entry, "kind", None) or getattr(self.entry, "parameters", {}).get("modality")
        return {"volume": "volumes", "slide": "slides", "features": "bags"}.get(str(kind), "images")

    def picture(self, what: str, ending: str) -> str:
        """The name of a picture that belongs to these numbers."""
        return f"{self.name}-{what}-{digest_bytes(self.file.read_bytes())[7:15]}.{ending}"


def write_results(
    catalog: Path, params: Path, *, seeds: Sequence[int], work: Path, reports: Path, output: Path
) -> list[str]:
    """Write `results.md` and its pictures, `results/`, into `output`; neither is ever there in part.

    Args:
        catalog: data/catalog.yaml.
        params: params.yaml, which names each experiment's source and family.
        seeds: that are planned of each experiment.
        work: data/work, with the datasets of which failures are shown.
        reports: data/reports.
        output: the folder, such as docs.

    Returns:
        What is missing on the page, a line each, with the command that makes it.

    Raises:
        ValueError: if no experiment has run.
    """
    entries = load_catalog(catalog)
    sections = read_yaml(params)
    found, unrun = [], []
    for name, section in sections.items():
        one = _read(name, section, entries[section["ingest"]["source"]], reports / name, tuple(seeds))
        if one is None:
            unrun.append(name)
        else:
            found.append(one)
    if not found:
        raise ValueError(
            f"{reports}: no experiment has run; `make reproduce EXPERIMENT={next(iter(sections))}`"
        )

    target = output / "results"
    missing: list[str] = []
    with replacing(target) as pictures:
        pictures.mkdir()
        parts = []
        for one in found:
            lacking = _draw(one, work / one.name, reports / one.name, pictures, target)
            missing.extend(f"{one.name}: {what}; `make reproduce EXPERIMENT={one.name}`" for what in lacking)
            parts.append(_section(one, pictures, lacking))
        parts.insert(0, _introduction(found, unrun))
        if any(MARK in part for part in parts):
            parts.insert(1, LEGEND)
        text = "\n\n".join(parts) + "\n"
        with replacing(output / "results.md") as page:
            page.write_text(text, encoding="utf-8")
    return missing


class Numbers(NamedTuple):
    """What the steps left of an experiment's scores.

    Attributes:
        file: the metrics.json that stands for the experiment: of all seeds joined, else of the first one.
        record: its content.
        by_seed: seed -> the content of its own metrics.json.
    """

    file: Path
    record: dict[str, Any]
    by_seed: dict[int, dict[str, Any]]


def read_numbers(reports: Path, seeds: Iterable[int]) -> Numbers | None:
    """The scores in an experiment's folder of reports; None where no seed has been evaluated."""
    by_seed = {}
    for seed in seeds:
        file = reports / str(seed) / "metrics.json"
        if file.is_file():
            by_seed[seed] = read_json(file)
    if not by_seed:
        return None
    file = reports / "metrics.json"
    record = read_json(file) if file.is_file() else {}
    if record.get("bundles") != [one["bundle"] for one in by_seed.values()]:
        # Not joined yet, or joined before a seed was trained again.
        first = next(iter(by_seed))
        file, record = reports / str(first) / "metrics.json", by_seed[first]
    return Numbers(file, record, by_seed)


def _read(
    name: str, section: Mapping[str, Any], entry: Entry, reports: Path, planned: tuple[int, ...]
) -> _Experiment | None:
    """What has been left of an experiment; None where no seed has been evaluated."""
    found = read_numbers(reports, planned)
    if found is None:
        return None
    file, record, each = found
    seeds = tuple(each)
    log = reports / "test_uses.jsonl"
    uses = [use["bundle"] for use in read_json_lines(log)] if log.is_file() else []
    return _Experiment(
        name=name,
        entry=entry,
        family=section["train"]["model"]["family"],
        aggregate=section.get("evaluate", {}).get("aggregate", "none"),
        record=record,
        file=file,
        seeds=seeds,
        planned=planned,
        by_seed={
            metric: [one["metrics"].get(metric, {}).get("value") for one in each.values()]
            for metric in record["metrics"]
        },
        decisions=tuple(
            read_decision(path) for seed in seeds if (path := reports / str(seed) / "decision.json").is_file()
        ),
        uses=(len(uses), len(set(uses))),
    )


# --- Pictures -----------------------------------------------------------------------------------------


def _draw(one: _Experiment, work: Path, reports: Path, pictures: Path, before: Path) -> list[str]:
    """Draw an experiment's curve and its worst mistakes, or keep those of `before`; what cannot be shown, in words."""
    names = one.picture("curve", "svg"), one.picture("cases", "webp")
    read = _predictions(one, reports)
    if read is None:
        for name in names:
            if (before / name).is_file():
                shutil.copyfile(before / name, pictures / name)
        return [] if (pictures / names[0]).is_file() else ["no predictions here that its numbers are of"]
    (frame, info), *others = read
    settings = Settings(resamples=0, subgroups=(), minimum_n=1, aggregate=one.aggregate)
    scored = evaluation_of(info.task)(frame, info, settings, others)
    drawing, (axes,) = panels(3.8, 3.3, columns=1)
    if scored.draw_curve(axes):
        (pictures / names[0]).write_bytes(svg_file(drawing))
    if not _may_be_shown(one.entry):
        return []
    folder = _dataset(one, work / "dataset")
    if folder is None:
        if (before / names[1]).is_file():
            shutil.copyfile(before / names[1], pictures / names[1])
            return []
        return ["no dataset here that its numbers are of"]
    if folder.info.kind != "features" and (strip := _strip(scored, folder)) is not None:
        (pictures / names[1]).write_bytes(strip)
    return []


def _predictions(one: _Experiment, reports: Path) -> list[tuple[pd.DataFrame, PredictionsInfo]] | None:
    """The predictions that the record's numbers are of, by seed; None where one is not here."""
    seeds = one.record.get("seeds") or [one.record["seed"]]
    files = [reports / str(seed) / "predictions.parquet" for seed in seeds]
    if not all(file.is_file() for file in files):
        return None
    read = [read_predictions(file) for file in files]
    if [info.bundle for _, info in read] != one.bundles:
        return None
    first = read[0][0]["sample_id"]
    # Of several seeds in the order of the first: each makes its own folds.
    return [
        (frame.set_index("sample_id", drop=False).loc[first].reset_index(drop=True), info)
        for frame, info in read
    ]


def _dataset(one: _Experiment, path: Path) -> DatasetFolder | None:
    """The dataset that the first seed was scored on; None where it is not here."""
    if not (path / "dataset.json").is_file():
        return None
    file = one.file.parent / str(one.seeds[0]) / "metrics.json"
    scored = read_json(file if file.is_file() else one.file)
    return DatasetFolder(path) if scored["dataset"] == digest_path(path / "dataset.json") else None


def _may_be_shown(entry: Entry) -> bool:
    return _FREE_LICENCES.fullmatch(entry.licence) is not None


def _strip(scored: Evaluation, folder: DatasetFolder) -> bytes | None:
    """The worst mistakes as one WebP picture, a row of each sort; None where there are none."""
    rows = [(heading, mistakes) for heading, mistakes in scored.mistakes().items() if mistakes]
    if not rows:
        return None
    width = PER_ROW * (_TILE_PX + _GAP_PX) - _GAP_PX
    height = 2 * _TEXT_PX + _TILE_PX + 3 * _TEXT_PX + _GAP_PX
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (heading, mistakes) in enumerate(rows):
        top = row * height
        shown = mistakes[:PER_ROW]
        of = f": {len(shown)} of {len(mistakes):,}, the worst first" if len(mistakes) > len(shown) else ""
        pen.text((0, top + 4), f"{heading}{of}", fill=INK, font=_font(15, bold=True))
        for column, mistake in enumerate(shown):
            left, upper = column * (_TILE_PX + _GAP_PX), top + 2 * _TEXT_PX - 6
            _paste(sheet, _window(scored.picture(mistake, folder), mistake), left, upper)
            for line, (text, colour) in enumerate(
                (
                    (f"truth: {mistake.truth}", INK),
                    (f"called: {mistake.called} ({_score(mistake)})", INK),
                    (mistake.sample_id, MUTED),
                )
            ):
                position = (left, upper + _TILE_PX + 4 + line * _TEXT_PX)
                pen.text(position, text, fill=colour, font=_fitting(text))
    out = io.BytesIO()
    sheet.save(out, format="WEBP", quality=_WEBP_QUALITY, method=6)
    return out.getvalue()


def _score(mistake: Mistake) -> str:
    return "not seen" if mistake.score is None else f"{mistake.score:.3f}"


def _window(pixels: np.ndarray, mistake: Mistake) -> np.ndarray:
    """The part of the picture around a mistaken box, square; all of it where no box is meant."""
    if mistake.box is None:
        return pixels
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = mistake.box
    wanted = round(_CROP * max(x1 - x0, y1 - y0))
    side = next((whole for whole in (_TILE_PX // 2, _TILE_PX) if wanted <= whole), wanted)
    side_x, side_y = min(side, width), min(side, height)
    left = int(np.clip((x0 + x1 - side_x) / 2, 0, width - side_x))
    top = int(np.clip((y0 + y1 - side_y) / 2, 0, height - side_y))
    return pixels[top : top + side_y, left : left + side_x]


def _paste(sheet: Image.Image, pixels: np.ndarray, left: int, upper: int) -> None:
    picture = Image.open(io.BytesIO(thumbnail_png(pixels, _TILE_PX))).convert("RGB")
    scale, how = _TILE_PX / max(picture.size), Image.Resampling.BICUBIC
    if scale >= 4:  # tiny: by a whole number, so that a pixel stays a pixel
        scale, how = math.floor(scale), Image.Resampling.NEAREST
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), how)
    sheet.paste("#eef1f4", (left, upper, left + _TILE_PX, upper + _TILE_PX))
    sheet.paste(picture, (left + (_TILE_PX - picture.width) // 2, upper + (_TILE_PX - picture.height) // 2))


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _fitting(text: str) -> ImageFont.FreeTypeFont:
    """The largest font in which a text is no wider than a tile, within reason."""
    return next(
        (font for size in (13, 12, 11, 10) if (font := _font(size)).getlength(text) <= _TILE_PX), _font(9)
    )


# --- Text ---------------------------------------------------------------------------------------------


def _introduction(found: Sequence[_Experiment], unrun: Sequence[str]) -> str:
    rows = []
    for one in found:
        best = one.best_published
        patients = f" of {one.record['n_patients']:,} patients" if one.record["clustered"] else ""
        rows.append([
            f"[{one.name}](#{one.name})",
            _escaped(one.entry.title),
            one.family.replace("_", " "),
            f"{one.record['n']:,} {one.noun}{patients}, {one.record['split']}",
            f"{title(one.headline)} {_text(one.metrics[one.headline]).replace('&nbsp;(', '<br>(')}",
            f"{best.metrics[one.headline]:.3f}, {_escaped(best.what)}" if best else MISSING,
            f"{len(one.seeds)} of {len(one.planned)}",
            _verdicts(one),
        ])  # fmt: skip
    parts = [
        "# Results",
        "Written by `cadx results` from `data/reports`, the numbers that `make reproduce` left there. In brackets "
        "stand 95 % confidence intervals, over patients where the source names them, else over samples. Where all "
        "planned seeds have run, a value is the mean over them and the interval is the recipe's; else it is the first "
        "seed's alone. Several test splits are small: read the interval, not the value. What others report was "
        "measured by them, on other machines and sometimes on other splits, as the entry says.",
        _table(
            ["Experiment", "Data", "Family", "Scored on", "Result", "Best published", "Seeds", "Gate"], rows
        ),
    ]
    if unrun:
        parts.append(f"Declared in `params.yaml` and not run yet: {', '.join(unrun)}.")
    return "\n\n".join(parts)


def _section(one: _Experiment, pictures: Path, lacking: Sequence[str]) -> str:
    record, entry = one.record, one.entry
    patients = f" of {record['n_patients']:,} patients" if record["clustered"] else ""
    lesions = f" with {record['n_lesions']:,} lesions" if "n_lesions" in record else ""
    classes = ", ".join(entry.classes)
    sought = f"; {entry.positive} is looked for" if entry.positive else ""
    facts = [
        f"Command: `make reproduce EXPERIMENT={one.name}`; {_commit(one.file)}",
        f"Family: {one.family.replace('_', ' ')}. Seeds: {_seeds(one)}",
        *_gate(one),
    ]
    if one.uses[0]:
        facts.append(
            f"The test split has been scored {counted(one.uses[0], 'time')}, for {counted(one.uses[1], 'bundle')}"
        )
    parts = [
        f"## {one.name}",
        f"**{_escaped(entry.title)}**: {_escaped(entry.modality)}. Scored on {record['n']:,} {one.noun}{patients}"
        f"{lesions}, of {judged_on(record['split'])}. Classes: {_escaped(classes)}{_escaped(sought)}. "
        f"{_escaped(entry.note)}".rstrip(),
        "\n".join(f"- {fact}." for fact in facts),
        *(f"> {_escaped(warning)}" for warning in record["warnings"]),
        _numbers(one, [name for name in HEADLINES[one.task] if name in one.metrics]),
        *_published(one),
        *_pictures(one, pictures, lacking),
        "<details><summary>All metrics, and how each interval was made</summary>",
        _numbers(one, list(one.metrics), methods=True),
        *_by_class(one),
        "</details>",
    ]
    return "\n\n".join(parts)


def _numbers(one: _Experiment, names: Sequence[str], *, methods: bool = False) -> str:
    several = len(one.seeds) > 1
    rows = []
    for name in names:
        estimate = one.metrics[name]
        each = ", ".join("-" if value is None else f"{value:.3f}" for value in one.by_seed[name])
        rows.append(
            [title(name), _text(estimate)]
            + ([each] if several else [])
            + [
                f"{estimate.n:,}",
                _escaped(estimate.method if methods else meanings_of(one.task)[name].meaning),
            ]
        )
    header = ["Metric", "Value (95 % interval)"] + (["Each seed"] if several else [])
    return _table([*header, "n", "Interval by" if methods else "What it says"], rows)


def _by_class(one: _Experiment) -> Iterator[str]:
    if (len(one.entry.classes) == 2 and one.task == "binary") or len(one.entry.classes) == 1:
        return
    shown = (
        ("ap50", "sensitivity", "precision")
        if one.task == "detection"
        else ("auc", "sensitivity", "specificity")
    )
    yield _table(
        ["Class", *map(title, shown)],
        [
            [_escaped(name), *(_text(Estimate.model_validate(values[metric])) for metric in shown)]
            for name, values in one.record["by_class"].items()
        ],
    )


def _published(one: _Experiment) -> Iterator[str]:
    """What others report beside ours, metric by metric."""
    names = dict.fromkeys(name for other in one.entry.published for name in other.metrics)
    compared = [name for name in names if name in one.metrics]
    if not compared:
        return
    rows = [["**cadx**", *(f"**{_text(one.metrics[name])}**" for name in compared), "this repository"]]
    rows.extend(
        [
            _escaped(other.what),
            *(f"{other.metrics[name]:.3f}" if name in other.metrics else "" for name in compared),
            _escaped(other.source),
        ]
        for other in one.entry.published
    )
    yield "What others report:"
    yield _table(["Model", *map(title, compared), "Source"], rows)


def _pictures(one: _Experiment, pictures: Path, lacking: Sequence[str]) -> Iterator[str]:
    curve, cases = one.picture("curve", "svg"), one.picture("cases", "webp")
    kind = "FROC" if one.task == "detection" else "ROC"
    mean = "the mean over seeds" if len(one.bundles) > 1 else f"seed {one.seeds[0]}"
    if (pictures / curve).is_file():
        yield (
            f'<img src="results/{curve}" width="380" alt="{kind} curve of {one.name}, {mean}, with its 95 % band">\n\n'
            f"*{kind} curve of {mean}, with pointwise 95 % limits from a bootstrap of "
            f"{'patients' if one.record['clustered'] else 'samples'}.*"
        )
    if (pictures / cases).is_file():
        what = "boxes, cut out of their images" if one.task == "detection" else one.noun
        frames = (
            " Green: lesions; orange: boxes called; pink: the mistake."
            if one.task == "detection"
            else " Lesions are framed where they are known."
            if one.noun == "images"
            else " Of a volume the middle slice."
            if one.noun == "volumes"
            else ""
        )
        yield (
            f'<img src="results/{cases}" width="1006" alt="The worst mistakes of {one.name}, seed {one.seeds[0]}">\n\n'
            f"*The worst mistakes of seed {one.seeds[0]}: {what}, each with its truth, what was called, and the score."
            f"{frames} Pictures: {_escaped(_source(one.entry))}.*"
        )
    elif not _may_be_shown(one.entry):
        yield f"*The licence of the data ({_escaped(one.entry.licence)}) does not say that pictures may be passed on.*"
    elif (pictures / curve).is_file() and not lacking and one.noun != "bags":
        yield f"*Seed {one.seeds[0]} made no mistake at its operating point.*"
    for what in lacking:
        yield f"*Not shown: {what}; `make reproduce EXPERIMENT={one.name}` brings them.*"


def _source(entry: Entry) -> str:
    if entry.citation == "none":
        return "drawn by this project" if entry.format == "phantom" else entry.licence
    return f"{entry.citation}; {entry.licence}"


def _seeds(one: _Experiment) -> str:
    run = ", ".join(map(str, one.seeds))
    if one.seeds == one.planned and len(one.bundles) == len(one.seeds):
        return run
    if one.seeds == one.planned:
        return f"{run}, not joined yet: values are those of seed {one.seeds[0]}"
    return (
        f"{run}, of the planned {', '.join(map(str, one.planned))}; values are those of seed {one.seeds[0]}"
    )


def _verdicts(one: _Experiment) -> str:
    passed = sum(decision.promote for decision in one.decisions)
    if not one.decisions:
        return "not asked"
    if len(one.decisions) == 1:
        return "promoted" if passed else "refused"
    return f"promoted {passed} of {len(one.decisions)}"


def _gate(one: _Experiment) -> Iterator[str]:
    for decision in one.decisions:
        said = "promoted" if decision.promote else "refused"
        yield f"Gate, seed {decision.seed}: {said}, {_escaped(decision.why)}"


def _commit(file: Path) -> str:
    """Where in history these numbers entered."""
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", str(file)], capture_output=True, text=True, check=False
    )
    found = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", str(file)], capture_output=True, text=True, check=False
    )
    commit = found.stdout.strip()
    if found.returncode or not commit or changed.stdout.strip():
        return "numbers not committed yet"
    return f"numbers of commit {commit}"


def _text(estimate: Estimate) -> str:
    """An estimate on one line."""
    return estimate_text(estimate).replace(" ", "&nbsp;")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _escaped(text: str) -> str:
    """Text that Markdown takes for nothing else, also within a table."""
    return re.sub(r"([|*_<>\[\]`])", r"\\\1", " ".join(text.split()))
