"""convert.py: every published layout becomes a bundle that computes the same, and nothing else is made of anything."""

import argparse
import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import convert
from llamagen_unitok import ImageGenerator
from llamagen_unitok.published.files import read_checkpoint
from modelfolder import content_hash
from tests.conftest import tiny_tokenizer
from tests.published_files import (
    WRAPPINGS,
    ddp_file,
    save,
    several_gpt,
    single_gpt,
    unitok_file,
    vq_file,
)
from tests.tiny_generator import random_batch
from tests.tiny_vqgan import tiny_vqgan
from tokenizer import PRESETS, UniTok, load_tokenizer

HEADS = ["--heads", "4"]  # the tiny generators are of no published size


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run convert.py in an empty folder: arguments → (exit code, stdout, the last line of stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "vitamin_base", tiny_tokenizer().config)

    def call(*arguments) -> tuple[int, str, str]:
        try:
            code = convert.main([*map(str, arguments), "--device", "cpu"])
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, re.split(r"[\r\n]", err.rstrip())[-1].strip()

    return call


def refused(run, *arguments, message: str) -> None:
    """The command ends in one line with `message`, and leaves neither a bundle nor anything half-written."""
    before = sorted(Path().rglob("*"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), err
    assert re.search(message, err), err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "wrapping"),
    [
        *(("llamagen", wrapping) for wrapping in WRAPPINGS),
        *(("unitok-llamagen", wrapping) for wrapping in ("ddp", "fsdp (bare)", "compiled in ddp")),
    ],
)
def test_every_wrapping_becomes_a_bundle_that_computes_the_same(run, kind, wrapping):
    if kind == "llamagen":
        gpt, tokenizer, tokenizer_file = single_gpt(), tiny_vqgan(), vq_file()
        size = ["--image-size", "64"]
    else:
        gpt, tokenizer, tokenizer_file = several_gpt(), tiny_tokenizer(), unitok_file()
        size = []
    published = WRAPPINGS[wrapping](gpt.state_dict())
    if wrapping == "ddp":
        published = ddp_file(gpt.state_dict(), image_size=tokenizer.config.img_size)
    save(published, Path("gpt.pt"))
    save(tokenizer_file, Path("tokenizer.pth"))
    pictures = [] if wrapping == "ddp" else ["--no-picture"]
    code, out, err = run("gpt.pt", "tokenizer.pth", "--out", "bundle", *HEADS, *size, *pictures)
    assert code == 0, err
    assert out == "bundle\n"
    assert sorted(p.name for p in Path().iterdir()) == ["bundle", "gpt.pt", "tokenizer.pth"]

    bundle = ImageGenerator.from_pretrained("bundle", device="cpu")
    expected_config = {**vars(gpt.config), "token_dropout": 0.1, "residual_dropout": 0.1, "ffn_dropout": 0.1}
    assert vars(bundle.gpt.config) == expected_config
    labels, codes = random_batch(gpt, batch=1)
    with torch.no_grad():
        assert bundle.gpt(labels, codes).equal(gpt(labels, codes))
    assert bundle.tokenizer.decode(codes).equal(tokenizer.decode(codes))
    assert bundle.names.find("golden retriever") == 207


def test_files_are_recognised_in_any_order_and_the_card_names_them(run):
    save(ddp_file(single_gpt().state_dict()), Path("g.pt"))
    save(vq_file(), Path("vq_ds16_c2i.pt"))
    assert run("vq_ds16_c2i.pt", "g.pt", "--out", "bundle", *HEADS)[0] == 0
    card = Path("bundle/README.md").read_text()
    for name in ("g.pt", "vq_ds16_c2i.pt"):
        sha = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        assert f"`{name}`" in card and sha in card
    assert "| `vq_ds16_c2i.pt` | LlamaGen VQ tokenizer | mit |" in card
    assert "\nlicense:" not in card  # of the other file nothing is known


def test_a_tokenizer_alone_becomes_a_tokenizer_folder(run):
    save(unitok_file(), Path("unitok_tokenizer.pth"))
    code, _, err = run("unitok_tokenizer.pth", "--out", "tokenizer")
    assert code == 0, err
    loaded = load_tokenizer("tokenizer")
    assert isinstance(loaded, UniTok) and not loaded.config.causal_projection
    codes = torch.randint(11, (1, 9, 3), generator=torch.Generator().manual_seed(0))
    assert loaded.decode(codes).equal(tiny_tokenizer().decode(codes))
    assert run("unitok_tokenizer.pth", "--out", "tokenizer")[0] == 0  # in place of what is there


