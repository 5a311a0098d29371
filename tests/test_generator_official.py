"""Published generator files load: every layout, every name, and a clear line for what does not fit."""

import json
from pathlib import Path

import pytest
import torch

from llamagen_unitok import GPT
from llamagen_unitok.official import published_state, read_config
from tests.tiny_generator import GROUPED, SINGLE, random_batch, tiny_gpt

KEY_FILES = sorted(path for path in (Path(__file__).parent / "golden").glob("*_keys.json") if "_gpt_" in path.name)


def from_official(state, **changes):
    return GPT.from_official(state, **{"num_classes": 5, "num_positions": 9, "n_head": 4, **changes})


@pytest.mark.parametrize("path", KEY_FILES, ids=lambda path: path.stem)
def test_published_entries_are_exactly_ours(path):
    published = json.loads(path.read_text())
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in published["entries"]}
    config = read_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    expected = published["config"]
    assert (config.layers, config.heads, config.width) == (expected["n_layer"], expected["n_head"], expected["dim"])
    assert config.ffn_width == expected["ffn_hidden"]
    assert config.num_codebooks * config.codebook_size == expected["vocab_size"]
    assert config.has_null_class == (expected["class_dropout_prob"] > 0)
    with torch.device("meta"):
        gpt = GPT(config)
    assert {name: tuple(tensor.shape) for name, tensor in gpt.state_dict().items()} == shapes
    assert sum(p.numel() for p in gpt.parameters()) == published["parameter_count"]


def test_all_published_key_files_are_tested():
    assert len(KEY_FILES) == 6


WRAPPERS = {
    "bare": lambda state: state,
    "ddp": lambda state: {"model": state, "optimizer": {}, "steps": 3},
    "module": lambda state: {"module": state},
    "state_dict": lambda state: {"state_dict": state},
    "nested": lambda state: {"model": {"module": state}},
    "compiled": lambda state: {"model": {f"_orig_mod.{name}": t for name, t in state.items()}},
    "compiled inside ddp": lambda state: {f"module._orig_mod.{name}": t for name, t in state.items()},
    "fsdp": lambda state: {name.replace("layers.0.", "layers.0._fsdp_wrapped_module."): t for name, t in state.items()},
    "rotation table": lambda state: {**state, "freqs_cis": torch.zeros(10, 4, 2)},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("changes", [{}, SINGLE, GROUPED, {"has_null_class": False}], ids=str)
def test_every_wrapping_gives_the_same_model(wrap, changes):
    gpt = tiny_gpt(**changes, ffn_multiple=256)
    loaded = from_official(wrap(gpt.state_dict()))
    assert loaded.config == gpt.config
    labels, codes = random_batch(gpt)
    assert torch.equal(loaded(labels, codes), gpt(labels, codes))


def test_half_precision_files_become_float32():
    gpt = tiny_gpt(ffn_multiple=256)
    loaded = from_official({name: tensor.half() for name, tensor in gpt.state_dict().items()})
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (without("cls_embedding.embedding_table.weight"), {}, "cls_embedding"),
        (without("norm.weight"), {}, r"1 missing \(norm.weight\)"),
        (without("layers.0.attention.wqkv.weight"), {}, "wqkv"),
        (without("tok_embeddings.codebooks.0.weight"), {}, "tok_embeddings"),
        (lambda state: {**state, "extra.weight": torch.zeros(2)}, {}, r"1 unexpected \(extra.weight\)"),
        (lambda state: {**state, "norm.weight": torch.zeros(2)}, {}, "1 wrong-shaped"),
        (lambda state: {k: t for k, t in state.items() if "layers." not in k}, {}, "no layers"),
        (lambda state: {k: t for k, t in state.items() if "output.layers." not in k}, {}, "depth_layers"),
        (lambda state: {**state, "epoch": 3}, {}, "'epoch' is a int"),
        (lambda state: {}, {}, "state dict"),
        (lambda state: [1, 2], {}, "state dict"),
        (lambda state: state, {"num_classes": 1000}, "6 rows.*num_classes=1000"),
        (lambda state: state, {"num_positions": 8}, "square"),
        (lambda state: state, {"n_head": None}, "n_head"),
        (lambda state: state, {"n_head": 5}, "n_head=5"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(spoil, arguments, message):
    state = tiny_gpt(ffn_multiple=256).state_dict()
    with pytest.raises(ValueError, match=message) as error:
        from_official(spoil(dict(state)), **arguments)
    assert "\n" not in str(error.value)


def test_the_given_state_is_left_alone():
    state = dict(tiny_gpt(ffn_multiple=256).state_dict())
    wrapped = {"model": {f"module.{name}": tensor for name, tensor in state.items()}}
    assert published_state(wrapped).keys() == state.keys()
    assert all(name.startswith("module.") for name in wrapped["model"])
