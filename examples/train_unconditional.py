"""Train an unconditional diffusion model (`UNet2DModel`, `DDPMScheduler`) and save it as a `DDPMPipeline` folder.

    accelerate launch examples/train_unconditional.py --config examples/configs/ddpm_digits.yaml
    accelerate launch examples/train_unconditional.py --config my_recipe.yaml --seed 1 --output_dir outputs/seed1

A recipe is a YAML file whose keys are the fields of `TrainingArgs`; flags on the command line win over it. The same
command run again continues from the newest checkpoint, bit-exactly on CPU: the data order is a function of
(seed, epoch), all randomness of a step is one of (seed, step, rank), and checkpoints lie between optimizer steps.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from image_batches import ImagePixels, augment, batch_indices, load_split
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

MAX_SKIPPED_IN_A_ROW = 50


@dataclasses.dataclass(frozen=True)
class TrainingArgs:
    """Settings of a run: the keys of a recipe, the flags of the command line."""

    output_dir: str = HfArg(help="pipeline folder to write; the checkpoints lie in it")
    model: dict | str | None = HfArg(default=None, help="arguments of UNet2DModel, a mapping (JSON in a flag)")
    scheduler: dict | str | None = HfArg(default=None, help="arguments of DDPMScheduler, a mapping")
    dataset_name: str = HfArg(default="digits", help="digits, or a path or Hub id for `datasets`")
    dataset_split: str = HfArg(default="train", help="split to train on")
    image_column: str = HfArg(default="image", help="column that holds the images")
    cache_images: bool = HfArg(default=False, help="decode every image once and keep it in memory")
    random_flip: bool = HfArg(default=False, help="mirror half of the images")
    random_rotation: float = HfArg(default=0.0, help="turn images by up to so many degrees")
    random_shift: float = HfArg(default=0.0, help="move them by up to this share of their side")
    random_scale: float = HfArg(default=0.0, help="shrink or enlarge them by up to this share")
    train_batch_size: int = HfArg(default=64, help="images of one process and micro-batch")
    gradient_accumulation_steps: int = HfArg(default=1, help="micro-batches in an optimizer step")
    max_train_steps: int = HfArg(default=1000, help="optimizer steps")
    learning_rate: float = HfArg(default=1e-4, help="peak learning rate")
    lr_scheduler: Literal["constant", "cosine"] = HfArg(default="cosine", help="shape after the warm-up")
    lr_warmup_steps: int = HfArg(default=500, help="steps of linear warm-up")
    adam_weight_decay: float = HfArg(default=0.0, help="weight decay of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="clip the gradient's norm to this")
    ema_max_decay: float = HfArg(default=0.9999, help="EMA decay, or (1 + n) / (10 + n) where that is less")
    mixed_precision: str | None = HfArg(default=None, help="no, fp16 or bf16; default: what accelerate is set to")
    seed: int = HfArg(default=0, help="of weights, data order, noise and samples")
    checkpointing_steps: int = HfArg(default=500, help="optimizer steps between checkpoints")
    checkpoints_total_limit: int = HfArg(default=2, help="how many of the newest checkpoints to keep")
    resume_from_checkpoint: Literal["latest", "none"] = HfArg(default="latest", help="none refuses to continue")
    logging_steps: int = HfArg(default=50, help="steps averaged into one line of loss.jsonl")
    dataloader_num_workers: int = HfArg(default=0, help="processes that decode images")
    save_dtype: Literal["float32", "float16", "bfloat16"] = HfArg(default="float32", help="of the saved pipeline")
    eval_batch_size: int = HfArg(default=64, help="images in samples.png, in rows of 8; 0: none")
    ddpm_num_inference_steps: int = HfArg(default=1000, help="sampling steps for samples.png")
    dry_run: bool = HfArg(default=False, help="print the resolved recipe and the parameter count, and stop")

    def __post_init__(self) -> None:
        for name, target in (("model", UNet2DModel), ("scheduler", DDPMScheduler)):
            mapping = getattr(self, name)
            mapping = json.loads(mapping) if isinstance(mapping, str) else mapping or {}
            if not isinstance(mapping, dict):
                raise ValueError(f"`{name}` must be a mapping of {target.__name__}'s arguments, got {mapping!r}.")
            check_keys(f"`{name}`", mapping, inspect.signature(target.__init__).parameters)
            object.__setattr__(self, name, mapping)
        if self.model.get("sample_size") is None:
            raise ValueError("`model` needs `sample_size`, the side of the images.")
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
                     "checkpoints_total_limit", "logging_steps", "learning_rate", "max_grad_norm"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.eval_batch_size < 0 or self.eval_batch_size % 8:
            raise ValueError(f"`eval_batch_size` must be a multiple of 8, or 0, got {self.eval_batch_size}.")

    def identity(self) -> dict:
        """The settings that decide the weights: a checkpoint of others is refused."""
        free = {"output_dir", "cache_images", "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
                "resume_from_checkpoint", "dataloader_num_workers", "save_dtype", "eval_batch_size",
                "ddpm_num_inference_steps", "dry_run"}  # fmt: skip
        free |= {"max_train_steps"} if self.lr_scheduler == "constant" else set()
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in free}

    def to_yaml(self) -> str:
        leave_out = ("output_dir", "resume_from_checkpoint", "dry_run")
        recipe = {key: value for key, value in dataclasses.asdict(self).items() if key not in leave_out}
        return yaml.safe_dump(recipe, sort_keys=False, width=119)


def parse_args(argv: list[str]) -> TrainingArgs:
    """The recipe of `--config` first, the command line over it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, flags = parser.parse_known_args(argv)
    recipe = {}
    if known.config:
        if not Path(known.config).is_file():
            near = sorted(path.name for path in (Path(__file__).parent / "configs").glob("*.yaml"))
            raise FileNotFoundError(f"No recipe {known.config!r}; --config takes a YAML file. In configs/: {near}.")
        recipe = yaml.safe_load(Path(known.config).read_text())
        if not isinstance(recipe, dict):
            raise ValueError(f"{known.config} holds a {type(recipe).__name__}; a recipe is a mapping of key: value.")
        check_keys(known.config, recipe, (setting.name for setting in dataclasses.fields(TrainingArgs)))
    given = []
    for key, value in recipe.items():
        if value is not None:  # null leaves the default
            given += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    parser = HfArgumentParser(TrainingArgs, description=__doc__.split("\n")[0], parents=[parser], allow_abbrev=False)
    return parser.parse_args_into_dataclasses(given + flags, look_for_args_file=False)[0]


