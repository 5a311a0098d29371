"""Every figure equals an independent computation: closed forms, direct formulas, brute force, torch-fidelity."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_unitok.evaluation.features import NEEDS, FeatureSet
from llamagen_unitok.evaluation.gaussian import Gaussian, GaussianStatistics
from llamagen_unitok.evaluation.metrics import METRICS
from llamagen_unitok.evaluation.metrics.frechet import frechet_distance
from llamagen_unitok.evaluation.metrics.inception_score import SPLITS, inception_score
from llamagen_unitok.evaluation.metrics.kid import kid, squared_mmd
from llamagen_unitok.evaluation.metrics.precision_recall import manifold_shares

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def gaussian(rows: np.ndarray) -> Gaussian:
    return Gaussian(rows.mean(axis=0), np.cov(rows, rowvar=False))


def rotation(width: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]


@given(
    shards=st.lists(st.integers(0, 700), min_size=1, max_size=6),
    batch=st.integers(1, 900),
    offset=st.sampled_from([0.0, 3.0, 1e4]),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=30)
def test_shards_in_any_order_and_cut_give_the_statistics_of_all_rows(shards, batch, offset, seed):
    shards[0] += 2
    random = np.random.default_rng(seed)
    rows = [(random.standard_normal((count, 5)) + offset).astype(np.float32) for count in shards]
    merged = GaussianStatistics(5)
    for i in random.permutation(len(rows)):
        shard = GaussianStatistics(5)
        for start in range(0, len(rows[i]), batch):
            shard.update(rows[i][start : start + batch])
        merged.merge(GaussianStatistics.from_state(*shard.state()))
    everything = np.concatenate(rows).astype(np.float64)
    assert merged.count == len(everything)
    np.testing.assert_allclose(merged.mean, everything.mean(axis=0), rtol=1e-10, atol=1e-10)
    expected = np.cov(everything, rowvar=False)
    assert np.abs(merged.cov - expected).max() <= 1e-10 * np.abs(expected).max()


def test_statistics_do_not_keep_a_batch_that_its_owner_overwrites():
    statistics, batch = GaussianStatistics(2), np.ones((3, 2), np.float64)
    statistics.update(batch)
    batch[:] = 7
    assert statistics.mean.tolist() == [1, 1]
    with pytest.raises(ValueError, match="at least 2 pictures, and there are 0"):
        GaussianStatistics(2).cov  # noqa: B018
    with pytest.raises(ValueError, match=r"rows of 2 numbers, got an array \(3, 4\)"):
        statistics.update(np.ones((3, 4)))


@given(
    seed=st.integers(0, 99),
    a=st.lists(st.sampled_from([0.0, 0.0, 1e-9, 0.3, 1.0, 250.0]), min_size=12, max_size=12),
    b=st.lists(st.sampled_from([0.0, 0.0, 1e-9, 0.3, 1.0, 250.0]), min_size=12, max_size=12),
)
@settings(deadline=None, max_examples=40)
def test_frechet_distance_of_gaussians_with_common_axes(seed, a, b):
    """Closed form: |Δμ|² + Σ (√a − √b)², for variances a, b along common axes, many of them 0."""
    axes, step = rotation(12, seed), np.random.default_rng(seed).standard_normal(12)
    first, second = (Gaussian(mean, (axes * v) @ axes.T) for mean, v in ((step, a), (0 * step, b)))
    expected = step @ step + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    tolerance = 1e-6 * (sum(a) + sum(b)) + 1e-12
    assert frechet_distance(first, second) == pytest.approx(expected, abs=tolerance)
    assert frechet_distance(second, first) == pytest.approx(expected, abs=tolerance)


def test_frechet_distance_of_gaussians_on_two_lines():
    """Closed form for rank 1: the cross term of a·uuᵀ and b·vvᵀ is √(ab) |u·v|. Axes that do not commute."""
    random = np.random.default_rng(0)
    for _ in range(20):
        u, v = (x / np.linalg.norm(x) for x in random.standard_normal((2, 30)))
        a, b = random.uniform(0.1, 9, 2)
        first, second = Gaussian(np.zeros(30), a * np.outer(u, u)), Gaussian(np.zeros(30), b * np.outer(v, v))
        expected = a + b - 2 * np.sqrt(a * b) * abs(u @ v)
        assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-7 * (a + b))


def test_frechet_distance_equals_the_matrix_root_where_that_is_sound():
    random = np.random.default_rng(1)
    a, b = (gaussian(random.standard_normal((400, 20)) @ random.standard_normal((20, 20))) for _ in range(2))
    root = scipy.linalg.sqrtm(a.cov @ b.cov).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [2, 30, 500])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_frechet_distance_of_identical_sets_is_zero_whatever_the_rank(count, scale):
    rows = np.abs(np.random.default_rng(2).standard_normal((count, 200))) * scale + scale
    one = gaussian(rows)
    other = gaussian(rows[np.random.default_rng(3).permutation(count)])
    assert abs(frechet_distance(one, other)) < 1e-6 * 2 * np.trace(one.cov)


def test_a_network_that_sees_nothing_gives_zero_and_widths_must_agree():
    nothing = Gaussian(np.zeros(4), np.zeros((4, 4)))
    assert frechet_distance(nothing, nothing) == 0
    with pytest.raises(ValueError, match="features of 4 and of 5 numbers"):
        frechet_distance(nothing, Gaussian(np.zeros(5), np.zeros((5, 5))))


def test_frechet_distance_and_score_equal_torch_fidelity_on_the_same_features():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    random = np.random.default_rng(4)
    a, b = random.standard_normal((300, 40)), random.standard_normal((200, 40)) + 0.2
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(expected, rel=1e-8)
    logits = (3 * random.standard_normal((203, 7))).astype(np.float32)
    score = inception_score(FeatureSet(203, logit_rows=logits), FeatureSet(None), CPU)
    expected = isc_features_to_metric(torch.from_numpy(logits))
    assert score["IS"] == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert score["IS_std"] == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_inception_score_of_samples_sorted_by_class_is_that_of_the_classes():
    """A sure classifier and 20 classes of 200: in truth 20; splits in sorted order hold 2 classes, and would say 2."""
    labels = np.arange(20).repeat(200)
    logits = np.full((4000, 20), -1e3, np.float32)
    logits[np.arange(4000), labels] = 1e3
    score = inception_score(FeatureSet(4000, logit_rows=logits), FeatureSet(None), CPU)
    # the entropy of about 20 a class in a split of 400 falls short of log 20 by 19 / (2 · 400) = 0.024
    assert score["IS"] == pytest.approx(20 * np.exp(-19 / 800), rel=0.01)
    with pytest.raises(ValueError, match="at least 10 samples, not 9"):
        inception_score(FeatureSet(9, logit_rows=logits[: SPLITS - 1]), FeatureSet(None), CPU)


def brute_force_share(manifold: np.ndarray, points: np.ndarray, k: int = 3) -> float:
    """Share of points inside a ball around a manifold's point that reaches to its k-th other point, one by one."""
    manifold, points = manifold.astype(np.float64), points.astype(np.float64)
    inside = 0
    radii = [
        sorted(((a - b) ** 2).sum() for j, b in enumerate(manifold) if j != i)[k - 1] for i, a in enumerate(manifold)
    ]
    for point in points:
        inside += any(((point - a) ** 2).sum() <= radius for a, radius in zip(manifold, radii, strict=True))
    return inside / len(points)


