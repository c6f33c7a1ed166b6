"""Train a classifier p(class | x_t, t) on the noise process of a diffusion pipeline, for classifier guidance.

    accelerate launch examples/train_classifier.py --config examples/configs/classifier_digits.yaml
    accelerate launch examples/train_classifier.py --config my_recipe.yaml --seed 1 --output_dir outputs/seed1

The pipeline gives its noise process and, if it is latent, its VAE; its network is not used. A recipe is a YAML file
whose keys are the fields of `ClassifierArgs`; flags on the command line win over it. The same command run again
continues from the newest checkpoint, bit-exactly on CPU: the data order is a function of (seed, epoch), all randomness
of a step is one of (seed, step, rank), and checkpoints lie between optimizer steps.
"""

import dataclasses
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from classifier_args import ClassifierArgs, parse_args
from classifier_base import Base, add_up, averages, class_names, load_images
from huggingface_hub import get_token
from image_batches import LabelledImages, augment, batch_indices
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_repr.denoiser.vae import encode_latents
from diffusers_repr.hub import HubError, Metric, is_repo_id, model_card, push_folder, write_json
from diffusers_repr.models import NoisyClassifier
from diffusers_repr.noise import add_noise
from diffusers_repr.training.checkpoints import find_checkpoint, read_state, read_tensors, save_checkpoint
from diffusers_repr.training.logs import read_log
from diffusers_repr.training.run import end_processes
from diffusers_repr.training.seeds import learning_rate, reseed

PUSHED = ("config.json", "diffusion_pytorch_model*", "README.md", "loss.jsonl", "evaluation.json")


def classify(model: torch.nn.Module, base: Base, pixels: torch.Tensor, labels: torch.Tensor, places: torch.Tensor):
    """Cross-entropy and correctness, both (B,), of images in [-1, 1] with noise at `places` of the process."""
    x0 = pixels if base.vae is None else encode_latents(base.vae, pixels)
    timesteps = base.timesteps(places)
    x_t = add_noise(x0.float(), base.schedule.resolve(timesteps), torch.randn_like(x0, dtype=torch.float32))
    logits = model(x_t, timesteps)
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels


