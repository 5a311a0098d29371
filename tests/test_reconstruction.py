"""Figures of a tokenizer: equal to direct formulas, whatever the batch size and the source; bad input is named."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from llamagen_unitok.evaluation.codebooks import count_codes, jensen_shannon_bits, perplexity, usage
from llamagen_unitok.evaluation.images import seeded_subset
from llamagen_unitok.evaluation.picture_quality import LPIPS_TRUNKS, load_lpips, ssim
from llamagen_unitok.evaluation.reconstruction import (
    ReconstructionDistance,
    ReconstructionSettings,
    error_map,
    reconstruct,
    worst_and_typical,
)
from llamagen_unitok.runtime.flags import Parser, add_flags, settings_from
from tests.conftest import tiny_tokenizer
from tests.tiny_extractor import TinyExtractor
from tokenizer.images import adm_centre_crop, to_uint8, to_unit

SIDE, COUNT = 48, 7


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def pictures():
    """Smooth and noisy pictures, uint8 (N, H, W, 3)."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (COUNT, SIDE, SIDE, 3)).astype(float)
    return np.stack([gaussian_filter(p, (i, i, 0)) for i, p in enumerate(noise)]).round().astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures):
    """The pictures in a folder without subfolders."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def direct_ssim(x, y):
    """Wang et al., equation 13, one channel at a time, with scipy's Gaussian; where the window fits."""

    def windowed(a):
        return gaussian_filter(a, 1.5, radius=5)

    values = []
    for channel in range(3):
        a, b = x[..., channel].astype(float), y[..., channel].astype(float)
        ma, mb = windowed(a), windowed(b)
        va, vb, cov = windowed(a * a) - ma * ma, windowed(b * b) - mb * mb, windowed(a * b) - ma * mb
        c1, c2 = 2.55**2, 7.65**2
        index = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
        values.append(index[5:-5, 5:-5])
    return np.mean(values)


def test_ssim_is_the_direct_formula(pictures):
    other = np.roll(pictures, 1, axis=0)
    ours = ssim(torch.from_numpy(pictures).movedim(-1, 1), torch.from_numpy(other).movedim(-1, 1))
    wanted = [direct_ssim(x, y) for x, y in zip(pictures, other, strict=True)]
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=0, atol=1e-12)
    assert max(wanted) - min(wanted) > 0.05
    equal = ssim(torch.from_numpy(pictures).movedim(-1, 1), torch.from_numpy(pictures).movedim(-1, 1))
    np.testing.assert_allclose(equal.numpy(), 1, atol=1e-12)


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


@given(codes=st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2), min_size=1, max_size=30))
@settings(deadline=None, max_examples=40)
def test_codebook_figures_are_scipys(codes):
    codes = np.array(codes)
    counts = count_codes(codes[None], 7)
    for k in range(2):
        wanted = [(codes[:, k] == entry).sum() for entry in range(7)]
        assert counts[k].tolist() == wanted
        assert usage(counts)[k] == len(set(codes[:, k].tolist())) / 7
        assert perplexity(counts)[k] == pytest.approx(math.exp(entropy(wanted)))
    uniform = np.full((2, 7), 3)
    wanted = [jensenshannon(row, uniform[0], base=2) ** 2 for row in counts]
    np.testing.assert_allclose(jensen_shannon_bits(counts, uniform), wanted, atol=1e-12)
    np.testing.assert_allclose(jensen_shannon_bits(counts, 5 * counts), 0, atol=1e-12)


def test_histograms_without_a_common_entry_are_one_bit_apart():
    assert jensen_shannon_bits(np.array([[1, 2, 0, 0]]), np.array([[0, 0, 5, 1]])) == pytest.approx([1])


def test_codes_outside_the_codebook_are_refused():
    with pytest.raises(ValueError, match="0 to 7 do not fit codebooks of 7"):
        count_codes(np.array([[0, 7]]), 7)


