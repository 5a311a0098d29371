"""Models on disk: 8-bit storage is close and small, replacing is complete or not at all, damage is named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfolder import ModelFolderError, content_hash, locate
from modelfolder.compact import pack, unpack
from tests.tiny_generator import tiny_gpt


@given(scale=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 50.0]), rows=st.integers(1, 5), seed=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_packed_matrices_come_back_within_half_a_step(scale, rows, seed):
    weight = torch.randn(rows, 3, 7, generator=torch.Generator().manual_seed(seed)) * scale
    state = {"conv.weight": weight, "bias": weight[:, 0, 0], "count": torch.arange(3)}
    again = unpack(pack(state), torch.float32)
    assert again.keys() == state.keys() and torch.equal(again["count"], state["count"])
    step = weight.flatten(1).abs().amax(1) / 127
    assert ((again["conv.weight"] - weight).flatten(1).abs() <= 0.51 * step[:, None] + 1e-7).all()
    torch.testing.assert_close(again["bias"], state["bias"], rtol=1e-3, atol=1e-7)


def test_a_packed_model_is_a_quarter_of_the_size_and_loads(tmp_path):
    gpt = tiny_gpt()
    whole, small = (gpt.save_pretrained(tmp_path / n, dtype=d) for n, d in (("whole", None), ("small", torch.int8)))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, small)]
    assert sizes[1] < 0.5 * sizes[0]
    again = type(gpt).from_pretrained(small)
    assert again.config == gpt.config and next(again.parameters()).dtype == torch.float32
    for (name, a), b in zip(gpt.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=a.detach().abs().max().item() / 127 + 1e-3, msg=name)


def test_saving_again_replaces_the_folder_and_leaves_nothing_else(tmp_path):
    gpt = tiny_gpt()
    first = content_hash(gpt.save_pretrained(tmp_path / "model"))
    assert content_hash(gpt.save_pretrained(tmp_path / "model")) == first
    with torch.no_grad():
        gpt.norm.weight.add_(1)
    assert content_hash(gpt.save_pretrained(tmp_path / "model")) != first
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_earlier_folder(tmp_path, monkeypatch):
    gpt = tiny_gpt()
    folder = gpt.save_pretrained(tmp_path / "model")
    before = content_hash(folder)

    def full_disk(*_args, **_options):
        raise OSError("No space left on device")

    monkeypatch.setattr("modelfolder.folder.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        gpt.save_pretrained(folder)
    assert content_hash(folder) == before and [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_folder_is_one_clear_line(name):
    with pytest.raises(ModelFolderError, match="no model folder at"):
        locate(name)


def test_large_models_are_read_from_shards(tmp_path, monkeypatch):
    from huggingface_hub import save_torch_state_dict

    gpt = tiny_gpt()
    folder = gpt.save_pretrained(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(gpt.state_dict(), folder, max_shard_size=20_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    again = type(gpt).from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), again.parameters(), strict=True))
    shards[0].unlink()
    with pytest.raises(ModelFolderError, match=rf"{shards[0].name} is missing"):
        type(gpt).from_pretrained(folder)