@given(
    counts=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    width=st.integers(3, 8),
    copies=st.integers(0, 6),
    shift=st.sampled_from([0.0, 1.0, 30.0]),
    block=st.integers(1, 50),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=40)
def test_precision_and_recall_equal_brute_force(counts, width, copies, shift, block, seed):
    random = np.random.default_rng(seed)
    real, generated = (random.standard_normal((n, width)).astype(np.float32) for n in counts)
    generated += np.float32(shift / 10)
    real, generated = real + np.float32(shift), generated + np.float32(shift)  # far from 0, as features are
    # equal pictures within a set and between sets
    generated[: min(copies, counts[1])] = real[0]
    expected = brute_force_share(real, generated), brute_force_share(generated, real)
    assert manifold_shares(real, generated, CPU, block) == pytest.approx(expected, abs=1e-9)
    order = random.permutation(counts[1])
    assert manifold_shares(real, generated[order], CPU, block) == pytest.approx(expected, abs=1e-9)


def test_identical_sets_have_full_precision_and_recall():
    rows = np.random.default_rng(5).standard_normal((30, 50)).astype(np.float32)
    assert manifold_shares(rows, rows) == (1.0, 1.0)
    assert manifold_shares(rows, rows + 1e3) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than 3 pictures on both sides, but the samples hold 3"):
        manifold_shares(rows, rows[:3])


def direct_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimator, term by term."""

    def k(x, y):
        return (float(x.astype(np.float64) @ y.astype(np.float64)) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def test_kid_equals_the_direct_formula_and_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric

    random = np.random.default_rng(6)
    a, b = random.standard_normal((15, 9)).astype(np.float32), random.standard_normal((11, 9)).astype(np.float32) + 0.3
    assert squared_mmd(*map(torch.from_numpy, (a, b))) == pytest.approx(direct_mmd(a, b), rel=1e-5)
    a, b = (random.standard_normal((n, 9)).astype(np.float32) + s for n, s in ((1300, 0), (1100, 0.2)))
    figures = kid(FeatureSet(1300, pool_rows=a), FeatureSet(1100, pool_rows=b), CPU)
    expected = kid_features_to_metric(*map(torch.from_numpy, (a, b)), verbose=False)
    assert figures["KID"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert figures["KID_std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)
    with pytest.raises(ValueError, match="at least 2 pictures on both sides, not 1 and 11"):
        squared_mmd(torch.ones(1, 9), torch.ones(11, 9))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_what_its_row_says_and_reads_nothing_else(name):
    metric = METRICS[name]
    rows = np.random.default_rng(7).standard_normal((40, 5)).astype(np.float32)
    made = {"pool": gaussian(rows), "spatial": gaussian(rows), "pool_rows": rows, "logit_rows": rows}
    samples, reference = (
        FeatureSet(40, **{need: made[need] for need in needs}) for needs in (metric.of_samples, metric.of_reference)
    )
    figures = metric.compute(samples, reference, CPU)
    assert tuple(figures) == metric.gives and all(isinstance(value, float) for value in figures.values())
    assert metric.of_samples | metric.of_reference <= set(NEEDS)


LARGE_SHARES = """
import resource, time
import numpy as np
from llamagen_unitok.evaluation.metrics.precision_recall import manifold_shares
random = np.random.default_rng(0)
real, generated = (random.standard_normal((count, 2048), dtype=np.float32) for count in (10_000, 50_000))
start = time.process_time()
precision, recall = manifold_shares(real, generated)
print(precision, recall, time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_precision_and_recall_of_fifty_thousand_samples_never_hold_all_distances():
    """All of them at once would be 2 GB for the sets against each other, and 10 GB for the samples among themselves."""
    done = subprocess.run([sys.executable, "-c", LARGE_SHARES], check=True, capture_output=True, text=True, cwd=ROOT)
    precision, recall, seconds, peak = map(float, done.stdout.split())
    print(f"{seconds:.0f} s of a core, peak memory {peak / 1e9:.2f} GB")
    assert peak < 3e9 and 0 < precision < 1 and 0 < recall < 1