def test_figures_are_those_of_one_picture_after_the_other(tokenizer, pictures, folder):
    figures = reconstruct(tokenizer, ReconstructionSettings(folder, batch_size=3))
    psnrs, ssims, codes = [], [], []
    for picture in pictures:
        image = to_unit(picture)[None]
        again = to_uint8(tokenizer.reconstruct(image))[0]
        psnrs.append(10 * math.log10(255**2 / np.mean((picture.astype(float) - again) ** 2)))
        ssims.append(direct_ssim(picture, again))
        codes.append(tokenizer.encode(image)[0].numpy())
    codes = np.concatenate(codes)
    for name, values, tolerance in (("psnr_db", psnrs, 1e-4), ("ssim", ssims, 1e-6)):
        assert figures[name]["mean"] == pytest.approx(np.mean(values), abs=tolerance)
        assert figures[name]["median"] == pytest.approx(np.median(values), abs=tolerance)
        assert figures[name]["worst"] == pytest.approx(min(values), abs=tolerance)
    books = figures["codebooks"]
    assert books["codes_per_codebook"] == len(codes) == COUNT * 9
    for k in range(3):
        shares = np.bincount(codes[:, k], minlength=11)
        assert books["usage"][k] == (shares > 0).mean()
        assert books["perplexity"][k] == pytest.approx(math.exp(entropy(shares)))
    assert figures["pictures"] == figures["of_pictures"] == COUNT
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def numbers(figures):
    return {name: figures[name] for name in ("psnr_db", "ssim")} | {"perplexity": figures["codebooks"]["perplexity"]}


@pytest.mark.parametrize("batch_size", [1, 2, 7, 20])
def test_figures_do_not_depend_on_the_batch_size(tokenizer, folder, batch_size):
    ours = numbers(reconstruct(tokenizer, ReconstructionSettings(folder, batch_size=batch_size)))
    wanted = numbers(reconstruct(tokenizer, ReconstructionSettings(folder, batch_size=4)))
    for name in ("psnr_db", "ssim"):
        assert ours[name] == pytest.approx(wanted[name], abs=1e-4)  # a pixel may round the other way
    assert ours["perplexity"] == wanted["perplexity"]


def test_observers_get_every_picture_once_and_in_order(tokenizer, pictures, folder):
    seen, counted = [], []
    reconstruct(
        tokenizer,
        ReconstructionSettings(folder, batch_size=3),
        observers=[lambda *batch: seen.append(batch), lambda x, _: counted.append(len(x))],
    )
    assert counted == [3, 3, 1]
    originals, again = (np.concatenate(part) for part in zip(*seen, strict=True))
    np.testing.assert_array_equal(originals, pictures)
    wanted = to_uint8(tokenizer.reconstruct(to_unit(pictures)))
    assert again.dtype == np.uint8 and np.abs(again.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("limit", [None, 4])
def test_an_npz_gives_what_a_folder_gives(tmp_path, tokenizer, pictures, folder, limit):
    np.savez(tmp_path / "pictures.npz", arr_0=pictures, label=np.arange(COUNT))
    figures = [
        reconstruct(tokenizer, ReconstructionSettings(source, limit=limit, subset_seed=5, batch_size=2))
        for source in (folder, tmp_path / "pictures.npz")
    ]
    assert figures[0] == {**figures[1], "images": str(folder)}
    assert figures[0]["pictures"] == (limit or COUNT) and figures[0]["subset_seed"] == (5 if limit else None)


def test_figures_say_of_which_pixels_they_are(tokenizer, pictures, folder):
    figures = [reconstruct(tokenizer, ReconstructionSettings(folder, limit=n, batch_size=n)) for n in (COUNT, 3)]
    assert figures[0]["pixels_hash"] == hashlib.sha256(pictures.tobytes()).hexdigest() != figures[1]["pixels_hash"]


def test_a_distance_of_few_pictures_is_warned_about_and_features_that_are_not_finite_are_refused(pictures):
    distance = ReconstructionDistance(TinyExtractor())
    distance(pictures[:3], pictures[3:6])
    distance(pictures[3:6], pictures[:3])
    (warning,) = distance.warnings()
    assert "rFID of 6 pictures is biased upwards" in warning and distance.figures()["rFID"] > -1e-6
    distance(pictures[:1], pictures[:1])
    assert distance.warnings() == []

    class Broken(TinyExtractor):
        def __call__(self, pixels):
            return super().__call__(pixels)._replace(pool=np.full((len(pixels), 6), np.nan, np.float32))

    with pytest.raises(ValueError, match="originals: the features of picture 0 are not finite"):
        ReconstructionDistance(Broken())(pictures[:2], pictures[:2])


def test_subfolders_are_read_too(tmp_path, tokenizer, pictures, folder):
    for index, picture in enumerate(pictures):
        (tmp_path / str(index)).mkdir()
        Image.fromarray(picture).save(tmp_path / str(index) / "a.png")
    flat, deep = (reconstruct(tokenizer, ReconstructionSettings(source)) for source in (folder, tmp_path))
    assert flat == {**deep, "images": str(folder)}


def test_subsets_are_seeded_ascending_and_without_repetition():
    subset = seeded_subset(100, 30, seed=1)
    assert (np.diff(subset) > 0).all() and len(subset) == 30 and 0 <= subset[0] and subset[-1] < 100
    assert np.array_equal(subset, seeded_subset(100, 30, seed=1))
    assert not np.array_equal(subset, seeded_subset(100, 30, seed=2))
    assert seeded_subset(5, 9, seed=0).tolist() == seeded_subset(5, None, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_the_adm_crop_halves_by_boxes_and_keeps_the_middle():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    large = small.repeat(4, axis=0).repeat(4, axis=1)  # box averages give it back exactly, bicubic does not
    crop = np.asarray(adm_centre_crop(Image.fromarray(large), 20))
    np.testing.assert_array_equal(crop, small[:, 5:25])
    same = Image.fromarray(small[:20, :20])
    assert np.array_equal(np.asarray(adm_centre_crop(same, 20)), small[:20, :20])


@given(width=st.integers(1, 120), height=st.integers(1, 120), size=st.integers(1, 48))
@settings(deadline=None, max_examples=60)
def test_the_adm_crop_has_its_size_and_no_border(width, height, size):
    crop = adm_centre_crop(Image.new("RGB", (width, height), (200, 100, 50)), size)
    assert crop.size == (size, size)
    assert np.abs(np.asarray(crop).astype(int) - (200, 100, 50)).max() <= 1


def test_pictures_of_other_sizes_are_cropped(tmp_path, tokenizer):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 131, 3), dtype=np.uint8))
    picture.save(tmp_path / "wide.png")
    seen = []
    reconstruct(tokenizer, ReconstructionSettings(tmp_path), observers=[lambda x, _: seen.append(x)])
    np.testing.assert_array_equal(seen[0][0], np.asarray(adm_centre_crop(picture, SIDE)))


