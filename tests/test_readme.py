"""The two pages that come first, each the whole use: every python block of README and quickstart runs."""

import pytest

from tests.testers.pages import ROOT, run_page


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_code_blocks_run(page, tmp_path, monkeypatch):
    run_page(ROOT / page, tmp_path, monkeypatch)
