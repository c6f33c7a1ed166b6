"""Every python block of README and docs runs, page by page, in order, in one namespace."""

import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def _fresh_accelerate():
    """A page that trains leaves later tests no accelerate state."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    text = page.read_text()
    blocks = [(text[: found.start()].count("\n") + 2, found.group(1)) for found in BLOCK.finditer(text)]
    if not blocks:
        pytest.skip(f"{page.name} has no python block")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    namespace = {"__name__": "docs"}
    for line, block in blocks:
        code = compile("\n" * (line - 1) + block, str(page), "exec")
        exec(code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_exist(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
