"""Run by `test_guided.py`: loads each folder of ours with `custom_pipeline=`, in a process of its own.

Compares with `guide` on the stock pipeline, saves, loads again with and without the folder.
"""

import multiprocessing
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffusers_repr import PAG, guide
from tests.pipelines.guided_cases import GUIDED, arguments, run
from tests.testers.models import saved


def load(folder: str, name: str, class_name: str) -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    consent = {
        "custom_pipeline": str(Path(__file__).parents[2] / "pipelines" / folder),
        "trust_remote_code": True,
    }
    pipe = DiffusionPipeline.from_pretrained(saved(name), **consent)
    stock = DiffusionPipeline.from_pretrained(saved(name))
    assert type(pipe).__name__ == class_name
    assert type(pipe).__module__.startswith("diffusers_modules.local")
    kept = [{k for k, c in p.components.items() if c is not None} for p in (pipe, stock)]
    assert kept[0] == kept[1]
    assert {k: v for k, v in pipe.config.items() if k[0] != "_"} == {
        k: v for k, v in stock.config.items() if k[0] != "_"
    }
    settings = arguments(name)
    guided = run(pipe, **settings, guidance=PAG(2.0))
    assert pipe.guidance_stats.lanes > len(pipe.guidance_stats.steps)
    if name != "class_unet":
        plain = run(stock, **settings)
        assert np.array_equal(run(pipe, **settings), plain)
        with guide(stock, PAG(2.0)):
            assert np.array_equal(run(stock, **settings), guided)
        assert np.abs(guided - plain).max() > 1e-4
    with tempfile.TemporaryDirectory() as root:
        pipe.save_pretrained(root)
        assert type(DiffusionPipeline.from_pretrained(root)) is type(stock)
        again = DiffusionPipeline.from_pretrained(root, **consent)
        assert type(again).__name__ == class_name
        assert np.array_equal(run(again, **settings, guidance=PAG(2.0)), guided)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(run(pipe, **settings, guidance=PAG(2.0)), guided)
    print(f"{folder} is good", flush=True)


if __name__ == "__main__":
    for folder, given in GUIDED.items():  # forked, so that the imports are paid once
        process = multiprocessing.get_context("fork").Process(target=load, args=(folder, *given))
        process.start()
        process.join()
