"""Pictures that show fidelity: rows of images under a heading each, same prompt and seed in a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["comparison_grid", "contact_sheet"]

_PAPER, _INK, _FAINT = "#ffffff", "#1a1a1a", "#6b6b6b"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def comparison_grid(rows: Mapping[str, NDArray[np.uint8]], scale: int = 2, gap: int = 6) -> Image.Image:
    """One row a variant, one column a prompt.

    Args:
        rows: heading -> uint8 [N, H, W, 3]; every row has the same N.
        scale: enlargement of each image, nearest neighbour, so that pixels stay what they are.
    """
    count, height, width = next(iter(rows.values())).shape[:3]
    cell_w, cell_h = width * scale + gap, height * scale + gap
    font = _font(15)
    margin = 16 + max(int(font.getlength(line)) for name in rows for line in name.split("\n"))
    sheet = Image.new("RGB", (margin + count * cell_w + gap, len(rows) * cell_h + gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        top = gap + row * cell_h
        draw.multiline_text((8, top + height * scale // 2), name, fill=_INK, font=font, anchor="lm", spacing=4)
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (margin + column * cell_w, top))
    return sheet


def contact_sheet(images: NDArray[np.uint8], captions: Sequence[str], columns: int = 8, scale: int = 2) -> Image.Image:
    """Images with their captions beneath, wrapped to the image's width."""
    height, width = images.shape[1] * scale, images.shape[2] * scale
    font = _font(11)
    wrapped = [_wrap(caption, font, width) for caption in captions]
    text_height = 14 * max(text.count("\n") + 1 for text in wrapped) + 8
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 12) + 12, rows * (height + text_height + 8) + 12), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(images, wrapped, strict=True)):
        x, y = 12 + index % columns * (width + 12), 12 + index // columns * (height + text_height + 8)
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + height + 3), text, fill=_FAINT, font=font, spacing=2)
    return sheet


def _wrap(text: str, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
