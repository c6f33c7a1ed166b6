"""Pictures of figures at a third of their size, for pages."""

import io
from pathlib import Path

from PIL import Image


def write_small_png(png: bytes, path: Path) -> None:
    """Write a PNG in the 256 colours that serve it best: text and lines stay sharp, a colour bar gets steps."""
    with Image.open(io.BytesIO(png)) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