def check_keys(place: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    allowed = [name for name in allowed if name != "self"]
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=3) or sorted(allowed)
            raise ValueError(f"Unknown key {key!r} in {place}. Closest allowed: {near}.")


def reseed(seed: int, step: int, rank: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def learning_rate(args: TrainingArgs, step: int) -> float:
    """Linear warm-up, then constant or half a cosine down to zero."""
    if step < args.lr_warmup_steps:
        return args.learning_rate * (step + 1) / args.lr_warmup_steps
    if args.lr_scheduler == "constant":
        return args.learning_rate
    share = (step - args.lr_warmup_steps) / (args.max_train_steps - args.lr_warmup_steps)
    return args.learning_rate * (1 + math.cos(math.pi * share)) / 2


def diffusion_loss(model: torch.nn.Module, scheduler: DDPMScheduler, images: torch.Tensor) -> torch.Tensor:
    """Mean squared error of what the scheduler predicts, at uniform timesteps (Ho et al. 2020, eq. 14)."""
    noise = torch.randn_like(images)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(images),), device=images.device)
    predicted = model(scheduler.add_noise(images, noise, timesteps), timesteps).sample
    target = {"epsilon": noise, "sample": images}.get(scheduler.config.prediction_type)
    if target is None:
        target = scheduler.get_velocity(images, noise, timesteps)
    return F.mse_loss(predicted.float(), target.float())


@dataclasses.dataclass
class Progress:
    """Where a run stands, as a checkpoint keeps it."""

    step: int = 0  # optimizer steps, the skipped ones included
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0  # of the steps since the last line of the log
    loss_count: int = 0


def list_checkpoints(folder: str | Path) -> list[Path]:
    return sorted(path for path in Path(folder).glob("checkpoint-*") if (path / "state.json").is_file())


def find_checkpoint(args: TrainingArgs, identity: dict) -> Path | None:
    """The checkpoint to continue from, if any; one of another run is refused."""
    existing = list_checkpoints(args.output_dir)
    if not existing:
        return None
    if args.resume_from_checkpoint == "none":
        raise ValueError(f"{args.output_dir} holds checkpoints; to start anew, name another --output_dir.")
    path = existing[-1]
    before = json.loads((path / "state.json").read_text())["identity"]
    changed = {key: before.get(key) for key in identity if before.get(key) != identity[key]}
    if changed:
        raise ValueError(f"{path} is of a run with {changed}. Run with these, or name another --output_dir.")
    return path


