"""A bundle as one object: which pictures it gives, what it refuses, and that it survives the disk."""

import itertools

import numpy as np
import pytest
import torch

from llamagen_unitok import ImageGenerator, generate
from llamagen_unitok.grid import labelled_grid
from llamagen_unitok.pipeline import make_preview
from modelfolder import ModelFolderError
from tests.conftest import NAMES, tiny_generator, tiny_tokenizer
from tests.tiny_generator import tiny_gpt
from tokenizer.images import to_pil


@pytest.fixture(scope="module")
def generator(bundle) -> ImageGenerator:
    return ImageGenerator.from_pretrained(bundle, device="cpu")


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_pictures_come_class_by_class_by_name_or_id(generator):
    by_name = generator(["pig", 0], num=2, seed=3)
    by_id = generator([2, "dog"], num=2, seed=3)
    assert len(by_name) == 4
    assert by_name[0].size == (48, 48)
    assert by_name[0].mode == "RGB"
    assert all(map(same, by_name, by_id))
    order = [(s.label, s.index) for s in generator.stream(["pig", 0], num=2)]
    assert order == [(2, 0), (2, 1), (0, 0), (0, 1)]


def test_a_single_label_needs_no_list(generator):
    assert same(generator("pig")[0], generator([2])[0])
    assert same(generator(2)[0], generator([2])[0])


def test_a_picture_does_not_depend_on_the_others_asked_for(generator):
    settings = {"cfg_scale": 2.0, "seed": 5, "batch_size": 3}
    alone = list(generator.stream([2], num=2, **settings))
    among = [s for s in generator.stream([0, 1, 2, 4], num=5, **settings) if s.label == 2][:2]
    for one, other in zip(alone, among, strict=True):
        assert one.codes.equal(other.codes)
        assert same(one.picture, other.picture)


def test_a_label_given_again_goes_on_counting(generator):
    once, twice = generator([2], num=4, batch_size=4), generator([2, 2], num=2, batch_size=4)
    assert all(map(same, once, twice))


def test_codes_and_pictures_are_those_of_generate_and_decode(generator):
    samples = list(generator.stream([1, 2, 3], batch_size=3, seed=7, top_k=5))
    codes = generate(generator.gpt, [1, 2, 3], indices=[0, 0, 0], seed=7, top_k=5)
    assert torch.stack([s.codes for s in samples]).equal(codes)
    for sample in samples:
        assert same(sample.picture, to_pil(generator.tokenizer.decode(sample.codes[None]))[0])


def test_seeds_and_indices_give_different_pictures(generator):
    a, b = generator([2], num=2, seed=0)
    (c,) = generator([2], seed=1)
    assert not same(a, b)
    assert not same(a, c)


