"""Diagnostics of a generator: equal to brute force on tiny inputs, whatever the batch size; misfits are named."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import jensenshannon

from llamagen_unitok.evaluation import nearest
from llamagen_unitok.evaluation.diagnostics import DiagnosisSettings, diagnose, draw_samples, measure_likelihoods
from llamagen_unitok.evaluation.images import seeded_subset
from llamagen_unitok.evaluation.nearest import nearest_by_codes, nearest_by_features, retrieved
from llamagen_unitok.runtime.flags import Parser, add_flags, settings_from
from llamagen_unitok.sampling import SamplingConfig, generate
from llamagen_unitok.training.data import CodeMeta, CodeShards, write_meta, write_shard
from modelfolder import file_hash
from tests.conftest import NAMES, tiny_generator
from tests.tiny_generator import tiny_gpt

GRID, K, V, VIEWS = 3, 3, 11, ["centre", "centre mirrored"]
SIZES = (6, 1, 5)


def write_shards(folder: Path, codes: np.ndarray, labels: np.ndarray, sizes=SIZES, **changes) -> Path:
    """codes (N, A, L, K) and labels (N,), cut into shards."""
    folder.mkdir(exist_ok=True)
    cuts = np.cumsum(sizes)[:-1]
    parts = zip(np.split(codes, cuts), np.split(labels, cuts), strict=True)
    paths = [write_shard(folder, i, len(sizes), *part) for i, part in enumerate(parts)]
    meta = {
        "tokenizer": "tiny", "tokenizer_hash": "0" * 64, "img_size": 48, "grid": GRID, "num_codebooks": K,
        "codebook_size": V, "views": VIEWS, "class_names": NAMES, "shard_sizes": list(sizes),
        "checksums": [file_hash(path) for path in paths],
    }  # fmt: skip
    write_meta(folder, CodeMeta(**{**meta, **changes}))
    return folder


@pytest.fixture(scope="module")
def data():
    """Codes (N, A, L, K) and labels (N,)."""
    rng = np.random.default_rng(0)
    return rng.integers(0, V, (sum(SIZES), len(VIEWS), GRID**2, K)), rng.integers(0, len(NAMES), sum(SIZES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    return write_shards(tmp_path_factory.mktemp("codes"), *data)


def mean_colour(pictures):
    """Features of pictures: mean and deviation of each channel."""
    pixels = np.stack(pictures).astype(np.float64)
    assert pixels.ndim == 4 and pictures[0].dtype == np.uint8
    return torch.from_numpy(np.concatenate([pixels.mean(axis=(1, 2)), pixels.std(axis=(1, 2))], axis=1))


def test_entries_are_what_the_shards_hold(data, folder):
    codes, labels = data
    order = [11, 0, 6, 5, 7, 0]
    got_labels, got = CodeShards(folder).entries(order)
    assert got.dtype == np.uint16 and np.array_equal(got, codes[order]) and np.array_equal(got_labels, labels[order])


@pytest.mark.parametrize("null", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_likelihoods_are_log_softmax_of_the_logits(data, null, batch_size):
    codes, labels = data[0][:, 0], data[1]
    gpt = tiny_gpt(has_null_class=null)
    cuts = range(0, len(codes), batch_size)
    measured = measure_likelihoods(gpt, ((labels[i : i + batch_size], codes[i : i + batch_size]) for i in cuts))
    assert set(measured) == ({"conditional", "unconditional"} if null else {"conditional"})
    for name, (bits, per_picture) in measured.items():
        wanted = np.zeros(codes.shape)
        for n, row in enumerate(codes):
            label = int(labels[n]) if name == "conditional" else len(NAMES)
            logits = gpt(torch.tensor([label]), torch.from_numpy(row)[None]).detach().double().numpy()[0]
            for p in range(GRID**2):
                for k in range(K):
                    shares = np.exp(logits[p, k]) / np.exp(logits[p, k]).sum()
                    wanted[n, p, k] = -math.log2(shares[row[p, k]])
        np.testing.assert_allclose(bits, wanted.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(per_picture, wanted.mean(axis=(1, 2)), rtol=1e-5)


def test_a_generator_that_knows_nothing_needs_log2_v_bits(data):
    gpt = tiny_gpt()
    gpt.output.zero_output()
    measured = measure_likelihoods(gpt, [(data[1], data[0][:, 0])])
    for bits, _ in measured.values():
        np.testing.assert_allclose(bits, math.log2(V), rtol=1e-6)


def test_damaged_weights_give_an_error_and_no_figure(data):
    gpt = tiny_gpt()
    gpt.norm.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        measure_likelihoods(gpt, [(data[1], data[0][:, 0])])


@given(seed=st.integers(0, 1000), count=st.integers(1, 4), block=st.integers(1, 6), values=st.integers(2, 4))
@settings(deadline=None, max_examples=25)
def test_nearest_codes_are_those_of_brute_force(tmp_path_factory, seed, count, block, values):
    rng = np.random.default_rng(seed)
    train = rng.integers(0, values, (sum(SIZES), len(VIEWS), GRID**2, K))
    shards = CodeShards(write_shards(tmp_path_factory.mktemp("codes"), train, np.zeros(sum(SIZES), int)))
    codes = np.concatenate([rng.integers(0, values, (4, GRID**2, K)), train[3:5, 1]])
    entries = np.sort(rng.choice(len(shards), 9, replace=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "SAMPLE_ROWS", 4)
        patch.setattr(nearest, "BLOCK_BYTES", block * 4 * len(VIEWS) * GRID**2 * K)
        found = nearest_by_codes(codes, shards, entries, count)
        others = nearest_by_codes(train[entries, 0], shards, entries, not_entry=entries)
    for n, row in enumerate(codes):
        share = {e: max((train[e, v] == row).mean() for v in range(2)) for e in entries.tolist()}
        wanted = sorted(share, key=lambda e: (-share[e], e))[:count]
        assert found.entries[n].tolist() == wanted
        np.testing.assert_allclose(found.share[n], [share[e] for e in wanted])
        for entry, view in zip(found.entries[n], found.views[n], strict=True):
            assert (train[entry, view] == row).mean() == share[entry]
    for n, own in enumerate(entries):
        shares = [max((train[e, v] == train[own, 0]).mean() for v in range(2)) for e in entries if e != own]
        assert others.share[n, 0] == pytest.approx(max(shares)) and others.entries[n, 0] != own


def test_more_neighbours_than_entries_are_marked_as_none(data, folder):
    found = nearest_by_codes(data[0][:1, 0], CodeShards(folder), np.array([0, 4]), 3)
    assert found.entries[0].tolist() == [0, 4, -1] and found.share[0, 2] == -1 and found.share[0, 0] == 1


def test_codes_of_another_shape_are_refused(folder):
    with pytest.raises(ValueError, match=r"\(L, K\) = \(9, 3\)"):
        nearest_by_codes(np.zeros((2, 9, 4), int), CodeShards(folder), np.arange(3))


@given(seed=st.integers(0, 1000), rows=st.integers(3, 20), block=st.integers(1, 25))
@settings(deadline=None, max_examples=30)
def test_nearest_features_are_those_of_brute_force(seed, rows, block):
    rng = np.random.default_rng(seed)
    features, reference = rng.standard_normal((5, 4)), rng.standard_normal((rows, 4)) * 7
    labels, reference_labels = rng.integers(0, 3, 5), rng.integers(0, 3, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "BLOCK_ROWS", block)
        found = nearest_by_features(torch.from_numpy(features), torch.from_numpy(reference), 3)
        hits = retrieved(
            torch.from_numpy(features), labels, torch.from_numpy(reference), torch.from_numpy(reference_labels)
        )
    for n in range(5):
        cosine = [features[n] @ r / np.linalg.norm(features[n]) / np.linalg.norm(r) for r in reference]
        wanted = sorted(range(rows), key=lambda r: -cosine[r])[:3]
        assert found.rows[n].tolist() == wanted
        np.testing.assert_allclose(found.similarity[n], [cosine[r] for r in wanted], atol=1e-6)
        assert bool(hits[n]) == (reference_labels[wanted[0]] == labels[n])


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="only 2 to compare"):
        nearest_by_features(torch.ones(1, 3), torch.ones(2, 3), 3)
    with pytest.raises(ValueError, match="not finite"):
        nearest_by_features(torch.ones(1, 3), torch.tensor([[1.0, math.nan, 0.0]]))


def test_samples_are_those_that_generate_draws_with_labels_in_balance():
    generator = tiny_generator()
    drawn = draw_samples(generator, DiagnosisSettings(Path("."), samples=12, batch_size=4), SamplingConfig(seed=3))
    assert sorted(np.bincount(drawn.labels, minlength=5)) == [2, 2, 2, 3, 3]
    wanted = torch.cat(
        [
            generate(generator.gpt, drawn.labels[i : i + 4].tolist(), seed=3, indices=numbers[i : i + 4])
            for numbers in [[int((drawn.labels[:n] == drawn.labels[n]).sum()) for n in range(12)]]
            for i in range(0, 12, 4)
        ]
    )
    assert np.array_equal(drawn.codes, wanted.numpy())


def all_figures(generator, folder, **changes):
    given = {"limit": 5, "samples": 6, "compared": 8, "batch_size": 3, **changes}
    return diagnose(generator, DiagnosisSettings(folder, **given), sampling=SamplingConfig(temperature=0.5))


def test_every_figure_equals_its_direct_computation(tmp_path, data, folder):
    generator = tiny_generator()
    whole = {"limit": 12, "compared": 12}
    one_view = write_shards(tmp_path / "codes", data[0][:, :1], data[1], views=VIEWS[:1])
    figures = all_figures(generator, one_view, **whole)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    codes, labels = data[0][:, 0], torch.from_numpy(data[1])
    nll = F.cross_entropy(generator.gpt(labels, torch.from_numpy(codes)).movedim(-1, 1), torch.from_numpy(codes))
    conditional = figures["likelihood"]["conditional"]
    assert conditional["bits_per_code"] == pytest.approx(nll.item() / math.log(2), rel=1e-5)
    assert conditional["bits_per_picture"] == pytest.approx(27 * nll.item() / math.log(2), rel=1e-5)
    maps = np.array(conditional["by_codebook_and_position"])
    assert maps.shape == (K, GRID**2)
    np.testing.assert_allclose(maps.mean(axis=1), conditional["by_codebook"])
    np.testing.assert_allclose(maps.mean(axis=0), conditional["by_position"])

    chosen = SamplingConfig(temperature=0.5)
    drawn = draw_samples(generator, DiagnosisSettings(folder, samples=6, batch_size=3), chosen).codes
    for k in range(K):
        ours, theirs = (np.bincount(c[..., k].ravel(), minlength=V) for c in (drawn, codes))
        assert figures["usage"]["jensen_shannon_bits"][k] == pytest.approx(jensenshannon(ours, theirs, base=2) ** 2)
        assert figures["usage"]["samples"]["usage"][k] == (ours > 0).mean()
        assert figures["usage"]["data"]["usage"][k] == (theirs > 0).mean()
    assert "jensen_shannon_bits_of_data" not in figures["usage"]  # every entry is already in the data's histogram

    largest = [max((row == other).mean() for other in codes) for row in drawn]
    memorisation = figures["memorisation"]
    assert memorisation["share_exact"] == 0
    assert memorisation["largest_equal_share"]["max"] == pytest.approx(max(largest))
    assert memorisation["largest_equal_share"]["mean"] == pytest.approx(np.mean(largest))


def test_figures_do_not_depend_on_the_batch_size(folder):
    """But for samples, which are the same in each batch shape only up to rounding: here they do not differ."""

    def flat(figures):
        parts = (figures["likelihood"]["conditional"], figures["likelihood"]["unconditional"], figures["usage"])
        return np.concatenate([np.ravel(v) for part in parts for v in part.values() if not isinstance(v, dict)])

    generator = tiny_generator()
    wanted = all_figures(generator, folder)
    for batch_size in (1, 4, 20):
        figures = all_figures(generator, folder, batch_size=batch_size)
        np.testing.assert_allclose(flat(figures), flat(wanted), rtol=1e-4, atol=1e-7)
        assert figures["memorisation"] == wanted["memorisation"]


def test_the_subset_follows_from_its_seed(folder):
    generator = tiny_generator()
    first, again, other = (all_figures(generator, folder, subset_seed=seed) for seed in (0, 0, 1))
    assert first == again and first["likelihood"] != other["likelihood"]
    assert first["likelihood"]["pictures"] == 5 and first["training_pictures"] == 12
    assert first["memorisation"]["compared_pictures"] == 8
    assert 0 < first["usage"]["jensen_shannon_bits_of_data_mean"] < 1  # 5 + 6 entries of 12


def test_a_generator_that_repeats_its_training_pictures_is_found_out(tmp_path):
    """Shards made of the generator's own samples, and of other codes."""
    generator, chosen = tiny_generator(), SamplingConfig(temperature=0.5)
    base = DiagnosisSettings(tmp_path, samples=12, batch_size=4)
    drawn = draw_samples(generator, base, chosen)
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, V, drawn.codes.shape), drawn.codes], axis=1)  # second view
    codes[9:] = (codes[9:] + 1) % V
    folder = write_shards(tmp_path / "codes", codes, drawn.labels)
    figures = diagnose(
        generator, DiagnosisSettings(folder, samples=12, batch_size=4, limit=3), sampling=chosen, tokenizer_hash="1"
    )
    repeated = np.mean([any(np.array_equal(row, other) for other in drawn.codes[:9]) for row in drawn.codes])
    assert figures["memorisation"]["share_exact"] == repeated >= 9 / 12
    assert figures["memorisation"]["largest_equal_share"]["max"] == 1
    assert figures["tokenizer_made_the_codes"] is False