class Run:
    """Everything a step changes: weights, the optimizer's state, the position."""

    def __init__(self, args: ClassifierArgs, accelerator: Accelerator, base: Base, data: LabelledImages) -> None:
        torch.manual_seed(args.seed)
        self.args, self.accelerator, self.base = args, accelerator, base
        self.step_count, self.sums = 0, torch.zeros(args.noise_bins, 3, dtype=torch.float64)  # since the last log line
        names = class_names(data, args)
        model = NoisyClassifier(num_classes=len(names), id2label=names, **base.config(), **args.model).train()
        optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.adam_weight_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.identity = args.identity() | {"base": base.config(), "classes": names, "images": len(data)}
        self.identity |= {"num_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}

    def save(self) -> None:
        """Write a checkpoint, whole or not at all; drop the oldest ones."""
        if self.accelerator.is_main_process:
            moments = self.optimizer.state_dict()["state"]
            optimizer = {f"{i}/{key}": value for i, state in moments.items() for key, value in state.items()}
            tensors = {"model": self.accelerator.unwrap_model(self.model).state_dict(), "optimizer": optimizer}
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}
            state = {"sums": self.sums.tolist(), "scaler": scaler, "identity": self.identity}
            keep = self.args.checkpoints_total_limit
            save_checkpoint(self.args.output_dir, self.step_count, tensors, state, keep)
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        self.accelerator.unwrap_model(self.model).load_state_dict(read_tensors(folder, "model"))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for path, value in read_tensors(folder, "optimizer").items():
            place, key = path.split("/")
            moments.setdefault(int(place), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        state = read_state(folder)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step_count, self.sums = state["step"], torch.tensor(state["sums"], dtype=torch.float64)

    def step(self, pixels: torch.Tensor, labels: torch.Tensor) -> float:
        """One optimizer step at uniform noise levels; the mean loss over all processes."""
        args, accelerator = self.args, self.accelerator
        reseed(args.seed, self.step_count, accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(args, self.step_count)
        pixels = pixels.to(accelerator.device).float() / 127.5 - 1  # NCHW, uint8 => [-1, 1]
        pixels = augment(pixels, args.random_flip, args.random_rotation, args.random_shift, args.random_scale)
        labels, places = labels.to(accelerator.device), torch.rand(len(labels), device=accelerator.device)
        losses, correct = classify(self.model, self.base, pixels, labels, places)
        accelerator.backward(losses.mean())
        norm = accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        parts = (places * args.noise_bins).long().clamp(max=args.noise_bins - 1)
        sums = accelerator.reduce(add_up(parts, losses, correct, args.noise_bins), "sum").cpu().double()
        loss = (sums[:, 1].sum() / sums[:, 0].sum()).item()
        if not (math.isfinite(loss) and (accelerator.scaler or math.isfinite(norm))):  # fp16's scaler skips by itself
            raise RuntimeError(f"Step {self.step_count + 1}: loss or gradient is not finite. Lower the learning_rate.")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_count, self.sums = self.step_count + 1, self.sums + sums
        return loss


@torch.no_grad()
def evaluate(model: NoisyClassifier, base: Base, data: LabelledImages, args: ClassifierArgs) -> dict:
    """Every image once in each part of the noise levels."""
    reseed(args.seed, args.max_train_steps, 0)
    device, bins = model.device, args.noise_bins
    sums = torch.zeros(bins, 3, device=device)
    for pixels, labels in DataLoader(data, args.train_batch_size, num_workers=args.dataloader_num_workers):
        pixels, labels = pixels.to(device).float() / 127.5 - 1, labels.to(device)
        for part in range(bins):
            places = (part + torch.rand(len(labels), device=device)) / bins
            losses, correct = classify(model, base, pixels, labels, places)
            sums += add_up(torch.full_like(labels, part), losses, correct, bins)
    edges = base.timesteps(torch.arange(bins + 1) / bins).tolist()
    return {"split": args.eval_split, "images": len(data), "timesteps": edges, **averages(sums.cpu().double())}


def train(args: ClassifierArgs) -> None:
    if args.push_to_hub and get_token() is None:
        raise HubError("`push_to_hub` needs a token: log in with `hf auth login`, or set HF_TOKEN.")
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    base = Base.load(args)
    if base.vae is not None:
        base.vae.requires_grad_(False).eval().to(accelerator.device)
    data = load_images(args, args.dataset_split, base)
    held_out = None if args.eval_split == "none" else load_images(args, args.eval_split, base)
    if held_out and class_names(held_out, args) != class_names(data, args):
        raise ValueError(f"The splits {args.dataset_split!r} and {args.eval_split!r} have other classes.")
    run = Run(args, accelerator, base, data)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint, run.identity)
    if checkpoint:
        run.load(checkpoint)
    if run.step_count > args.max_train_steps:
        raise ValueError(f"{checkpoint} is past --max_train_steps {args.max_train_steps}. Raise that.")

    size, everyone = args.train_batch_size, args.train_batch_size * accelerator.num_processes
    first = run.step_count * everyone + accelerator.process_index * size
    order = batch_indices(len(data), args.seed, first, size, stride=everyone)
    batches = iter(DataLoader(data, batch_sampler=order, num_workers=args.dataloader_num_workers))
    accelerator.print(f"{everyone} of {len(data)} images a step, steps {run.step_count} to {args.max_train_steps}")

    log = Path(args.output_dir) / "loss.jsonl"
    if accelerator.is_main_process:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(json.dumps(line) + "\n" for line in read_log(log, run.step_count)))
    bar = tqdm(total=args.max_train_steps, initial=run.step_count, disable=not accelerator.is_main_process)
    since = time.perf_counter(), run.step_count
    while run.step_count < args.max_train_steps:
        loss = run.step(*next(batches))
        bar.set_postfix_str(f"loss={loss:.4f}", refresh=False)
        bar.update()
        last = run.step_count == args.max_train_steps
        if run.step_count % args.logging_steps == 0 or last:
            speed = (run.step_count - since[1]) * everyone / (time.perf_counter() - since[0])
            line = {"step": run.step_count, **averages(run.sums), "images_per_second": round(speed, 1)}
            since = time.perf_counter(), run.step_count
            run.sums.zero_()
            if accelerator.is_main_process:
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        if run.step_count % args.checkpointing_steps == 0 or last:
            run.save()
    bar.close()
    if accelerator.is_main_process:
        save_model(args, accelerator.unwrap_model(run.model).eval(), base, len(data), held_out)
    accelerator.wait_for_everyone()  # no process takes the group down while another still works
    del run
    end_processes(accelerator)


