"""evaluate.py: references, extractors, one pass over the samples, equal figures from many processes, clear refusals."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from llamagen_unitok.evaluation import images, references
from llamagen_unitok.evaluation.extractors import EXTRACTORS
from llamagen_unitok.evaluation.figures import BiasedFigureWarning, evaluate_samples
from llamagen_unitok.evaluation.images import open_images
from llamagen_unitok.evaluation.metrics import METRICS
from llamagen_unitok.evaluation.npz import write_npz
from llamagen_unitok.evaluation.provenance import as_array
from llamagen_unitok.runtime import flags
from modelfolder import file_hash
from tests.tiny_extractor import NamelessExtractor, TinyExtractor, pictures, write_folder
from tokenizer.images import adm_centre_crop

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.filterwarnings("ignore::llamagen_unitok.evaluation.figures.BiasedFigureWarning"),
    pytest.mark.usefixtures("own_cache"),
]


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


def test_hidden_files_are_no_pictures_and_an_array_of_any_name_is_cropped_as_a_folder_is(tmp_path):
    pixels = pictures(9, size=12)
    folder = write_folder(tmp_path / "folder", pixels)
    (folder / "000" / "._00000.png").write_bytes(b"what a Mac leaves beside each file")
    np.savez(tmp_path / "named.npz", images=pixels)
    sources = [open_images(path, crop=6) for path in (folder, tmp_path / "named.npz")]
    for source in sources:
        assert (source.count, source.size) == (9, (6, 6))
        cropped = np.concatenate(list(source.batches(4)))
        wanted = [np.asarray(adm_centre_crop(Image.fromarray(one), 6)) for one in pixels]
        np.testing.assert_array_equal(cropped, wanted)
        np.testing.assert_array_equal(np.concatenate(list(source.chosen([0, 3, 4, 8], 3))), cropped[[0, 3, 4, 8]])
    assert [source.name_of(8) for source in sources] == ["000/00008.png", "images[8]"]


def test_the_next_batch_of_a_folder_is_read_while_one_is_used(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "folder", pictures(6))
    second_batch_read = threading.Event()
    load = images.load_rgb

    def watched(file):
        picture = load(file)
        if file.name == "00003.png":
            second_batch_read.set()
        return picture

    monkeypatch.setattr(images, "load_rgb", watched)
    batches = open_images(folder).batches(2)
    next(batches)
    assert second_batch_read.wait(timeout=30)


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
from modelfolder import file_hash
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


# The script


def test_the_script_prints_figures_and_writes_where_they_come_from(sets, tiny, tmp_path, capsys):
    samples, real = sets
    assert run(samples, "--reference", real, "--json", tmp_path / "figures.json", "--device", "cpu") == 0
    out, err = capsys.readouterr()
    record = json.loads((tmp_path / "figures.json").read_text())
    expected = evaluate_samples(samples, real, TinyExtractor(), progress=False)
    assert record["figures"] == {name: value for name, value in expected.items() if isinstance(value, float)}
    assert record["samples"] == {
        "name": "samples.npz", "hash": file_hash(samples), "count": 50, "size": [8, 8], "record": {"seed": 3}
    }  # fmt: skip
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
    assert "real.npz has pictures of 8×8 pixels, the samples of 16×16" in refusal(capsys, bad, *against)
    assert "is not there" in refusal(capsys, tmp_path / "none.npz", *against)
    assert "is not there" in refusal(capsys, samples, "--reference", tmp_path / "none")
    assert "--reference are needed" in refusal(capsys, samples)
    assert "no metric 'FIT'" in refusal(capsys, samples, *against, "--metrics", "FIT")
    assert "--batch-size must be" in refusal(capsys, samples, *against, "--batch-size", 0)
    assert "--json" in refusal(capsys, samples, *against, "--json", tmp_path / "figures.txt")
    assert "--make-reference needs --out" in refusal(capsys, "--make-reference", real)
    making = ("--make-reference", real, "--out", tmp_path / "made.npz")
    assert "--metrics is for measuring samples" in refusal(capsys, *making, "--metrics", "FID")
    assert "leave out" in refusal(capsys, samples, *making)
    assert "--json, --reference is for measuring" in refusal(capsys, *making, *against, "--json", tmp_path / "a.json")
    assert "--out is for making a reference" in refusal(capsys, samples, *against, "--out", tmp_path / "made.npz")
    assert "--pictures is for making a reference" in refusal(capsys, samples, *against, "--pictures", 9)

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


def test_reconstruction_warns_of_few_pictures_and_says_of_which_pixels_it_is(sets, tiny, bundle, tmp_path, capsys):
    folder = write_folder(tmp_path / "five", pictures(5, size=48))
    record = tmp_path / "figures.json"
    arguments = ("--reconstruct", folder, "--tokenizer", bundle, "--features", "inception", "--json", record)
    assert run(*arguments, "--device", "cpu") == 0
    assert "warning: rFID of 5 pictures is biased upwards" in capsys.readouterr().err
    found = json.loads(record.read_text())
    assert len(found["warnings"]) == 1
    assert found["figures"]["pixels_hash"] == hashlib.sha256(pictures(5, size=48).tobytes()).hexdigest()


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("what", ["--reconstruct", "--diagnose"])
def test_what_one_process_measures_is_refused_under_torchrun_by_the_first_alone(monkeypatch, capsys, rank, what):
    monkeypatch.setattr(flags, "TELLING_SEC", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    rest = {"--reconstruct": ("--tokenizer", "none"), "--diagnose": ("--codes", "none")}[what]
    assert run(what, "none", *rest) == 2
    told = f"{what} runs in one process: start it with python, not with torchrun\n"
    assert capsys.readouterr().err == (told if rank == "0" else "")


@pytest.mark.parametrize("what", ["--reconstruct", "--diagnose"])
def test_weights_for_a_network_of_ones_own_are_taken_or_refused_in_every_mode(bundle, tmp_path, capsys, what):
    rest = {"--reconstruct": ("--tokenizer", bundle), "--diagnose": ("--codes", tmp_path)}[what]
    weights = ("--inception-weights", tmp_path / "none.pth")
    source = bundle if what == "--diagnose" else tmp_path
    assert "none.pth is not there" in refusal(capsys, what, source, *rest, "--features", "inception", *weights)
    assert "--inception-weights goes with --features inception" in refusal(capsys, what, source, *rest, *weights)


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


LARGE_RUN = """
import json, resource, sys
import numpy as np
from llamagen_unitok.evaluation.features import Features
from llamagen_unitok.evaluation.figures import evaluate_samples
from llamagen_unitok.evaluation.npz import ArrayStream, write_npz

class Wide:
    name, frechet_name, weights_hash = "wide", "FID", "0" * 64
    width, spatial_width, has_logits = 2048, 2023, True

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
