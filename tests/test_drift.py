"""Image statistics equal to plain NumPy, two-sample tests equal to their definitions, and few alarms over nothing."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.stats import entropy
from sklearn.metrics.pairwise import rbf_kernel
from threadpoolctl import threadpool_limits

from cadx.drift import (
    STATISTICS,
    compare_embeddings,
    compare_means,
    compare_numbers,
    compare_requests,
    compare_shares,
    image_statistics,
    median_bandwidth,
    unknown_places,
)


@pytest.fixture(params=[np.uint8, np.uint16], ids=["8 bits", "16 bits"])
def dtype(request):
    return request.param


def test_the_number_of_threads_decides_no_bit() -> None:
    """Datasets hold these numbers, and are known by the digest of their bytes."""
    rng = np.random.default_rng(0)
    images = [rng.normal(20_000, 6_000, (200, 200)).astype(np.uint16) for _ in range(5)]
    with threadpool_limits(1):
        alone = [image_statistics(pixels) for pixels in images]
    with threadpool_limits(2):
        assert [image_statistics(pixels) for pixels in images] == alone


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


def test_p_values_of_means_are_those_of_permutations():
    rng = np.random.default_rng(5)
    reference, current = rng.beta(0.2, 3, 50), rng.beta(0.4, 3, 30)
    found = compare_means(reference, current, level=1e-3)
    permuted = stats.permutation_test(
        (reference, current),
        lambda a, b, axis: np.abs(a.mean(axis) - b.mean(axis)),
        permutation_type="independent",
        alternative="greater",
        n_resamples=5000,
        vectorized=True,
        rng=rng,
    )
    assert found.effect == pytest.approx(permuted.statistic)
    assert found.p_value == pytest.approx(permuted.pvalue, abs=0.03)


def test_a_p_value_can_fall_below_the_level_that_it_is_judged_at():
    """With a fixed number of permutations it could not where there are many sites, and no site would ever alarm."""
    far = compare_means(np.zeros(50), np.ones(50), level=1e-4)
    assert 0 < far.p_value <= 0.5e-4 * 1.01


# --- Embeddings ---------------------------------------------------------------------------------------


def clouds(seed: int, *numbers: int, width: int = 12) -> list[np.ndarray]:
    """Embeddings of one distribution: variance falls off from axis to axis."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(number, width)) / (1 + np.arange(width)) + 3 for number in numbers]


def test_the_distance_of_embeddings_is_the_unbiased_mmd():
    reference, current = clouds(1, 40, 25)
    current = current + 0.5
    bandwidth = median_bandwidth(reference)
    distances = [np.linalg.norm(a - b) for i, a in enumerate(reference) for b in reference[:i]]
    assert bandwidth == pytest.approx(np.median(distances), rel=1e-4)
    gamma = 1 / (2 * bandwidth**2)
    xx, yy, xy = (
        rbf_kernel(a, b, gamma) for a, b in ((reference,) * 2, (current,) * 2, (reference, current))
    )
    unbiased = sum(k[~np.eye(len(k), dtype=bool)].mean() for k in (xx, yy)) - 2 * xy.mean()
    assert compare_embeddings(reference, current, bandwidth).effect == pytest.approx(
        np.sqrt(unbiased / 2), rel=1e-3
    )


def test_p_values_of_embeddings_are_those_of_permutations():
    reference, current = clouds(2, 40, 30)
    current[:, 0] += 0.35
    bandwidth = median_bandwidth(reference)
    rows = np.concatenate([reference, current])
    kernel = rbf_kernel(rows, rows, 1 / (2 * bandwidth**2))

    def biased(first: np.ndarray, second: np.ndarray) -> float:
        first, second = first.astype(int), second.astype(int)
        between = kernel[np.ix_(first, second)].mean()
        return kernel[np.ix_(first, first)].mean() + kernel[np.ix_(second, second)].mean() - 2 * between

    permuted = stats.permutation_test(
        (np.arange(40), np.arange(40, 70)),
        biased,
        permutation_type="independent",
        alternative="greater",
        n_resamples=2000,
        rng=np.random.default_rng(0),
    )
    found = compare_embeddings(reference, current, bandwidth).p_value
    assert found == pytest.approx(permuted.pvalue, abs=0.02)


def test_embeddings_that_spread_out_have_moved_though_their_mean_has_not():
    reference, current = clouds(3, 150, 150)
    wider = current.mean(0) + 2 * (current - current.mean(0)) + (reference.mean(0) - current.mean(0))
    bandwidth = median_bandwidth(reference)
    assert compare_embeddings(reference, wider, bandwidth, level=1e-3).p_value < 1e-3
    assert compare_embeddings(reference, current, bandwidth).p_value > 0.01


def test_embeddings_without_any_variance_have_a_p_value():
    same = np.full((20, 5), 0.25)
    assert compare_embeddings(same, same[:9], median_bandwidth(same)) == (1.0, 0.0)
    assert compare_embeddings(same, same[:9] + 9, median_bandwidth(same)).effect == pytest.approx(1, abs=1e-3)


# --- Many questions -----------------------------------------------------------------------------------


