"""Quality: what stands in an image, told apart on real images; and copies, found among a hundred thousand."""

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from cadx import quality
from cadx.quality import (
    CHECKS,
    PRECEDENCE,
    are_outliers,
    blur_effect,
    box_problems,
    find_duplicates,
    find_near_duplicates,
    image_checks,
    likeness,
    near_duplicates,
    perceptual_hash,
    text_score,
)

WITH_LETTERS = {"00001247_011", "00002673_004", "00005712_022"}
"""The radiographs of the mirror with PORTABLE, SEMI-ERECT or SUPINE in their pixels, by eye."""


@pytest.fixture(scope="module")
def radiographs(mirror: Path) -> dict[str, np.ndarray]:
    folder = mirror / "nih_rsna_cxr" / "images"
    return {path.stem: np.array(Image.open(path).convert("L")) for path in sorted(folder.glob("*.png"))[:24]}


@pytest.fixture(scope="module")
def smears(mirror: Path) -> list[np.ndarray]:
    folder = mirror / "bccd" / "BCCD" / "JPEGImages"
    return [np.array(Image.open(path)) for path in sorted(folder.glob("*.jpg"))[:16]]


def gray(pixels: np.ndarray) -> np.ndarray:
    scaled = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    return scaled.mean(axis=2) if scaled.ndim == 3 else scaled


def with_text(pixels: np.ndarray, text: str, size_px: int, value: int = 255) -> np.ndarray:
    picture = Image.fromarray(pixels)
    at = (pixels.shape[1] // 20, pixels.shape[0] // 20)
    ImageDraw.Draw(picture).text(at, text, fill=value, font=ImageFont.load_default(size_px))
    return np.array(picture)


# --- Checks -------------------------------------------------------------------------------------------


def test_blur_is_told_from_sharpness_whatever_the_noise_and_the_size(radiographs, smears):
    """The published measure calls every noisy image sharp."""
    rng = np.random.default_rng(0)
    for pixels in [*list(radiographs.values())[::3], *smears[::3]]:
        image = gray(pixels)
        sharp = blur_effect(image)
        assert sharp < 0.75
        blurred = ndimage.gaussian_filter(image, 0.015 * max(image.shape))
        noisy = blurred + rng.normal(0, 0.02, image.shape).astype(np.float32)
        for variant in (blurred, noisy, blurred[::2, ::2]):
            assert blur_effect(variant) > 0.75
        assert abs(blur_effect(image + rng.normal(0, 0.02, image.shape).astype(np.float32)) - sharp) < 0.02
        assert abs(blur_effect(image[::2, ::2]) - sharp) < 0.05


def test_clipping_counts_lost_areas_and_no_plain_background(radiographs):
    image = np.tile(np.linspace(40, 220, 200).astype(np.uint8), (200, 1))
    assert image_checks(image)["clipped_fraction"] == 0.0
    framed = np.pad(image, 40)  # a collimator, or air
    assert image_checks(framed)["clipped_fraction"] == 0.0
    framed[100:150, 100:140] = 0  # lost inside the body
    assert image_checks(framed)["clipped_fraction"] == pytest.approx(50 * 40 / framed.size)
    framed[60:90, 60:90] = 255
    framed[95, 60] = 255  # an extreme by chance
    assert image_checks(framed)["clipped_fraction"] == pytest.approx((50 * 40 + 30 * 30) / framed.size)
    white = np.pad(image, 40, constant_values=255)  # a slide
    assert image_checks(white)["clipped_fraction"] == 0.0
    overexposed = [
        image_checks(np.clip(pixels[::2, ::2].astype(int) * 2, 0, 255).astype(np.uint8))["clipped_fraction"]
        for pixels in radiographs.values()
    ]
    assert np.mean(np.array(overexposed) > 0.1) >= 0.8


def test_twelve_bits_in_sixteen_use_a_sixteenth_of_the_range():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 4096, (64, 64)).astype(np.uint16)
    assert image_checks(image)["range_fraction"] == pytest.approx(1 / 16, rel=0.02)
    assert image_checks(image * 16)["range_fraction"] == pytest.approx(1.0, rel=0.02)


def test_letters_are_found_in_the_radiographs_that_have_some_and_in_no_other(mirror, smears):
    folder = mirror / "nih_rsna_cxr" / "images"
    paths = sorted(folder.glob("*.png"))[::2] + [folder / f"{name}.png" for name in sorted(WITH_LETTERS)]
    scores = {path.stem: text_score(gray(np.array(Image.open(path).convert("L")))) for path in paths}
    assert {name for name, score in scores.items() if score >= 0.5} == WITH_LETTERS
    assert max(score for name, score in scores.items() if name not in WITH_LETTERS) == 0.0
    assert max(text_score(gray(pixels)) for pixels in smears) == 0.0


