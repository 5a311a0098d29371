"""Out again: bundles and models pushed to the hub are what comes back from it, whichever tokenizer they hold."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch

from llamagen_unitok import GPT, ImageGenerator
from llamagen_unitok.imagenet import imagenet_names
from tests.conftest import tiny_generator, tiny_tokenizer
from tests.published_files import single_gpt
from tests.tiny_vqgan import tiny_vqgan
from tokenizer import load_tokenizer


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that stands for the hub: HfApi uploads there, snapshot_download answers from there."""
    root = tmp_path / "hub"

    class FolderApi:
        def create_repo(self, repo_id, *, private, exist_ok):
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            (root / repo_id / ".private").write_text(str(private))
            return f"hub://{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, delete_patterns):
            for path in (root / repo_id).rglob("*"):
                if any(fnmatch(str(path.relative_to(root / repo_id)), pattern) for pattern in delete_patterns):
                    path.unlink()
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr("huggingface_hub.HfApi", FolderApi)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **_: str(root / repo_id))
    return root


def vq_bundle() -> ImageGenerator:
    return ImageGenerator(single_gpt(), tiny_vqgan(), imagenet_names(), card="---\nlicense: mit\n---\n\n# VQ\n")


@pytest.mark.parametrize("make", [vq_bundle, tiny_generator], ids=["vqgan", "unitok"])
def test_a_pushed_bundle_comes_back_whole(hub, make):
    bundle = make()
    assert bundle.push_to_hub("me/model", private=True) == "hub://me/model"
    assert (hub / "me/model/.private").read_text() == "True"
    assert (hub / "me/model/README.md").read_text() == bundle.card
    assert not list(hub.rglob("*.pt")) and not list(hub.rglob("*.bin"))
    again = ImageGenerator.from_pretrained("me/model", device="cpu")
    assert type(again.tokenizer) is type(bundle.tokenizer) and again.tokenizer.config == bundle.tokenizer.config
    assert (again.names.names, again.names.aliases, again.card) == (
        bundle.names.names,
        bundle.names.aliases,
        bundle.card,
    )
    for one, other in zip(bundle([1, 2], cfg_scale=1.5), again([1, 2], cfg_scale=1.5), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("make", [vq_bundle, tiny_generator], ids=["vqgan", "unitok"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=["half", "8-bit"])
def test_smaller_bundles_survive_the_round_trip_on_disk(tmp_path, make, dtype):
    bundle = make()
    once = ImageGenerator.from_pretrained(bundle.save_pretrained(tmp_path / "once", dtype=dtype), device="cpu")
    twice = ImageGenerator.from_pretrained(once.save_pretrained(tmp_path / "twice"), device="cpu")
    for part in ("gpt", "tokenizer"):
        original, first, second = (getattr(b, part).state_dict() for b in (bundle, once, twice))
        for name, tensor in first.items():
            assert tensor.equal(second[name])
            step = original[name].abs().max() / 100 + 1e-3
            assert (tensor - original[name]).abs().max() <= step, name


@pytest.mark.parametrize(
    ("model", "load"),
    [(tiny_vqgan(), load_tokenizer), (tiny_tokenizer(), load_tokenizer), (single_gpt(), GPT.from_pretrained)],
    ids=["vqgan", "unitok", "generator"],
)
def test_a_pushed_model_comes_back(hub, model, load):
    assert model.push_to_hub("me/part") == "hub://me/part"
    again = load("me/part")
    assert type(again) is type(model) and again.config == model.config
    for name, tensor in model.state_dict().items():
        assert tensor.equal(again.state_dict()[name])


def test_pushing_again_replaces_the_weights_whatever_their_number_of_files(hub, monkeypatch):
    first, second = single_gpt(), single_gpt(seed=1)
    with monkeypatch.context() as changed:
        changed.setattr("modelfolder.folder.SHARD_SIZE", "20KB")
        first.push_to_hub("me/part")
    assert len(list(hub.rglob("*.safetensors"))) > 1
    for model in (second, first):
        model.push_to_hub("me/part")
        assert len(list(hub.rglob("*.safetensors"))) == 1
        again = GPT.from_pretrained("me/part").state_dict()
        assert all(tensor.equal(again[name]) for name, tensor in model.state_dict().items())


def test_an_interrupted_upload_leaves_nothing_behind(hub, monkeypatch, tmp_path):
    def no_network(self, **_):
        raise OSError("connection lost")

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", no_network)
    with pytest.raises(OSError, match="connection lost"):
        vq_bundle().push_to_hub("me/model")
    assert list(scratch.iterdir()) == []
