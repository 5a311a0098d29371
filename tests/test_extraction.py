"""Extraction: every source gives the same pictures, crops are the published ones, shards the same for any processes."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import extract_codes
from llamagen_unitok.labels import ClassNames
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.training.data import CodeShards
from llamagen_unitok.training.sources import SourceOptions, expand_ranges, fingerprint, index_tar, open_source
from tests.conftest import tiny_tokenizer
from tokenizer.images import adm_centre_crop, to_unit

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
ALONE = World(0, 1, torch.device("cpu"))
CLASSES, PER_CLASS = 3, 3
NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """3 classes of 3 lossless pictures, 80 by 70 pixels."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for name in NAMES:
        (root / name).mkdir()
        for i in range(PER_CLASS):
            coarse = rng.integers(0, 255, (7, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((80, 70), Image.Resampling.BICUBIC).save(root / name / f"{i}.png")
    return root


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def tars(folder, tmp_path_factory):
    """The same pictures in two tar files; labels as .cls in the first and in .json in the second."""
    root = tmp_path_factory.mktemp("tars")
    paths = sorted(folder.glob("*/*.png"))
    for number, part in enumerate((paths[:5], paths[5:])):
        with tarfile.open(root / f"train-{number:03d}.tar", "w") as tar:
            for path in part:
                label = NAMES.index(path.parent.name)
                key = f"./{path.parent.name}.d/{path.stem}"  # the dot of a folder is not the key's end
                if number == 0:
                    add(tar, f"{key}.cls", str(label).encode())
                else:
                    add(tar, f"{key}.json", json.dumps({"label": label, "caption": "x"}).encode())
                add(tar, f"{key}.png", path.read_bytes())
    return root


@pytest.fixture(scope="module")
def parquet(folder, tmp_path_factory):
    """The same pictures as the hub's data sets hold them: struct of bytes and path, ClassLabel names in the schema."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    root = tmp_path_factory.mktemp("parquet")
    paths = sorted(folder.glob("*/*.png"))
    features = {"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}}
    for number, part in enumerate((paths[:4], paths[4:])):
        table = pyarrow.table(
            {
                "image": [{"bytes": path.read_bytes(), "path": path.name} for path in part],
                "label": [NAMES.index(path.parent.name) for path in part],
            }
        ).replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, root / f"train-{number}.parquet", row_group_size=2)
    return root


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return tiny_tokenizer().save_pretrained(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


def extract(source, tokenizer, out, *flags) -> int:
    arguments = ["--images", source, "--tokenizer", tokenizer, "--out", out, "--shard-size", 4, "--batch-size", 3]
    return extract_codes.main([str(a) for a in [*arguments, "--workers", 2, "--device", "cpu", *flags]])


@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_every_source_gives_the_pictures_of_the_folder_in_its_order(kind, folder, request):
    expected = open_source(folder, SourceOptions(), ALONE)
    source = open_source(request.getfixturevalue(kind), SourceOptions(), ALONE)
    assert source.labels.tolist() == expected.labels.tolist() == sorted(list(range(CLASSES)) * PER_CLASS)
    assert (source.class_names or NAMES) == NAMES == expected.class_names
    for index in (8, 0, 4, 3, 5):  # at random, across files and row groups
        assert np.array_equal(np.asarray(source.load(index)), np.asarray(expected.load(index)))


def test_files_are_named_by_ranges_or_as_their_folder(tars):
    whole = open_source(tars, SourceOptions(), ALONE)
    ranged = open_source(tars / "train-{000..001}.tar", SourceOptions(), ALONE)
    assert [ranged.name(i) for i in range(9)] == [whole.name(i) for i in range(9)]
    assert expand_ranges("a{08..11}b{1..2}") == [f"a{i}b{j}" for i in ("08", "09", "10", "11") for j in (1, 2)]
    with pytest.raises(ValueError, match=r"train-002\.tar is missing \(1 of 3 files\)"):
        open_source(tars / "train-{000..002}.tar", SourceOptions(), ALONE)


def test_tar_headers_are_read_once(tars, tmp_path, monkeypatch):
    options = SourceOptions(index=tmp_path / "index")
    first = open_source(tars, options, ALONE)
    monkeypatch.setattr("llamagen_unitok.training.sources.index_tar", None)
    again = open_source(tars, options, ALONE)
    assert [again.name(i) for i in range(9)] == [first.name(i) for i in range(9)]
    assert np.array_equal(np.asarray(again.load(6)), np.asarray(first.load(6)))


PNG = io.BytesIO()
Image.new("RGB", (4, 4)).save(PNG, "PNG")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": PNG.getvalue()}, r"no label for a\.png"),
        ({"a.png": PNG.getvalue(), "a.json": b'{"other": 1}'}, r"no label for a\.png"),
        ({"a.png": PNG.getvalue(), "a.cls": b"cat"}, r"a\.cls must hold the number of a class, not 'cat'"),
        ({"a.png": PNG.getvalue(), "a.cls": b"-1"}, r"a\.cls must hold the number of a class"),
        ({"a.png": PNG.getvalue(), "a.json": b"{"}, r"a\.json is not valid JSON"),
        ({"a.png": PNG.getvalue(), "a.json": b'{"label": "x"}'}, r"a\.json must hold the number of a class"),
        ({"a.png": PNG.getvalue(), "a.jpg": b"", "a.cls": b"0"}, r"two pictures of key 'a', a\.png and a\.jpg"),
        ({"a.txt": b"hello"}, r"has no pictures"),
    ],
)
def test_a_tar_that_does_not_keep_the_layout_is_named_in_one_line(tmp_path, members, message):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    with pytest.raises(ValueError, match=message) as error:
        index_tar(tmp_path / "x.tar", "label")
    assert "x.tar" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 100, 700, 3000])
def test_a_tar_cut_short_is_named(tars, tmp_path, keep):
    path = tmp_path / "cut.tar"
    path.write_bytes((tars / "train-000.tar").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        index_tar(path, "label")


def test_a_compressed_tar_is_refused(tars, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.add(tars / "train-000.tar", "x")
    with pytest.raises(ValueError, match=r"no sound uncompressed tar file"):
        index_tar(tmp_path / "x.tar", "label")


def test_a_parquet_file_without_the_columns_names_those_it_has(parquet):
    for flags, message in (
        ({"image_column": "jpg"}, r"no column 'jpg' but image, label: give --image-column"),
        ({"label_column": "cls"}, r"no column 'cls' but image, label: give --label-column"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(parquet, SourceOptions(**flags), ALONE)


@pytest.mark.parametrize("keep", [0, 100, -30, -3])
def test_a_parquet_file_cut_short_is_named(parquet, tmp_path, keep):
    path = tmp_path / "cut.parquet"
    path.write_bytes((parquet / "train-0.parquet").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.parquet is no sound parquet file") as error:
        open_source(path, SourceOptions(), ALONE)
    assert "Traceback" not in str(error.value)


def test_parquet_labels_may_be_names_and_pictures_plain_bytes_or_paths(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    paths = [folder / "cat" / "0.png", folder / "ant" / "1.png", folder / "bee" / "2.png"]
    names = [path.parent.name for path in paths]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    relative = [{"bytes": None, "path": str(path.relative_to(folder))} for path in paths]
    for column in ([path.read_bytes() for path in paths], relative):
        pq.write_table(pyarrow.table({"jpg": column, "what": names}), tmp_path / "x.parquet")
        source = open_source(tmp_path / "x.parquet", SourceOptions("jpg", "what"), ALONE)
        assert source.class_names == NAMES and source.labels.tolist() == [2, 0, 1]
        for index, path in enumerate(paths):
            assert np.array_equal(np.asarray(source.load(index)), np.asarray(Image.open(path).convert("RGB")))


def test_shards_hold_the_tokenizers_codes_whatever_the_source(
    folder, tars, parquet, tokenizer_folder, tmp_path, capsys
):
    tokenizer, source = tiny_tokenizer(), open_source(folder, SourceOptions(), ALONE)
    outs = {}
    for name, images in (("folder", folder), ("tars", tars), ("parquet", parquet)):
        out = outs[name] = tmp_path / name
        assert extract(images, tokenizer_folder, out, "--views", "flip") == 0
        shards = CodeShards(out)
        shards.verify()
        assert len(shards) == 9 and shards.meta.shard_sizes == [4, 4, 1]
        assert shards.meta.class_names == (["class 0", "class 1", "class 2"] if name == "tars" else NAMES)
        for index in range(9):
            crop = np.asarray(adm_centre_crop(source.load(index), 48))
            for view, pixels in enumerate((crop, crop[:, ::-1])):
                label, codes = shards[index, view]
                assert label == index // PER_CLASS
                assert np.array_equal(codes, tokenizer.encode(to_unit(pixels)[None])[0].numpy())
    for shard in sorted(outs["folder"].glob("*.safetensors")):
        assert (
            shard.read_bytes()
            == (outs["tars"] / shard.name).read_bytes()
            == (outs["parquet"] / shard.name).read_bytes()
        )


def test_two_processes_write_the_shards_of_one_bit_for_bit(tars, tokenizer_folder, tmp_path):
    flags = ["--ten-crop", "--crop-ranges", "1.1,1.05"]
    assert extract(tars, tokenizer_folder, tmp_path / "one", *flags) == 0
    arguments = ["--images", tars, "--tokenizer", tokenizer_folder, "--out", tmp_path / "two", "--shard-size", 4]
    arguments += ["--batch-size", 3, "--device", "cpu", *flags]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, ROOT / "extract_codes.py", *arguments]
    subprocess.run([str(a) for a in command], env=environment, check=True, timeout=240)
    one, two = (sorted((tmp_path / name).glob("*")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 6
    for a, b in zip(one, two, strict=True):
        assert a.is_dir() or a.read_bytes() == b.read_bytes(), a.name


def test_a_damaged_shard_is_made_again_and_no_other(folder, tokenizer_folder, tmp_path, capsys):
    out = tmp_path / "codes"
    assert extract(folder, tokenizer_folder, out) == 0
    shards = sorted(out.glob("*.safetensors"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    damaged = bytearray(before[shards[1]][0])
    damaged[-1] ^= 1
    shards[1].write_bytes(damaged)
    capsys.readouterr()
    assert extract(folder, tokenizer_folder, out) == 0
    assert f"{shards[1]} is damaged: making it again" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in shards} == {path: data for path, (data, _) in before.items()}
    assert [path for path in shards if path.stat().st_mtime_ns != before[path][1]] == [shards[1]]


def test_a_shard_that_a_crash_of_the_machine_left_empty_is_made_again(folder, tokenizer_folder, tmp_path):
    out = tmp_path / "codes"
    assert extract(folder, tokenizer_folder, out) == 0
    shards = sorted(out.glob("*.safetensors"))
    before = [path.read_bytes() for path in shards]
    (out / "meta.json").unlink()
    shards[0].write_bytes(b"")
    shards[2].write_bytes(before[2][:-1])
    assert extract(folder, tokenizer_folder, out) == 0
    assert [path.read_bytes() for path in shards] == before


def test_names_of_parquet_classes_need_not_sort(parquet, tokenizer_folder, tmp_path):
    from pyarrow import parquet as pq

    table = pq.read_table(parquet / "train-0.parquet")
    features = {"info": {"features": {"label": {"names": ["wasp", "bee"]}}}}
    (tmp_path / "in").mkdir()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "in" / "a.parquet")
    ClassNames(["Wasp", "Bee"]).save(tmp_path)
    assert extract(tmp_path / "in", tokenizer_folder, tmp_path / "out", "--class-names", tmp_path) == 0
    assert CodeShards(tmp_path / "out").meta.class_names == ["Wasp", "Bee"]


def spoil(source: Path, pictures: list[bytes]) -> None:
    """Overwrite the end of these pictures wherever they lie in the files of a source."""
    for path in (p for p in source.rglob("*") if p.is_file()):
        data = path.read_bytes()
        for whole in pictures:
            data = data.replace(whole, whole[:60] + bytes(len(whole) - 60))
        path.write_bytes(data)


UNREADABLE = {
    "folder": ["ant/1.png", "ant/2.png", "cat/2.png"],
    "tars": ["train-000.tar:./ant.d/1.png", "train-000.tar:./ant.d/2.png", "train-001.tar:./cat.d/2.png"],
    "parquet": ["row group 0, row 1", "row group 1, row 0", "row group 2, row 0"],
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_pictures_are_all_named_in_one_line_and_other_shards_are_kept(
    kind, folder, tokenizer_folder, tmp_path, request, capsys
):
    source = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "source"))
    wholes = sorted(folder.glob("*/*.png"))
    spoil(source, [wholes[i].read_bytes() for i in (1, 2, 8)])
    assert extract(source, tokenizer_folder, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()
    assert all(name in error[-1] for name in UNREADABLE[kind])
    assert error[-1].count("cannot be read as a picture") == 3 and "--skip-unreadable" in error[-1]
    assert not any("Traceback" in line for line in error)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["shard-00001-of-00003.safetensors"]
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("kind", UNREADABLE)
def test_pictures_left_out_are_listed_and_all_others_keep_their_codes(
    kind, folder, tokenizer_folder, tmp_path, request, capsys
):
    source = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "source"))
    assert extract(source, tokenizer_folder, tmp_path / "whole") == 0
    wholes = sorted(folder.glob("*/*.png"))
    spoil(source, [wholes[i].read_bytes() for i in (1, 7)])
    out = tmp_path / "out"
    assert extract(source, tokenizer_folder, out) == 2
    kept = (out / "shard-00002-of-00003.safetensors").stat().st_mtime_ns
    assert extract(source, tokenizer_folder, out, "--skip-unreadable", "--verify", 7) == 0
    assert float(capsys.readouterr().out.rsplit("PSNR ", 1)[1].split()[0]) > 5  # each beside its own original
    shards, whole = CodeShards(out), CodeShards(tmp_path / "whole")
    shards.verify()
    assert shards.meta.shard_sizes == [3, 3, 1]
    assert [number for number, _ in shards.meta.unreadable] == [1, 7]
    assert all(part in name for part, (_, name) in zip((UNREADABLE[kind][0], ""), shards.meta.unreadable, strict=True))
    for row, number in enumerate([0, 2, 3, 4, 5, 6, 8]):
        assert np.array_equal(shards[row, 0][1], whole[number, 0][1]) and shards[row, 0][0] == whole[number, 0][0]
    assert (out / "shard-00002-of-00003.safetensors").stat().st_mtime_ns == kept

    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert extract(source, tokenizer_folder, out, "--skip-unreadable") == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert CodeShards(out).meta == shards.meta
    # without the flag the shards that lack pictures are not good enough
    assert extract(source, tokenizer_folder, out) == 2


def test_originals_are_found_beside_pictures_that_were_left_out(folder, tokenizer_folder, tmp_path):
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    spoil(source, [(folder / "ant" / "0.png").read_bytes()])
    assert extract(source, tokenizer_folder, tmp_path / "out", "--skip-unreadable", "--verify", 8) == 0
    sheet = np.asarray(Image.open(tmp_path / "out" / "verify.png").convert("RGB")).astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (48, 48, 3))[:, :, 0]
    for path in sorted(folder.glob("*/*.png"))[1:]:
        original = np.asarray(adm_centre_crop(Image.open(path), 48)).astype(int)
        assert (np.abs(windows[:, :, ::8, ::8] - original[::8, ::8]).max(axis=(2, 3, 4)) <= 1).sum() == 1


def test_a_shard_of_unreadable_pictures_only_is_refused(folder, tokenizer_folder, tmp_path, capsys):
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    spoil(source, [path.read_bytes() for path in sorted(folder.glob("*/*.png"))[8:]])
    assert extract(source, tokenizer_folder, tmp_path / "out", "--skip-unreadable") == 2
    assert "a shard must hold one readable picture at least" in capsys.readouterr().err.splitlines()[-1]


def by_two_processes(source, tokenizer, out, *flags) -> subprocess.CompletedProcess:
    arguments = ["--images", source, "--tokenizer", tokenizer, "--out", out, "--shard-size", 4, "--batch-size", 3]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, ROOT / "extract_codes.py", *arguments, "--device", "cpu", *flags]
    return subprocess.run([str(a) for a in command], env=environment, timeout=240, capture_output=True, text=True)


def test_one_bad_file_ends_two_processes_in_one_line(tars, folder, tokenizer_folder, tmp_path):
    source = Path(shutil.copytree(tars, tmp_path / "source"))
    cut = source / "train-001.tar"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:700])
    result = by_two_processes(source, tokenizer_folder, tmp_path / "out")
    assert result.returncode != 0 and result.stderr.count("train-001.tar is") == 1
    assert "extract_codes.py" not in "".join(line for line in result.stderr.splitlines() if line.startswith("  File"))


def test_two_processes_leave_the_pictures_out_that_one_does(tars, folder, tokenizer_folder, tmp_path):
    source = Path(shutil.copytree(tars, tmp_path / "source"))
    spoil(source, [path.read_bytes() for path in sorted(folder.glob("*/*.png"))[1:6:4]])
    result = by_two_processes(source, tokenizer_folder, tmp_path / "two")
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if "--skip-unreadable" in line]
    assert "ant.d/1.png" in line and "bee.d/2.png" in line  # of shards of both processes
    assert by_two_processes(source, tokenizer_folder, tmp_path / "two", "--skip-unreadable").returncode == 0
    assert extract(source, tokenizer_folder, tmp_path / "one", "--skip-unreadable") == 0
    one, two = (sorted(p for p in (tmp_path / name).glob("*") if p.is_file()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", ["folder", "tars", "parquet"])
def test_a_source_whose_pictures_changed_is_another_job(kind, folder, tokenizer_folder, tmp_path, request, capsys):
    source = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "source"))
    first = fingerprint(open_source(source, SourceOptions(), ALONE))
    assert first == fingerprint(open_source(request.getfixturevalue(kind), SourceOptions(), ALONE))
    if kind == "folder":
        assert extract(source, tokenizer_folder, tmp_path / "out") == 0
        Image.new("RGB", (80, 70)).save(source / "ant" / "1.png")
        assert extract(source, tokenizer_folder, tmp_path / "out") == 2
        assert "holds codes of another job (other pictures in their order" in capsys.readouterr().err
    else:
        data = open_source(source, SourceOptions(), ALONE)
        assert data.sizes.shape == (9,) and data.sizes.min() > 0
        data.sizes = data.sizes + 1
        assert fingerprint(data) != first


@pytest.mark.parametrize("left", ["", "{", "[1]"])
def test_a_damaged_note_of_the_job_is_named_in_one_line(folder, tokenizer_folder, tmp_path, capsys, left):
    out = tmp_path / "out"
    assert extract(folder, tokenizer_folder, out) == 0
    (out / "job.json").write_text(left)
    capsys.readouterr()
    assert extract(folder, tokenizer_folder, out) == 2
    error = capsys.readouterr().err
    assert str(out / "job.json") in error and "give an empty folder" in error and error.count("\n") == 1


def test_class_names_come_from_the_flag_and_their_order_is_held(tars, folder, tokenizer_folder, tmp_path, capsys):
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    ClassNames(["Ant", "Bee", "Cat"]).save(tmp_path / "right")
    ClassNames(["Bee", "Ant", "Cat"]).save(tmp_path / "wrong")
    assert extract(tars, tokenizer_folder, tmp_path / "a", "--class-names", tmp_path / "right") == 0
    assert CodeShards(tmp_path / "a").meta.class_names == ["Ant", "Bee", "Cat"]
    assert extract(folder, tokenizer_folder, tmp_path / "b", "--class-names", tmp_path / "wrong") == 2
    assert "class of the pictures 0 is 'ant', which is class 1 (Ant)" in capsys.readouterr().err
    assert extract(tars, tokenizer_folder, tmp_path / "c", "--class-names", 2) == 2
    assert "has label 2, but there are 2 class names" in capsys.readouterr().err


def test_verify_draws_originals_beside_their_decoded_codes(folder, tokenizer_folder, tmp_path, capsys):
    out = tmp_path / "codes"
    assert extract(folder, tokenizer_folder, out, "--verify", 9) == 0
    right = float(capsys.readouterr().out.rsplit("PSNR ", 1)[1].split()[0])
    sheet = np.asarray(Image.open(out / "verify.png").convert("RGB")).astype(int)
    original = np.asarray(adm_centre_crop(Image.open(folder / "ant" / "0.png"), 48)).astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (48, 48, 3))[:, :, 0]
    assert (np.abs(windows[:, :, ::8, ::8] - original[::8, ::8]).max(axis=(2, 3, 4)) <= 1).sum() == 1
    tokenizer = tiny_tokenizer()
    source = open_source(folder, SourceOptions(), ALONE)
    crops = to_unit(np.stack([np.asarray(adm_centre_crop(source.load(i), 48)) for i in range(9)]))
    error = (torch.cat([tokenizer.reconstruct(crop[None]) for crop in crops]) - crops).square().flatten(1).mean(1)
    assert right == pytest.approx((10 * torch.log10(4 / error)).mean().item(), abs=0.06)


def test_bf16_is_for_the_encoder_and_most_codes_stay(folder, tokenizer_folder, tmp_path):
    assert extract(folder, tokenizer_folder, tmp_path / "fp32") == 0
    assert extract(folder, tokenizer_folder, tmp_path / "bf16", "--dtype", "bf16") == 0
    fp32, bf16 = (CodeShards(tmp_path / name).entries(range(9))[1] for name in ("fp32", "bf16"))
    assert 0.8 < (fp32 == bf16).mean() < 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop-ranges", "1.1"], None),
        (["--crop-ranges", "1.05"], "--crop-ranges 1.05 is for --ten-crop"),
        (["--ten-crop", "--crop-ranges", "0.9"], "must be numbers from 1 to 10"),
        (["--ten-crop", "--crop-ranges", "x"], "must be numbers from 1 to 10"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--images", "nowhere"], "--images nowhere is not a folder"),
        (["--images", "x.tar.gz"], "--images x.tar.gz is not a folder"),
        (["--images", "x.tar"], "x.tar is missing"),
    ],
)
def test_wrong_flags_are_one_clear_line(folder, tokenizer_folder, tmp_path, capsys, flags, message):
    code = extract(folder, tokenizer_folder, tmp_path / "out", *flags)
    assert code == (2 if message else 0)
    if message:
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