def test_the_first_unitok_release_is_read_with_causal_projections(run):
    save(unitok_file(), Path("early.pth"))
    assert run("early.pth", "--out", "early", "--causal-projection")[0] == 0
    loaded, causal = load_tokenizer("early"), tiny_tokenizer(causal_projection=True)
    assert loaded.config == causal.config
    codes = torch.randint(11, (1, 9, 3), generator=torch.Generator().manual_seed(0))
    assert loaded.decode(codes).equal(causal.decode(codes))
    assert not loaded.decode(codes).equal(tiny_tokenizer().decode(codes))


def test_averaged_weights_are_taken_when_asked_for(run):
    raw, averaged = single_gpt(seed=0), single_gpt(seed=1)
    save({**ddp_file(raw.state_dict()), "ema": averaged.state_dict()}, Path("both.pt"))
    save(ddp_file(raw.state_dict()), Path("raw.pt"))
    save(vq_file(), Path("vq.pt"))
    assert run("both.pt", "vq.pt", "--out", "raw", *HEADS)[0] == 0
    assert run("both.pt", "vq.pt", "--out", "averaged", *HEADS, "--weights", "ema")[0] == 0
    for folder, gpt in (("raw", raw), ("averaged", averaged)):
        loaded = ImageGenerator.from_pretrained(folder, device="cpu").gpt
        assert loaded.norm.weight.equal(gpt.norm.weight)
    refused(run, "raw.pt", "vq.pt", "--out", "b", "--weights", "ema", message="none of the files.*with ema weights")


def test_half_precision_files_stay_so_unless_asked(run):
    state = {name: tensor.bfloat16() for name, tensor in single_gpt().state_dict().items()}
    save(ddp_file(state), Path("g.pt"))
    save(vq_file(), Path("vq.pt"))
    assert run("g.pt", "vq.pt", "--out", "as-is", *HEADS)[0] == 0
    assert run("g.pt", "vq.pt", "--out", "wide", *HEADS, "--dtype", "fp32")[0] == 0
    sizes = [Path(name, "generator", "model.safetensors").stat().st_size for name in ("as-is", "wide")]
    assert 1.7 < sizes[1] / sizes[0] < 2.1


def test_inspect_prints_what_files_hold_and_writes_nothing(run):
    save(ddp_file(single_gpt().state_dict()), Path("g.pt"))
    save(unitok_file(), Path("t.pth"))
    before = sorted(Path().iterdir())
    code, out, err = run("g.pt", "t.pth", "--inspect")
    assert code == 0, err
    assert sorted(Path().iterdir()) == before
    assert "g.pt: LlamaGen generator, under model" in out
    assert "1001 rows in the class table" in out
    assert "image_size=64" in out and "gpt_model=GPT-B" in out
    assert "t.pth: UniTok tokenizer, under trainer.unitok" in out
    numbers = sum(parameter.numel() for parameter in single_gpt().parameters())
    assert f"{numbers:,} numbers, float32" in out


MIXES = {
    "eight codebooks with VQ-16": (
        lambda: (
            save(ddp_file(several_gpt(num_positions=16).state_dict()), Path("g.pt")),
            save(vq_file(), Path("t.pt")),
        ),
        "does not fit the generator.*codebooks K = 1 instead of 3",
    ),
    "VQ-8 for VQ-16": (
        lambda: (
            save(ddp_file(single_gpt().state_dict()), Path("g.pt")),
            save(vq_file(tiny_vqgan(width_multiples=(1,) * 4)), Path("t.pt")),
        ),
        "trained on grids of 4×4 codes, but t.pt at 64 pixels gives 8×8",
    ),
    "another codebook": (
        lambda: (
            save(ddp_file(single_gpt(codebook_size=12).state_dict()), Path("g.pt")),
            save(vq_file(), Path("t.pt")),
        ),
        "codebook size V = 11 instead of 12",
    ),
    "two generators": (
        lambda: (save(ddp_file(single_gpt().state_dict()), Path("g.pt")),) * 2,
        "are both generators: give one of each",
    ),
    "a generator alone": (
        lambda: (save(ddp_file(single_gpt().state_dict()), Path("g.pt")),),
        "generator alone: give its tokenizer's file",
    ),
    "no size": (
        lambda: (save({"model": single_gpt().state_dict()}, Path("g.pt")), save(vq_file(), Path("t.pt"))),
        "does not hold the size of its pictures: give it, as in --image-size",
    ),
    "other classes": (
        lambda: (
            save(ddp_file(single_gpt(num_classes=5).state_dict()), Path("g.pt")),
            save(vq_file(), Path("t.pt")),
        ),
        "6 rows: num_classes=1000",
    ),
    "not a checkpoint of ours": (
        lambda: (save({"weights": {"a": torch.zeros(1)}}, Path("g.pt")), save(vq_file(), Path("t.pt"))),
        "g.pt is none of the files that can be read.*begins with weights",
    ),
    "a list": (lambda: (save([1], Path("g.pt")),), "holds a list"),
    "nothing": (lambda: (Path("gone.pt"),), "there is no file gone.pt"),
    "a text": (lambda: (Path("g.pt"), Path("g.pt").write_text("hello"))[:1], "g.pt is (no checkpoint|refused)"),
}


