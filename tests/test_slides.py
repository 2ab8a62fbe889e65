"""Slides: the same pixels as OpenSlide's, at the place and resolution asked for, from bounded handles and memory."""

import io
import multiprocessing
import os
import shutil
import struct
import threading
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import openslide
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage
from scipy import ndimage

from cadx.reading import slides
from cadx.reading.slides import (
    MAX_SLIDE_SIDE_PX,
    MAX_TILE_PX,
    SlidePool,
    TileCache,
    check_is_one_file,
    open_slide,
    summarise_slide,
    tissue_mask,
)

NAME = "Ignatowska_Bronislawa"
GLASS, EOSIN, HAEMATOXYLIN = (243, 241, 244), (225, 150, 185), (110, 70, 150)


def texture(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    """Smooth colour with fine grain: every tile differs."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(
        rng.integers(90, 255, (max(2, height_px // 24), max(2, width_px // 24), 3), np.uint8)
    )
    smooth = np.asarray(coarse.resize((width_px, height_px), Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + rng.integers(-5, 6, smooth.shape), 0, 255).astype(np.uint8)


def write_slide(
    path: Path,
    levels: list[np.ndarray],
    *,
    compression: str | None = "jpeg",
    mpp: float | tuple[float, float] | None = 0.5,
    tile_px: int = 128,
    beneath: bool = False,
    predictor: bool = False,
) -> Path:
    """A pyramid of tiles; `beneath` puts the lower levels into sub-directories."""
    across, down = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    with tifffile.TiffWriter(path) as writer:
        for number, level in enumerate(levels):
            writer.write(
                level,
                tile=(tile_px, tile_px),
                compression=compression,
                compressionargs={"level": 85} if compression == "jpeg" else None,
                photometric="rgb",  # of what is given: with JPEG it is stored as YCbCr
                predictor=predictor,
                resolution=(1e4 / across, 1e4 / down) if across and down else (0, 0),
                resolutionunit="CENTIMETER",
                subfiletype=int(number > 0),
                subifds=len(levels) - 1 if beneath and number == 0 else None,
                metadata=None,
            )
    return path


def halved(pixels: np.ndarray, times: int) -> list[np.ndarray]:
    """A pyramid by 2, sizes rounded down as scanners do."""
    levels = [pixels]
    for _ in range(times):
        last = levels[-1][: levels[-1].shape[0] // 2 * 2, : levels[-1].shape[1] // 2 * 2]
        levels.append(np.asarray(Image.fromarray(last).reduce(2)))
    return levels


def openslide_region(path: Path, place: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
    with openslide.OpenSlide(path) as handle:
        return np.asarray(handle.read_region(place, level, size).convert("RGB")).astype(int)


def overwrite_tile(path: Path, number: int, data: bytes | None = None, page: int = 0) -> None:
    """Put `data`, or noise, over a tile's bytes; the directory stays as it is."""
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages[page].dataoffsets[number], tiff.pages[page].databytecounts[number]
    junk = data if data is not None else np.random.default_rng(1).integers(0, 255, size, np.uint8).tobytes()
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(junk[:size])


def overwrite_tag(path: Path, **values: int) -> None:
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name, value in values.items():
            tiff.pages[0].tags[name].overwrite(value)


@pytest.fixture
def pyramid(tmp_path: Path) -> Path:
    return write_slide(tmp_path / "pyramid.tiff", halved(texture(517, 701), 2))


# --- The same pixels as OpenSlide -------------------------------------------------------------------


def test_real_slide_says_what_it_is(mirror: Path) -> None:
    with open_slide(mirror / "wsi/cmu-1-small-region.svs") as slide:
        assert slide.size_px == (2967, 2220)
        assert slide.slide_mpp == pytest.approx(0.499)
        assert (slide.vendor, slide.objective_power) == ("aperio", 20)
        assert slide.attributes == {"scanner": "CPAPERIOCS"}
        assert slide.assumptions == ()
        assert slide.size_um == (pytest.approx(2967 * 0.499), pytest.approx(2220 * 0.499))


@pytest.mark.parametrize("place", [(0, 0), (240, 480), (101, 203), (2000, 2900), (1, 2711)])
def test_real_tiles_are_openslides(
    mirror: Path, place: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mirror / "wsi/cmu-1-small-region.svs"
    expected = openslide_region(path, place, 0, (240, 240))
    inside = (2967 - place[1], 2220 - place[0])
    monkeypatch.setattr(openslide.OpenSlide, "read_region", None)  # decoded here, not there
    with open_slide(path) as slide:
        tile = slide.tile(place[0] * 0.499, place[1] * 0.499, 240, 0.499)
    difference = np.abs(tile.astype(int) - expected)[: inside[0], : inside[1]]
    assert difference.max() <= 2
    assert (tile[inside[0] :] == 255).all()
    assert (tile[:, inside[1] :] == 255).all()


@pytest.mark.parametrize(
    ("compression", "predictor"), [("jpeg", False), ("deflate", False), ("deflate", True), (None, False)]
)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_packings_are_decoded_as_openslide_does(
    tmp_path: Path, compression: str | None, predictor: bool, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = halved(texture(640, 768), 2)
    path = write_slide(tmp_path / "s.tiff", levels, compression=compression, predictor=predictor)
    for left, top in ((0, 0), (37, 53)):
        expected = openslide_region(path, (left * 2**level, top * 2**level), level, (100, 100))
        with monkeypatch.context() as patch, open_slide(path) as slide:
            patch.setattr(openslide.OpenSlide, "read_region", None)
            mpp = 0.5 * 2**level
            tile = slide.tile(left * mpp, top * mpp, 100, mpp)
        assert np.abs(tile.astype(int) - expected).max() <= 2
        if compression != "jpeg":
            assert np.array_equal(tile, levels[level][top : top + 100, left : left + 100])


def test_other_packings_are_left_to_openslide(tmp_path: Path) -> None:
    levels = halved(texture(640, 768), 1)
    with open_slide(write_slide(tmp_path / "s.tiff", levels, compression="lzw")) as slide:
        assert np.array_equal(slide.tile(20, 30, 128, 0.5), levels[0][60:188, 40:168])
        assert np.array_equal(slide.tile(20, 30, 128, 1.0), levels[1][30:158, 20:148])
        tile = slide.tile(300, 250, 256, 0.5)
        assert np.array_equal(tile[:140, :168], levels[0][500:, 600:])
        assert (tile[140:] == 255).all()


def test_pyramid_in_sub_directories_is_found(tmp_path: Path) -> None:
    whole = np.full((600, 800, 3), (200, 30, 30), np.uint8)
    half = np.full((300, 400, 3), (30, 30, 200), np.uint8)
    path = write_slide(tmp_path / "s.tiff", [whole, half], compression=None, beneath=True)
    with openslide.OpenSlide(path) as handle:
        assert handle.level_count == 1
    with open_slide(path) as slide:
        assert (slide.tile(0, 0, 64, 0.9) == (200, 30, 30)).all()
        assert (slide.tile(0, 0, 64, 1.0) == (30, 30, 200)).all()
        assert (slide.tile(0, 0, 16, 5.0) == (30, 30, 200)).all()


def test_what_was_not_scanned_is_white(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tiff", [texture(256, 256)], compression=None)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        tiff.pages[0].tags["TileByteCounts"].overwrite([0, *counts[1:]])
        tiff.pages[0].tags["TileOffsets"].overwrite([0, *tiff.pages[0].dataoffsets[1:]])
    expected = openslide.OpenSlide(path).read_region((0, 0), 0, (128, 128))
    assert np.asarray(expected)[..., 3].max() == 0, "OpenSlide shows it as transparent"
    with open_slide(path) as slide:
        assert (slide.tile(0, 0, 128, 0.5) == 255).all()
        assert (slide.tile(64, 0, 128, 0.5) != 255).any()


# --- Place and resolution ---------------------------------------------------------------------------


def spots(height_px: int, width_px: int, centres: list[tuple[float, float]]) -> np.ndarray:
    """Dark discs of 12 px radius on white, centred at (x, y) in pixel coordinates (a pixel spans i to i + 1)."""
    y, x = np.mgrid[:height_px, :width_px] + 0.5
    pixels = np.full((height_px, width_px, 3), 255, np.uint8)
    for centre_x, centre_y in centres:
        pixels[np.hypot(x - centre_x, y - centre_y) <= 12] = 0
    return pixels


@pytest.mark.parametrize("mpp", [0.42, 0.5, 0.51, 0.7, 1.0, 1.37, 2.9, 4.0])
@pytest.mark.parametrize("times", [0, 3])
def test_place_is_a_distance_on_the_slide_not_a_coordinate_of_a_level(
    tmp_path: Path, mpp: float, times: int
) -> None:
    """The chapter's sketch took a level's coordinates for level 0's: all but the slide's corner was elsewhere."""
    centres = [(150.0, 140.0), (1203.5, 333.25), (1399.0, 1201.0), (250.5, 1100.75)]
    path = write_slide(tmp_path / "s.tiff", halved(spots(1347, 1533, centres), times), compression=None)
    with open_slide(path) as slide:
        for x_px, y_px in centres:
            x_um, y_um = x_px * 0.5, y_px * 0.5
            tile_px = 48
            left_um, top_um = x_um - 20.3 * mpp, y_um - 27.6 * mpp
            dark = 255.0 - slide.tile(left_um, top_um, tile_px, mpp)[..., 0]
            if mpp >= 2:  # other spots may show too
                dark *= np.hypot(*(np.mgrid[:tile_px, :tile_px] + 0.5 - [[[27.6]], [[20.3]]])) < 16 / mpp + 3
            row, column = ndimage.center_of_mass(dark)
            assert abs(column + 0.5 - 20.3) < 0.75
            assert abs(row + 0.5 - 27.6) < 0.75


def test_level_is_the_coarsest_that_is_fine_enough(tmp_path: Path) -> None:
    """Magnification and number of a level say nothing: what counts is um per pixel."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    levels = [
        np.full((1024 // n, 1024 // n, 3), c, np.uint8) for n, c in zip((1, 4, 16), colours, strict=True)
    ]
    with open_slide(write_slide(tmp_path / "s.tiff", levels, compression=None, tile_px=64)) as slide:
        used = {
            mpp: colours.index(tuple(slide.tile(10, 10, 8, mpp)[4, 4])) for mpp in (0.5, 1.9, 2, 7.9, 8, 30)
        }
    assert used == {0.5: 0, 1.9: 0, 2: 1, 7.9: 1, 8: 2, 30: 2}


def test_coarser_tiles_are_averages_not_samples(tmp_path: Path) -> None:
    """Every other pixel black: a tile at twice the um per pixel is gray, not black, white or moire."""
    board = np.indices((512, 512)).sum(0) % 2 * 255
    pixels = np.repeat(board[..., None], 3, 2).astype(np.uint8)
    with open_slide(write_slide(tmp_path / "s.tiff", [pixels], compression=None)) as slide:
        assert np.abs(slide.tile(20, 20, 64, 1.5).astype(int) - 127.5).max() < 25
        assert np.abs(slide.tile(20, 20, 32, 5.0).astype(int) - 127.5).max() < 4


def test_thumbnail_is_the_whole_slide_without_levels(tmp_path: Path) -> None:
    pixels = texture(1700, 2300)
    with open_slide(write_slide(tmp_path / "s.tiff", [pixels], compression=None)) as slide:
        thumbnail = slide.thumbnail(4.1)
    assert thumbnail.shape == (207, 280, 3)
    expected = Image.fromarray(pixels).resize((280, 207), Image.Resampling.BILINEAR)
    assert np.abs(thumbnail.astype(int) - np.asarray(expected)).max() <= 1


def test_thumbnail_has_no_white_rim_where_a_level_was_rounded_down(tmp_path: Path) -> None:
    levels = halved(np.full((259, 519, 3), 90, np.uint8), 3)
    with open_slide(write_slide(tmp_path / "s.tiff", levels, compression=None)) as slide:
        for mpp in (0.5, 1.0, 1.3, 2.0, 4.0, 9.0):
            assert (slide.thumbnail(mpp) == 90).all()


@pytest.mark.parametrize("wanted", [(-1000.0, 0.0), (0.0, 300.0), (float("nan"), 0.0), (351.0, 0.0)])
def test_tile_beyond_the_slide_is_refused(pyramid: Path, wanted: tuple[float, float]) -> None:
    with (
        open_slide(pyramid) as slide,
        pytest.raises(ValueError, match=r"beyond the slide of 350\.5 x 258\.5 um"),
    ):
        slide.tile(*wanted, 64, 0.5)


def test_finer_than_scanned_is_refused(pyramid: Path) -> None:
    with open_slide(pyramid) as slide:
        assert slide.tile(0, 0, 64, 0.4).shape == (64, 64, 3)
        with pytest.raises(ValueError, match=r"finer than the slide was scanned \(0\.5"):
            slide.tile(0, 0, 64, 0.25)
        for mpp in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="mpp is"):
                slide.tile(0, 0, 64, mpp)
        for tile_px in (0, MAX_TILE_PX + 1):
            with pytest.raises(ValueError, match="tile_px is"):
                slide.tile(0, 0, tile_px, 0.5)


def test_coarser_than_can_be_averaged_is_refused_before_memory_is(pyramid: Path) -> None:
    with open_slide(pyramid) as slide:
        assert slide.tile(0, 0, 2, 600.0).shape == (2, 2, 3)
        with pytest.raises(ValueError, match="give a smaller mpp"):
            slide.tile(0, 0, 256, 1e7)


# --- um per pixel -----------------------------------------------------------------------------------


def test_unknown_resolution_is_refused_with_its_fix_and_taken_from_the_catalogue(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tiff", [texture(300, 300)], mpp=None)
    with pytest.raises(ValueError, match="give slide_mpp in the catalogue entry"):
        open_slide(path)
    slide = open_slide(path, slide_mpp=0.25)
    assert slide.slide_mpp == 0.25
    assert slide.assumptions == ("um per pixel is not in the file; slide_mpp 0.25 was given",)


def test_dots_per_inch_of_an_image_editor_are_no_resolution(mirror: Path) -> None:
    """72 dpi would be 353 um per pixel: OpenSlide reports it without a word."""
    with pytest.raises(ValueError, match="give slide_mpp"):
        open_slide(mirror / "wsi/boxes.tiff")
    with open_slide(mirror / "wsi/boxes.tiff", slide_mpp=0.5) as slide:
        assert slide.thumbnail(4.0).shape == (31, 38, 3)


def test_given_resolution_must_not_contradict_the_file(pyramid: Path) -> None:
    assert open_slide(pyramid, slide_mpp=0.502).assumptions == ()
    assert open_slide(pyramid, slide_mpp=0.502).slide_mpp == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"slide_mpp 0\.25 was given, but the file says 0\.5"):
        open_slide(pyramid, slide_mpp=0.25)
    for value in (0.0, -0.5, float("nan"), 500.0):
        with pytest.raises(ValueError, match="slide_mpp is"):
            open_slide(pyramid, slide_mpp=value)


def test_oblong_pixels_are_refused(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tiff", [texture(300, 300)], mpp=(0.5, 0.51))
    with pytest.raises(ValueError, match="not square"):
        open_slide(path)
    path = write_slide(tmp_path / "t.tiff", [texture(300, 300)], mpp=(0.5, 0.502))
    assert open_slide(path).slide_mpp == pytest.approx(0.501)


# --- Refusals ---------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"^slide: ") as caught:
        summarise_slide(path)
    text = str(caught.value)
    assert "\n" not in text
    assert NAME not in text
    return text


def test_what_is_no_slide_is_refused_in_one_line(mirror: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.svs"
    assert "no such file" in refusal(path)
    for data in (b"", b"PatientName: " + NAME.encode(), (mirror / "wsi/broken.svs").read_bytes()):
        path.write_bytes(data)
        assert "OpenSlide cannot read it" in refusal(path)
    Image.fromarray(texture(64, 64)).save(path, format="PNG")
    assert "OpenSlide cannot read it" in refusal(path)


def test_cut_off_slide_is_refused_on_opening(pyramid: Path, tmp_path: Path) -> None:
    """OpenSlide looks at the coarsest level only, and fails when a reader comes to what is missing."""
    path = tmp_path / f"{NAME}.tiff"
    data = pyramid.read_bytes()
    for part in (10, len(data) // 2, len(data) - 200):
        path.write_bytes(data[:part])
        assert "cut off" in refusal(path) or "ends before" in refusal(path)
    with tifffile.TiffFile(pyramid, mode="r+b") as tiff:
        offsets = tiff.pages[0].dataoffsets
        tiff.pages[0].tags["TileOffsets"].overwrite([*offsets[:-1], len(data) - 10])
    openslide.OpenSlide(pyramid).close()
    assert "ends before its last tile" in refusal(pyramid)


def test_a_property_with_a_damaged_name_is_passed_over(mirror: Path, tmp_path: Path) -> None:
    data = (mirror / "wsi/cmu-1-small-region.svs").read_bytes()
    path = tmp_path / f"{NAME}.svs"
    path.write_bytes(data.replace(b"StripeWidth", b"StripeWid\xffh"))
    with open_slide(path) as slide:
        assert slide.slide_mpp == pytest.approx(0.499)


def test_smallest_slide_works(mirror: Path) -> None:
    with open_slide(mirror / "wsi/small.svs") as slide:
        assert slide.size_px == (16, 16)
        assert slide.thumbnail(0.499).shape == (16, 16, 3)
        assert slide.thumbnail(100).shape == (1, 1, 3)
        assert slide.tile(0, 0, 64, 0.499).shape == (64, 64, 3)
    assert summarise_slide(mirror / "wsi/small.svs").thumbnail.shape == (16, 16, 3)


def test_claims_of_a_header_are_limited(tmp_path: Path) -> None:
    source = write_slide(tmp_path / "s.tiff", [texture(500, 700)])
    for tags, reason in (
        ({"ImageWidth": MAX_SLIDE_SIDE_PX + 1}, "the limit is 1048576 on a side"),
        ({"TileWidth": 32768, "TileLength": 32768}, "claims tiles of 32768 x 32768"),
        ({"ImageWidth": 900_000}, "another number of tiles"),
        ({"TileWidth": 16, "TileLength": 16}, "another number of tiles"),
    ):
        path = Path(shutil.copy(source, tmp_path / f"{NAME}.tiff"))
        overwrite_tag(path, **tags)
        tracemalloc.start()
        text = refusal(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert reason in text
        assert peak_bytes < 10_000_000


def test_jpeg_that_claims_to_be_larger_than_its_tile_is_refused(pyramid: Path) -> None:
    with tifffile.TiffFile(pyramid) as tiff:
        data = pyramid.read_bytes()
        offset = tiff.pages[0].dataoffsets[0]
    start = data.index(b"\xff\xc0", offset)  # frame header: length, precision, height, width
    assert struct.unpack(">HH", data[start + 5 : start + 9]) == (128, 128)
    pyramid.write_bytes(data[: start + 5] + struct.pack(">HH", 60_000, 60_000) + data[start + 9 :])
    with open_slide(pyramid) as slide:
        tracemalloc.start()
        with pytest.raises(ValueError, match="damaged"):
            slide.tile(0, 0, 64, 0.5)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()


# --- Damage -----------------------------------------------------------------------------------------


def test_poisoned_handle_is_opened_again(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tiff", [texture(512, 512)], compression="lzw")
    overwrite_tile(path, 5)
    with openslide.OpenSlide(path) as handle:
        with pytest.raises(openslide.OpenSlideError):
            handle.read_region((128, 128), 0, (128, 128))
        with pytest.raises(openslide.OpenSlideError):
            handle.read_region((256, 256), 0, (128, 128))  # a good tile: the handle is poisoned
    with open_slide(path) as slide:
        before = slide.tile(128, 128, 128, 0.5)
        with pytest.raises(ValueError, match="the tile at x 64, y 64 um: damaged in the file"):
            slide.tile(64, 64, 128, 0.5)
        assert np.array_equal(slide.tile(128, 128, 128, 0.5), before)


def test_one_damaged_tile_costs_one_opening_and_not_one_for_each_tile_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(openslide.OpenSlide):
        number = 0

        def __init__(self, path: Path) -> None:
            Counted.number += 1
            super().__init__(path)

    path = write_slide(tmp_path / "s.tiff", [texture(512, 512)], compression="lzw")
    overwrite_tile(path, 5)
    monkeypatch.setattr(slides.openslide, "OpenSlide", Counted)
    with open_slide(path) as slide:
        with pytest.raises(ValueError, match="damaged in the file"):
            slide.tile(64, 64, 128, 0.5)
        before = Counted.number
        for _ in range(6):
            slide.tile(128, 128, 128, 0.5)
    assert Counted.number == before + 1


@pytest.mark.parametrize("compression", ["jpeg", "deflate", "lzw"])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_damaged_tile_does_not_end_the_slide(tmp_path: Path, compression: str, threads: int) -> None:
    path = write_slide(tmp_path / "s.tiff", [texture(512, 512)], compression=compression)
    overwrite_tile(path, 5)
    grid = [(column * 64.0, row * 64.0) for row in range(4) for column in range(4)]
    damaged: list[tuple[int, str]] = []
    with open_slide(path) as slide:
        read = slide.tiles(grid, 128, 0.5, threads=threads, on_damage=lambda *what: damaged.append(what))
        assert [index for index, _ in read] == [index for index in range(16) if index != 5]
        assert [index for index, _ in damaged] == [5]
        assert "\n" not in damaged[0][1]
        with pytest.raises(ValueError, match="x 64, y 64 um"):
            list(slide.tiles(grid, 128, 0.5, threads=threads))


def test_jpeg_that_ends_early_is_refused_not_filled_with_gray(pyramid: Path) -> None:
    with tifffile.TiffFile(pyramid) as tiff:
        size = tiff.pages[0].databytecounts[0]
        data = pyramid.read_bytes()[tiff.pages[0].dataoffsets[0] :][:size]
    overwrite_tile(pyramid, 0, data[: size // 2].ljust(size, b"\0"))
    with open_slide(pyramid) as slide, pytest.raises(ValueError, match="cut off"):
        slide.tile(0, 0, 128, 0.5)


def mutations(data: bytes, number: int, seed: int) -> list[bytes]:
    """Cut off, and with a few bytes changed: anywhere, and in the head, where the directory is."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(number):
        if index % 3 == 0:
            made.append(data[: rng.integers(0, len(data))])
            continue
        changed = bytearray(data)
        reach = len(data) if index % 3 == 1 else min(600, len(data))
        for place in rng.integers(0, reach, rng.integers(1, 12)):
            changed[place] = rng.integers(0, 256)
        made.append(bytes(changed))
    return made


def read_everything(path: Path) -> bool:
    """Whether the slide could be read; in either case rightly shaped or refused in one line, in 2 s."""
    started = time.process_time()  # what others do on the machine does not count
    try:
        with open_slide(path) as slide:
            height_um, width_um = slide.size_um
            assert slide.tile(width_um / 3, height_um / 3, 64, slide.slide_mpp).shape == (64, 64, 3)
            grid = [(0.0, 0.0), (width_um / 2, height_um / 2)]
            for _, tile in slide.tiles(grid, 64, 2 * slide.slide_mpp, on_damage=lambda *_: None):
                assert tile.shape == (64, 64, 3)
            thumbnail = slide.thumbnail(max(height_um, width_um, slide.slide_mpp * 100) / 100)
            assert thumbnail.dtype == np.uint8
            assert thumbnail.ndim == 3
        read = True
    except ValueError as error:
        text = str(error)
        assert text.startswith("slide: ")
        assert "\n" not in text
        assert NAME not in text
        read = False
    assert time.process_time() - started < 2
    return read


@pytest.mark.parametrize("compression", ["jpeg", "deflate", None, "lzw"])
def test_broken_pyramids_are_refused_or_read(tmp_path: Path, compression: str | None) -> None:
    data = write_slide(
        tmp_path / "s.tiff",
        halved(texture(300, 420), 1),
        compression=compression,
        predictor=compression == "deflate",
    ).read_bytes()
    path = tmp_path / f"{NAME}.tiff"
    read = []
    for broken in mutations(data, 45, seed=3):
        path.write_bytes(broken)
        read.append(read_everything(path))
    assert 0 < sum(read) < len(read), "neither all refused nor all read"


@pytest.mark.slow
def test_many_broken_slides_are_refused_or_read(mirror: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.svs"
    sources = [(mirror / "wsi/cmu-1-small-region.svs").read_bytes(), (mirror / "wsi/small.svs").read_bytes()]
    for compression in ("jpeg", "deflate", None, "lzw"):
        written = write_slide(tmp_path / "s.tiff", halved(texture(500, 700), 2), compression=compression)
        sources.append(written.read_bytes())
    for data in sources:
        for broken in mutations(data, 400, seed=11):
            path.write_bytes(broken)
            read_everything(path)


# --- Bounds -----------------------------------------------------------------------------------------


def test_cache_is_bounded(tmp_path: Path) -> None:
    """The chapter's sketch kept every tile it had read."""
    path = write_slide(tmp_path / "s.tiff", [texture(1024, 1024)], compression=None)
    cache = TileCache(max_bytes=10 * 128 * 128 * 3)
    with open_slide(path, cache=cache) as slide:
        for _ in slide.tiles([(x, y) for x in range(5, 400, 40) for y in range(5, 400, 40)], 100, 0.5):
            assert cache.num_bytes <= cache.max_bytes
    assert cache.num_bytes == cache.max_bytes


def test_cache_keeps_what_was_used_last(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    unpack = slides._unpack
    monkeypatch.setattr(slides, "_unpack", lambda data, tiling: decoded.append(1) or unpack(data, tiling))
    with open_slide(pyramid, cache=TileCache(2 * 128 * 128 * 3)) as slide:
        for x_um in (1, 2, 65, 3, 129, 4, 66):  # tiles 0, 0, 1, 0, 2, 0, 1 of the first row
            slide.tile(x_um, 1, 16, 0.5)
    assert len(decoded) == 4


def test_a_tile_belongs_to_the_caller(pyramid: Path) -> None:
    with open_slide(pyramid) as slide:
        for _ in range(3):
            for x_um in (0, 10):
                tile = slide.tile(x_um, 0, 128, 0.5)
                assert tile.max() > 0
                tile[:] = 0


def open_files(folder: Path) -> int:
    number = 0
    for link in list(Path("/proc/self/fd").iterdir()):
        # The handle that lists the folder is gone again when its own link is read, and others may be.
        with suppress(FileNotFoundError):
            number += str(folder) in str(link.readlink())
    return number


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts handles in /proc")
@pytest.mark.parametrize("compression", ["jpeg", "lzw"])
def test_a_pool_holds_few_slides_open(tmp_path: Path, compression: str) -> None:
    paths = [
        write_slide(tmp_path / f"{number}.tiff", [texture(256, 256, number)], compression=compression)
        for number in range(6)
    ]
    pool = SlidePool(max_open=2, cache_bytes=4 * 128 * 128 * 3)
    slides_seen = [pool.open(path) for path in paths]
    tiles = [slide.tile(3, 3, 64, 0.5) for slide in slides_seen[4:]]
    one_slide = open_files(tmp_path) / 2
    for _ in range(2):
        for path in paths:
            pool.open(path).tile(3, 3, 64, 0.5)
            assert open_files(tmp_path) <= 2 * one_slide
            assert pool.cache.num_bytes <= pool.cache.max_bytes
    assert pool.open(paths[5]) is pool.open(paths[5])
    # One that was closed opens itself again.
    assert np.array_equal(slides_seen[4].tile(3, 3, 64, 0.5), tiles[0])
    slides_seen[4].close()
    pool.close()
    assert open_files(tmp_path) == 0


def test_memory_does_not_grow_with_the_slide(tmp_path: Path) -> None:
    pixels = np.tile(texture(512, 512), (12, 12, 1))
    path = write_slide(tmp_path / "s.tiff", [pixels], compression=None, tile_px=256)
    level_bytes = pixels.nbytes
    del pixels
    with open_slide(path, cache=TileCache(12 << 20)) as slide:
        tracemalloc.start()
        slide.thumbnail(8.0)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 32 << 20 < level_bytes / 3


def child(slide: slides.Slide, answer: "multiprocessing.connection.Connection") -> None:
    answer.send(slide.tile(30, 30, 100, 0.5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("compression", ["jpeg", "lzw"])
def test_a_forked_process_opens_its_own_handles(tmp_path: Path, compression: str) -> None:
    slide = open_slide(write_slide(tmp_path / "s.tiff", [texture(400, 400)], compression=compression))
    expected = slide.tile(30, 30, 100, 0.5)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(slide, there))
    held, done = threading.Event(), threading.Event()

    def hold() -> None:  # another thread, in the middle of a read
        with slide._lock, slide._cache._lock:
            held.set()
            done.wait(120)

    reader = threading.Thread(target=hold)
    reader.start()
    held.wait()
    process.start()
    done.set()
    reader.join()
    answered = here.poll(60)
    if not answered:
        process.kill()
    assert answered, "the child waits for a lock that nobody will open"
    tile = here.recv()
    process.join()
    assert np.array_equal(tile, expected)
    assert np.array_equal(slide.tile(30, 30, 100, 0.5), expected)


def test_threads_give_the_same_tiles_in_order(pyramid: Path) -> None:
    grid = np.array([(x, y) for y in range(0, 250, 19) for x in range(0, 340, 23)], float)
    with open_slide(pyramid) as slide:
        one = list(slide.tiles(grid, 48, 0.7))
        two = list(slide.tiles(grid, 48, 0.7, threads=2))
        assert [index for index, _ in two] == list(range(len(grid)))
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(one, two, strict=True))
        assert list(slide.tiles([], 48, 0.7, threads=2)) == []


def test_tiles_are_read_as_they_are_asked_for(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    tile = slides.Slide.tile
    monkeypatch.setattr(slides.Slide, "tile", lambda self, *args: read.append(1) or tile(self, *args))
    with open_slide(pyramid) as slide:
        for threads in (1, 2):
            read.clear()
            stream = slide.tiles([(1.0, 1.0)] * 500, 32, 0.5, threads=threads)
            next(stream)
            stream.close()
            assert len(read) < 80


# --- Tissue -----------------------------------------------------------------------------------------


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found & truth).sum() / (found | truth).sum())


def drawn(
    truth: np.ndarray,
    *,
    glass: tuple[int, int, int] = GLASS,
    stain: tuple[int, int, int] = EOSIN,
    noise: float = 3,
) -> np.ndarray:
    """A picture of stained tissue with nuclei where `truth` is."""
    rng = np.random.default_rng(0)
    picture = np.where(truth[..., None], stain, glass).astype(float)
    nuclei = truth & (ndimage.gaussian_filter(rng.normal(size=truth.shape), 1.5) > 0.15)
    picture[nuclei] = HAEMATOXYLIN
    picture = ndimage.gaussian_filter(picture, (0.7, 0.7, 0)) + rng.normal(0, noise, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def blobs(seed: int = 0) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(300, 400)), 25)
    return field > np.quantile(field, 0.7)


@pytest.mark.parametrize("glass", [GLASS, (255, 255, 255), (205, 206, 204), (247, 242, 228)])
@pytest.mark.parametrize("stain", [EOSIN, (236, 205, 222), (150, 90, 160)])
def test_tissue_is_found_on_white_gray_and_yellowish_glass(
    glass: tuple[int, int, int], stain: tuple[int, int, int]
) -> None:
    truth = blobs()
    if glass != (255, 255, 255):  # stained light passes the glass too
        stain = tuple(round(part * lamp / 255) for part, lamp in zip(stain, glass, strict=True))
    assert overlap(tissue_mask(drawn(truth, glass=glass, stain=stain), 8.0), truth) >= 0.9


@pytest.mark.parametrize("shade", [255, 240, 205, 128, 20, 0])
def test_empty_slide_has_no_tissue(shade: int) -> None:
    """Otsu's threshold alone would split its noise in two."""
    rng = np.random.default_rng(0)
    picture = np.clip(shade + rng.normal(0, 2, (200, 300, 3)), 0, 255).astype(np.uint8)
    assert not tissue_mask(picture, 8.0).any()


def test_saturation_is_compared_in_its_own_range() -> None:
    """The chapter's sketch compared 0..255 with thresholds for 0..1, so that glass was tissue (or nothing was)."""
    noise = np.random.default_rng(0).integers(-3, 4, (100, 200, 3))
    picture = (np.full((100, 200, 3), 240) + noise).astype(np.uint8)
    picture[:, 100:] = (230, 190, 210)  # saturation .17, which is 44 of 255
    of_255 = np.asarray(Image.fromarray(picture).convert("HSV"))[..., 1]
    assert (of_255[:, :100] > 0.1).mean() > 0.9, "the sketch's rule would not fail here"
    assert tissue_mask(picture, 8.0)[:, 100:].all()
    assert not tissue_mask(picture, 8.0)[:, :100].any()
    assert not tissue_mask(picture, 8.0, minimum_saturation=0.2, maximum_saturation=0.2).any()


@pytest.mark.parametrize("ink", [(35, 60, 165), (20, 120, 60), (40, 170, 120), (28, 27, 31)])
def test_ink_is_no_tissue(ink: tuple[int, int, int]) -> None:
    truth = blobs()
    picture = drawn(truth)
    stroke = np.zeros_like(truth)
    stroke[20:270, 40:52] = True
    stroke &= ~ndimage.binary_dilation(truth, iterations=3)
    picture[stroke] = ink
    mask = tissue_mask(picture, 8.0)
    assert not (mask & stroke).any()
    assert overlap(mask, truth) >= 0.9


def test_specks_go_and_small_holes_are_filled_by_area_not_by_pixels() -> None:
    def picture(mpp: float) -> np.ndarray:
        y_um, x_um = (np.mgrid[: round(1600 / mpp), : round(2400 / mpp)] + 0.5) * mpp
        truth = np.hypot(x_um - 800, y_um - 800) < 600
        truth &= np.hypot(x_um - 700, y_um - 800) > 150  # a hole of 70,000 um2 stays
        truth &= np.hypot(x_um - 1100, y_um - 800) > 40  # one of 5,000 um2 does not
        truth |= np.hypot(x_um - 2000, y_um - 400) < 60  # a speck of 11,000 um2
        return np.where(truth[..., None], EOSIN, GLASS).astype(np.uint8)

    for mpp in (4.0, 16.0):
        mask = tissue_mask(picture(mpp), mpp)
        at = {name: mask[round(y / mpp), round(x / mpp)] for name, x, y in (
            ("tissue", 400, 800), ("hole", 700, 800), ("small hole", 1100, 800), ("speck", 2000, 400),
        )}  # fmt: skip
        assert at == {"tissue": True, "hole": False, "small hole": True, "speck": False}
    assert tissue_mask(picture(4.0), 4.0, minimum_area_um2=5000)[100, 500]


def test_tissue_of_a_real_slide(mirror: Path) -> None:
    summary = summarise_slide(mirror / "wsi/cmu-1-small-region.svs")
    assert summary.tissue.dtype == np.uint8
    assert summary.tissue.shape == summary.thumbnail.shape[:2] == (512, 383)
    assert 0.3 < summary.tissue.mean() < 0.4
    # Looked up on the slide, in um from its corner: dermis, epidermis, a strand; glass, dust, green ink.
    spots_um = {(500, 1200): 1, (560, 550): 1, (260, 530): 1, (100, 1200): 0, (1040, 300): 0, (940, 670): 0}
    row_um, column_um = (1000 * spacing for spacing in summary.spacing_mm)
    assert {at: summary.tissue[int(at[1] / row_um), int(at[0] / column_um)] for at in spots_um} == spots_um


def test_wrong_pictures_are_refused() -> None:
    for picture, mpp in (
        (np.zeros((4, 4), np.uint8), 8.0),
        (np.zeros((4, 4, 3), np.float32), 8.0),
        (np.zeros((4, 4, 3), np.uint8), 0.0),
    ):
        with pytest.raises(ValueError, match=r"^tissue_mask: "):
            tissue_mask(picture, mpp)


# --- Summary ----------------------------------------------------------------------------------------


def test_summary_covers_the_slide_on_one_grid(tmp_path: Path) -> None:
    truth = np.zeros((1500, 2100), bool)
    truth[300:1100, 500:1700] = True
    picture = np.where(truth[..., None], EOSIN, GLASS).astype(np.uint8)
    path = write_slide(tmp_path / "s.tiff", halved(picture, 2), mpp=None)
    summary = summarise_slide(path, slide_mpp=0.5)
    assert summary.thumbnail.shape == (366, 512, 3)
    assert np.allclose(np.array(summary.spacing_mm) * (366, 512), (0.750, 1.050))
    assert summary.assumptions == ("um per pixel is not in the file; slide_mpp 0.5 was given",)
    assert (summary.size_px, summary.slide_mpp, summary.findings) == ((1500, 2100), 0.5, ())
    small = np.asarray(Image.fromarray(truth).resize((512, 366), Image.Resampling.NEAREST))
    assert overlap(summary.tissue > 0, small) > 0.97


def test_summary_of_a_large_slide_is_coarser(tmp_path: Path) -> None:
    level = np.full((200, 9000, 3), 240, np.uint8)
    path = write_slide(tmp_path / "s.tiff", [level], mpp=16.0, compression="deflate")
    assert summarise_slide(path).thumbnail.shape == (46, 2048, 3)


def test_slide_without_tissue_is_reported(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tiff", [np.full((800, 800, 3), GLASS, np.uint8)])
    summary = summarise_slide(path)
    assert not summary.tissue.any()
    assert len(summary.findings) == 1
    assert summary.findings[0].startswith("no_tissue: ")


def test_summary_of_a_damaged_slide_is_refused(pyramid: Path) -> None:
    overwrite_tile(pyramid, 0)
    overwrite_tile(pyramid, 0, page=1)
    overwrite_tile(pyramid, 0, page=2)
    with pytest.raises(ValueError, match=r"^slide: "):
        summarise_slide(pyramid)


def write_vms(folder: Path, *, size_px: int = 256, **fields: object) -> Path:
    """A slide of Hamamatsu's older kind: an index, and JPEGs beside it."""
    for name in ("image", "map", "macro"):
        Image.fromarray(texture(size_px, size_px)).save(folder / f"{name}.jpg", restart_marker_rows=1)
    (folder / "index.opt").write_bytes(bytes(40 * 64))
    known = {
        "NoLayers": 1, "NoJpegColumns": 1, "NoJpegRows": 1, "ImageFile": "image.jpg", "MapFile": "map.jpg",
        "OptimisationFile": "index.opt", "MacroImage": "macro.jpg", "SourceLens": 20,
        "PhysicalWidth": 500 * size_px, "PhysicalHeight": 500 * size_px,
    }  # fmt: skip
    lines = [f"{name}={value}" for name, value in (known | fields).items()]
    path = folder / f"{NAME}.vms"
    path.write_text("\n".join(["[Virtual Microscope Specimen]", *lines, ""]))
    return path


def test_a_slide_of_several_files_is_refused_since_a_dataset_would_keep_one(tmp_path: Path) -> None:
    path = write_vms(tmp_path)
    with open_slide(path) as slide:  # reading it where it lies is no trouble
        assert slide.vendor == "hamamatsu"
        assert slide.slide_mpp == pytest.approx(0.5)
    dicom = tmp_path / f"{NAME}.dcm"
    dicom.write_bytes(whole_slide_dicom())
    for source, what in ((path, "Hamamatsu (.vms, .vmu)"), (dicom, "a DICOM series")):
        with pytest.raises(
            ValueError, match=r"^slide: .* several files, .*; export it as one TIFF or SVS$"
        ) as caught:
            summarise_slide(source)
        assert what in str(caught.value)
        assert NAME not in str(caught.value)


def whole_slide_dicom() -> bytes:
    """The header of one file of a DICOM slide."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        VLWholeSlideMicroscopyImageStorage,
        "1.2.3",
    )
    ds = Dataset()
    ds.file_meta = meta
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = (
        VLWholeSlideMicroscopyImageStorage,
        "1.2.3",
        "1.2.4",
    )
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.Rows = ds.Columns = ds.TotalPixelMatrixRows = ds.TotalPixelMatrixColumns = 64
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, ds, enforce_file_format=True)
    return stream.getvalue()


def test_a_slide_of_one_file_is_kept(pyramid: Path, mirror: Path) -> None:
    check_is_one_file(pyramid)
    check_is_one_file(mirror / "wsi/small.svs")


def test_hamamatsus_tiff_is_one_file(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSlide calls .ndpi by the same name as .vms."""
    monkeypatch.setattr(openslide.OpenSlide, "detect_format", lambda path: "hamamatsu")
    check_is_one_file(pyramid)
