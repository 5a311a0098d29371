"""The table of published checkpoints: where the files are, under which licence, and what their authors measured.

File names, figures and licences were read in the repositories' README files and on the hub's pages, not by downloading.
"""

from __future__ import annotations

from typing import NamedTuple

from llamagen_unitok.config import PRESETS, Size

LLAMAGEN = "LlamaGen README"
UNITOK = "UniTok README"


class HubFile(NamedTuple):
    """A file of a hub repository (user/name), and the licence that its page states."""

    repository: str
    name: str
    licence: str


class PublishedTokenizer(NamedTuple):
    """img_size: pixels that it is converted for.   rfid, source: published reconstruction FID at 256×256."""

    file: HubFile
    img_size: int
    rfid: float
    source: str


class PublishedGenerator(NamedTuple):
    """A class-conditional ImageNet generator of one codebook.

    tokenizer: a name in TOKENIZERS.   image_size: pixels of its pictures; cell: pixels of one code's side.
    cfg_scale: the guidance scale of the published figure.   fid, source: published FID-50k at 256×256 with that
    guidance (larger pictures resized).   fid_no_guidance: the same at scale 1 and its source, where there is one.
    """

    file: HubFile
    tokenizer: str
    size: Size
    image_size: int
    cfg_scale: float
    fid: float
    source: str
    fid_no_guidance: tuple[float, str] | None = None
    cell: int = 16

    @property
    def grid(self) -> int:
        """Codes along the side of a picture."""
        return self.image_size // self.cell

    @property
    def files(self) -> tuple[HubFile, HubFile]:
        """Both files of the bundle: generator, tokenizer."""
        return self.file, TOKENIZERS[self.tokenizer].file


def _llamagen(name: str) -> HubFile:
    return HubFile("FoundationVision/LlamaGen", name, "mit")


TOKENIZERS: dict[str, PublishedTokenizer] = {
    "llamagen-vq-16": PublishedTokenizer(_llamagen("vq_ds16_c2i.pt"), 256, 2.19, LLAMAGEN),
    "llamagen-vq-8": PublishedTokenizer(_llamagen("vq_ds8_c2i.pt"), 256, 0.59, LLAMAGEN),
    "unitok-large": PublishedTokenizer(
        HubFile("FoundationVision/unitok_tokenizer", "unitok_tokenizer.pth", "apache-2.0"), 256, 0.41, UNITOK
    ),
}


def _row(size: str, image_size: int, cfg_scale: float, fid: float, no_guidance: float | None = None):
    return PublishedGenerator(
        file=_llamagen(f"c2i_{size}_{image_size}.pt"),
        tokenizer="llamagen-vq-16",
        size=PRESETS[size],
        image_size=image_size,
        cfg_scale=cfg_scale,
        fid=fid,
        source=LLAMAGEN,
        fid_no_guidance=None if no_guidance is None else (no_guidance, UNITOK),
    )


GENERATORS: dict[str, PublishedGenerator] = {
    "llamagen-b-256": _row("B", 256, 2.0, 5.46),
    "llamagen-l-256": _row("L", 256, 2.0, 3.80),
    "llamagen-b-384": _row("B", 384, 2.0, 6.09),
    "llamagen-l-384": _row("L", 384, 2.0, 3.07),
    "llamagen-xl-384": _row("XL", 384, 1.75, 2.62),
    "llamagen-xxl-384": _row("XXL", 384, 1.75, 2.34, 14.6),
    "llamagen-3b-384": _row("3B", 384, 1.65, 2.18),
}


def generator_of_file(name: str) -> PublishedGenerator | None:
    """The row whose generator file has this name."""
    return next((row for row in GENERATORS.values() if row.file.name == name), None)


def licence_of_file(name: str) -> str | None:
    """The licence of a published file, by its name."""
    files = [file for row in GENERATORS.values() for file in row.files]
    files += [row.file for row in TOKENIZERS.values()]
    return next((file.licence for file in files if file.name == name), None)