@pytest.mark.parametrize("text", ["DOE JANE 1950-03-12", "Name: Meier, Ulla"])
@pytest.mark.parametrize("size_px", [12, 16, 24, 40])
def test_a_name_burned_in_is_found_at_any_size(radiographs, text, size_px):
    images = [pixels for name, pixels in radiographs.items() if name not in WITH_LETTERS][::2]
    scores = [text_score(gray(with_text(pixels, text, size_px))) for pixels in images]
    assert np.mean(np.array(scores) >= 0.5) >= 0.9


@pytest.mark.parametrize("marker", ["L", "R", "AP", "PA", "L 7"])
def test_lead_markers_are_no_text(radiographs, marker):
    images = [pixels for name, pixels in radiographs.items() if name not in WITH_LETTERS]
    assert max(text_score(gray(with_text(pixels, marker, 60))) for pixels in images[:8]) == 0.0


def test_checks_are_finite_or_undefined_for_any_image():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 7), (3, 2), (28, 28), (120, 100), (40, 30, 3)):
        for dtype in (np.uint8, np.uint16):
            values = image_checks(rng.integers(0, 200, shape).astype(dtype))
            assert tuple(values) == CHECKS
            assert all(np.isnan(value) or 0 <= value <= 1 for value in values.values())
    assert np.isnan(image_checks(np.eye(9, dtype=np.uint8))["clipped_fraction"])  # a mask


# --- Copies -------------------------------------------------------------------------------------------


