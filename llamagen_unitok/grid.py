"""Many pictures on one sheet, each group under its label."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 8  # pictures beside each other, at most
GAP = 6  # pixels between pictures
BACKGROUND, INK = "white", "black"


def labelled_grid(groups: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """One RGB sheet: groups of pictures (all of one size, H×W) from left to right and down, a label above each group.

    A group is as wide as the largest group, 8 pictures at most, and goes on below when it has more. A label that is too
    long for its group is cut short. Raises ValueError when there is nothing to show.
    """
    pictures = [picture for _, group in groups for picture in group]
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    width, height = pictures[0].size
    font = ImageFont.load_default(size=max(10, round(height / 8)))
    label_height = sum(font.getmetrics()) + GAP

    across = min(COLUMNS, max(len(group) for _, group in groups))  # pictures beside each other in one group
    down = max(math.ceil(len(group) / across) for _, group in groups)
    groups_across = min(len(groups), max(1, COLUMNS // across))
    groups_down = math.ceil(len(groups) / groups_across)
    group_width = across * (width + GAP)
    group_height = label_height + down * (height + GAP)

    sheet = Image.new("RGB", (groups_across * group_width + GAP, groups_down * group_height + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (label, group) in enumerate(groups):
        left = GAP + number % groups_across * group_width
        top = GAP + number // groups_across * group_height
        draw.text((left, top), _fitted(label, font, group_width - GAP), fill=INK, font=font)
        for i, picture in enumerate(group):
            sheet.paste(picture, (left + i % across * (width + GAP), top + label_height + i // across * (height + GAP)))
    return sheet


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, cut short with an ellipsis until it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
