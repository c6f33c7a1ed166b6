"""The wheel carries every package, the published pipelines among them."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PUBLISHED = ("pipelines", "schedulers_ext")


def test_the_wheel_has_every_module(tmp_path):
    source = tmp_path / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("diffusers_repr", *PUBLISHED):
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    want = {file.relative_to(source).as_posix() for file in source.rglob("*.py")} - {"setup.py"}
    want = {f"diffusers_repr/{name}" if name.split("/")[0] in PUBLISHED else name for name in want}
    want |= {"diffusers_repr/py.typed"}
    want |= {f"diffusers_repr/pipelines/{file.parent.name}/README.md" for file in ROOT.glob("pipelines/*/pipeline.py")}
    assert {f"diffusers_repr/pipelines/guided_{name}/README.md" for name in ("dit", "unconditional")} <= want
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path]
    run = subprocess.run([*build, source], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == want

    # Out of the wheel all that it carries can be published; trained models are part of a clone.
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    code = """
import diffusers_repr
from diffusers_repr.cli import main
print(diffusers_repr.__file__)
raise SystemExit(main(["publish", "--namespace", "user", "--dry_run"]))
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith(str(tmp_path / "site"))
    for name in ("sit", "guided_dit", "scheduling_flow_match_sde"):
        assert f"user/{name}  {tmp_path / 'site'}" in run.stdout
    assert "examples/models is part of a clone" in run.stdout