def variants(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The same image as other software would hand it on."""
    picture = Image.fromarray(pixels)
    width, height = picture.size

    def coded(quality: int) -> np.ndarray:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        return np.array(Image.open(stream))

    smaller = (round(width * 0.98), round(height * 0.98))
    return {
        "JPEG 75": coded(75),
        "JPEG 40": coded(40),
        "2 % smaller": np.array(picture.resize(smaller, Image.Resampling.BICUBIC)),
        "half": np.array(picture.reduce(2)),
        "brighter": np.clip(pixels * 1.05 + 5, 0, 255).astype(np.uint8),
    }


def test_copies_keep_their_hash_and_their_details(radiographs, smears):
    for pixels in [*list(radiographs.values())[::3], *smears[::3]]:
        original = int(perceptual_hash(pixels), 16)
        for name, copy in variants(pixels).items():
            distance = (original ^ int(perceptual_hash(copy), 16)).bit_count()
            assert distance <= 4, name
            assert likeness(pixels, copy) >= 0.98, name


def test_the_report_names_no_pair_of_different_patients(mirror, radiographs, smears):
    """Hashes alone do: 24 of 17 million pairs of PneumoniaMNIST, whose images have 28 px."""
    arrays = np.load(mirror / "pneumoniamnist" / "pneumoniamnist.npz")
    small = np.concatenate([arrays[f"{split}_images"] for split in ("train", "val", "test")])
    for images in (list(radiographs.values()), smears, list(small)):
        pairs = near_duplicates([perceptual_hash(pixels) for pixels in images])
        num_pairs = len(images) * (len(images) - 1) / 2
        assert len(pairs) / num_pairs < 1e-5 or len(pairs) <= 1
        for one, other in pairs:
            if likeness(images[one], images[other]) >= 0.95:
                np.testing.assert_array_equal(images[one], images[other])


def brute_force(hashes: list[str], max_distance: int) -> set[tuple[int, int]]:
    values = [int(text, 16) if text else None for text in hashes]
    return {
        (one, other)
        for other in range(len(values))
        for one in range(other)
        if values[one] is not None
        and values[other] is not None
        and (values[one] ^ values[other]).bit_count() <= max_distance
    }


@pytest.mark.parametrize("max_distance", [0, 1, 4, 7])
def test_near_duplicates_are_all_pairs_and_no_other(max_distance):
    rng = np.random.default_rng(max_distance)
    bases = rng.integers(0, 2**63, 20)
    hashes = [""]
    for base in bases:
        for _ in range(12):
            flips = rng.choice(64, rng.integers(0, 9), replace=False)
            hashes.append(f"{int(base) ^ sum(1 << int(bit) for bit in flips):016x}")
    hashes += ["", hashes[1], hashes[1], "f" * 16, "0" * 16]
    pairs = [tuple(pair) for pair in near_duplicates(hashes, max_distance).tolist()]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == brute_force(hashes, max_distance)


def test_no_hash_has_no_pair():
    assert near_duplicates([]).shape == (0, 2)
    assert near_duplicates(["", ""]).shape == (0, 2)


def test_a_hundred_thousand_hashes_take_little_memory():
    rng = np.random.default_rng(0)
    # As crowded as radiographs are: a third of the bits is always the same.
    values = rng.integers(0, 1 << 63, 100_000, dtype=np.uint64) & np.uint64(0x5FB7_EDDB_F6BD_6DB5)
    hashes = [f"{value:016x}" for value in values]
    tracemalloc.start()
    near_duplicates(hashes, 4)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100e6


def test_near_copies_are_marked_in_the_less_precious_split(radiographs):
    one, other = list(radiographs.values())[:2]
    images = {"a": one, "b": variants(one)["JPEG 75"], "c": other, "d": variants(other)["half"], "e": one}
    samples = pd.DataFrame(
        {
            "sample_id": list(images),
            "phash": [perceptual_hash(pixels) for pixels in images.values()],
            "pixels_sha256": ["1", "2", "3", "4", "1"],
            "patient": ["p", "p", "q", "r", "s"],
            "given_split": ["train", "test", "", "", "train"],
        }
    )
    found = find_near_duplicates(samples, images.__getitem__)
    assert found["near_duplicate"].tolist() == [
        "near_duplicate_across_splits", "", "", "near_duplicate_across_patients", "near_duplicate_across_splits",
    ]  # fmt: skip
    assert found["near_duplicate_of"].tolist() == ["b", "", "", "c", "b"]


def of_one_hash(splits: list[str], patients: list[str] | None = None) -> pd.DataFrame:
    names = [f"s{row:04d}" for row in range(len(splits))]
    return pd.DataFrame(
        {
            "sample_id": names,
            "phash": "00ff00ff00ff00ff",
            "pixels_sha256": names,
            "patient": patients or names,
            "given_split": splits,
        }
    )


def mixture(share: float) -> np.ndarray:
    """One of a row of images, whose likeness is the cosine of the difference of their shares, in radians."""
    one, other = np.random.default_rng(0).normal(0, 20, (2, 64, 64))
    return np.clip(np.rint(128 + np.cos(share) * one + np.sin(share) * other), 0, 255).astype(np.uint8)


def test_five_thousand_images_of_one_hash_are_each_read_once_and_compared_with_one(monkeypatch):
    base = np.random.default_rng(0).integers(20, 230, (64, 64), dtype=np.uint8)
    samples = of_one_hash(["val", "train", "", "test", "train"] * 1000)
    read, compared = list[str](), list[int]()
    count = quality._likenesses

    def preview(sample_id: str) -> np.ndarray:
        read.append(sample_id)
        return base + np.uint8(int(sample_id[1:]) % 20)

    def counted(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        compared.append(len(ones) * len(others))
        return count(ones, others)

    monkeypatch.setattr(quality, "_likenesses", counted)
    found = find_near_duplicates(samples, preview)
    assert sorted(read) == samples["sample_id"].tolist()
    assert sum(compared) == 5000
    in_test = samples["given_split"] == "test"
    assert (found.loc[~in_test, "near_duplicate"] == "near_duplicate_across_splits").all()
    assert found.loc[in_test, "near_duplicate"].tolist() == ["", *["near_duplicate_across_patients"] * 999]
    assert found["near_duplicate_of"].drop(3).unique().tolist() == ["s0003"]


def test_unlike_images_of_one_hash_are_each_read_once():
    read = list[str]()

    def preview(sample_id: str) -> np.ndarray:
        read.append(sample_id)
        return np.random.default_rng(int(sample_id[1:]) // 2).integers(0, 256, (64, 64), dtype=np.uint8)

    found = find_near_duplicates(of_one_hash(["val", "train"] * 300), preview)
    assert sorted(read) == [f"s{row:04d}" for row in range(600)]
    assert found["near_duplicate"].tolist() == ["near_duplicate_across_splits", ""] * 300
    assert found["near_duplicate_of"].tolist()[:4] == ["s0001", "", "s0003", ""]


def test_a_leak_is_found_where_its_original_is_represented_by_an_image_that_is_less_like_it():
    images = {"s0000": mixture(0.5), "s0001": mixture(0.0), "s0002": mixture(0.25)}
    assert likeness(images["s0000"], images["s0001"]) < 0.9
    assert min(likeness(images["s0002"], images[name]) for name in ("s0000", "s0001")) > 0.96
    found = find_near_duplicates(of_one_hash(["val", "train", "train"], ["p", "q", "q"]), images.__getitem__)
    assert found.to_numpy().tolist() == [["near_duplicate_across_splits", "s0002"], ["", ""], ["", ""]]


@pytest.mark.parametrize("seed", range(8))
def test_crowded_hashes_hide_no_leak_that_a_look_at_each_pair_finds(seed):
    rng = np.random.default_rng(seed)
    samples = of_one_hash(
        rng.choice([*PRECEDENCE], 40).tolist(), [f"p{number}" for number in rng.integers(0, 9, 40)]
    )
    values = rng.choice([0, 1, 0b111110, 0b1110000011], 40) + 2**60
    samples["phash"] = [f"{value:016x}" for value in values]
    images = {name: mixture(share) for name, share in zip(samples["sample_id"], rng.random(40), strict=True)}
    ranks = [PRECEDENCE.index(split) for split in samples["given_split"]]
    rows = list(zip(samples["sample_id"], ranks, samples["patient"], values.tolist(), strict=True))
    originals: dict[str, set[str]] = {}
    for name, rank, _, value in rows:
        for other, its_rank, _, its_value in rows:
            is_candidate = its_rank < rank and (value ^ its_value).bit_count() <= 4
            if is_candidate and likeness(images[name], images[other]) >= 0.95:
                originals.setdefault(name, set()).add(other)
    found = find_near_duplicates(samples, images.__getitem__).set_index(samples["sample_id"])
    leaks = found.index[found["near_duplicate"] == "near_duplicate_across_splits"]
    assert set(leaks) == set(originals)
    assert all(found.loc[name, "near_duplicate_of"] in originals[name] for name in leaks)
    patients = samples.set_index("sample_id")["patient"]
    others = found[found["near_duplicate"] == "near_duplicate_across_patients"]
    for name, original in others["near_duplicate_of"].items():
        assert likeness(images[str(name)], images[original]) >= 0.95
        assert patients[name] != patients[original]


@pytest.mark.parametrize(
    ("here", "there", "dropped"),
    [
        ("train", "test", "train"),
        ("val", "train", "val"),
        ("val", "calibration", "val"),
        ("test", "val", "val"),
    ],
)
def test_a_copy_leaves_the_less_precious_split(here: str, there: str, dropped: str):
    samples = pd.DataFrame(
        {
            "sample_id": ["a", "b"],
            "pixels_sha256": ["x", "x"],
            "patient": ["p", "p"],
            "given_split": [here, there],
            "label_sick": [1.0, 1.0],
        }
    )
    kinds = find_duplicates(samples, ["label_sick"])["duplicate"]
    assert dict(zip(samples["given_split"], kinds, strict=True)) == {
        dropped: "duplicate_across_splits",
        ({here, there} - {dropped}).pop(): "",
    }


# --- Tables -------------------------------------------------------------------------------------------


def test_outliers_of_spacing():
    rng = np.random.default_rng(0)
    spacings = pd.Series(np.exp(rng.normal(0, 0.1, 200)) * 0.7)
    assert not are_outliers(spacings).any()
    spacings[7] = 70.0  # centimetres for millimetres
    spacings[9] = np.nan
    assert np.flatnonzero(are_outliers(spacings)).tolist() == [7]


def test_boxes_are_judged_one_by_one():
    samples = pd.DataFrame({"sample_id": ["a"], "height_px": [20], "width_px": [30]})
    corners = {
        "whole": ("a", "cell", 0, 0, 30, 20),
        "upright line": ("a", "cell", 4, 4, 4, 9),
        "level line": ("a", "cell", 4, 4, 9, 4),
        "turned": ("a", "cell", 9, 4, 4, 9),
        "upside down": ("a", "cell", 4, 9, 9, 4),
        "right of it": ("a", "cell", 4, 4, 31, 9),
        "below it": ("a", "cell", 4, 4, 9, 21),
        "left of it": ("a", "cell", -1, 4, 9, 9),
        "above it": ("a", "cell", 4, -1, 9, 9),
        "other class": ("a", "cat", 4, 4, 9, 9),
        "other sample": ("z", "cell", 4, 4, 9, 9),
    }
    boxes = pd.DataFrame(list(corners.values()), columns=["sample_id", "class", "x0", "y0", "x1", "y1"])
    judged = box_problems(boxes, samples, ["cell"]).set_index(pd.Index(corners))
    expected = {
        "has_area": {"upright line", "level line", "turned", "upside down"},
        "is_inside": {"right of it", "below it", "left of it", "above it"},
        "is_of_a_class": {"other class"},
        "is_of_a_sample": {"other sample"},
    }
    for column, failing in expected.items():
        assert set(judged.index[~judged[column]]) == failing
