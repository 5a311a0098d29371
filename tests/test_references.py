"""References: ADM's layout, statistics alone, what is kept of them, and what is refused before anything is measured."""

import numpy as np
import pytest

from llamagen_unitok.evaluation import images, references
from llamagen_unitok.evaluation.features import collect_features
from llamagen_unitok.evaluation.figures import evaluate_samples
from llamagen_unitok.evaluation.images import open_images
from llamagen_unitok.evaluation.npz import write_npz
from llamagen_unitok.evaluation.references import Reference, make_reference
from tests.tiny_extractor import NamelessExtractor, TinyExtractor, pictures, write_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore::llamagen_unitok.evaluation.figures.BiasedFigureWarning"),
    pytest.mark.usefixtures("own_cache"),
]


@pytest.fixture
def sets(tmp_path):
    """(samples, reference) as .npz files of 50 and 40 pictures of 8×8."""
    write_npz(tmp_path / "samples.npz", {"arr_0": pictures(50)})
    write_npz(tmp_path / "real.npz", {"arr_0": pictures(40, seed=1)})
    return tmp_path / "samples.npz", tmp_path / "real.npz"


def test_a_made_reference_has_adms_layout_and_gives_the_same_figures(sets, tmp_path):
    samples, real = sets
    folder = write_folder(tmp_path / "folder", pictures(40, seed=1))
    extractor = TinyExtractor()
    make_reference(folder, tmp_path / "adm.npz", extractor, batch_size=16, progress=False)
    with np.load(tmp_path / "adm.npz") as made:
        np.testing.assert_array_equal(made["arr_0"], pictures(40, seed=1))
        features = extractor(pictures(40, seed=1))
        np.testing.assert_allclose(made["mu"], features.pool.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(made["sigma"], np.cov(features.pool.astype(np.float64), rowvar=False), rtol=1e-9)
        np.testing.assert_allclose(
            made["sigma_s"], np.cov(features.spatial.astype(np.float64), rowvar=False), rtol=1e-9
        )
    figures = [
        evaluate_samples(samples, path, extractor, progress=False) for path in (tmp_path / "adm.npz", real, folder)
    ]
    for name in ("FID", "sFID", "IS", "precision", "recall", "KID"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-9) == figures[2][name], name


def test_adms_statistics_are_used_for_inception_only(sets, tmp_path):
    """A file whose mu and sigma are of other pictures than its arr_0, as in ADM's 256 batch."""
    samples, _ = sets
    everything = collect_features(open_images(samples), TinyExtractor(), ("pool", "spatial"), batch_size=16)
    arrays = {"arr_0": pictures(12, seed=1), **references.adm_statistics(everything)}
    write_npz(tmp_path / "adm.npz", arrays)
    extractor = TinyExtractor()
    result = evaluate_samples(samples, tmp_path / "adm.npz", extractor, progress=False)
    assert result["FID"] == pytest.approx(0, abs=1e-6) and result["sFID"] == pytest.approx(0, abs=1e-6)
    assert (result["num_reference"], result["num_reference_rows"]) == (None, 12) and extractor.seen == 50 + 12
    assert evaluate_samples(samples, tmp_path / "adm.npz", NamelessExtractor(), progress=False)["FD-nameless"] > 1
    extractor = TinyExtractor()
    evaluate_samples(samples, tmp_path / "adm.npz", extractor, metrics=["FID", "sFID"], progress=False)
    assert extractor.seen == 50  # its pictures are not needed


def test_a_file_of_statistics_alone_gives_what_it_can(sets, tmp_path):
    samples, real = sets
    everything = collect_features(open_images(real), TinyExtractor(), ("pool",), batch_size=16)
    write_npz(tmp_path / "statistics.npz", references.adm_statistics(everything))
    result = evaluate_samples(samples, tmp_path / "statistics.npz", TinyExtractor(), progress=False)
    assert {name for name, value in result.items() if isinstance(value, float)} == {"FID", "IS", "IS_std"}
    for metric in ("recall", "sFID"):
        with pytest.raises(ValueError, match=r"statistics.npz holds no pictures, only Inception statistics"):
            evaluate_samples(samples, tmp_path / "statistics.npz", TinyExtractor(), metrics=[metric], progress=False)


def test_a_reference_made_with_other_weights_is_refused(sets, tmp_path):
    samples, real = sets
    other = TinyExtractor()
    other.weights_hash = "8" * 64
    make_reference(real, tmp_path / "adm.npz", other, batch_size=16, progress=False)
    with pytest.raises(ValueError, match=r"adm.npz was made with other Inception weights \(88888888…\)"):
        evaluate_samples(samples, tmp_path / "adm.npz", TinyExtractor(), progress=False)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_a_large_reference_keeps_some_of_its_pictures(tmp_path, kind):
    pixels = pictures(30)
    source = tmp_path / "all.npz"
    write_npz(source, {"arr_0": pixels}) if kind == "npz" else write_folder(source, pixels)
    make_reference(source, tmp_path / "some.npz", TinyExtractor(), batch_size=8, most=11, progress=False)
    kept = open_images(tmp_path / "some.npz")
    assert kept.count == 11
    numbers = np.flatnonzero(references.chosen_pictures(30, 11))
    np.testing.assert_array_equal(np.concatenate(list(kept.batches(4))), pixels[numbers])
    with np.load(tmp_path / "some.npz") as made:
        np.testing.assert_allclose(made["mu"], TinyExtractor()(pixels).pool.mean(axis=0), rtol=1e-6)


def test_a_made_reference_of_few_pictures_is_warned_about(sets, tmp_path):
    """Its record says how many pictures are behind its statistics; ADM's own files do not say."""
    samples, real = sets
    extractor = TinyExtractor()
    make_reference(real, tmp_path / "made.npz", extractor, batch_size=16, progress=False)
    extractor.width = 6
    result = evaluate_samples(samples, tmp_path / "made.npz", extractor, metrics=["FID"], progress=False)
    assert result["num_reference"] == 40 and result["warnings"] == []
    make_reference(write_folder(tmp_path / "few", pictures(5)), tmp_path / "few.npz", extractor, batch_size=16)
    result = evaluate_samples(samples, tmp_path / "few.npz", extractor, metrics=["FID"], progress=False)
    (warning,) = result["warnings"]
    assert result["num_reference"] == 5 and "FID of 5 reference pictures is biased upwards" in warning


@pytest.mark.parametrize("name", ["mu", "sigma", "mu_s", "sigma_s"])
@pytest.mark.parametrize("damage", ["nan", "width"])
def test_statistics_that_no_comparison_can_use_are_found_before_any_picture_is_looked_at(sets, tmp_path, name, damage):
    samples, real = sets
    everything = collect_features(open_images(real), TinyExtractor(), ("pool", "spatial"), batch_size=16)
    arrays = {"arr_0": pictures(12), **references.adm_statistics(everything)}
    if damage == "nan":
        arrays[name] = np.full_like(arrays[name], np.nan)
    else:
        arrays[name] = np.ones((3,) * arrays[name].ndim)
    write_npz(tmp_path / "adm.npz", arrays)
    extractor = TinyExtractor()
    width = 4 if name.endswith("_s") else 6
    with pytest.raises(ValueError, match=rf"adm.npz: mu.* are no finite mean and covariance of {width} features"):
        evaluate_samples(samples, tmp_path / "adm.npz", extractor, progress=False)
    assert extractor.seen == 0


def test_what_a_reference_cannot_give_is_found_before_any_picture_is_looked_at(sets, tmp_path):
    samples, real = sets
    extractor = TinyExtractor()
    everything = collect_features(open_images(real), TinyExtractor(), ("pool",), batch_size=16)
    write_npz(tmp_path / "adm.npz", {"arr_0": pictures(12), **references.adm_statistics(everything)})
    with pytest.raises(ValueError, match="mu and sigma, but no mu_s and sigma_s: it cannot give sFID"):
        evaluate_samples(samples, tmp_path / "adm.npz", extractor, metrics=["sFID"], progress=False)
    write_npz(tmp_path / "three.npz", {"arr_0": pictures(3)})
    with pytest.raises(ValueError, match="precision-recall needs at least 4 pictures of the reference, not 3"):
        evaluate_samples(samples, tmp_path / "three.npz", extractor, progress=False)
    with pytest.raises(ValueError, match="IS needs at least 10 samples, not 3"):
        evaluate_samples(tmp_path / "three.npz", real, extractor, metrics=["IS"], progress=False)
    assert extractor.seen == 0


@pytest.mark.parametrize("statistics", [False, True])
def test_precision_and_recall_take_as_many_real_pictures_as_adms_batches_hold(sets, tmp_path, monkeypatch, statistics):
    """A fixed choice of a plain file or folder; a file in ADM's layout has made its choice."""
    samples, real = sets
    monkeypatch.setattr(references, "ADM_PICTURES", 15)
    if statistics:
        make_reference(real, tmp_path / "made.npz", TinyExtractor(), batch_size=16, most=30, progress=False)
        real = tmp_path / "made.npz"
    result = evaluate_samples(samples, real, TinyExtractor(), progress=False)
    assert result["num_reference_rows"] == (30 if statistics else 15)
    assert result["num_reference"] == 40
    features = Reference(real).features(TinyExtractor(), ["pool_rows"], batch_size=16, progress=False)
    numbers = range(30) if statistics else np.flatnonzero(references.chosen_pictures(40, 15))
    seen = TinyExtractor()(next(open_images(real).chosen(list(numbers), 40))).pool
    np.testing.assert_allclose(features.pool_rows, seen, rtol=1e-6)


@pytest.mark.parametrize("damage", ["flipped", "without rows", "not an npz"])
def test_a_damaged_cache_is_as_good_as_none(sets, tmp_path, damage):
    samples, real = sets
    expected = evaluate_samples(samples, real, TinyExtractor(), progress=False)
    (kept,) = tmp_path.glob("real.npz.tiny-*.npz")
    data = bytearray(kept.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 255
        kept.write_bytes(data)
    elif damage == "without rows":
        write_npz(kept, {"count": np.array(40), "mu": np.ones(6)})
    else:
        kept.write_bytes(data.replace(b"(6, 6)", b"(6, 6("))
    extractor = TinyExtractor()
    assert evaluate_samples(samples, real, extractor, progress=False) == expected
    assert extractor.seen == 90


def test_a_reference_given_opened_is_hashed_once(sets, monkeypatch):
    samples, real = sets
    hashed, opened = [], Reference(real)
    hash_of = images.file_hash
    monkeypatch.setattr(images, "file_hash", lambda file: hashed.append(file) or hash_of(file))
    for _ in range(3):
        evaluate_samples(samples, opened, NamelessExtractor(), progress=False)
    assert hashed == [real]
