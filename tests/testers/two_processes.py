"""Two real processes over gloo, launched once a test run: what several test files want to see two processes do.

Each job writes into a folder of its own and tells what its main process saw; `together` of tests/conftest.py launches
them, and each file compares with one process.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def metrics(folder):
    """Every metric on 23 samples, a prime number."""
    from tests.metrics.two_processes import run

    return run()


def command(words):
    """`diffusers-repr` in each process: exit code and what it printed."""
    from diffusers_repr.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(words)
    return [code, printed.getvalue()]


def extract(folder):
    from tests.features.test_cli_extract import command as words

    inputs = folder.parent / "inputs"
    return command(words(inputs / "ddpm", inputs / "pets.parquet", folder))


def cache(folder):
    """`diffusers-repr cache` in each process: what it wrote to stderr."""
    from diffusers_repr.cli import main
    from tests.cli.test_cache import flags

    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        assert main(["cache", *flags(folder.parent / "inputs", folder)]) == 0, told.getvalue()
    return told.getvalue()


def training(folder):
    from tests.training.two_processes import ddp, fsdp

    return {"ddp": ddp(folder / "ddp"), "fsdp": fsdp(folder / "fsdp")}


def samples(folder):
    import tests.examples.conftest  # noqa: F401  the scripts can be imported
    from tests.examples.test_sample_for_fid import sample

    return str(sample(folder))


def sinkhorn(folder):
    from tests.assign.test_sinkhorn import sinkhorn_job

    return sinkhorn_job()


def assign(folder):
    from tests.cli.test_assign import job

    return job(folder.parent / "inputs", folder)


def probe(folder):
    import tests.examples.conftest  # noqa: F401
    from tests.examples.test_train_probe import cached_run

    return cached_run(folder, folder.parent / "inputs", 4)


def representations(folder):
    """Every objective that makes a representation under DDP, and one of them in the loop."""
    from tests.objectives.representation_cases import job

    return job(folder)


def generate(folder):
    from tests.synthesis.test_generated_sets import job

    return job(folder)


JOBS = (metrics, extract, cache, training, samples, sinkhorn, assign, probe, representations, generate)


def everywhere(value):
    """What each process has."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def main(folder):
    """All jobs, as one of the two processes."""
    from accelerate import Accelerator

    from tests.training.loop_cases import forget_accelerate

    assert Accelerator().num_processes == 2
    told = {"processes": torch.distributed.get_world_size(), "backend": torch.distributed.get_backend()}
    for job in JOBS:
        told[job.__name__] = everywhere(job(folder / job.__name__))
        forget_accelerate()
    if torch.distributed.get_rank() == 0:
        (folder / "told.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def make_inputs(folder):
    """What the jobs read."""
    from tests.cli.test_cache import make_inputs as of_cache
    from tests.features.test_cli_extract import write_data
    from tests.testers.models import saved

    folder.mkdir()
    shutil.copytree(saved("ddpm"), folder / "ddpm")
    write_data(folder / "pets.parquet", 23)
    (folder / "pets" / "data").mkdir(parents=True)
    for split, rows in (("train", 24), ("test", 9)):
        write_data(folder / "pets" / "data" / f"{split}-00000-of-00001.parquet", rows)
    of_cache(folder)


def launch(folder):
    """Run `main` in two processes, and give what they told: of each job a list, one entry a process."""
    make_inputs(folder / "inputs")
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "tests.testers.two_processes", str(folder)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "told.json").read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
