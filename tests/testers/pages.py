"""The pages that a reader follows, and how their python blocks are run: in order, one namespace, an empty folder."""

import re
from pathlib import Path

from tests.training.loop_cases import forget_accelerate

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_page(page: Path, folder: Path, monkeypatch) -> None:
    """Run every block; a page that trains leaves later tests no accelerate state."""
    text = page.read_text()
    monkeypatch.chdir(folder)
    for name in ("examples", "pipelines"):
        (folder / name).symlink_to(ROOT / name)
    namespace = {"__name__": "docs"}
    try:
        for found in BLOCK.finditer(text):
            line = text[: found.start()].count("\n") + 1
            exec(compile("\n" * line + found.group(1), str(page), "exec"), namespace)
    finally:
        forget_accelerate()
