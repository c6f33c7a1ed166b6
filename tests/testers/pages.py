"""The pages that a reader follows, and how their python blocks are run: in order, one namespace, an empty folder."""

import re
from pathlib import Path

from diffusers_repr.assign.base import _ASSIGNERS
from diffusers_repr.denoiser import family_registry
from diffusers_repr.encoders import family as encoder_family
from diffusers_repr.heads.base import _HEADS
from diffusers_repr.sweep.measure import MEASURES
from tests.training.loop_cases import forget_accelerate

ROOT = Path(__file__).parents[2]
REGISTRIES = (_ASSIGNERS, _HEADS, MEASURES, family_registry._FAMILIES, encoder_family._FAMILIES)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_page(page: Path, folder: Path, monkeypatch) -> None:
    """Run every block; later tests are left no accelerate state and no class that a page registers."""
    text = page.read_text()
    monkeypatch.chdir(folder)
    for name in ("examples", "pipelines"):
        (folder / name).symlink_to(ROOT / name)
    namespace, before = {"__name__": "docs"}, [dict(registry) for registry in REGISTRIES]
    try:
        for found in BLOCK.finditer(text):
            line = text[: found.start()].count("\n") + 1
            exec(compile("\n" * line + found.group(1), str(page), "exec"), namespace)
    finally:
        forget_accelerate()
        for registry, known in zip(REGISTRIES, before, strict=True):
            registry.clear()
            registry.update(known)