@pytest.mark.parametrize("case", MIXES)
def test_wrong_mixes_are_refused_in_one_line(run, case):
    make, message = MIXES[case]
    refused(run, *make(), "--out", "bundle", *HEADS, message=message)


@pytest.mark.parametrize(
    ("published", "name", "message"),
    [
        (ddp_file(single_gpt(num_positions=36).state_dict(), image_size=96), "g.pt", r"g.pt \(its arguments\) says 96"),
        ({"model": single_gpt().state_dict()}, "c2i_B_384.pt", "c2i_B_384.pt says 384"),
        ({"model": {**single_gpt().state_dict(), "freqs_cis": torch.zeros(37, 4, 2)}}, "g.pt", "grids of 6×6"),
    ],
    ids=["arguments", "published name", "rotation table"],
)
def test_a_larger_generator_with_a_smaller_claim_is_refused(run, published, name, message):
    save(published, Path(name))
    save(vq_file(), Path("vq.pt"))
    refused(run, name, "vq.pt", "--out", "bundle", "--image-size", "64", *HEADS, message=message)


def test_a_thousand_rows_make_a_bundle_without_guidance(run):
    import sample

    save(ddp_file(single_gpt(has_null_class=False).state_dict()), Path("g.pt"))
    save(vq_file(), Path("vq.pt"))
    assert run("g.pt", "vq.pt", "--out", "bundle", *HEADS)[0] == 0
    assert "`--cfg 1` only" in Path("bundle/README.md").read_text()
    arguments = ["--checkpoint", "bundle", "--class", "207", "--num", "1", "--device", "cpu"]
    assert sample.main([*arguments, "--cfg", "2"]) == 2
    assert sample.main(arguments) == 0


class Harmful:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["weights", "arguments", "raw pickle"])
@pytest.mark.parametrize("call", ["system", "eval"])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(run, place, call):
    trace = Path("executed")
    function, argument = (os.system, f"touch {trace}") if call == "system" else (eval, f"open({str(trace)!r}, 'w')")
    harmful, state = Harmful(function, argument), single_gpt().state_dict()
    if place == "raw pickle":
        Path("g.pt").write_bytes(pickle.dumps({"model": harmful}, protocol=2))
    else:
        save({"model": state, "x": harmful} if place == "weights" else ddp_file(state, note=harmful), Path("g.pt"))
    save(vq_file(), Path("vq.pt"))
    refused(
        run,
        "g.pt",
        "vq.pt",
        "--out",
        "bundle",
        *HEADS,
        message=r"g\.pt is refused: loading it would call .*(system|eval)",
    )
    assert not trace.exists()
    # The file is harmful: an ordinary load does run it.
    torch.load("g.pt", weights_only=False) if place != "raw pickle" else pickle.loads(Path("g.pt").read_bytes())
    assert trace.exists()


def test_the_namespace_of_training_is_the_only_class_that_is_allowed(run):
    from llamagen_unitok.published.files import ALLOWED_CLASSES

    assert ALLOWED_CLASSES == [argparse.Namespace]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # for other loads nothing has changed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda g, t: g["norm.weight"].fill_(float("nan")), "non-finite logits"),
        (lambda g, t: t["decoder.conv_out.bias"].fill_(float("inf")), "does not decode random codes"),
        (lambda g, t: t["decoder.conv_out.weight"].zero_(), "to one colour"),
        (lambda g, t: g.pop("norm.weight"), r"1 missing \(norm.weight\)"),
    ],
    ids=["generator of nan", "tokenizer of inf", "tokenizer of zeros", "missing tensor"],
)
def test_a_bundle_that_fails_its_check_is_not_there_and_an_earlier_one_stays(run, spoil, message):
    gpt, tokenizer = single_gpt().state_dict(), vq_file()
    save(ddp_file(gpt), Path("g.pt"))
    save(tokenizer, Path("vq.pt"))
    assert run("g.pt", "vq.pt", "--out", "bundle", *HEADS)[0] == 0
    before = content_hash("bundle/generator")
    with torch.no_grad():
        spoil(gpt, tokenizer["model"])
    save(ddp_file(gpt), Path("g.pt"))
    save(tokenizer, Path("vq.pt"))
    refused(run, "g.pt", "vq.pt", "--out", "bundle", *HEADS, message=message)
    assert content_hash("bundle/generator") == before


