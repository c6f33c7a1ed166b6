"""A scheduler file as a repository: the file, its default config and a card."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from diffusers_repr.hub.cards import model_card
from diffusers_repr.hub.files import atomic_write

_ALLOWED = ("diffusers", "torch", "numpy")  # what every machine that loads a scheduler has

_TEXT = """{summary}

{details}

```py
from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

{cls} = get_class_from_dynamic_module(
    "{repo_id}", "{stem}.py", class_name="{cls}",
    trust_remote_code=True,  # runs the file: read it first; diffusers before 0.38 has no such argument
    revision="<commit>",  # and pin what you have read
)
pipe.scheduler = {cls}.from_pretrained("{repo_id}")
```

With `pip install diffusers-repr` no remote code is needed:

```py
from diffusers_repr.schedulers_ext.{stem} import {cls}
```

A pipeline folder can carry it: put `{stem}.py` and `scheduler_config.json` into the folder's `scheduler/`, and write

```json
"scheduler": ["{stem}", "{cls}"]
```

into its `model_index.json`. It then loads with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
"""


def stage_scheduler(file: str | os.PathLike[str], folder: str | os.PathLike[str], repo_id: str) -> Path:
    """Write what the repository of a scheduler holds: the file, `scheduler_config.json` and README.md.

    Args:
        file: `scheduling_<name>.py`, which must pass `check_scheduler_file`; it is run, for the defaults.
        folder: Where to write.
        repo_id: Id of the repository, for the card.

    Returns:
        `folder`.

    Raises:
        FileNotFoundError, ValueError: As `check_scheduler_file`.
    """
    file, folder = Path(file), Path(folder)
    name = check_scheduler_file(file)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / file.name)
    cls = _load(file, name)
    cls().save_config(folder)
    summary, _, details = (ast.get_docstring(ast.parse(file.read_bytes())) or name).partition("\n\n")
    text = _TEXT.format(summary=summary, details=details, cls=name, stem=file.stem, repo_id=repo_id)
    tags = ["diffusers", "diffusers-repr", "scheduler"]
    card = model_card(title=name, text=text.replace("\n\n\n\n", "\n\n"), tags=tags, library_name="diffusers")
    atomic_write(folder / "README.md", card)
    return folder


def check_scheduler_file(path: str | os.PathLike[str]) -> str:
    r"""Check, without running it, that a scheduler file stands alone.

    Args:
        path: The file.

    Returns:
        Name of its scheduler class.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not Python, imports more than torch, diffusers, numpy and Python's own modules, or
            has no scheduler class or several.

    Example:
        >>> file = getfixture("tmp_path") / "scheduling_mine.py"
        >>> _ = file.write_text("from diffusers import SchedulerMixin\nclass Mine(SchedulerMixin): ...")
        >>> check_scheduler_file(file)
        'Mine'
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no scheduler file {str(path)!r}.")
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not valid Python: {error}. Correct it first.") from error
    for node in ast.walk(tree):
        for module in _imported(node):
            if module.split(".")[0] not in (*_ALLOWED, *sys.stdlib_module_names):
                raise ValueError(
                    f"{str(path)!r}, line {getattr(node, 'lineno', 0)}, imports {module!r}. A published scheduler is "
                    f"one file that needs {', '.join(_ALLOWED)} only: write what it needs into it."
                )
    found = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any("SchedulerMixin" in ast.unparse(base) for base in node.bases)
    ]
    if len(found) != 1:
        raise ValueError(f"{str(path)!r} has {len(found)} classes of base SchedulerMixin {found}; one is needed.")
    return found[0]


def _imported(node: ast.AST) -> list[str]:
    """Modules that a statement imports; "." for a relative import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." if node.level else node.module or "."]
    return []


def _load(file: Path, name: str) -> Any:
    """The class out of the file, which need not be importable by name."""
    spec = importlib.util.spec_from_file_location(f"_published_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
