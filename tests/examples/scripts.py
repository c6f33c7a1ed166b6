"""A script of `examples/` run in this process, as `accelerate launch` would run it."""

import contextlib
import io
import sys
from pathlib import Path
from unittest import mock

from PIL import Image

from tests.training.loop_cases import forget_accelerate

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_script(main, name: str, *flags: str) -> str:
    """What it prints; its card names it by `sys.argv`."""
    printed = io.StringIO()
    argv = [str(EXAMPLES / f"{name}.py"), *flags]
    try:
        with contextlib.redirect_stdout(printed), mock.patch.object(sys, "argv", argv):
            main(list(flags))
    finally:
        forget_accelerate()
    return printed.getvalue()


def picture(path: Path) -> Image.Image:
    """A picture that a script wrote, its file closed."""
    with Image.open(path) as image:
        return image.copy()
