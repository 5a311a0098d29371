"""evaluate.py: references, extractors, one pass over the samples, equal figures from many processes, clear refusals."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from llamagen_unitok.evaluation import extractors, references
from llamagen_unitok.evaluation.extractors import EXTRACTORS, make_extractor
from llamagen_unitok.evaluation.features import collect_features
from llamagen_unitok.evaluation.figures import BiasedFigureWarning, evaluate_samples
from llamagen_unitok.evaluation.images import open_images
from llamagen_unitok.evaluation.metrics import METRICS
from llamagen_unitok.evaluation.npz import write_npz
from llamagen_unitok.evaluation.provenance import as_array
from llamagen_unitok.evaluation.references import make_reference
from tests.tiny_extractor import NamelessExtractor, TinyExtractor, pictures

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::llamagen_unitok.evaluation.figures.BiasedFigureWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is kept in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def sets(tmp_path):
    """(samples, reference) as .npz files of 50 and 40 pictures of 8×8."""
    write_npz(tmp_path / "samples.npz", {"arr_0": pictures(50), "record": as_array({"seed": 3})})
    write_npz(tmp_path / "real.npz", {"arr_0": pictures(40, seed=1)})
    return tmp_path / "samples.npz", tmp_path / "real.npz"


@pytest.fixture
def tiny(monkeypatch):
    """TinyExtractor in the place of Inception, for the script."""
    monkeypatch.setitem(EXTRACTORS, "inception", TinyExtractor)


def write_folder(folder: Path, pixels: np.ndarray) -> Path:
    for i, one in enumerate(pixels):
        file = folder / f"{i // 10:03d}" / f"{i:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(file)
    return folder


def run(*arguments) -> int:
    return evaluate.main([str(a) for a in arguments])


# Pictures


def test_a_folder_and_any_npz_give_the_same_pictures(tmp_path):
    pixels = pictures(25)
    folder = write_folder(tmp_path / "folder", pixels)
    (folder / "notes.txt").write_text("not a picture")
    np.savez(tmp_path / "named.npz", images=pixels, label=np.arange(25))
    np.savez_compressed(tmp_path / "arr_0.npz", arr_0=pixels, other=pixels)
    for path in (folder, tmp_path / "named.npz", tmp_path / "arr_0.npz"):
        source = open_images(path)
        assert (source.count, source.size) == (25, (8, 8))
        np.testing.assert_array_equal(np.concatenate(list(source.batches(7))), pixels)
        np.testing.assert_array_equal(np.concatenate(list(source.batches(7, 9, 20))), pixels[9:20])


def test_a_content_hash_changes_with_every_pixel_and_name(tmp_path):
    def hash_of(change=None):
        folder = write_folder(tmp_path / f"{change}", pictures(3))
        if change == "pixel":
            pixels = pictures(3)[1].copy()
            pixels[0, 0, 0] ^= 1
            Image.fromarray(pixels).save(folder / "000" / "00001.png")
        if change == "name":
            (folder / "000" / "00001.png").rename(folder / "000" / "00003.png")
        return open_images(folder).content_hash

    assert hash_of("same") == hash_of() and len({hash_of(), hash_of("pixel"), hash_of("name")}) == 3


# Figures


def test_each_sample_is_seen_once_and_a_reference_only_the_first_time(sets):
    samples, real = sets
    extractor = TinyExtractor()
    first = evaluate_samples(samples, real, extractor, progress=False)
    assert extractor.seen == 50 + 40
    assert {"FID", "sFID", "IS", "IS_std", "precision", "recall", "KID", "KID_std"} <= set(first)
    assert (first["num_samples"], first["num_reference"], first["num_reference_rows"]) == (50, 40, 40)
    assert evaluate_samples(samples, real, extractor, progress=False) == first
    assert extractor.seen == 50 + 40 + 50
    # another reference under the same name is another reference
    write_npz(real, {"arr_0": pictures(40, seed=2)})
    assert evaluate_samples(samples, real, extractor, progress=False)["FID"] != first["FID"]
    assert extractor.seen == 50 + 40 + 50 + 50 + 40


def test_other_weights_are_another_cache(sets):
    samples, real = sets
    evaluate_samples(samples, real, TinyExtractor(), progress=False)
    other = TinyExtractor()
    other.weights_hash = "8" * 64
    evaluate_samples(samples, real, other, progress=False)
    assert other.seen == 50 + 40


def test_a_read_only_folder_and_a_damaged_cache_only_cost_time(sets, monkeypatch, tmp_path):
    samples, real = sets
    expected = evaluate_samples(samples, real, TinyExtractor(), progress=False)
    (kept,) = tmp_path.glob("real.npz.tiny-*.npz")
    kept.write_bytes(kept.read_bytes()[:200])
    extractor = TinyExtractor()
    assert evaluate_samples(samples, real, extractor, progress=False) == expected
    assert extractor.seen == 90
    kept.unlink()

    def refuse(path, arrays):
        if path.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        write_npz(path, arrays)

    monkeypatch.setattr(references, "write_npz", refuse)
    evaluate_samples(samples, real, TinyExtractor(), progress=False)
    extractor = TinyExtractor()
    assert evaluate_samples(samples, real, extractor, progress=False) == expected
    assert extractor.seen == 50 and not kept.exists()
    assert len(list((tmp_path / "user-cache" / "llamagen-unitok").iterdir())) == 1


def test_figures_do_not_depend_on_the_batch_size(sets):
    samples, real = sets
    one = evaluate_samples(samples, real, TinyExtractor(), batch_size=64, progress=False)
    other = evaluate_samples(samples, real, TinyExtractor(), batch_size=7, progress=False)
    for name in one:
        if isinstance(one[name], float):
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name


def test_samples_that_are_the_reference_are_perfect(sets):
    samples, _ = sets
    result = evaluate_samples(samples, samples, TinyExtractor(), progress=False)
    assert result["FID"] == pytest.approx(0, abs=1e-6) and result["sFID"] == pytest.approx(0, abs=1e-6)
    assert result["precision"] == result["recall"] == 1


def test_figures_of_other_networks_have_names_of_their_own(sets):
    result = evaluate_samples(*sets, NamelessExtractor(), progress=False)
    figures = {name for name, value in result.items() if isinstance(value, float)}
    names = "FD IS IS_std precision recall KD KD_std"
    assert figures == {f"{n.removesuffix('_std')}-nameless{'_std' * n.endswith('_std')}" for n in names.split()}
    with pytest.raises(ValueError, match="gives no spatial features"):
        evaluate_samples(*sets, NamelessExtractor(), metrics=["sFID"], progress=False)


@pytest.mark.parametrize("asked", [["FID"], ["is"], ["recall"], ["KID", "sFID"], ["fd-nameless"]])
def test_only_the_metrics_asked_for_are_computed(sets, asked):
    extractor = NamelessExtractor() if asked == ["fd-nameless"] else TinyExtractor()
    result = evaluate_samples(*sets, extractor, metrics=asked, progress=False)
    keys = {name for name in METRICS if set(METRICS[name].gives) & {a.upper().replace("SFID", "sFID") for a in asked}}
    expected = {"recall": {"precision", "recall"}, "fd-nameless": {"FD-nameless"}}.get(asked[0])
    expected = expected or {figure for key in keys for figure in METRICS[key].gives}
    assert {name for name, value in result.items() if isinstance(value, float)} == expected
    if asked == ["is"]:
        assert extractor.seen == 50  # no reference is read for it
    with pytest.raises(ValueError, match=r"no metric 'fidelity': choose from FID, sFID, IS"):
        evaluate_samples(*sets, extractor, metrics=["fidelity"], progress=False)


def test_too_few_samples_for_the_network_are_warned_about(sets):
    extractor = TinyExtractor()
    with pytest.warns(BiasedFigureWarning, match="KID is over subsets of 40 pictures"):
        result = evaluate_samples(*sets, extractor, progress=False)
    assert not any("biased upwards" in text for text in result["warnings"])
    extractor.width = 50
    with pytest.warns(BiasedFigureWarning, match="FID of 50 samples is biased upwards: a covariance of 50 features"):
        evaluate_samples(*sets, extractor, metrics=["FID"], progress=False)


TWO_PROCESSES = """
import json, sys
import numpy as np
from llamagen_unitok.evaluation.figures import evaluate_samples
from llamagen_unitok.runtime.distributed import processes
from tests.tiny_extractor import TinyExtractor
samples, real, out = sys.argv[1:]
with processes("cpu") as world:
    extractor = TinyExtractor()
    result = evaluate_samples(samples, real, extractor, batch_size=4, progress=False, world=world)
    counts = world.gather(np.array([extractor.seen]))
    try:
        evaluate_samples(samples, real, extractor, metrics=["nothing"], progress=False, world=world)
    except ValueError as error:
        refused = str(error)
    try:
        world.share_outcome(lambda: int("x"))
    except ValueError as error:
        refused += str(error)
    if world.is_main:
        json.dump([result, [int(c[0]) for c in counts], refused], open(out, "w"))
