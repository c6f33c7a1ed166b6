"""The two pages that come first, each the whole use: every python block of README and quickstart runs."""

import pytest
from datasets import DatasetDict

from diffusers_repr.data import digits
from tests.testers.pages import ROOT, run_page


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """On every sixth digit: what the pages say of all of them is measured by the demo."""
    few = {split: rows.select(range(0, len(rows), 6)) for split, rows in digits.load_digits_splits().items()}
    monkeypatch.setattr(digits, "load_digits_splits", lambda: DatasetDict(few))
    run_page(ROOT / page, tmp_path, monkeypatch)
