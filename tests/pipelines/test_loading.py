"""`custom_pipeline=` through diffusers' own loader, for each folder of ours that samples."""

import os
import subprocess
import sys

import numpy as np
import torch
from diffusers_repr.pipelines.token_generation import TokenGenerationPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler

from tests.objectives import autoencoder_cases, token_cases
from tests.pipelines import rcg_cases, retrieval_cases, sit_cases
from tests.pipelines.guided_cases import GUIDED
from tests.pipelines.test_joint_diffusion import make


def test_every_folder_loads_with_consent(tmp_path):
    """One process for all, which forks: most of the time of a process goes into imports."""
    pipe = sit_cases.pipeline(
        FlowMatchSDEScheduler(path="cosine"), vae=sit_cases.autoencoder(), id2label={1: "goldfish"}
    )
    call = {"num_inference_steps": 2, "output_type": "np"}
    pipe.save_pretrained(tmp_path / "sit")
    sit_cases.pipeline().save_pretrained(tmp_path / "sit-pixels")
    np.save(tmp_path / "sit.npy", pipe("goldfish", generator=torch.Generator().manual_seed(0), **call).images)
    for kind in ("unet", "vit"):
        pipe = make(kind)
        pipe.save_pretrained(tmp_path / kind)
        guided = {"class_labels": "owl", "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(0)}
        np.save(tmp_path / f"{kind}.npy", pipe(**guided, **call).images)
    pipe = rcg_cases.make("unet", num_classes=3)
    pipe.save_pretrained(tmp_path / "rcg")
    guided = {"class_labels": [0, 2], "guidance_scale": 2.0, "prior_num_inference_steps": 2, "output_type": "np"}
    guided |= {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    np.save(tmp_path / "rcg.npy", pipe(**guided).images)
    pipe = retrieval_cases.pipeline()
    pipe.save_pretrained(tmp_path / "retrieval")
    call = {"guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "np"}
    query, seed = retrieval_cases.vectors(2, 9), torch.Generator().manual_seed(0)
    np.save(tmp_path / "retrieval.npy", pipe(query, retrieval_cases.index(), generator=seed, **call).images)
    pipe = TokenGenerationPipeline(token_cases.tokenizer(), token_cases.pixel_model())
    pipe.save_pretrained(tmp_path / "tokens")
    call = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
    np.save(tmp_path / "tokens.npy", pipe(**call, generator=torch.Generator().manual_seed(0)).images)
    pipe, codes = autoencoder_cases.pipeline("pdae"), autoencoder_cases.codes(2)
    pipe.save_pretrained(tmp_path / "autoencoder")
    torch.save(codes, tmp_path / "codes.pt")
    found = pipe.decode(codes, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    np.save(tmp_path / "autoencoder.npy", found.images)
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pipelines.load_ours", str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    good = [line for line in done.stdout.splitlines() if "good" in line]
    own = (
        "sit",
        "joint",
        "rcg",
        "retrieval",
        "tokens",
        "autoencoder",
        "feature_extraction",
        "few_shot_segmentation",
        "correspondence",
        "open_vocabulary_segmentation",
        "diffusion_classifier",
    )
    names = (*GUIDED, *own, "two")
    assert good == [f"{name} is good" for name in names], done.stderr[-3000:]