def test_a_file_cut_short_is_named(run):
    save(ddp_file(single_gpt().state_dict()), Path("g.pt"))
    save(vq_file(), Path("vq.pt"))
    Path("g.pt").write_bytes(Path("g.pt").read_bytes()[:-50_000])
    refused(run, "g.pt", "vq.pt", "--out", "bundle", *HEADS, message=r"g\.pt is no checkpoint file, or damaged")


def test_a_folder_with_other_things_is_not_replaced(run):
    save(vq_file(), Path("vq.pt"))
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    for config in ("there is none", "config.json", "config.json"):  # many a folder has one
        refused(run, "vq.pt", "--out", "mine", message=r"mine holds other things \(thesis\.txt")
        Path("mine", config).write_text("{}")
        Path("mine", "there is none").unlink(missing_ok=True)
    Path("model").mkdir()
    save(vq_file(), Path("model/model.safetensors"))
    refused(run, "model/model.safetensors", "--out", "model", message="would replace the folder that model/model")
    refused(run, "vq.pt", "--out", "vq.pt", message="--out vq.pt is a file")
    refused(run, "vq.pt", message="--out is missing")


def test_labels_can_be_a_file_or_a_number_and_their_order_is_checked(run):
    save(ddp_file(single_gpt(num_classes=2).state_dict(), num_classes=2), Path("g.pt"))
    save(vq_file(), Path("vq.pt"))
    Path("labels.json").write_text(json.dumps({"0": "cat", "1": "dog"}))
    for name in ("cat", "dog"):
        Path("pictures", name).mkdir(parents=True)
    files = ["g.pt", "vq.pt", "--out", "bundle", *HEADS]
    assert run(*files, "--labels", "labels.json", "--class-folders", "pictures")[0] == 0
    assert ImageGenerator.from_pretrained("bundle", device="cpu").names.names == ["cat", "dog"]
    assert run(*files, "--labels", "2")[0] == 0
    assert ImageGenerator.from_pretrained("bundle", device="cpu").names.names == ["class 0", "class 1"]
    Path("labels.json").write_text(json.dumps({"0": "dog", "1": "cat"}))
    wrong = [*files, "--labels", "labels.json", "--class-folders", "pictures"]
    refused(run, *wrong, message="class folder 0 is 'cat', which is class 1")
    refused(run, *files, "--labels", "birds", message="--labels birds is no labels.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file["model"].update({"norm.weight": torch.ones(32, dtype=torch.int64)}), "holds int64 numbers"),
        (lambda file: file["model"].update({7: torch.ones(1)}), "none of the files that can be read"),
        (lambda file: vars(file["args"]).update(image_size="large"), "says image_size='large'"),
        (lambda file: vars(file["args"]).update(num_classes=999), "was trained on 999 classes, but --labels has 1000"),
    ],
    ids=["whole numbers", "a key that is no name", "a size that is no number", "other classes"],
)
def test_files_that_cannot_be_right_are_one_clear_line(run, spoil, message):
    file = ddp_file(single_gpt().state_dict())
    spoil(file)
    save(file, Path("g.pt"))
    save(vq_file(), Path("vq.pt"))
    refused(run, "g.pt", "vq.pt", "--out", "bundle", *HEADS, message=message)


@pytest.mark.parametrize("table", [torch.tensor(1.0), torch.zeros(20, 4, 2)], ids=["a number", "no square grid"])
def test_a_rotation_table_that_is_none_says_nothing_about_the_grid(run, table):
    save({"model": {**single_gpt().state_dict(), "freqs_cis": table}}, Path("g.pt"))
    save(vq_file(), Path("vq.pt"))
    assert run("g.pt", "vq.pt", "--out", "bundle", *HEADS, "--image-size", "64", "--no-picture")[0] == 0


def test_double_precision_becomes_single(run):
    save(ddp_file({name: t.double() for name, t in single_gpt().state_dict().items()}), Path("g.pt"))
    save(vq_file(), Path("vq.pt"))
    assert run("g.pt", "vq.pt", "--out", "bundle", *HEADS)[0] == 0
    weights = ImageGenerator.from_pretrained("bundle", device="cpu").gpt.state_dict()
    assert all(tensor.equal(weights[name]) for name, tensor in single_gpt().state_dict().items())


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(run, monkeypatch):
    save(ddp_file(single_gpt().state_dict()), Path("g.pt"))
    save(vq_file(), Path("vq.pt"))

    def full(*_args, **_options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("modelfolder.folder.save_file", full)
    refused(run, "g.pt", "vq.pt", "--out", "bundle", *HEADS, message="could not be written: .*No space left")


def test_bytes_that_are_no_checkpoint_are_one_clear_line(tmp_path):
    path = tmp_path / "any.pt"
    for seed in range(40):
        path.write_bytes(np.random.default_rng(seed).bytes(1000))
        with pytest.raises(ValueError, match=r"any\.pt is (no checkpoint file|refused)"):
            read_checkpoint(path)