def answers(seed: int, number: int, sites: int = 3, ill: float = 0.1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Image statistics, and answers, of images of a few sites that differ."""
    rng = np.random.default_rng(seed)
    site = rng.integers(sites, size=number)
    places = {
        "site": [f"S{k}" for k in site],
        "scanner": [f"scanner of S{k}" if k else "" for k in site],
    }
    images = pd.DataFrame({f"stat_{name}": rng.normal(site, 1) for name in STATISTICS} | places)
    p = np.where(rng.random(number) < ill, rng.beta(8, 1, number), rng.beta(1, 30, number))
    said = pd.DataFrame(
        {"prob_well": 1 - p, "prob_sick": p, "decision": np.where(p > 0.5, "sick", "well")} | places
    )
    said["embedding"] = list(rng.normal(size=(number, 6)) + site[:, None])
    return images, said


def compare(seed: int, change: pd.DataFrame | None = None, **options: float):
    reference, _ = answers(seed, 400)
    _, heldout = answers(seed + 1, 300)
    images, said = answers(seed + 2, 200) if change is None else (change, change)
    requests = images.join(said.drop(columns=["site", "scanner"])) if change is None else change
    chosen = {"alpha": 0.025, "minimum_effect": 0.03, "minimum_n": 30} | options
    return compare_requests(reference, heldout, requests, ["sick"], **chosen)


def moved(findings) -> set[tuple[str, str]]:
    return {(finding.slice, finding.name) for finding in findings if finding.drifted}


def test_a_fault_at_one_site_is_found_there_and_nowhere_else():
    images, said = answers(12, 200)
    requests = images.join(said.drop(columns=["site", "scanner"]))
    here = requests["site"] == "S2"
    requests.loc[here, "stat_sharpness"] -= 1.2
    found = moved(compare(10, requests))
    assert ("site S2", "stat_sharpness") in found
    assert not {place for place, _ in found} & {"site S0", "site S1"}
    findings = compare(10, requests)
    assert {finding.slice for finding in findings} == {"all", "site S0", "site S1", "site S2"}, (
        "a scanner that is all of its site was asked again, or one without a name"
    )
    assert next(f.n for f in findings if f.slice == "site S2") == here.sum()


def test_a_site_with_too_few_requests_is_not_judged():
    assert {finding.slice for finding in compare(20, minimum_n=150)} == {"all"}


def test_a_change_too_small_to_matter_is_no_drift():
    images, said = answers(32, 200)
    requests = images.join(said.drop(columns=["site", "scanner"]))
    requests["stat_mean"] += 0.8
    assert ("all", "stat_mean") in moved(compare(30, requests))
    assert ("all", "stat_mean") not in moved(compare(30, requests, minimum_effect=0.9))


def test_more_patients_that_are_ill_are_found_by_their_mean_probability():
    _, said = answers(42, 200, ill=0.3)
    images, _ = answers(42, 200)
    findings = compare(40, images.join(said.drop(columns=["site", "scanner"])))
    assert ("all", "prevalence_sick") in moved(findings)
    shares = next(f for f in findings if (f.slice, f.name) == ("all", "prevalence_sick"))
    assert shares.current_mean == pytest.approx(said["prob_sick"].mean())
    assert shares.effect == pytest.approx(shares.current_mean - shares.reference_mean)


def test_windows_without_a_change_alarm_as_rarely_as_declared():
    runs, alpha = 40, 0.2
    alarms = sum(bool(moved(compare(1000 + 3 * run, alpha=alpha, minimum_effect=0.0))) for run in range(runs))
    assert 0 < alarms <= stats.binom.ppf(0.999, runs, alpha)


def test_places_that_the_reference_does_not_hold_are_named():
    _, heldout = answers(1, 50, sites=2)
    _, later = answers(2, 60, sites=3)
    new = int((later["site"] == "S2").sum())
    assert unknown_places(heldout, later) == {"site": {"S2": new}, "scanner": {"scanner of S2": new}}
    assert unknown_places(heldout.assign(site="", scanner=""), later) == {"site": {}, "scanner": {}}


def test_a_detector_is_watched_by_its_best_scores_and_its_boxes():
    def boxes(seed: int, number: int, rate: float) -> pd.DataFrame:
        rng = np.random.default_rng(seed)
        num = rng.poisson(rate, number)
        best = np.where(num > 0, rng.uniform(0.5, 1, number), rng.uniform(0, 0.5, number))
        called = {"prob_lesion": best, "decision_lesion": num > 0, "num_boxes": num}
        return pd.DataFrame({"site": "", "scanner": ""} | called, index=range(number))

    def watch(rate: float):
        requests = boxes(3, 200, rate).join(answers(4, 200)[0].filter(like="stat_"))
        requests["embedding"] = [np.empty(0, np.float32)] * 200
        reference, heldout = answers(1, 400)[0], boxes(2, 300, rate=0.4)
        return compare_requests(
            reference, heldout, requests, ["lesion"], alpha=0.025, minimum_effect=0.03, minimum_n=30
        )

    asked = {finding.name for finding in watch(0.4) if not finding.name.startswith("stat_")}
    assert asked == {"prob_lesion", "decision_lesion", "num_boxes"}, "a score is no probability"
    assert not moved(watch(0.4))
    assert ("all", "num_boxes") in moved(watch(1.5))