def test_retrieval_and_pictures(tmp_path):
    """With the generator's own samples as training pictures, features find each again, and so its class."""
    generator, chosen = tiny_generator(), SamplingConfig(temperature=0.5)
    drawn = draw_samples(generator, DiagnosisSettings(tmp_path, samples=10, batch_size=4), chosen)
    folder = write_shards(tmp_path / "codes", drawn.codes[:, None], drawn.labels, sizes=(4, 6), views=VIEWS[:1])
    run = DiagnosisSettings(folder, samples=10, batch_size=4, shown=4, pictures=tmp_path / "pictures")
    figures = diagnose(generator, run, sampling=chosen, extract=mean_colour)
    pictures = [np.asarray(p) for p in generator.decode(torch.from_numpy(drawn.codes))]
    features = F.normalize(mean_colour(pictures).float(), dim=1)
    own = [drawn.labels[(features[n] @ features.T).argmax()] == drawn.labels[n] for n in range(10)]
    assert figures["retrieval"]["accuracy"] == np.mean(own) > 0.5
    assert figures["retrieval"]["chance"] == pytest.approx(0.2)
    assert figures["retrieval"]["share_with_class_compared"] == 1
    few = DiagnosisSettings(folder, samples=10, batch_size=4, compared=3)
    retrieval = diagnose(generator, few, sampling=chosen, extract=mean_colour)["retrieval"]
    present = {drawn.labels[row] for row in seeded_subset(10, 3, 0)}
    assert retrieval["share_with_class_compared"] == 2 * len(present) / 10 >= retrieval["accuracy"]
    assert figures["retrieval"]["similarity"]["min"] == pytest.approx(1, abs=1e-5)
    assert figures["memorisation"]["share_exact"] == 1
    wanted = {"likelihood", "usage", "nearness", "nearest", "nearest_by_features"}
    assert set(figures["pictures"]) == wanted
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {f"{name}.png" for name in wanted}
    for path in figures["pictures"].values():
        assert np.asarray(Image.open(path).convert("RGB")).std() > 5
    sheet = np.asarray(Image.open(figures["pictures"]["nearest"]))
    # a sample lies in the first column, and its nearest training picture, itself, beside it
    twice = [np.concatenate([p, np.full((48, 6, 3), 255, np.uint8), p], axis=1) for p in pictures]
    assert any(np.array_equal(sheet[y : y + 48, 6:108], pair) for y in range(len(sheet)) for pair in twice)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 12}, r"--codes .* does not fit the generator: codebook size V = 12 instead of 11"),
        ({"class_names": ["a"] * 6}, r"6 classes instead of 5"),
    ],
)
def test_codes_that_do_not_fit_are_one_clear_line(tmp_path, data, changes, message):
    folder = write_shards(tmp_path / "codes", *data, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        all_figures(tiny_generator(), folder)
    assert "\n" not in str(caught.value)


def test_other_bad_input_is_one_clear_line(tmp_path, data, folder):
    other = write_shards(tmp_path / "k", data[0][..., :2], data[1], num_codebooks=2)
    file = tmp_path / "file"
    file.write_text("text")
    for call, message in (
        (lambda: all_figures(tiny_generator(), other), r"codebooks K = 2 instead of 3"),
        (lambda: all_figures(tiny_generator(), tmp_path / "none"), r"no meta\.json"),
        (lambda: all_figures(tiny_generator(), folder, pictures=file), r"--pictures .* is a file"),
        (lambda: all_figures(tiny_generator(), folder, samples=0), r"--samples must be at least 1"),
        (lambda: all_figures(tiny_generator(), folder, subset_seed=-1), r"--subset-seed"),
        (
            lambda: diagnose(
                tiny_generator(has_null_class=False), DiagnosisSettings(folder), sampling=SamplingConfig(cfg_scale=2)
            ),
            "--cfg 2 needs a null class",
        ),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_flags_are_made_from_the_settings(tmp_path):
    parser = Parser("test")
    add_flags(parser, DiagnosisSettings)
    flags = parser.parse_args(["--codes", str(tmp_path), "--samples", "7", "--pictures", "here"])
    assert settings_from(DiagnosisSettings, flags) == DiagnosisSettings(tmp_path, samples=7, pictures=Path("here"))