def test_samples_are_drawn_only_when_taken(generator, monkeypatch):
    batches = []
    monkeypatch.setattr(
        "llamagen_unitok.pipeline.generate", lambda *args, **more: batches.append(1) or generate(*args, **more)
    )
    taken = list(itertools.islice(generator.stream([2], num=1_000_000, batch_size=4), 6))
    assert len(taken) == 6
    assert len(batches) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [5]}, "no class 5: ids are 0 to 4"),
        ({"labels": ["zebrra"]}, "zebra face"),
        ({"labels": []}, "no label"),
        ({"labels": [0], "num": 0}, "--num"),
        ({"labels": [0], "batch_size": 0}, "--batch-size"),
        ({"labels": [0], "cfg_scale": -1.0}, "--cfg"),
        ({"labels": [0], "top_p": 0.0}, "--top-p"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_taken(generator, arguments, message):
    with pytest.raises(ValueError, match=message):
        generator.stream(**arguments)


def test_guidance_without_a_null_class_is_refused(bundle_without_null_class):
    generator = ImageGenerator.from_pretrained(bundle_without_null_class, device="cpu")
    with pytest.raises(ValueError, match="null class"):
        generator(["pig"], cfg_scale=1.5)
    assert len(generator(["pig"], cfg_scale=1.0)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codebooks": 4, "width": 32}, "codebooks K = 4 instead of 3"),
        ({"codebook_size": 12}, "codebook size V = 12 instead of 11"),
        ({"img_size": 32}, "positions L = 4 instead of 9"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(bundle, tmp_path, changes, message):
    other = tiny_tokenizer(**changes)
    with pytest.raises(ValueError, match=message):
        ImageGenerator(tiny_gpt(), other)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        ImageGenerator.from_pretrained(bundle, tokenizer=tmp_path / "other")


def test_names_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="5 class names do not fit a generator of 7 classes"):
        tiny_generator(num_classes=7)


def test_a_bundle_survives_saving(generator, tmp_path):
    folder = generator.save_pretrained(tmp_path / "deep" / "copy")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "aliases.json",
        "generator",
        "labels.json",
        "tokenizer",
    ]
    assert not [p for p in folder.parent.iterdir() if p != folder]
    again = ImageGenerator.from_pretrained(folder, device="cpu")
    assert again.names.names == NAMES
    assert again.card == "# Tiny\n"
    assert same(again("🐷", seed=1)[0], generator("pig", seed=1)[0])
    again.save_pretrained(folder, dtype=torch.float16)  # in place of what is there
    assert not [p for p in folder.parent.iterdir() if p != folder]
    assert len(ImageGenerator.from_pretrained(folder, device="cpu")("pig")) == 1


def test_an_interrupted_save_leaves_the_earlier_bundle(generator, tmp_path, monkeypatch):
    folder = generator.save_pretrained(tmp_path / "bundle")
    monkeypatch.setattr(type(generator.names), "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        generator.save_pretrained(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert len(ImageGenerator.from_pretrained(folder, device="cpu")("pig")) == 1


def test_parts_in_folders_of_their_own_make_a_generator_with_numbered_classes(bundle):
    generator = ImageGenerator.from_pretrained(bundle / "generator", tokenizer=bundle / "tokenizer", device="cpu")
    assert generator.names[3] == "class 3"
    assert len(generator([3])) == 1
    with pytest.raises(ValueError, match="holds no tokenizer/"):
        ImageGenerator.from_pretrained(bundle / "generator")


def test_damaged_weights_are_named(damaged_bundle):
    with pytest.raises(ModelFolderError, match=r"model\.safetensors is damaged or cut short"):
        ImageGenerator.from_pretrained(damaged_bundle, device="cpu")


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_the_generators_dtype_leaves_the_tokenizer_in_float32(bundle, dtype):
    generator = ImageGenerator.from_pretrained(bundle, device="cpu", dtype=dtype)
    assert generator.gpt.norm.weight.dtype == torch.bfloat16
    assert {p.dtype for p in generator.tokenizer.parameters()} == {torch.float32}
    assert len(generator("pig")) == 1


def test_an_unknown_dtype_lists_the_known_ones(bundle):
    with pytest.raises(ValueError, match="use auto, fp32, bf16, fp16"):
        ImageGenerator.from_pretrained(bundle, device="cpu", dtype="fp8")


def test_preview_writes_a_sheet_of_the_generators_pictures(bundle, tmp_path):
    png = tmp_path / "previews" / "step-1.png"
    make_preview(bundle)(tiny_gpt(), png)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in png.parent.iterdir()] == ["step-1.png"]


def test_grid_shows_every_picture_once(generator):
    pictures = generator([0, 1, 2], num=3)
    sheet = labelled_grid([(name, pictures[3 * i : 3 * i + 3]) for i, name in enumerate(["a", "b" * 99, "c"])])
    pixels = np.asarray(sheet)
    for picture in pictures:
        first = np.asarray(picture)[0]
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (1, 48, 3))[:, :, 0, 0]
        rows, columns = np.nonzero((windows == first).all(axis=(-1, -2)))
        found = [same(pixels[y : y + 48, x : x + 48], picture) for y, x in zip(rows, columns, strict=True)]
        assert sum(found) == 1
    with pytest.raises(ValueError, match="at least one picture"):
        labelled_grid([])


def test_the_tokenizer_decodes_without_tf32_and_leaves_the_setting_alone(bundle):
    generator, seen = ImageGenerator.from_pretrained(bundle, device="cpu"), []
    plain = generator._to_images
    generator._to_images = lambda codes: seen.append(torch.backends.cudnn.allow_tf32) or plain(codes)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled
    generator([2])
    assert seen == [False]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled) == before


@pytest.mark.gpu
def test_pixels_are_decoded_where_the_codes_are_generated(bundle):
    generator = ImageGenerator.from_pretrained(bundle, device="cuda", dtype="fp32")
    assert next(generator.tokenizer.parameters()).is_cuda
    on_cpu = ImageGenerator.from_pretrained(bundle, device="cpu")
    for sample in generator.stream([2, 0]):
        off = np.abs(np.asarray(sample.picture).astype(int) - np.asarray(on_cpu.decode(sample.codes[None])[0]))
        assert off.max() <= 1
