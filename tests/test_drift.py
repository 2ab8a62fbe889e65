"""Image statistics equal to plain NumPy, two-sample tests equal to their definitions, logs as workers leave them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.stats import entropy
from sklearn.decomposition import PCA

from cadx.drift import (
    STATISTICS,
    compare_numbers,
    compare_shares,
    embedding_summary,
    image_statistics,
    read_request_log,
)
from cadx.types import Digest


@pytest.fixture(params=[np.uint8, np.uint16], ids=["8 bits", "16 bits"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("shape", [(31, 17), (1, 9), (9, 1), (12, 11, 3), (28, 28)])
def test_statistics_equal_plain_numpy(dtype, shape):
    top = np.iinfo(dtype).max
    rng = np.random.default_rng(sum(shape))
    pixels = np.clip(rng.normal(0.5, 0.4, shape), 0, 1)
    pixels = np.rint(pixels * top).astype(dtype)
    unit = pixels.astype(np.float64) / top
    across = [np.abs(np.diff(unit, axis=axis)).ravel() for axis in (0, 1)]
    bins = np.bincount((pixels.astype(int) // ((top + 1) // 256)).ravel(), minlength=256)
    expected = {
        "mean": unit.mean(),
        "std": unit.std(),
        "p01": np.quantile(unit, 0.01, method="inverted_cdf"),
        "p50": np.quantile(unit, 0.50, method="inverted_cdf"),
        "p99": np.quantile(unit, 0.99, method="inverted_cdf"),
        "entropy_bits": entropy(bins, base=2),
        "sharpness": np.concatenate(across).mean() / unit.std(),
        "dark_fraction": (unit <= 0.02).mean(),
        "bright_fraction": (unit >= 0.98).mean(),
    }
    found = image_statistics(pixels)
    assert tuple(found) == STATISTICS
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


def test_same_image_at_both_depths_looks_the_same():
    gray = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    assert image_statistics(gray) == pytest.approx(image_statistics(gray.astype(np.uint16) * 257))


def test_constant_images_have_no_nan(dtype):
    for value in (0, np.iinfo(dtype).max):
        found = image_statistics(np.full((3, 5), value, dtype))
        assert not any(np.isnan(number) for number in found.values())
        assert found["std"] == found["sharpness"] == found["entropy_bits"] == 0
    assert image_statistics(np.zeros((1, 1), dtype))["dark_fraction"] == 1


def test_blur_and_noise_move_sharpness_but_contrast_does_not():
    rng = np.random.default_rng(1)
    smooth = np.add.outer(np.linspace(40, 120, 64), np.linspace(0, 60, 64))
    sharpness = [
        image_statistics(pixels.astype(np.uint8))["sharpness"]
        for pixels in (smooth, 1.3 * smooth, smooth + rng.normal(0, 15, smooth.shape))
    ]
    assert sharpness[1] == pytest.approx(sharpness[0], rel=0.1)
    assert sharpness[2] > 5 * sharpness[0]


def test_strided_pixels_are_counted_whole():
    pixels = np.random.default_rng(2).integers(0, 256, (20, 20), dtype=np.uint8)
    assert image_statistics(pixels[::2, ::3]) == image_statistics(pixels[::2, ::3].copy())


# --- Two samples --------------------------------------------------------------------------------------


def test_the_distance_of_numbers_is_the_largest_gap_of_their_distributions():
    rng = np.random.default_rng(3)
    reference, current = rng.normal(0, 1, 70), rng.normal(0.4, 1.5, 45)
    gaps = [abs((reference <= x).mean() - (current <= x).mean()) for x in [*reference, *current]]
    assert compare_numbers(reference, current).effect == pytest.approx(max(gaps))


def test_p_values_of_numbers_are_those_of_permutations():
    rng = np.random.default_rng(4)
    reference, current = rng.normal(0, 1, 40), rng.normal(0.6, 1, 30)
    found = compare_numbers(reference, current)
    permuted = stats.permutation_test(
        (reference, current),
        lambda a, b: compare_numbers(a, b).effect,
        permutation_type="independent",
        n_resamples=2000,
        rng=rng,
    )
    assert found.p_value == pytest.approx(
        np.mean(permuted.null_distribution >= found.effect - 1e-9), abs=0.02
    )


def test_p_values_of_shares_add_up_the_hypergeometric_distribution():
    reference, current = np.arange(30) < 4, np.arange(18) < 9
    chances = stats.hypergeom(48, 13, 18).pmf(np.arange(14))
    expected = chances[chances <= chances[9] * (1 + 1e-7)].sum()
    found = compare_shares(reference, current)
    assert found.p_value == pytest.approx(expected)
    assert found.effect == pytest.approx(9 / 18 - 4 / 30)


def test_samples_that_never_vary_have_p_values():
    same, other = np.full(20, 0.3), np.full(15, 0.4)
    assert compare_numbers(same, same[:9]) == (1.0, 0.0)
    assert compare_numbers(same, other).effect == 1
    assert 0 <= compare_numbers(same, other).p_value < 1e-6
    for reference, current, effect in ((True, True, 0), (False, False, 0), (True, False, 1)):
        found = compare_shares(np.full(20, reference), np.full(15, current))
        assert found.effect == effect
        assert (found.p_value < 1e-6) == bool(effect)


def test_many_requests_do_not_alarm_over_nothing():
    rng = np.random.default_rng(5)
    found = compare_numbers(rng.normal(0, 1, 40_000), rng.normal(0.1, 1, 40_000))
    assert found.p_value < 1e-6
    assert not found.is_drift(1e-3, minimum_effect=0.1)
    assert found.is_drift(1e-3, minimum_effect=found.effect)
    few = compare_numbers(np.arange(4.0), np.arange(4.0) + 9)
    assert few.effect == 1
    assert not few.is_drift(1e-3, minimum_effect=0.1), "four requests prove nothing"


# --- Embeddings ---------------------------------------------------------------------------------------


def clouds(seed: int, *numbers: int, width: int = 48) -> list[np.ndarray]:
    """Embeddings of one distribution: variance falls off from axis to axis, and none is the coordinates'."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0]
    scales = 1 / (1 + np.arange(width))
    return [(rng.normal(size=(number, width)) * scales) @ turn + 3 for number in numbers]


