"""Reading and writing models as folders of config.json and safetensors, from disk or from the Hugging Face hub.

The tokenizer and the generator both inherit from :class:`ModelFolder`; neither knows the other. A *bundle* holds
them side by side as ``tokenizer/`` and ``generator/``; either can also live in a folder of its own.
Nothing here ever unpickles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modelfolder.compact import pack, unpack

CONFIG_NAME = "config.json"
KIND_KEY = "kind"  # in config.json, which of the architectures that can be this part
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_SIZE = "512MB"  # writing takes this much memory beside the model's own
# Of an earlier upload, unless it is uploaded again.
STALE = ["*.safetensors", f"*{INDEX_NAME}", "*aliases.json"]
# What a model folder or a bundle may hold, for replacing it may delete nothing else.
_OURS = re.compile(r"(config|labels|aliases)\.json|model.*\.safetensors(\.index\.json)?|README\.md|generator|tokenizer")


class ModelFolderError(ValueError):
    """A model folder is missing, incomplete, damaged or of another architecture than it says."""


def locate(path_or_hub_id: str | Path) -> Path:
    """Return the local folder of a bundle or model, downloading it from the hub when it is not a folder here.

    Raises ModelFolderError, in one line, when there is neither such a folder nor such a hub repository in reach.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    looks_local = path.exists() or path.is_absolute() or str(path_or_hub_id).startswith((".", "~"))
    if looks_local or str(path_or_hub_id).count("/") != 1:
        raise ModelFolderError(
            f"no model folder at {path}: give a folder that holds {CONFIG_NAME}, or a hub id user/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors", "*.md"], repo_type="model"
            )
        )
    except Exception as error:
        # The hub library raises a dozen types for "not there", "no network" and "no permission"; all end the run here.
        raise ModelFolderError(
            f"{path_or_hub_id} is neither a folder here nor a hub repository in reach ({type(error).__name__}): "
            "check the name, or download the bundle and give its folder"
        ) from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder's model.safetensors, or of the shards its index names."""
    index_path = folder / INDEX_NAME
    if index_path.exists():
        names = sorted(set(_read_json(index_path).get("weight_map", {}).values()))
    else:
        names = [WEIGHTS_NAME]
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ModelFolderError(f"{path} is missing: copy or download the whole folder again")
        try:
            state.update(load_file(path))
        except (SafetensorError, ValueError, OSError) as error:
            raise ModelFolderError(f"{path} is damaged or cut short ({error}): copy or download it again") from error
    return state


def stored_kind(folder: Path) -> str | None:
    """The architecture that a folder's config.json names, or None; ModelFolderError when it is missing or damaged."""
    return _read_json(folder / CONFIG_NAME).get(KIND_KEY)