"""


def test_processes_share_the_work_and_get_the_same_figures(sets, tmp_path):
    """2 processes, batches of 4: 13 of the samples make shares of 24 and 26, 10 of the reference 20 each."""
    samples, real = sets
    script = tmp_path / "figures.py"
    script.write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what torchrun sets, without the seconds that it takes to start itself
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(script), str(samples), str(real), str(tmp_path / "two.json")]
    started = [subprocess.Popen(command, env={**environment, "RANK": rank}) for rank in "01"]
    try:
        assert [process.wait(timeout=240) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    two, seen, refused = json.loads((tmp_path / "two.json").read_text())
    for kept in tmp_path.glob("real.npz.tiny-*.npz"):
        kept.unlink()
    one = evaluate_samples(samples, real, TinyExtractor(), batch_size=4, progress=False)
    assert seen == [24 + 20, 26 + 20]
    assert two.keys() == one.keys() and "nothing" in refused and "invalid literal" in refused
    for name, value in one.items():
        assert two[name] == (pytest.approx(value, rel=1e-10, abs=1e-12) if isinstance(value, float) else value), name


# References


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


# The script


def test_the_script_prints_figures_and_writes_where_they_come_from(sets, tiny, tmp_path, capsys):
    samples, real = sets
    assert run(samples, "--reference", real, "--json", tmp_path / "figures.json", "--device", "cpu") == 0
    out, err = capsys.readouterr()
    record = json.loads((tmp_path / "figures.json").read_text())
    expected = evaluate_samples(samples, real, TinyExtractor(), progress=False)
    assert record["figures"] == {name: value for name, value in expected.items() if isinstance(value, float)}
    assert record["samples"] == {"name": "samples.npz", "count": 50, "size": [8, 8], "record": {"seed": 3}}
    assert record["reference"] == {"name": "real.npz", "hash": open_images(real).content_hash, "count": 40, "rows": 40}
    assert record["extractor"] == {"name": "tiny", "weights_hash": "7" * 64, "width": 6}
    assert record["code_version"] and "command" in record
    assert f"FID        {expected['FID']:.6g}\n" in out and "50 samples" in out
    assert "warning: KID is over subsets of 40 pictures" in err and "Warning:" not in err


def test_the_script_makes_a_reference_and_uses_it(sets, tiny, tmp_path, capsys):
    samples, _ = sets
    folder = write_folder(tmp_path / "folder", pictures(20, seed=1))
    arguments = ["--make-reference", folder, "--out", tmp_path / "made.npz", "--pictures", 15, "--device", "cpu"]
    assert run(*arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'made.npz'}\n"
    assert run(samples, "--reference", tmp_path / "made.npz", "--metrics", "FID,recall", "--device", "cpu") == 0
    assert "recall" in capsys.readouterr().out


def refusal(capsys, *arguments) -> str:
    """The one line that the script says when it refuses."""
    assert run(*arguments, "--device", "cpu") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "picture/s" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_every_bad_input_is_one_clear_line(sets, tiny, tmp_path, capsys, monkeypatch):
    samples, real = sets
    bad = tmp_path / "bad.npz"
    against = ("--reference", real)
    bad.write_bytes(samples.read_bytes()[:-5000])
    assert "bad.npz cannot be read as an .npz file" in refusal(capsys, bad, *against)
    # the list of contents is whole, the pixels are not: what a copy that lost its middle looks like
    data = samples.read_bytes()
    bad.write_bytes(data[:3000] + data[6000:])
    assert "bad.npz" in refusal(capsys, bad, *against)
    np.savez(bad, arr_0=pictures(5).astype(np.float32))
    assert "arr_0 is float32 (5, 8, 8, 3)" in refusal(capsys, bad, *against)
    np.savez(bad, arr_0=pictures(5)[..., 0])
    assert "arr_0 is uint8 (5, 8, 8)" in refusal(capsys, bad, *against)
    np.savez(bad, a=pictures(5), b=pictures(5))
    assert "several (a, b)" in refusal(capsys, bad, *against)
    np.savez(bad, arr_0=pictures(20, size=16))
    assert "pictures of 16×16 pixels, but" in refusal(capsys, bad, *against)
    assert "is not there" in refusal(capsys, tmp_path / "none.npz", *against)
    assert "is not there" in refusal(capsys, samples, "--reference", tmp_path / "none")
    assert "--reference are needed" in refusal(capsys, samples)
    assert "no metric 'FIT'" in refusal(capsys, samples, *against, "--metrics", "FIT")
    assert "--batch-size must be" in refusal(capsys, samples, *against, "--batch-size", 0)
    assert "--json" in refusal(capsys, samples, *against, "--json", tmp_path / "figures.txt")
    assert "--make-reference needs --out" in refusal(capsys, "--make-reference", real)

    folder = write_folder(tmp_path / "folder", pictures(12))
    (folder / "001" / "00011.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert "00011.png cannot be read as a picture" in refusal(capsys, folder, *against)
    Image.fromarray(pictures(1, size=4)[0]).save(folder / "001" / "00011.png")
    assert "00011.png has 4×4 pixels, but" in refusal(capsys, folder, *against)
    (tmp_path / "empty").mkdir()
    assert "empty holds no pictures" in refusal(capsys, tmp_path / "empty", *against)

    class Broken(TinyExtractor):
        def __call__(self, pixels):
            features = super().__call__(pixels)
            features.spatial[1, 2] = np.nan
            return features

    monkeypatch.setitem(EXTRACTORS, "inception", Broken)
    assert "the features of picture 1 are not finite" in refusal(capsys, samples, *against, "--batch-size", 99)


# Extractors


def test_missing_inception_weights_without_network_name_the_file_and_the_place(sets, monkeypatch, tmp_path, capsys):
    def no_network(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    line = refusal(capsys, sets[0], "--reference", sets[1])
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    assert "https://github.com/toshas/torch-fidelity" in line and f"put it at {place}" in line
    assert "--inception-weights FILE" in line


def test_wrong_inception_weights_are_refused(sets, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    against = (sets[0], "--reference", sets[1], "--inception-weights", weights)
    assert "weights.pth is not there" in refusal(capsys, *against)
    torch.save({"a": torch.ones(1)}, weights)
    assert "is not the published weights-inception-2015-12-05-6726825d.pth" in refusal(capsys, *against)
    assert "goes with --features inception" in refusal(capsys, *against, "--features", "efficientnet-lite0")


def test_a_pickle_that_runs_code_is_not_run(tmp_path, monkeypatch):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Runs(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth cannot be read as weights"):
        make_extractor("inception", tmp_path / "weights.pth", check_hash=False)
    assert not (tmp_path / "ran").exists()


def test_the_table_names_networks_that_torch_fidelity_has():
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    assert set(EXTRACTORS) - {"inception", "efficientnet-lite0"} <= set(FEATURE_EXTRACTORS_REGISTRY)
    with pytest.raises(ValueError, match="no extractor 'resnet': choose from inception, efficientnet-lite0, vgg16"):
        make_extractor("resnet")


def test_another_network_of_torch_fidelity_goes_through_the_same_table(monkeypatch):
    import torch_fidelity.feature_extractor_vgg16 as module

    class SmallVGG(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            torch.manual_seed(0)
            first, second, last = torch.nn.Linear(3, 16), torch.nn.Linear(16, 12), torch.nn.Linear(12, 4)
            rest = torch.nn.ReLU(), torch.nn.Dropout()
            self.classifier = torch.nn.Sequential(first, *rest, second, *rest, last)

        def forward(self, x):
            return self.classifier(x.mean(dim=(2, 3)))

    monkeypatch.setattr(module, "torchvision_load_pretrained_vgg16", SmallVGG)
    extractor = make_extractor("vgg16")
    features = extractor(pictures(2))
    assert (extractor.name, extractor.frechet_name, extractor.width) == ("vgg16", "FD-vgg16", 12)
    assert features.pool.shape == (2, 12) and features.logits is features.spatial is None
    assert extractor.weights_hash == make_extractor("vgg16").weights_hash and len(extractor.weights_hash) == 64
    with pytest.raises(ValueError, match="takes no file of weights"):
        make_extractor("vgg16", Path("weights.pth"))


def test_efficientnet_gives_its_own_figures_offline(tmp_path, capsys):
    random = np.random.default_rng(0)
    for name in ("samples", "real"):
        write_npz(tmp_path / f"{name}.npz", {"arr_0": random.integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)})
    arguments = (tmp_path / "samples.npz", "--reference", tmp_path / "real.npz", "--features", "efficientnet-lite0")
    assert run(*arguments, "--json", tmp_path / "figures.json", "--device", "cpu") == 0
    record = json.loads((tmp_path / "figures.json").read_text())
    assert {"FD-EfficientNet", "IS-EfficientNet"} <= set(record["figures"])
    assert not {"FID", "sFID", "IS", "KID"} & set(record["figures"])
    assert "FD-EfficientNet of 11 samples is biased upwards" in capsys.readouterr().err
    extractor = make_extractor("efficientnet-lite0")
    pixels = random.integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    features = extractor(pixels)
    picture = Image.fromarray(pixels[1]).resize((224, 224), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.asarray(picture).copy()).float().permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        logits = extractor._network((image - 0.5) / 0.5)
    np.testing.assert_allclose(features.logits[1], logits[0].numpy(), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> Path:
    """Seeded random weights of torch-fidelity's Inception, scaled so that signals neither die nor grow."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **o: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.1)
    torch.nn.init.normal_(network.fc.weight, std=1)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