def test_the_summary_is_principal_components_and_the_distance_from_them():
    reference, embeddings = clouds(1, 60, 25)
    found = embedding_summary(reference, embeddings, components=3)
    assert list(found) == ["embedding_1", "embedding_2", "embedding_3", "embedding_residual"]
    pca = PCA(3).fit(reference)
    own, expected = pca.transform(reference), pca.transform(embeddings)
    for k in range(3):
        sign = np.sign(pca.components_[k][np.abs(pca.components_[k]).argmax()])
        np.testing.assert_allclose(found[f"embedding_{k + 1}"], sign * expected[:, k] / own[:, k].std())
    near, far = (
        np.linalg.norm(rows - pca.inverse_transform(pca.transform(rows)), axis=1)
        for rows in (reference, embeddings)
    )
    np.testing.assert_allclose(found["embedding_residual"], (far - near.mean()) / near.std())


def test_axes_point_the_same_way_whatever_the_order_of_rows():
    reference, embeddings = clouds(2, 50, 10)
    found, again = (embedding_summary(rows, embeddings) for rows in (reference, reference[::-1]))
    for name in found:
        np.testing.assert_allclose(found[name], again[name], atol=1e-9)


def test_what_the_reference_never_showed_ends_up_in_the_residual():
    reference, embeddings = clouds(3, 80, 40)
    hidden = np.linalg.svd(reference - reference.mean(0))[2][-1]
    before, after = (embedding_summary(reference, rows) for rows in (embeddings, embeddings + 3 * hidden))
    np.testing.assert_allclose(after["embedding_1"], before["embedding_1"], atol=1e-9)
    assert (after["embedding_residual"] > before["embedding_residual"] + 3).all()


def test_rows_that_chose_the_axes_are_no_reference_but_others_are():
    """Without drift, p of the residual is below 0.05 in a twentieth of the trials only for other rows."""
    own, others = [], []
    for trial in range(60):
        axes, reference, current = clouds(100 + trial, 40, 40, 200)
        later = embedding_summary(axes, current)["embedding_residual"]
        for rows, found in ((axes, own), (reference, others)):
            found.append(compare_numbers(embedding_summary(axes, rows)["embedding_residual"], later).p_value)
    assert np.mean(np.less(own, 0.05)) > 0.3
    assert np.mean(np.less(others, 0.05)) <= stats.binom.ppf(0.999, 60, 0.05) / 60


def test_embeddings_that_hardly_vary_have_fewer_axes_and_no_nan():
    line = np.outer(np.arange(9.0), np.ones(5))
    assert list(embedding_summary(line, line)) == ["embedding_1", "embedding_residual"]
    for reference in (np.full((6, 5), 0.25), np.full((1, 5), 0.25)):
        found = embedding_summary(reference, line)
        assert list(found) == ["embedding_residual"]
        assert np.isfinite(found["embedding_residual"]).all()


# --- The request log ----------------------------------------------------------------------------------

BUNDLE, OTHER = (Digest("sha256:" + digit * 64) for digit in "12")


