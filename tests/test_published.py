"""Published checkpoints by name: a cache that is filled once, offline from files on disk, and 384-pixel generators."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import extract_codes
import sample
from llamagen_unitok import ImageGenerator
from llamagen_unitok.config import PRESETS as SIZES
from llamagen_unitok.config import Size
from llamagen_unitok.evaluation.presets import PRESETS as FIGURES
from llamagen_unitok.published import cache, presets
from llamagen_unitok.published.presets import GENERATORS, TOKENIZERS
from tests.conftest import tiny_tokenizer
from tests.published_files import ddp_file, save, seeded_state, single_gpt, unitok_file, vq_file
from tests.tiny_vqgan import tiny_vqgan
from tokenizer import PRESETS as TOKENIZER_PRESETS
from tokenizer.images import Resize, to_uint8, to_unit

ROOT = Path(sample.__file__).resolve().parent
TINY_SIZE = Size(2, 4, 32)  # tests.tiny_generator.TINY
DOG = ["--checkpoint", "llamagen-b-256", "--class", "golden retriever", "--device", "cpu"]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The folder of published files in an empty cache; the working folder is empty too, and there is no hub."""
    monkeypatch.setenv("LLAMAGEN_UNITOK_CACHE", str(tmp_path / "cache"))
    # Whatever asks the hub gets as far as a refused connection, wherever this runs.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "cache" / "files" / "FoundationVision" / "LlamaGen"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def tiny_rows(monkeypatch):
    """The table's rows with generators of two layers and small pictures: 64 pixels for 256, 96 for 384."""
    for name, row in GENERATORS.items():
        small = row._replace(size=TINY_SIZE, image_size=row.image_size // 4)
        monkeypatch.setitem(presets.GENERATORS, name, small)


def fill(files: Path, size: str = "B", image_size: int = 256, bare: bool = False) -> None:
    """A generator and the tokenizer of tiny seeded weights, under the published names and in their layouts."""
    state = single_gpt(num_positions=(image_size // 4 // 16) ** 2).state_dict()
    save(state if bare else {"model": state}, files / f"c2i_{size}_{image_size}.pt")
    save(vq_file(), files / "vq_ds16_c2i.pt")


def test_a_published_name_draws_offline_from_files_in_the_cache(files, tiny_rows, capsys):
    fill(files)
    assert sample.main([*DOG, "--cfg", "2.0", "--num", "2", "--npz", "dogs.npz"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("dogs.npz\n2 pictures")
    for name in ("c2i_B_256.pt", "vq_ds16_c2i.pt"):
        assert re.search(rf"^{name}: SHA-256 [0-9a-f]{{64}}$", err, re.M), err
    with np.load("dogs.npz") as samples:
        assert samples["arr_0"].shape == (2, 64, 64, 3)
        assert samples["label"].tolist() == [207, 207]
        pixels = samples["arr_0"]
    expected = ImageGenerator(single_gpt(num_positions=16), tiny_vqgan())
    assert np.array_equal(pixels[1], np.asarray(expected([207], 2, cfg_scale=2.0)[1]))


def test_conversion_happens_once_and_then_needs_no_files(files, tiny_rows, capsys):
    fill(files)
    assert sample.main([*DOG, "--num", "1", "--out", "a.png"]) == 0
    capsys.readouterr()
    for path in files.iterdir():
        path.unlink()
    assert sample.main([*DOG[:2], "--class", "n02099601", "--device", "cpu", "--num", "1", "--out", "b.png"]) == 0
    assert "converting" not in capsys.readouterr().err
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert sample.main([*DOG[:2], "--list-classes"]) == 0
    assert "207\tgolden retriever\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llamagen-b-384", "llamagen-3b-384"])  # DDP and FSDP files
def test_384_pixel_generators_have_24_rows_of_codes_and_resize_to_256(files, tiny_rows, capsys, name):
    """Here in a quarter: 96 pixels, 6 rows, resized to 64."""
    fill(files, name.split("-")[1].upper(), 384, bare="xxl" in name or "3b" in name)
    arguments = ["--checkpoint", name, "--class", "207", "--num", "1", "--device", "cpu"]
    assert sample.main([*arguments, "--npz", "a.npz"]) == 0, capsys.readouterr().err
    assert sample.main([*arguments, "--npz", "b.npz", "--resize", "64"]) == 0
    large, small = (np.load(file)["arr_0"] for file in ("a.npz", "b.npz"))
    assert large.shape == (1, 96, 96, 3) and small.shape == (1, 64, 64, 3)


def test_area_is_the_mean_over_the_pixels_that_a_new_one_touches():
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    resized = Resize(4)(images)
    for i, rows in enumerate([(0, 2), (1, 3), (3, 5), (4, 6)]):  # pixel i of 4 covers 1.5 i to 1.5 (i + 1) of 6
        for j, columns in enumerate([(0, 2), (1, 3), (3, 5), (4, 6)]):
            expected = images[:, :, slice(*rows), slice(*columns)].mean((2, 3))
            torch.testing.assert_close(resized[:, :, i, j], expected)


def test_the_table_says_what_is_published():
    assert {name: (row.size, row.image_size, row.grid) for name, row in GENERATORS.items()} == {
        "llamagen-b-256": (SIZES["B"], 256, 16),
        "llamagen-l-256": (SIZES["L"], 256, 16),
        "llamagen-b-384": (SIZES["B"], 384, 24),
        "llamagen-l-384": (SIZES["L"], 384, 24),
        "llamagen-xl-384": (SIZES["XL"], 384, 24),
        "llamagen-xxl-384": (SIZES["XXL"], 384, 24),
        "llamagen-3b-384": (SIZES["3B"], 384, 24),
    }
    # GETTING_STARTED.md of LlamaGen: guidance by size, and 384-pixel pictures resized for the figure.
    scales = {"b": 2.0, "l": 2.0, "xl": 1.75, "xxl": 1.75, "3b": 1.65}
    for name, row in GENERATORS.items():
        assert row.cfg_scale == scales[name.split("-")[1]]
        assert FIGURES[name].resize == ("256:bicubic" if row.image_size == 384 else None)
        assert row.file.name == f"c2i_{name.split('-')[1].upper()}_{row.image_size}.pt"
        assert row.tokenizer in TOKENIZERS and row.source
        assert FIGURES[name].sampling.cfg_scale == row.cfg_scale and FIGURES[name].figures == {"FID": row.fid}


def test_the_documented_tables_are_the_tables():
    text = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    for name, row in GENERATORS.items():
        side, no_guidance = row.image_size, f"{row.fid_no_guidance[0]} " if row.fid_no_guidance else ""
        cells = (
            f"`{name}` | `{row.file.name}` | {side}×{side} | {row.grid}×{row.grid} | {row.cfg_scale} | {row.fid:.2f}"
        )
        assert f"| {cells} | {no_guidance}|\n" in text
    for name, row in TOKENIZERS.items():
        licence = {"mit": "MIT", "apache-2.0": "Apache 2.0"}[row.file.licence]
        cells = f"`{name}` | `{row.file.repository}`, `{row.file.name}` | {licence} | {row.rfid} | {row.source}"
        assert f"| {cells} |\n" in text


def test_a_tokenizer_by_name_replaces_the_bundles_and_extracts_codes(files, monkeypatch, capsys, bundle):
    monkeypatch.setitem(TOKENIZER_PRESETS, "vitamin_base", tiny_tokenizer().config)
    monkeypatch.setitem(
        presets.TOKENIZERS,
        "unitok-large",
        TOKENIZERS["unitok-large"]._replace(img_size=tiny_tokenizer().config.img_size),
    )
    folder = files.parent / "unitok_tokenizer"
    folder.mkdir()
    save(unitok_file(tiny_tokenizer(seed=5)), folder / "unitok_tokenizer.pth")
    arguments = ["--checkpoint", str(bundle), "--class", "pig", "--num", "1", "--device", "cpu"]
    assert sample.main([*arguments, "--npz", "own.npz"]) == 0, capsys.readouterr().err
    assert sample.main([*arguments, "--npz", "other.npz", "--tokenizer", "unitok-large"]) == 0, capsys.readouterr().err
    assert not np.array_equal(np.load("own.npz")["arr_0"], np.load("other.npz")["arr_0"])
    for name in ("cat", "dog"):
        Path("pictures", name).mkdir(parents=True)
        Image.new("RGB", (50, 50), (name == "cat" and "red") or "blue").save(f"pictures/{name}/0.png")
    flags = ["--images", "pictures", "--out", "codes", "--workers", "1", "--device", "cpu"]
    assert extract_codes.main([*flags, "--tokenizer", "unitok-large"]) == 0, capsys.readouterr().err


def test_codes_are_extracted_with_a_vq_tokenizer(files, capsys):
    from llamagen_unitok.training.data import CodeShards

    tokenizer = tiny_vqgan()
    folder = tokenizer.save_pretrained("vq")
    Path("pictures", "dog").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("pictures/dog/0.png")
    flags = ["--images", "pictures", "--out", "codes", "--workers", "1", "--device", "cpu"]
    assert extract_codes.main([*flags, "--tokenizer", str(folder)]) == 0, capsys.readouterr().err
    shards = CodeShards(Path("codes"))
    assert (shards.meta.num_codebooks, shards.meta.codebook_size, shards.meta.grid) == (1, 11, 4)
    label, codes = shards[0, 0]
    assert label == 0
    assert torch.from_numpy(codes.astype(np.int64)).equal(tokenizer.encode(to_unit(pixels)[None])[0])


WRONG = {
    "another size": (lambda f: fill(f, image_size=256, size="L"), "llamagen-l-256", "it is another checkpoint"),
    "no network": (
        lambda f: None,
        "llamagen-b-256",
        r"c2i_B_256\.pt and vq_ds16_c2i\.pt of .*FoundationVision/LlamaGen",
    ),
    "half of the files": (
        lambda f: (fill(f), (f / "vq_ds16_c2i.pt").unlink()),
        "llamagen-b-256",
        r"needs vq_ds16_c2i\.pt of .*put it into .*files.FoundationVision.LlamaGen",
    ),
    "a damaged file": (
        lambda f: (fill(f), (f / "c2i_B_256.pt").write_bytes(b"half")),
        "llamagen-b-256",
        r"c2i_B_256\.pt (is no checkpoint|is refused)",
    ),
    "a misspelt name": (lambda f: None, "llamagen-b-265", "published checkpoint: llamagen-b-256, llamagen-l-256"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_ends_in_one_line_and_leaves_no_bundle(files, tiny_rows, monkeypatch, capsys, case):
    make, name, message = WRONG[case]
    make(files)
    if case == "another size":
        monkeypatch.setitem(presets.GENERATORS, name, presets.GENERATORS[name]._replace(size=Size(3, 4, 32)))
    assert sample.main(["--checkpoint", name, "--class", "207", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err.splitlines()[-1]), err
    models = cache.cache_folder() / "models"
    assert not models.exists() or [p for p in models.iterdir() if not p.name.endswith(".lock")] == []


@pytest.mark.parametrize("text", ["0", "-3", "big", "64:lanczos", ""])
def test_impossible_sizes_are_refused(bundle, text, capsys):
    assert sample.main(["--checkpoint", str(bundle), "--class", "pig", "--resize", text]) == 2
    assert "--resize" in capsys.readouterr().err


def test_bicubic_is_the_published_way(bundle):
    """LlamaGen's sampling: interpolate what is not clamped, then round."""
    generator = ImageGenerator.from_pretrained(bundle, device="cpu")
    codes = torch.randint(11, (1, 9, 3), generator=torch.Generator().manual_seed(0))
    generator.resize = Resize.parse("32:bicubic")
    decoded = generator.tokenizer.decode_unclamped(codes)
    expected = torch.nn.functional.interpolate(decoded, size=(32, 32), mode="bicubic")
    assert np.array_equal(np.asarray(generator.decode(codes)[0]), to_uint8(expected)[0])


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMAGEN_UNITOK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "llamagen-unitok"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "llamagen-unitok"
    monkeypatch.setenv("LLAMAGEN_UNITOK_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"


def command(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "sample.py", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LLAMAGEN_UNITOK_CACHE": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("name", [*GENERATORS, *TOKENIZERS])
def test_a_refused_connection_ends_in_a_line_that_names_the_files_and_their_place(files, capsys, name):
    with pytest.raises(ValueError, match="is out of reach") as error:
        cache.locate_model(name)
    needed = GENERATORS[name].files if name in GENERATORS else (TOKENIZERS[name].file,)
    assert all(file.name in str(error.value) for file in needed)
    assert f"hub repository {needed[0].repository}" in str(error.value)
    assert isinstance(error.value.__cause__, ConnectionError) or "Connect" in type(error.value.__cause__).__name__
    place = files.parent.parent / needed[0].repository
    assert str(error.value).endswith(f"put {'them' if len(needed) > 1 else 'it'} into {place}")
    assert "\n" not in str(error.value)
    assert (
        f"downloading {needed[0].name} from {needed[0].repository} (licence: {needed[0].licence})"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_true_size_draws_offline_from_seeded_files(tmp_path):
    """GPT-B and VQ-16 with seeded weights under the published names: the whole command, nothing shrunk."""
    files = tmp_path / "cache" / "files" / "FoundationVision" / "LlamaGen"
    files.mkdir(parents=True)
    save(ddp_file(seeded_state("llamagen_gpt_b_keys.json"), image_size=256), files / "c2i_B_256.pt")
    save({"model": seeded_state("llamagen_vq16_keys.json")}, files / "vq_ds16_c2i.pt")
    done = command([*DOG, "--cfg", "2.0", "--num", "1", "--batch-size", "1"], tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "golden-retriever-cfg2-seed0.png") as sheet:
        assert sheet.width >= 256
