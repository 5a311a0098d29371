"""Generator, tokenizer and class names as one object that turns labels into pictures: a bundle."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from llamagen_unitok.config import GPTConfig, code_differences
from llamagen_unitok.gpt import GPT
from llamagen_unitok.grid import labelled_grid
from llamagen_unitok.labels import ClassNames
from llamagen_unitok.runtime.distributed import pick_device
from llamagen_unitok.runtime.files import replacing
from llamagen_unitok.runtime.memory import explained_batch
from llamagen_unitok.sampling import SamplingConfig, generate, release
from modelfolder import locate, replacing_folder, upload
from tokenizer import Tokenizer, load_tokenizer, read_tokenizer_config
from tokenizer.fast import FastDecoder
from tokenizer.images import Resize, to_pil
from tokenizer.table import PART as TOKENIZER_PART

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_SIZE = 8  # pictures generated at once, unless the caller says otherwise
# How codes become pixels: as the tokenizer does it, or with rewritten convolutions, in float32 (the same up to
# rounding) or bfloat16, which can be compiled too.
DECODERS: dict[str, Callable[[Tokenizer], Callable[[Tensor], Tensor]]] = {
    "plain": lambda tokenizer: tokenizer.decode_unclamped,
    "fast": FastDecoder,
    "bf16": lambda tokenizer: FastDecoder(tokenizer, torch.bfloat16),
    "compiled": lambda tokenizer: FastDecoder(tokenizer, torch.bfloat16, compiled=True),
}
CARD_NAME = "README.md"
PREVIEW_CLASSES = 32


class Sample(NamedTuple):
    """One generated picture. index: its number within the class.   codes: (L, K) int64, on the CPU."""

    label: int
    index: int
    picture: Image.Image
    codes: Tensor


class ImageGenerator:
    """Labels → pictures.

    The generator computes on its device in its own dtype; there too the tokenizer decodes in float32 (TF32 off), one
    picture at a time, so that pixels follow from the codes and the device alone. Set `resize` to get pictures of
    another size than the model's.
    """

    resize: Resize | None = None

    def __init__(
        self, gpt: GPT, tokenizer: Tokenizer, names: ClassNames | None = None, card: str | None = None
    ) -> None:
        """names: None numbers the classes.   card: the model card, README.md of the bundle.

        Raises ValueError when the tokenizer or the names do not fit the generator.
        """
        check_fit(gpt.config, tokenizer.config)
        self.names = ClassNames.numbered(gpt.config.num_classes) if names is None else names
        if len(self.names) != gpt.config.num_classes:
            raise ValueError(
                f"{len(self.names)} class names do not fit a generator of {gpt.config.num_classes} classes"
            )
        self.gpt, self.tokenizer, self.card = gpt.eval(), tokenizer.eval(), card
        self.use_decoder("plain")

    def use_decoder(self, name: str) -> None:
        """Decode as a row of DECODERS says, from now on. ValueError where the tokenizer has no such decoder."""
        self.decoder_name, self._to_images = name, DECODERS[name](self.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        tokenizer: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> ImageGenerator:
        """Load a bundle, or a generator folder together with a `tokenizer` of its own (folder, bundle or hub id).

        device: of the generator, "auto" (CUDA if there is one) or a torch device.   dtype: of the generator, "auto"
        (fp32 on a CPU, bf16 on CUDA), "fp32", "bf16", "fp16" or a torch dtype.
        Raises ValueError (ModelFolderError for what is missing or damaged), in one line. That the parts fit each other
        is checked before any weights are read.
        """
        chosen = pick_device(str(device))
        chosen_dtype = pick_dtype(dtype, chosen)
        folder = locate(path_or_hub_id)
        tokenizer_folder = folder if tokenizer is None else locate(tokenizer)
        if tokenizer is None and not (folder / TOKENIZER_PART).is_dir():
            raise ValueError(f"{folder} holds no {TOKENIZER_PART}/ folder: give a whole bundle, or --tokenizer as well")
        check_fit(
            GPT.read_config(GPT.part_of(folder)),
            read_tokenizer_config(tokenizer_folder),
            where=f" ({folder} and {tokenizer_folder})",
        )
        card = folder / CARD_NAME
        return cls(
            GPT.from_pretrained(folder, device=chosen, dtype=chosen_dtype),
            load_tokenizer(tokenizer_folder).to(chosen),
            ClassNames.load(folder),
            card.read_text(encoding="utf-8") if card.is_file() else None,
        )

    def __call__(
        self,
        labels: int | str | Iterable[int | str],
        num: int = 1,
        *,
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
        **sampling: Any,
    ) -> list[Image.Image]:
        """`num` pictures of each label (an id or a name), class by class, as RGB pictures; see `stream`."""
        samples = self.stream(labels, num, batch_size=batch_size, progress=progress, **sampling)
        return [sample.picture for sample in samples]

    def stream(
        self,
        labels: int | str | Iterable[int | str],
        num: int = 1,
        *,
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
        engine: str = "auto",
        **sampling: Any,
    ) -> Iterator[Sample]:
        """Like calling the object, but one sample after the other, so that any number of them fits in memory.

        sampling: the fields of SamplingConfig, such as cfg_scale and seed.   progress: a bar on stderr.
        Picture i of a class is the same whatever else is asked for: it follows from (seed, label, i). A label given
        again goes on counting. Every batch has `batch_size` rows, the last one padded, since rounding depends on the
        shape. Raises ValueError for wrong labels or settings, at once and not only when the first sample is taken.
        """
        config = SamplingConfig(**sampling)
        config.check_generator(self.gpt.config)
        for name, value in (("num", num), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} ({name}) must be a whole number of at least 1, got {value!r}")
        wanted = [labels] if isinstance(labels, (int, str)) else labels
        ids = [self.names.find(label) for label in wanted]
        if not ids:
            raise ValueError("no label is given: give at least one id or name")
        return self._generate(ids, num, batch_size, progress, engine, sampling)

    def _generate(
        self, ids: list[int], num: int, batch_size: int, progress: bool, engine: str, sampling: dict[str, Any]
    ) -> Iterator[Sample]:
        rows = _rows(ids, num)
        total = len(ids) * num
        one_batch = total <= batch_size  # then the bar counts positions, since it would jump from nothing to all
        with tqdm(total=total, unit="picture", desc="generating", disable=not progress or one_batch) as bar:
            while batch := list(itertools.islice(rows, batch_size)):
                padded = batch + batch[-1:] * (batch_size - len(batch))
                with explained_batch(batch_size):
                    codes = generate(
                        self.gpt,
                        [label for label, _ in padded],
                        indices=[index for _, index in padded],
                        engine=engine,
                        progress=progress and one_batch,
                        **sampling,
                    )
                codes = codes[: len(batch)].cpu()
                for (label, index), codes_LK in zip(batch, codes, strict=True):
                    yield Sample(label, index, self.decode(codes_LK[None])[0], codes_LK)
                    bar.update()

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """codes (B, L, K) → B pictures, each decoded alone: convolutions round differently in batches."""
        device = next(self.tokenizer.parameters()).device
        return [picture for row in codes.to(device) for picture in to_pil(self.images(row[None]))]

    def images(self, codes: Tensor) -> Tensor:
        """codes (B, L, K) on the tokenizer's device → images (B, 3, H, W) in [-1, 1], resized where `resize` is set."""
        # cuDNN's own default rounds convolutions to TF32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            images = self._to_images(codes)
        return (images if self.resize is None else self.resize(images)).clamp(-1, 1)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write the whole bundle, complete or not at all, in place of what was there; `dtype` casts the weights."""
        folder = Path(folder)
        with replacing_folder(folder) as unfinished:
            self.gpt.save_pretrained(unfinished / GPT.part, dtype=dtype)
            self.tokenizer.save_pretrained(unfinished / TOKENIZER_PART, dtype=dtype)
            self.names.save(unfinished)
            (unfinished / CARD_NAME).write_text(self.card or _default_card(self.gpt.config), encoding="utf-8")
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool = False, dtype: torch.dtype | None = None) -> str:
        """Upload the whole bundle as the hub repository ``user/name``; returns its address."""
        with tempfile.TemporaryDirectory() as scratch:
            return upload(repo_id, self.save_pretrained(Path(scratch) / "bundle", dtype=dtype), private=private)


def check_fit(generator: GPTConfig, tokenizer: Any, where: str = "") -> None:
    """Raise ValueError, in one line, unless the tokenizer decodes exactly the codes that the generator makes.

    tokenizer: the config of any tokenizer in the table.
    """
    differences = code_differences(tokenizer, generator)
    if differences:
        raise ValueError(
            f"the tokenizer does not fit the generator{where}: {', '.join(differences)}; "
            "use the tokenizer that made the generator's training codes"
        )


def make_preview(
    tokenizer: str | Path, device: str | torch.device = "cpu", classes: int = PREVIEW_CLASSES
) -> Callable[[GPT, Path], None]:
    """What a trainer of generators calls to see its weights: preview(gpt, png) writes a sheet of pictures.

    They are the first of up to `classes` classes spread evenly over all, at seed 0 and without guidance. The tokenizer
    is read now, so that a wrong path ends a run before it starts.
    """
    decoder = load_tokenizer(tokenizer).to(device)

    def preview(gpt: GPT, png: Path) -> None:
        generator = ImageGenerator(gpt, decoder)
        count = gpt.config.num_classes
        labels = [i * count // min(classes, count) for i in range(min(classes, count))]
        groups = [(str(label), [picture]) for label, picture in zip(labels, generator(labels), strict=True)]
        release(gpt)  # training needs the memory
        png.parent.mkdir(parents=True, exist_ok=True)
        with replacing(png) as file:
            labelled_grid(groups).save(file, format="PNG")

    return preview


def _rows(ids: list[int], num: int) -> Iterator[tuple[int, int]]:
    """(label, index) of all pictures in order: `num` for each id, indices counted within the class."""
    given: dict[int, int] = {}
    for label in ids:
        first = given.get(label, 0)
        given[label] = first + num
        for index in range(first, first + num):
            yield label, index


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The number type of a generator on a device; see `ImageGenerator.from_pretrained`. ValueError for no such one."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not known: use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _default_card(config: GPTConfig) -> str:
    return (
        "---\nlibrary_name: llamagen-unitok\ntags: [image-generation, autoregressive]\n---\n\n"
        f"# LlamaGen-UniTok bundle\n\nA class-conditional image generator: {config.num_classes} classes, "
        f"{config.layers} layers of width {config.width}, {config.num_codebooks} codebooks of {config.codebook_size} "
        f"entries, a grid of {config.grid}×{config.grid}.\n\n"
        "    python sample.py --checkpoint THIS_FOLDER --class 0\n"
    )