def save_model(
    args: ClassifierArgs, model: NoisyClassifier, base: Base, images: int, held_out: LabelledImages | None
) -> None:
    """The model folder with its card, measured as it is saved, and pushed if asked for."""
    folder = Path(args.output_dir)
    torch.nn.Module.to(model, getattr(torch, args.save_dtype))
    model.save_pretrained(folder)
    scores = None
    if held_out:
        scores = evaluate(NoisyClassifier.from_pretrained(folder).to(model.device), base, held_out, args)
        write_json(folder / "evaluation.json", scores)
    (folder / "README.md").write_text(card(args, model, base, images, scores))
    if args.push_to_hub:
        with tempfile.TemporaryDirectory() as staged:
            for path in (path for pattern in PUSHED for path in folder.glob(pattern)):
                shutil.copy(path, staged)
            print(push_folder(staged, args.hub_model_id, private=args.hub_private))


def card(args: ClassifierArgs, model: NoisyClassifier, base: Base, images: int, scores: dict | None) -> str:
    table, metrics = "It was not measured.", []
    if scores:
        edges, bins = scores["timesteps"], (scores["accuracy_by_bin"], scores["loss_by_bin"])
        rows = [(f"{low:.4g} to {high:.4g}", *row) for low, high, *row in zip(edges, edges[1:], *bins, strict=False)]
        rows = [f"| {part} | {100 * hits:.1f} % | {loss:.3f} |" for part, hits, loss in rows]
        table = f"""On {scores["images"]:,} images of split `{args.eval_split}`, each once in every part of the noise:

| timestep | accuracy | cross-entropy (nats) |
|---|---|---|
""" + "\n".join([*rows, f"| all | {100 * scores['accuracy']:.1f} % | {scores['loss']:.3f} |"])
        metrics = [Metric("accuracy", scores["accuracy"], name="accuracy over all noise levels",
                          dataset=args.dataset_name, split=args.eval_split)]  # fmt: skip
    text = f"""A `NoisyClassifier` of {model.num_parameters():,} parameters, for classifier guidance of `{base.name}`
(Dhariwal and Nichol 2021): p(class | x_t, t) on its {base.schedule.kind} noise process. Trained by
`examples/train_classifier.py` of diffusers-repr; saved in {args.save_dtype}.

```python
from diffusers_repr.models import NoisyClassifier

classifier = NoisyClassifier.from_pretrained("{args.hub_model_id or Path(args.output_dir).name}")
log_p = classifier(x_t, timestep).log_softmax(1)  # x_t: (B, {base.channels}, H, W) as the network takes it
```

{table}

- Data: {images:,} images of `{args.dataset_name}`, split `{args.dataset_split}`, and no other.
- Steps: {args.max_train_steps:,} with seed {args.seed}, at uniformly random noise levels.

## Recipe

```yaml
{recipe(args, base)}```"""
    on_hub = "/" in args.dataset_name and is_repo_id(args.dataset_name) and not Path(args.dataset_name).exists()
    return model_card(title=Path(args.output_dir).name, text=text, base_model=base.hub_id, metrics=metrics,
                      tags=["diffusers", "classifier-guidance", "image-classification"],
                      datasets=[args.dataset_name] if on_hub else [])  # fmt: skip


def recipe(args: ClassifierArgs, base: Base) -> str:
    """Without the place of a pipeline on this disk."""
    local = Path(args.pretrained_model_name_or_path).is_absolute()
    return (dataclasses.replace(args, pretrained_model_name_or_path=base.name) if local else args).to_yaml()


def main(argv: list[str]) -> None:
    args = parse_args(argv, description=__doc__.split("\n")[0])
    print(args.to_yaml()) if args.dry_run else train(args)


if __name__ == "__main__":
    main(sys.argv[1:])