class AsTensors(torch.utils.data.Dataset):
    """Pictures for torch-fidelity: uint8 (3, H, W)."""

    def __init__(self, pixels):
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


def fidelity_and_ours(weights: Path, folder: Path, metrics: list[str], **asked) -> tuple[dict, dict]:
    """Figures of 16 samples against 14 real pictures, by torch-fidelity and by us."""
    from torch_fidelity import calculate_metrics

    sets = [pictures(n, seed, size=20) for n, seed in ((16, 8), (14, 9))]
    for name, pixels in zip(("samples", "real"), sets, strict=True):
        write_npz(folder / f"{name}.npz", {"arr_0": pixels})
    theirs = calculate_metrics(
        input1=AsTensors(sets[0]), input2=AsTensors(sets[1]), feature_extractor_weights_path=str(weights), cuda=False,
        feature_extractor="inception-v3-compat", batch_size=8, kid_subset_size=14, verbose=False, cache=False,
        save_cpu_ram=True, **asked,
    )  # fmt: skip
    extractor = make_extractor("inception", weights, check_hash=False)
    ours = evaluate_samples(
        folder / "samples.npz", folder / "real.npz", extractor, metrics=metrics, batch_size=8, progress=False
    )
    return theirs, ours


def check_all_but_fid(theirs: dict, ours: dict) -> None:
    assert ours["IS"] - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=1e-5)
    # the network does tell pictures apart; splits of one picture score 1, so the mean is little more
    assert ours["IS"] > 1 + 5e-4 and ours["precision"] > 0 and ours["recall"] > 0
    # float32 kernels on their side
    assert ours["KID"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)  # their mean is float32


