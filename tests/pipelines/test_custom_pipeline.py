"""`custom_pipeline=` through diffusers' own loader, for a folder of every family."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_repr.hub import check_pipeline_file
from tests.testers.models import PIPELINES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_folder_of_every_family_loads_runs_saves_and_loads_again(tmp_path):
    """Equal to the plain extractor, settings and components kept; three of them in `test_loading.py`."""
    env = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.load_custom", *PIPELINES],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    errors = json.loads(run.stdout.splitlines()[-1])["errors"]
    assert "trust_remote_code=True" in errors.pop("no consent")
    assert errors == dict.fromkeys(PIPELINES)


def test_the_file_can_be_published():
    assert (
        check_pipeline_file(ROOT / "pipelines" / "feature_extraction" / "pipeline.py") == "FeatureExtractionPipeline"
    )
