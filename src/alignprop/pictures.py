"""Picture grids with captions."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_GAP = 6
_CAPTION = 18
_SMALLEST = 128


def captioned_grid(
    columns: Sequence[Sequence[Image.Image]], captions: Sequence[str], *, per_row: int = 8
) -> Image.Image:
    """Draw one column of pictures for each caption, wrapped into bands of ``per_row`` columns.

    Small pictures are enlarged by a whole factor, without smoothing, so that their pixels can be judged.

    Args:
        columns: N lists of S pictures, all of one size.
        captions: N texts; what does not fit is cut off.
        per_row: columns of a band.
    """
    width, height = columns[0][0].size
    factor = max(1, _SMALLEST // width)
    width, height = width * factor, height * factor
    num_bands = -(-len(columns) // per_row)
    band = len(columns[0]) * (height + _GAP) + _CAPTION + _GAP
    num_columns = min(per_row, len(columns))
    canvas = Image.new("RGB", (num_columns * (width + _GAP) + _GAP, num_bands * band + _GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for place, (pictures, caption) in enumerate(zip(columns, captions, strict=True)):
        left, top = _GAP + place % per_row * (width + _GAP), _GAP + place // per_row * band
        draw.text((left + width / 2, top + _CAPTION / 2), _fitted(caption, font, width), "black", font, anchor="mm")
        for row, picture in enumerate(pictures):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST) if factor > 1 else picture
            canvas.paste(enlarged, (left, top + _CAPTION + row * (height + _GAP)))
    return canvas


def save_grid(columns: Sequence[Sequence[Image.Image]], captions: Sequence[str], path: Path) -> None:
    """Write :func:`captioned_grid` as a PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    captioned_grid(columns, captions).save(path)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