@given(values=st.lists(st.floats(0, 100), min_size=1, max_size=12), count=st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_worst_and_typical_pictures(values, count):
    chosen = worst_and_typical(np.array(values), count)
    rows = [row for _, row in chosen]
    assert len(set(rows)) == len(rows) == min(len(values), 2 * count)
    worst = [row for kind, row in chosen if kind == "worst"]
    typical = [row for kind, row in chosen if kind == "typical"]
    assert sorted(values)[: len(worst)] == [values[row] for row in worst]
    median = np.median(values)
    left = [abs(values[row] - median) for row in range(len(values)) if row not in rows]
    assert all(abs(values[row] - median) <= distance for row in typical for distance in left)


def test_the_sheet_shows_the_worst_picture_first(tmp_path, tokenizer, pictures, folder):
    sheet = tmp_path / "sheet.png"
    figures = reconstruct(tokenizer, ReconstructionSettings(folder, sheet=sheet, shown=2, batch_size=2))
    assert figures["sheet"] == str(sheet) and [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    again = to_uint8(tokenizer.reconstruct(to_unit(pictures)))
    errors = ((pictures.astype(float) - again) ** 2).mean(axis=(1, 2, 3))
    worst = int(errors.argmax())
    drawn = np.asarray(Image.open(sheet))
    places = np.argwhere((drawn == pictures[worst][0, 0]).all(axis=2))
    found = [(y, x) for y, x in places if np.array_equal(drawn[y : y + SIDE, x : x + SIDE], pictures[worst])]
    assert len(found) == 1 and found[0][1] < SIDE
    y, x = found[0]
    beside = drawn[y : y + SIDE, x + SIDE + 6 : x + 2 * SIDE + 6]
    assert np.abs(beside.astype(int) - again[worst]).max() <= 1
    right = drawn[y : y + SIDE, x + 2 * (SIDE + 6) : x + 3 * SIDE + 12]
    np.testing.assert_array_equal(right, error_map(pictures[worst], beside))


def test_the_error_map_is_black_where_nothing_differs_and_grows_with_the_error():
    original = np.full((4, 4, 3), 100, dtype=np.uint8)
    image = original.copy()
    image[0, 0, 1], image[1, 1, 2], image[2, 2, 0] = 110, 60, 255  # 10, 40, 155
    brightness = error_map(original, image).astype(int).sum(axis=2)
    assert brightness[3, 3] < 10 < brightness[0, 0] < brightness[1, 1] < brightness[2, 2]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder where torch.hub keeps what it fetched."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("network", LPIPS_TRUNKS)
def test_lpips_without_its_weights_is_left_out_with_the_reason(hub, tokenizer, folder, network):
    figures = reconstruct(tokenizer, ReconstructionSettings(folder, limit=1, lpips_network=network))
    assert figures["lpips"] is None
    assert "not on disk" in figures["lpips_left_out"] and str(hub) in figures["lpips_left_out"]


def test_lpips_is_the_packages(hub, tokenizer, pictures, folder):
    lpips = pytest.importorskip("lpips")
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    torch.manual_seed(0)
    name = SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    torch.save(squeezenet1_1().state_dict(), hub / name)
    figures = reconstruct(tokenizer, ReconstructionSettings(folder, lpips_network="squeeze", batch_size=3))
    reference = lpips.LPIPS(net="squeeze", verbose=False).eval()
    again = to_uint8(tokenizer.reconstruct(to_unit(pictures)))
    with torch.no_grad():
        wanted = [reference(to_unit(x)[None], to_unit(y)[None]).item() for x, y in zip(pictures, again, strict=True)]
        distance, reason = load_lpips("squeeze", torch.device("cpu"))
        equal = distance(to_unit(pictures), to_unit(pictures))
    assert figures["lpips"]["network"] == "squeeze" and "lpips_left_out" not in figures and reason == ""
    assert figures["lpips"]["mean"] == pytest.approx(np.mean(wanted), rel=1e-4) and min(wanted) > 0
    assert figures["lpips"]["worst"] == pytest.approx(max(wanted), rel=1e-4)
    assert equal.abs().max() == 0

    (hub / name).write_bytes(b"cut short")
    figures = reconstruct(tokenizer, ReconstructionSettings(folder, limit=1, lpips_network="squeeze"))
    assert figures["lpips"] is None and name in figures["lpips_left_out"]


def test_bad_input_is_one_clear_line(tmp_path, tokenizer, pictures):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    Image.fromarray(pictures[0]).save(tmp_path / "broken" / "good.png")
    (tmp_path / "broken" / "bad.png").write_bytes(b"no picture")
    np.savez(tmp_path / "floats.npz", arr_0=pictures / 255)
    np.savez(tmp_path / "other.npz", images=pictures, more=pictures)
    np.savez(tmp_path / "none.npz", arr_0=pictures[:0])
    (tmp_path / "file.txt").write_text("text")
    for name, message in {
        "empty": r"empty holds no pictures",
        "broken": r"bad\.png cannot be read",
        "floats.npz": r"floats\.npz: .*uint8.*arr_0 is float64",
        "none.npz": r"none\.npz: .*arr_0 is uint8 \(0,",
        "other.npz": r"other\.npz: .*several \(images, more\)",
        "file.txt": r"file\.txt cannot be read as an \.npz file",
        "missing": r"missing is not there",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            reconstruct(tokenizer, ReconstructionSettings(tmp_path / name, batch_size=1))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"--sheet .*\.png"):
        reconstruct(tokenizer, ReconstructionSettings(tmp_path / "broken", sheet=tmp_path / "sheet.txt"))
    damaged = tiny_tokenizer()
    next(damaged.decoder.parameters()).data.fill_(math.nan)
    np.savez(tmp_path / "good.npz", arr_0=pictures)
    with pytest.raises(ValueError, match="not finite"):
        reconstruct(damaged, ReconstructionSettings(tmp_path / "good.npz"))


@pytest.mark.parametrize("name", ["limit", "batch_size", "shown", "subset_seed", "workers"])
def test_impossible_settings_name_their_flag(tmp_path, name):
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        ReconstructionSettings(tmp_path, **{name: -1})


def test_flags_are_made_from_the_settings(tmp_path):
    parser = Parser("test")
    add_flags(parser, ReconstructionSettings)
    flags = parser.parse_args(["--reconstruct", str(tmp_path), "--limit", "5", "--lpips-network", "vgg"])
    assert settings_from(ReconstructionSettings, flags) == ReconstructionSettings(
        tmp_path, limit=5, lpips_network="vgg"
    )