def content_hash(folder: str | Path) -> str:
    """SHA-256, in hexadecimal, over a model folder's config.json and weight files: who made these codes or pictures."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted([folder / CONFIG_NAME, *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        add_file(digest, path)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()


def add_file(digest: Any, path: Path) -> None:
    """Feed a file's bytes to a hashlib digest, a piece at a time."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def check_replaceable(folder: Path) -> None:
    """Raise ModelFolderError where `folder` holds anything but what models and bundles consist of."""
    if folder.is_file():
        raise ModelFolderError(f"{folder} is a file: give a folder")
    others = sorted(p.name for p in folder.iterdir() if not _OURS.fullmatch(p.name)) if folder.is_dir() else []
    if others:
        more = ", …" if len(others) > 3 else ""
        raise ModelFolderError(
            f"{folder} holds other things ({', '.join(others[:3])}{more}): give a new folder, or a model's to replace"
        )


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `folder` when the block ends well, and vanishes when it does not.

    Raises ModelFolderError, before anything is written, where that would delete what is no part of a model.
    """
    folder = folder.resolve()
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    replaced = unfinished.with_suffix(".old")
    unfinished.mkdir()
    try:
        yield unfinished
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_folder(
    folder: str | Path,
    config: dict[str, Any],
    state: dict[str, Tensor],
    stored_as: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Path:
    """Write config.json and (sharded) safetensors so that `folder` appears complete or not at all.

    stored_as: what becomes of a part of the state on its way, one shard at a time, so that a cast needs no second copy
    of a large model. An existing model folder of the same name is replaced after the new one is complete.
    Raises OSError when the disk does not take it, ModelFolderError for a folder that holds other things.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    shards = split_torch_state_dict_into_shards(state, max_shard_size=SHARD_SIZE)
    with replacing_folder(folder) as unfinished:
        _write_json(unfinished / CONFIG_NAME, config)
        index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
        for file_name, names in shards.filename_to_tensors.items():
            part = stored_as({name: state[name].detach().cpu().contiguous() for name in names})
            try:
                save_file(part, unfinished / file_name, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{folder} could not be written: {error}") from None
            index["metadata"]["total_size"] += sum(t.numel() * t.element_size() for t in part.values())
            index["weight_map"].update(dict.fromkeys(part, file_name))
        if shards.is_sharded:
            _write_json(unfinished / INDEX_NAME, index)
        for path in unfinished.iterdir():
            path.chmod(0o644)  # safetensors makes its files readable by the owner only
    return folder


def upload(repo_id: str, folder: Path, *, private: bool) -> str:
    """Make the hub repository ``user/name`` hold what is in `folder`; returns its address.

    Weights of an earlier upload that are not in `folder` are removed: an index left behind would bring them back.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=STALE)
    return str(address)


class ModelFolder:
    """Mixin for an nn.Module that is built as ``cls(config)`` from a frozen dataclass ``cls.config_class``.

    ``part`` is the name of the model's subfolder in a bundle. ``kind`` names the architecture in config.json where a
    part has several; a folder that names none is taken to be right.
    """

    part: ClassVar[str]
    kind: ClassVar[str | None] = None
    float32_only: ClassVar[bool] = False  # a model whose results hang on float32 loads in no other type
    config_class: ClassVar[type]
    config: Any

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ):
        """Load from a bundle, a folder of its own, or a hub id; returns the model in eval mode.

        Weights of any floating type on disk, and packed 8-bit ones, become `dtype`.
        Raises ModelFolderError when files are missing or damaged, or when the tensors are not exactly those of the
        architecture in config.json; and for a dtype that the model does not compute in.
        """
        if cls.float32_only and dtype != torch.float32:
            raise ModelFolderError(
                f"a {cls.part} loads in float32 only, since rounding would change its codes, not in {dtype}: "
                "run it under torch.autocast, or sample with --decoder bf16"
            )
        folder = locate(path_or_hub_id)
        folder = cls.part_of(folder)
        config = cls.read_config(folder)
        with torch.device("meta"):
            model = cls(config)
        state = unpack(read_weights(folder), dtype)
        return model.load_exactly(state, folder).to(device)

    @classmethod
    def part_of(cls, folder: Path) -> Path:
        """The model's own folder: this part of a bundle, or the folder itself."""
        return folder / cls.part if (folder / cls.part).is_dir() else folder

    @classmethod
    def read_config(cls, folder: Path):
        """The dataclass in a folder's config.json; unknown, missing or impossible values raise ModelFolderError."""
        values = _read_json(folder / CONFIG_NAME)
        kind = values.pop(KIND_KEY, cls.kind)
        if kind != cls.kind:
            raise ModelFolderError(f"{folder} holds a {cls.part} of kind {kind!r}, not {cls.kind!r}")
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ModelFolderError(
                f"{folder / CONFIG_NAME} has unknown keys {unknown}: this code knows {sorted(known)}"
            )
        try:
            return cls.config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except (TypeError, ValueError) as error:
            raise ModelFolderError(f"{folder / CONFIG_NAME}: {error}") from error

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write config.json and safetensors into `folder`, complete or not at all.

        dtype: a floating type casts the weights; torch.int8 packs them (modelfolder.compact); None leaves them.
        """
        stored_as = dict if dtype is None else pack if dtype == torch.int8 else partial(unpack, dtype=dtype)
        config = dataclasses.asdict(self.config)
        return write_folder(
            folder, {KIND_KEY: self.kind, **config} if self.kind else config, self.state_dict(), stored_as
        )

    def push_to_hub(self, repo_id: str, *, private: bool = False, dtype: torch.dtype | None = None) -> str:
        """Upload the model as a hub repository of its own (``user/name``); returns its address."""
        with tempfile.TemporaryDirectory() as scratch:
            return upload(repo_id, self.save_pretrained(Path(scratch) / self.part, dtype=dtype), private=private)

    def start_from(self, path_or_hub_id: str | Path) -> None:
        """Copy the weights of a bundle or folder into this model; ModelFolderError unless they fit it exactly."""
        other = type(self).from_pretrained(path_or_hub_id)
        check_state(self, other.state_dict(), path_or_hub_id)
        self.load_state_dict(other.state_dict())

    def load_exactly(self, state: dict[str, Tensor], source: str | Path):
        """Take over `state` in a model built on the meta device; returns the model in eval mode.

        Raises ModelFolderError, which names `source`, unless names and shapes are exactly the model's.
        """
        check_state(self, state, source)
        self.load_state_dict(state, assign=True)
        self.materialize_buffers()
        return self.eval()

    def materialize_buffers(self) -> None:
        """Compute the buffers that are not stored, after a build on the meta device; none by default."""


def check_state(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Raise ModelFolderError unless `state` has exactly the model's names and shapes; says what differs."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    reshaped = [
        f"{n} {found[n]} for {expected[n]}" for n in sorted(expected.keys() & found.keys()) if expected[n] != found[n]
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong-shaped", reshaped))
        if names
    ]
    if problems:
        raise ModelFolderError(f"{source} does not fit {type(model).__name__}: tensors {'; '.join(problems)}")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing: {path.parent} is not a model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelFolderError(f"{path} must hold a JSON object")
    return values
