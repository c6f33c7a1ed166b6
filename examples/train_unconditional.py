"""Train a diffusion model of images (`UNet2DModel`, `DDPMScheduler`) and save it as a pipeline folder.

    accelerate launch examples/train_unconditional.py --config examples/configs/ddpm_digits.yaml
    accelerate launch examples/train_unconditional.py --config my_recipe.yaml --seed 1 --output_dir outputs/seed1

An unconditional model is saved as a `DDPMPipeline`. A model with `num_class_embeds`, the number of classes and one
more for the null id, is trained on labels, a share of which become the null id, and is saved as a `DDIMPipeline`.

A recipe is a YAML file whose keys are the fields of `TrainingArgs`; flags on the command line win over it. The same
command run again continues from the newest checkpoint, bit-exactly on CPU: the data order is a function of
(seed, epoch), all randomness of a step is one of (seed, step, rank), and checkpoints lie between optimizer steps.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from image_batches import ImagePixels, LabelledImages, augment, batch_indices, drop_labels, load_split
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from training_args import TrainingArgs, parse_args

MAX_SKIPPED_IN_A_ROW = 50


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


def diffusion_loss(
    model: torch.nn.Module, scheduler: DDPMScheduler, images: torch.Tensor, class_labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of what the scheduler predicts, at uniform timesteps (Ho et al. 2020, eq. 14)."""
    noise = torch.randn_like(images)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(images),), device=images.device)
    condition = {} if class_labels is None else {"class_labels": class_labels}
    predicted = model(scheduler.add_noise(images, noise, timesteps), timesteps, **condition).sample
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

    def __init__(self, args: TrainingArgs, accelerator: Accelerator, images: ImagePixels | LabelledImages) -> None:
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

    def step(self, batches: Iterator[torch.Tensor | list[torch.Tensor]]) -> float:
        """One optimizer step, skipped where loss or gradient is not finite; the mean loss over all processes."""
        args, accelerator, progress = self.args, self.accelerator, self.progress
        reseed(args.seed, progress.step, accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(args, progress.step)
        losses = []
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.accumulate(self.model):
                batch = next(batches)
                images, *labels = batch if args.class_conditional else [batch]
                images = images.to(accelerator.device).float() / 127.5 - 1  # NCHW, uint8 => [-1, 1]
                images = augment(images, args.random_flip, args.random_rotation, args.random_shift, args.random_scale)
                labels = [
                    drop_labels(ids.to(accelerator.device), args.null_label, args.label_dropout) for ids in labels
                ]
                losses.append(diffusion_loss(self.model, self.scheduler, images, *labels))
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
    if args.class_conditional:
        images = LabelledImages(images, args.label_column, args.model["num_class_embeds"])
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
        kind = DDIMPipeline if args.class_conditional else DDPMPipeline
        save_pipeline(args, kind(model.eval(), run.scheduler), lines, len(images))
    accelerator.end_training()


@torch.no_grad()
def sample_classes(pipeline: DDIMPipeline, labels: list[int], generator: torch.Generator, steps: int) -> list:
    """An image of each class in `labels` by deterministic DDIM without guidance."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    side = unet.config.sample_size
    shape = (len(labels), unet.config.in_channels, *([side, side] if isinstance(side, int) else side))
    images = torch.randn(shape, generator=generator).to(unet.device)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        predicted = unet(images, timestep, class_labels=torch.tensor(labels, device=unet.device)).sample
        images = scheduler.step(predicted, timestep, images).prev_sample
    return pipeline.numpy_to_pil((images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy())


def save_pipeline(args: TrainingArgs, pipeline: DDPMPipeline | DDIMPipeline, lines: list[dict], images: int) -> None:
    """The pipeline with a grid of samples, a row for each class if there are classes, and a card."""
    folder = Path(args.output_dir)
    if args.eval_batch_size:
        generator = torch.Generator("cpu").manual_seed(args.seed)
        if args.class_conditional:
            labels = [place // 8 % args.null_label for place in range(args.eval_batch_size)]
            samples = sample_classes(pipeline, labels, generator, args.ddpm_num_inference_steps)
        else:
            samples = pipeline(args.eval_batch_size, generator, args.ddpm_num_inference_steps).images
        samples = [ImageOps.scale(sample, max(1, 32 // sample.width), Image.Resampling.NEAREST) for sample in samples]
        make_image_grid(samples, rows=len(samples) // 8, cols=8).save(folder / "samples.png")
    torch.nn.Module.to(pipeline.unet, getattr(torch, args.save_dtype))
    pipeline.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(args, pipeline, lines, images))


def model_card(args: TrainingArgs, pipeline: DDPMPipeline | DDIMPipeline, lines: list[dict], images: int) -> str:
    kind = type(pipeline).__name__
    final = [line["loss"] for line in lines[-max(1, len(lines) // 20) :] if line["loss"] is not None] or [math.nan]
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: apache-2.0
tags:
- diffusers
- {"class-conditional" if args.class_conditional else "unconditional"}-image-generation
- {kind.removesuffix("Pipeline").lower()}
---

# {Path(args.output_dir).name}

A `{kind}` with a `UNet2DModel` of {pipeline.unet.num_parameters():,} parameters, trained by
`examples/train_unconditional.py` of diffusers-repr. The weights are the moving average, saved in {args.save_dtype}.
{"![samples](samples.png)" if args.eval_batch_size else ""}

- Data: {images:,} images of `{args.dataset_name}`, split `{args.dataset_split}`, and no other.
- Steps: {lines[-1]["step"]:,} with seed {args.seed}; {lines[-1]["skipped"]} skipped, where the loss was not finite.
- Final training loss: {sum(final) / len(final):.4f}, the mean of the last twentieth of `loss.jsonl`.
{label_notes(args)}
## Recipe

```yaml
{args.to_yaml()}```
"""


def label_notes(args: TrainingArgs) -> str:
    if not args.class_conditional:
        return ""
    classes, null = args.null_label, args.null_label
    return f"""- Labels: column `{args.label_column}`, ids 0 to {classes - 1}. The null id is {null}: a label became
  it with probability {args.label_dropout:g}.
  `DDIMPipeline` loads the folder but passes no labels: sample by a loop with `unet(images, t, class_labels=ids)`.
"""


def main(argv: list[str]) -> None:
    args = parse_args(argv, description=__doc__.split("\n")[0])
    if args.dry_run:
        print(f"{args.to_yaml()}# {UNet2DModel(**args.model).num_parameters():,} parameters")
    else:
        train(args)


if __name__ == "__main__":
    main(sys.argv[1:])