def request_line(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "prediction_id": f"{number:032x}",
        "time": f"2026-03-04T05:06:{number:02d}.500Z",
        "model": "m",
        "version": "1" * 12,
        "bundle": BUNDLE,
        "site": "north",
        "scanner": "",
        "statistics": dict.fromkeys(STATISTICS, number / 100),
        "embedding": [0.5, number],
        "probabilities": {"well": 0.75, "sick": 0.25},
        "decision": "well",
        "warnings": ["unusual image"] * (number % 2),
        "timing_ms": {"total": 1.0},
    } | changes


def write_log(folder: Path, name: str, *lines: dict[str, Any], end: str = "") -> None:
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")


def test_a_log_comes_back_by_time_with_the_columns_of_a_bundles_answers(tmp_path: Path) -> None:
    write_log(tmp_path, "b.jsonl", request_line(3), request_line(1))
    write_log(tmp_path, "a.jsonl", request_line(2, decision="sick"))
    (tmp_path / "notes.txt").write_text("no log")
    log = read_request_log(tmp_path, BUNDLE)
    assert log[1:] == (0, 0, 0)
    frame = log.requests
    assert list(frame) == [
        "prediction_id", "time", "site", "scanner", *(f"stat_{name}" for name in STATISTICS),
        "prob_well", "prob_sick", "decision", "embedding", "num_warnings",
    ]  # fmt: skip
    assert frame["prediction_id"].tolist() == [f"{number:032x}" for number in (1, 2, 3)]
    assert frame["time"].iloc[0] == pd.Timestamp("2026-03-04T05:06:01.5", tz="UTC")
    assert frame["stat_p50"].tolist() == [0.01, 0.02, 0.03]
    assert frame["decision"].tolist() == ["well", "sick", "well"]
    assert frame["num_warnings"].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(np.stack(frame["embedding"].to_list())[:, 1], [1, 2, 3])


def test_decisions_of_many_labels_are_a_column_each(tmp_path: Path) -> None:
    write_log(tmp_path, "a.jsonl", request_line(1, decision=["sick"]), request_line(2, decision=[]))
    frame = read_request_log(tmp_path, BUNDLE).requests
    assert "decision" not in frame
    assert frame["decision_sick"].tolist() == [True, False]
    assert frame["decision_well"].tolist() == [False, False]


@pytest.mark.parametrize("cut", [1, 40, -1, "half a letter"])
def test_a_line_cut_short_is_skipped_and_counted(tmp_path: Path, cut: int | str) -> None:
    line = json.dumps(request_line(2, site="Zürich"), ensure_ascii=False).encode()
    torn = line[: line.index(b"\xc3") + 1] if isinstance(cut, str) else line[:cut]
    write_log(tmp_path, "a.jsonl", request_line(1))
    with (tmp_path / "a.jsonl").open("ab") as stream:
        stream.write(torn)
    write_log(tmp_path, "b.jsonl", request_line(3))
    log = read_request_log(tmp_path, BUNDLE)
    assert (len(log.requests), log.torn) == (2, 1)


def test_lines_of_other_bundles_and_repeated_ones_are_counted(tmp_path: Path) -> None:
    write_log(tmp_path, "a.jsonl", request_line(1), request_line(1), request_line(2, bundle=OTHER))
    write_log(tmp_path, "b.jsonl", request_line(1), request_line(3), request_line(4, bundle=OTHER))
    log = read_request_log(tmp_path, BUNDLE)
    assert log.requests["prediction_id"].tolist() == [f"{number:032x}" for number in (1, 3)]
    assert log[1:] == (0, 2, 2)


def test_nothing_of_the_bundle_is_one_line_that_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no request that sha256:1111"):
        read_request_log(tmp_path, BUNDLE)
    write_log(tmp_path, "a.jsonl", request_line(1, bundle=OTHER), end='{"schema')
    with pytest.raises(
        ValueError, match=r"1 lines of other bundles, 1 cut short.*CADX_REQUEST_LOG"
    ) as caught:
        read_request_log(tmp_path, BUNDLE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "line 2 is no request of schema_version 1"),
        ({"statistics": {"mean": 0.5}}, "line 2 has no 'std'"),
        ({"probabilities": {"well": "Smith, John", "sick": 0.5}}, r"line 2 is not of the log's form"),
        ({"embedding": [float("nan"), 1]}, r"line 2 is not of the log's form"),
        ({"time": "yesterday"}, r"line 2 is not of the log's form"),
        ({"time": "2026-03-04T05:06:07"}, r"line 2 is not of the log's form"),
    ],
)
def test_a_whole_line_of_another_form_is_refused_where_it_stands(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_log(tmp_path, "a.jsonl", request_line(1), request_line(2, **changes))
    with pytest.raises(ValueError, match=rf"a\.jsonl: {message}") as caught:
        read_request_log(tmp_path, BUNDLE)
    assert "\n" not in str(caught.value)
    assert "Smith" not in str(caught.value)
