"""Every python block of the guides runs; links, paths and the list of pages are whole."""

import ast
import re

import pytest

from tests.testers.pages import BLOCK, ROOT, run_page

PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = (ROOT / "README.md", ROOT / "docs" / "quickstart.md")  # test_readme.py runs these
GUIDES = [page for page in PAGES if page not in ELSEWHERE and BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    run_page(page, tmp_path, monkeypatch)


def _slug(heading: str) -> str:
    """A heading's anchor on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_local_links_exist():
    for page in [*PAGES, *(ROOT / "docs" / "results").glob("**/*.md"), *(ROOT / "pipelines").glob("*/README.md")]:
        text = page.read_text()
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", text):
            if "://" in target:
                continue
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page} links to {target}"
            if anchor and linked.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                assert anchor in map(_slug, headings), f"{page} links to {target}#{anchor}"


def test_every_page_is_listed_once_in_the_readme():
    listed = (ROOT / "README.md").read_text().split("## Documentation")[1]
    for page in (ROOT / "docs").glob("*.md"):
        assert listed.count(f"(docs/{page.name})") == 1, page.name


def test_the_paths_that_are_told_exist():
    """Scripts, recipes and models that the pages, the cards and the scripts themselves name."""
    told = [*PAGES, ROOT / "Makefile", *(ROOT / "docs" / "results").glob("**/*.md")]
    told += [path for kind in ("py", "yaml", "md") for path in (ROOT / "examples").glob(f"**/*.{kind}")]
    for page in told:
        for path in re.findall(r"(?<![\w/.])examples/[\w/.-]*\w", page.read_text()):
            assert (ROOT / path).exists(), f"{page} names {path}"


def test_the_quickstart_is_that_of_the_docs():
    """One text: the script's code is that of the page, its imports apart, which stand at its head."""

    def parts(text):
        body = ast.parse(text).body
        imports = {
            (node.module, alias.name) for node in body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        code = [ast.dump(node) for node in body if not isinstance(node, ast.ImportFrom)]
        return imports, code

    page = "\n".join(BLOCK.findall((ROOT / "docs" / "quickstart.md").read_text()))
    imports, (_, *code) = parts((ROOT / "examples" / "quickstart.py").read_text())  # the first is its docstring
    assert (imports, code) == parts(page)