def test_inception_figures_equal_torch_fidelity(inception_weights, tmp_path):
    metrics = ["IS", "KID", "precision-recall"]
    check_all_but_fid(*fidelity_and_ours(inception_weights, tmp_path, metrics, isc=True, kid=True, prc=True))


@pytest.mark.slow
def test_fid_and_all_other_figures_equal_torch_fidelity(inception_weights, tmp_path):
    theirs, ours = fidelity_and_ours(inception_weights, tmp_path, list(METRICS), isc=True, kid=True, prc=True, fid=True)
    check_all_but_fid(theirs, ours)
    assert ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours["sFID"] > 0


def test_spatial_features_are_seven_channels_of_mixed_6_channels_last(inception_weights):
    """The branch computed by hand, from its input: convolution, batch norm, ReLU."""
    extractor = make_extractor("inception", inception_weights, check_hash=False)
    inputs = []
    branch = extractor._network.Mixed_6d.branch1x1
    branch.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    features = extractor(pictures(2))
    assert features.pool.shape == (2, 2048) and features.logits.shape == (2, 1008)
    assert features.spatial.shape == (2, 2023)
    x = torch.einsum("oi,bihw->bhwo", branch.conv.weight[:7, :, 0, 0], inputs[0])
    norm = branch.bn
    x = (x - norm.running_mean[:7]) / (norm.running_var[:7] + norm.eps).sqrt() * norm.weight[:7] + norm.bias[:7]
    np.testing.assert_allclose(features.spatial, x.clamp_min(0).flatten(1).numpy(), rtol=1e-3, atol=1e-4)
    assert extractor.weights_hash == extractors.file_hash(inception_weights)
    weight = extractor._network.fc.weight.numpy()
    np.testing.assert_allclose(features.logits, features.pool @ weight.T, rtol=1e-3, atol=1e-4)


