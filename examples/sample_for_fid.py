"""Sample many images of a pipeline into the `.npz` file that ADM's evaluator reads (FID, sFID, IS, precision, recall).

    accelerate launch examples/sample_for_fid.py outputs/imagenet-repa-sit-xl2 --num_samples 50000 \
        --guidance_scale 1.8 --guidance_interval 0 0.7 --num_inference_steps 250 --scheduler FlowMatchSDEScheduler

Any pipeline of this package, and those of diffusers that sample by class or freely. Sample n has the seed `seed + n`,
so that the images do not depend on the number of processes; the same command goes on where it was stopped. In `--out`
lie `images/`, a store with the key of each image, and `samples.npz` (`arr_0`, uint8, N x H x W x 3), of which
`python evaluator.py REFERENCE.npz samples.npz` of https://github.com/openai/guided-diffusion/tree/main/evaluations
makes the numbers.
"""

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import numpy as np
import torch
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler
from PIL import Image

from diffusers_repr import Denoiser
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import REQUIRED, check_keys, json_mapping, setting
from diffusers_repr.denoiser import LabelConditioner
from diffusers_repr.hub.identity import weights_hash
from diffusers_repr.hub.places import last_name
from diffusers_repr.store.image_store import ImageKey, write_images
from diffusers_repr.store.npz import write_npz
from diffusers_repr.store.processes import process_state