class Run:
    """Everything a step changes: weights, their average, the optimizer's state, the position."""

    def __init__(self, args: TrainingArgs, accelerator: Accelerator, images: ImagePixels) -> None:
        torch.manual_seed(args.seed)
        self.args, self.accelerator, self.progress = args, accelerator, Progress()
        self.scheduler = DDPMScheduler(**args.scheduler)
        model = UNet2DModel(**args.model)
        self.names = [name for name, _ in model.named_parameters()]
        self.ema = EMAModel(model.parameters(), decay=args.ema_max_decay, foreach=True)
        optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.adam_weight_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.ema.to(accelerator.device)
        self.identity = args.identity() | {"images": len(images), "num_processes": accelerator.num_processes}
        self.identity["mixed_precision"] = accelerator.mixed_precision

    def save(self) -> None:
        """Write a checkpoint: into a temporary folder, which is then renamed; drop the oldest ones."""
        if self.accelerator.is_main_process:
            final = Path(self.args.output_dir) / f"checkpoint-{self.progress.step:08d}"
            partial = final.with_name(f"partial-{final.name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(self.accelerator.unwrap_model(self.model).state_dict(), partial / "model.safetensors")
            save_file(dict(zip(self.names, self.ema.shadow_params, strict=True)), partial / "ema.safetensors")
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}
            torch.save({"optimizer": self.optimizer.state_dict(), "scaler": scaler}, partial / "optimizer.pt")
            state = {"progress": vars(self.progress), "ema_updates": self.ema.optimization_step}
            (partial / "state.json").write_text(json.dumps(state | {"identity": self.identity}, indent=2))
            os.replace(partial, final)
            for old in list_checkpoints(self.args.output_dir)[: -self.args.checkpoints_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        self.accelerator.unwrap_model(self.model).load_state_dict(load_file(folder / "model.safetensors"))
        averaged = load_file(folder / "ema.safetensors", device=str(self.accelerator.device))
        self.ema.shadow_params = [averaged[name] for name in self.names]
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        state = json.loads((folder / "state.json").read_text())
        self.progress, self.ema.optimization_step = Progress(**state["progress"]), state["ema_updates"]

    def step(self, batches: Iterator[torch.Tensor]) -> float:
        """One optimizer step, skipped where loss or gradient is not finite; the mean loss over all processes."""
        args, accelerator, progress = self.args, self.accelerator, self.progress
        reseed(args.seed, progress.step, accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(args, progress.step)
        losses = []
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.accumulate(self.model):
                images = next(batches).to(accelerator.device).float() / 127.5 - 1  # NCHW, uint8 => [-1, 1]
                images = augment(images, args.random_flip, args.random_rotation, args.random_shift, args.random_scale)
                losses.append(diffusion_loss(self.model, self.scheduler, images))
                accelerator.backward(losses[-1])
        norm = accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        loss = accelerator.reduce(torch.stack(losses).detach().mean(), "mean").item()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite or accelerator.scaler:  # fp16's scaler skips by itself and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        if finite:
            self.ema.step(self.model.parameters())
            progress.loss_sum, progress.loss_count = progress.loss_sum + loss, progress.loss_count + 1
        progress.skipped += not finite
        progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
        if progress.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(f"{MAX_SKIPPED_IN_A_ROW} losses in a row were not finite. Try a lower --learning_rate.")
        return loss

    def log_line(self, images_per_second: float) -> dict:
        """Settle the losses since the last line."""
        progress = self.progress
        mean = progress.loss_sum / progress.loss_count if progress.loss_count else None
        progress.loss_sum, progress.loss_count = 0.0, 0
        lr = learning_rate(self.args, progress.step - 1)
        line = {"step": progress.step, "loss": mean, "learning_rate": lr, "skipped": progress.skipped}
        return line | {"images_per_second": round(images_per_second, 1)}


def read_log(path: Path, last_step: int) -> list[dict]:
    """Lines up to a step: a killed run may have written more, and half a line."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    lines = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in lines if line["step"] <= last_step]


def train(args: TrainingArgs) -> None:
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    data = load_split(args.dataset_name, args.dataset_split)
    channels, side = args.model.get("in_channels", 3), args.model["sample_size"]
    images = ImagePixels(data, args.image_column, channels, side, args.cache_images)
    run = Run(args, accelerator, images)
    checkpoint = find_checkpoint(args, run.identity)
    if checkpoint:
        run.load(checkpoint)
    if run.progress.step > args.max_train_steps:
        raise ValueError(f"{checkpoint} is past --max_train_steps {args.max_train_steps}. Raise that.")
    accelerator.wait_for_everyone()

    # The images of a step lie side by side over micro-batches and ranks.
    micro, everyone = args.train_batch_size, args.train_batch_size * accelerator.num_processes
    images_per_step = everyone * args.gradient_accumulation_steps
    first = run.progress.step * images_per_step + accelerator.process_index * micro
    order = batch_indices(len(images), args.seed, first, micro, stride=everyone)
    batches = iter(DataLoader(images, batch_sampler=order, num_workers=args.dataloader_num_workers))
    accelerator.print(
        f"{accelerator.num_processes} processes, {images_per_step} of {len(images)} images a step, "
        f"steps {run.progress.step} to {args.max_train_steps} in {args.output_dir}"
    )

    log = Path(args.output_dir) / "loss.jsonl"
    lines, main_process = read_log(log, run.progress.step), accelerator.is_main_process
    if main_process:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bar = tqdm(total=args.max_train_steps, initial=run.progress.step, disable=not main_process, mininterval=1)
    since = time.perf_counter(), run.progress.step
    run.model.train()
    while run.progress.step < args.max_train_steps:
        loss = run.step(batches)
        step, last = run.progress.step, run.progress.step == args.max_train_steps
        speed = (step - since[1]) * images_per_step / (time.perf_counter() - since[0])
        bar.set_postfix_str(f"loss={loss:.4f}, images/s={speed:.0f}, skipped={run.progress.skipped}", refresh=False)
        bar.update()
        if step % args.logging_steps == 0 or last:
            lines.append(run.log_line(speed))
            since = time.perf_counter(), step
            if main_process:
                with log.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
        if step % args.checkpointing_steps == 0 or last:
            run.save()
    bar.close()
    if main_process:
        model = accelerator.unwrap_model(run.model)
        run.ema.copy_to(model.parameters())
        save_pipeline(args, DDPMPipeline(model.eval(), run.scheduler), lines, images)
    accelerator.end_training()


def save_pipeline(args: TrainingArgs, pipeline: DDPMPipeline, lines: list[dict], images: ImagePixels) -> None:
    """The pipeline with a grid of samples and a card."""
    folder = Path(args.output_dir)
    if args.eval_batch_size:
        generator = torch.Generator("cpu").manual_seed(args.seed)
        samples = pipeline(args.eval_batch_size, generator, args.ddpm_num_inference_steps).images
        samples = [ImageOps.scale(sample, max(1, 32 // sample.width), Image.Resampling.NEAREST) for sample in samples]
        make_image_grid(samples, rows=len(samples) // 8, cols=8).save(folder / "samples.png")
    torch.nn.Module.to(pipeline.unet, getattr(torch, args.save_dtype))
    pipeline.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(args, pipeline, lines, images))


def model_card(args: TrainingArgs, pipeline: DDPMPipeline, lines: list[dict], images: ImagePixels) -> str:
    final = [line["loss"] for line in lines[-max(1, len(lines) // 20) :] if line["loss"] is not None] or [math.nan]
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: apache-2.0
tags:
- diffusers
- unconditional-image-generation
- ddpm
---

# {Path(args.output_dir).name}

A `DDPMPipeline` with a `UNet2DModel` of {pipeline.unet.num_parameters():,} parameters, trained by
`examples/train_unconditional.py` of diffusers-repr. The weights are the moving average, saved in {args.save_dtype}.
{"![samples](samples.png)" if args.eval_batch_size else ""}

- Data: {len(images):,} images of `{args.dataset_name}`, split `{args.dataset_split}`, and no other.
- Steps: {lines[-1]["step"]:,} with seed {args.seed}; {lines[-1]["skipped"]} skipped, where the loss was not finite.
- Final training loss: {sum(final) / len(final):.4f}, the mean of the last twentieth of `loss.jsonl`.

## Recipe

```yaml
{args.to_yaml()}```
"""


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    if args.dry_run:
        print(f"{args.to_yaml()}# {UNet2DModel(**args.model).num_parameters():,} parameters")
    else:
        train(args)


if __name__ == "__main__":
    main(sys.argv[1:])