LARGE_RUN = """
import json, resource, sys
import numpy as np
from llamagen_unitok.evaluation.features import Features
from llamagen_unitok.evaluation.figures import evaluate_samples
from llamagen_unitok.evaluation.npz import ArrayStream, write_npz

class Wide:
    name, frechet_name, width, weights_hash = "wide", "FID", 2048, "0" * 64

    def __init__(self):
        random = np.random.default_rng(0)
        self.maps = [random.standard_normal((192, n), dtype=np.float32) for n in (2048, 2023, 1008)]

    def __call__(self, pixels):
        means = pixels.reshape(len(pixels), 8, 32, 8, 32, 3).mean(axis=(2, 4), dtype=np.float32).reshape(-1, 192)
        pool, spatial, logits = (np.tanh(means / 64 @ one) for one in self.maps)
        return Features(pool, spatial, logits)

def stream(count, seed):
    random = np.random.default_rng(seed)
    for first in range(0, count, 250):
        coarse = random.integers(0, 256, (min(250, count - first), 8, 8, 3), dtype=np.uint8)
        yield coarse.repeat(32, axis=1).repeat(32, axis=2)

folder, samples, real = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for name, count in (("samples", samples), ("real", real)):
    pixels = ArrayStream((count, 256, 256, 3), np.dtype(np.uint8), stream(count, count))
    write_npz(__import__("pathlib").Path(folder, name + ".npz"), {"arr_0": pixels})
result = evaluate_samples(folder + "/samples.npz", folder + "/real.npz", Wide(), progress=True)
result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(result))
"""


@pytest.mark.slow
def test_fifty_thousand_pictures_stay_below_four_gigabytes(tmp_path):
    """11.8 GB of pictures of 256×256 on disk, features as wide as Inception's from a stub, every figure."""
    command = [sys.executable, "-c", LARGE_RUN, str(tmp_path), "50000", "10000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    print(f"peak memory {result['peak_bytes'] / 1e9:.2f} GB")
    assert result["peak_bytes"] < 4e9
    assert (result["num_samples"], result["num_reference_rows"]) == (50_000, 10_000)
    assert all(np.isfinite(result[name]) for name in ("FID", "sFID", "IS", "precision", "recall", "KID"))