RECIPES = Path(__file__).parent / "configs"
OWN_SCHEDULERS = {kind.__name__: kind for kind in (FlowMatchODEScheduler, FlowMatchSDEScheduler)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is sampled, and how."""

    POSITIONAL: ClassVar = ("model",)

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    out: str = setting("outputs/fid-samples", "folder to write; the same command goes on in it")
    num_samples: int = setting(50_000, "how many images")
    classes: Literal["random", "balanced", "none"] = setting(
        "random", "labels: drawn by the seed, as REPA's generate.py does; 0, 1, 2, ... in turn; or none"
    )
    guidance_scale: float | None = setting(None, "classifier-free guidance; default: the pipeline's own")
    guidance_interval: list[float] | None = setting(None, "its times, low and high in [0, 1], where a pipeline has it")
    num_inference_steps: int = setting(250, "steps of the sampler")
    scheduler: str | None = setting(None, "class of the sampler, of diffusers or of this package; default: as saved")
    scheduler_args: dict | str | None = setting(None, "arguments over those of the saved scheduler, a mapping")
    rounding: Literal["nearest", "down"] = setting("nearest", "of pixels to whole numbers; REPA's code: down")
    seed: int = setting(0, "sample n has the seed `seed + n`")
    batch_size: int = setting(32, "images of one process and call")
    shard_size: int | None = setting(None, "images of a shard, which a stopped run makes anew; default: at most 1000")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "of the model")
    allow_tf32: bool = setting(False, "TF32 matrix products on GPUs that have it")
    revision: str | None = setting(None, "branch, tag or commit of the model on the Hub")
    quiet: bool = setting(False, "no progress bar")

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheduler_args", json_mapping("scheduler_args", self.scheduler_args))
        for name in ("num_samples", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}.")
        if self.guidance_interval is not None and len(self.guidance_interval) != 2:
            raise ValueError(f"--guidance_interval takes low and high, got {self.guidance_interval}.")


class Sampler:
    """A pipeline as the settings ask for it."""

    def __init__(self, settings: Settings, device: Any) -> None:
        self.settings = settings
        self.denoiser = Denoiser.from_pretrained(
            settings.model, revision=settings.revision, dtype=getattr(torch, settings.dtype)
        )
        pipe, conditioner = self.denoiser.pipe, self.denoiser.conditioner
        self.num_classes = conditioner.num_classes if isinstance(conditioner, LabelConditioner) else 0
        if self.num_classes and "class_labels" not in inspect.signature(type(pipe).__call__).parameters:
            pipe = GuidedUnconditionalPipeline(pipe.unet, pipe.scheduler)  # diffusers has none that takes classes
        pipe.scheduler = self.scheduler(pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.given = pipe.to(device), self.arguments(pipe)

    def scheduler(self, saved: Any) -> Any:
        """The sampler that is asked for, with the settings of the saved one."""
        name = self.settings.scheduler or type(saved).__name__
        kind = OWN_SCHEDULERS.get(name) or getattr(diffusers, name, None)
        if not (inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)):
            raise ValueError(f"--scheduler {name!r} is none of diffusers or {', '.join(OWN_SCHEDULERS)}.")
        check_keys("--scheduler_args", self.settings.scheduler_args, inspect.signature(kind.__init__).parameters)
        return kind.from_config(saved.config, **self.settings.scheduler_args)

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """What every call is given."""
        settings, known = self.settings, inspect.signature(type(pipe).__call__).parameters
        if "prompt" in known:
            raise ValueError(f"{type(pipe).__name__} samples by prompts; this script samples by class, or freely.")
        given = {"num_inference_steps": settings.num_inference_steps, "output_type": "np"}
        for name in ("guidance_scale", "guidance_interval"):
            if (value := getattr(settings, name)) is not None:
                if name not in known:
                    raise ValueError(f"{type(pipe).__name__} takes no {name}; leave --{name} out.")
                given[name] = tuple(value) if isinstance(value, list) else value
        return given

    def keys(self) -> list[ImageKey]:
        """Of every image, all that decides it."""
        settings, count = self.settings, self.settings.num_samples
        labels: list[str | None] = [None] * count
        if settings.classes != "none" and self.num_classes:
            drawn = torch.randint(self.num_classes, (count,), generator=torch.Generator().manual_seed(settings.seed))
            turn = torch.arange(count) % self.num_classes
            labels = [str(n) for n in (drawn if settings.classes == "random" else turn).tolist()]
        height, width = self.denoiser.image_size
        how = {**self.given, "scheduler": type(self.pipe.scheduler).__name__, **settings.scheduler_args}
        how |= {"rounding": settings.rounding, "dtype": settings.dtype}
        common = {
            "model": last_name(settings.model) if os.path.isdir(settings.model) else settings.model,
            "revision": f"weights {weights_hash(self.denoiser.model)[:16]}",
            "guidance": json.dumps(how, sort_keys=True),
            "steps": settings.num_inference_steps,
            "height": height,
            "width": width,
        }
        return [ImageKey(seed=settings.seed + at, condition=label, **common) for at, label in enumerate(labels)]

    def __call__(self, keys: list[ImageKey]) -> list[Image.Image]:
        """The images of some keys."""
        generators = [torch.Generator("cpu").manual_seed(key.seed) for key in keys]
        given = {**self.given, "generator": generators}
        if keys[0].condition is not None:
            given["class_labels"] = [int(key.condition) for key in keys]
        else:
            given["batch_size"] = len(keys)
        pixels = 255 * np.clip(self.pipe(**given).images, 0, 1)
        whole = np.floor(pixels) if self.settings.rounding == "down" else np.round(pixels)
        return [
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in whole.astype(np.uint8)
        ]


def main(argv: list[str]) -> None:
    (settings,) = parse_recipe((Settings,), argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, model=settings.model)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.allow_tf32
    state, out = process_state(), Path(settings.out)
    sampler = Sampler(settings, state.device)
    chosen = {"batch_size": settings.batch_size, "shard_size": settings.shard_size, "progress": not settings.quiet}
    store = write_images(out / "images", sampler.keys(), sampler, **chosen)
    if state.is_main_process:
        file = write_npz(out / "samples.npz", store.pictures(), len(store))
        print(f"{len(store)} images of {state.num_processes} process{'es' * (state.num_processes > 1)}: {file}")
    state.wait_for_everyone()


if __name__ == "__main__":
    run_script(main)
