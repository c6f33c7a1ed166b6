"""Train a readout head or a pair of depth heads on the features of a frozen denoiser.

    accelerate launch examples/train_readout.py --config examples/configs/readout_digits_edges.yaml
    accelerate launch examples/train_readout.py --config my_recipe.yaml --seed 1 --output_dir outputs/seed1

A recipe is a YAML file whose keys are the fields of `ReadoutArgs`; flags on the command line win over it. Every sample
has a noise level of its own and the empty prompt or the null class. Columns of the data set by `kind`:

- `spatial` (edges, pose, ...): `image`; with a `target` other than `edges` also `label_image`. Mean squared error.
- `depth`: the same, least absolute error; a strong head and a weak one, saved in the folder `weak` inside.
- `appearance`: `image`, `positive`, `negative`. Triplet loss of cosines, margin 0.5.
- `correspondence`: `image`, `second_image`, and lists of [y, x] in pixels `points`, `second_points`, of which equal
  places correspond; points outside an image are left out. Symmetric cross-entropy of cosines.

The same command run again continues from the checkpoint, bit-exactly on CPU: the data order is a function of
(seed, epoch), all randomness of a step is one of (seed, step, rank), and checkpoints lie between optimizer steps.
"""

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from image_batches import batch_indices, load_split
from readout_args import HEADS, ReadoutArgs, parse_args
from readout_data import ReadoutRows, labels_of, noisy_features
from readout_report import evaluate, save_heads
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_repr import Denoiser
from diffusers_repr.heads import (
    MapHead,
    appearance_triplet_loss,
    correspondence_loss,
    depth_layers,
    readout_layers,
    sample_points,
)
from diffusers_repr.hub import push_folder
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.training.logs import read_log
from diffusers_repr.training.run import end_processes
from diffusers_repr.training.seeds import reseed

Batch = dict[str, torch.Tensor]


class Objective(torch.nn.Module):
    """The heads in training, by the folder each is saved in, and their loss."""

    def __init__(self, args: ReadoutArgs, denoiser: Denoiser, size: tuple[int, int]) -> None:
        super().__init__()
        self.args, self.size = args, size
        low, high = denoiser.schedule.timestep_range
        default = [low, low + 0.8 * (high - low)] if args.kind == "depth" else [low, high]
        options = {**args.head, "level_range": args.level_range or default, "label_range": args.label_range}
        if args.kind == "depth":
            strong, weak = depth_layers(denoiser.model)
            layers = {"strong": args.layers or strong, "weak": args.weak_layers or weak}
        else:
            layers = {"head": args.layers or readout_layers(denoiser.model)}
            options["kind"] = args.kind
        if args.kind in ("spatial", "depth"):
            options["target"] = args.target
        make = HEADS[args.kind].for_base
        self.heads = torch.nn.ModuleDict({k: make(denoiser, v, size, **options) for k, v in layers.items()})
        self.layers = list(dict.fromkeys(path for paths in layers.values() for path in paths))

    def forward(self, features: Batch, timestep: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The sum over heads; `features` and `timestep` have one row for each image of the batch, kind after kind."""
        losses = []
        for head in self.heads.values():
            read = head(features, timestep)
            if self.args.kind == "appearance":
                losses.append(appearance_triplet_loss(*read.chunk(3)))
            elif self.args.kind == "correspondence":
                parts = zip(read.chunk(2), ("image", "second"), strict=True)
                first, second = (sample_points(x, batch[f"{name}_points"], self.size) for x, name in parts)
                losses.append(correspondence_loss(first, second, batch["valid"]))
            else:
                loss = F.l1_loss if self.args.kind == "depth" else F.mse_loss
                losses.append(loss(read, labels_of(batch, self.args, tuple(read.shape[2:]))))
        return torch.stack(losses).sum()


def draw_levels(denoiser: Denoiser, head: MapHead, count: int) -> NoiseLevel:
    """One level a sample, uniform over the head's timesteps; whole ones where the process has steps."""
    low, high = head.config.level_range
    if denoiser.schedule.kind == "vp":
        return denoiser.level(torch.randint(math.ceil(low), math.floor(high) + 1, (count,)))
    return denoiser.level(low + (high - low) * torch.rand(count))


def load_base(args: ReadoutArgs, device: torch.device) -> Denoiser:
    dtype = getattr(torch, args.base_dtype)
    denoiser = Denoiser.from_pretrained(args.pretrained_model_name_or_path, revision=args.revision, dtype=dtype)
    denoiser.pipe.to(device)
    denoiser.model.requires_grad_(False)
    denoiser.prompts = {}  # the empty prompt is encoded once
    return denoiser


def save_checkpoint(path: Path, state: dict) -> None:
    torch.save(state, path.with_name(f"partial-{path.name}"))
    os.replace(path.with_name(f"partial-{path.name}"), path)


def load_checkpoint(path: Path, identity: dict) -> dict | None:
    """What to continue from, if anything; the checkpoint of another run is refused."""
    if not path.is_file():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    before = json.loads(state["identity"])
    changed = {key: before.get(key) for key in identity if before.get(key) != identity[key]}
    if changed:
        raise ValueError(f"{path} is of a run with {changed}. Run with these, or name another --output_dir.")
    return state


def train(args: ReadoutArgs) -> None:
    accelerator = Accelerator(mixed_precision="no")
    denoiser = load_base(args, accelerator.device)
    size = (args.resolution, args.resolution) if args.resolution else denoiser.image_size
    rows = ReadoutRows(load_split(args.dataset_name, args.dataset_split), args, denoiser.image_channels, size)
    torch.manual_seed(args.seed)
    objective = Objective(args, denoiser, size)
    heads, layers = objective.heads, objective.layers
    optimizer = torch.optim.AdamW(heads.parameters(), args.learning_rate, weight_decay=args.adam_weight_decay)
    folder, ranks = Path(args.output_dir), accelerator.num_processes
    identity = json.loads(json.dumps(args.identity() | {"images": len(rows), "num_processes": ranks}))
    state = load_checkpoint(folder / "checkpoint.pt", identity) or {"step": 0, "losses": []}
    step, losses = state["step"], state["losses"]  # losses of the steps since the last line of the log
    if step > args.max_train_steps:
        raise ValueError(f"The checkpoint is at step {step}, past --max_train_steps {args.max_train_steps}.")
    if step:
        heads.load_state_dict(state["heads"])
    model, optimizer = accelerator.prepare(objective, optimizer)
    if step:
        optimizer.load_state_dict(state["optimizer"])
    lines, main_process = start_log(folder / "loss.jsonl", step, accelerator), accelerator.is_main_process

    size_of_step = args.train_batch_size * ranks
    first = step * size_of_step + accelerator.process_index * args.train_batch_size
    order = batch_indices(len(rows), args.seed, first, args.train_batch_size, stride=size_of_step)
    batches = iter(DataLoader(rows, batch_sampler=order, num_workers=args.dataloader_num_workers))
    bar = tqdm(total=args.max_train_steps, initial=step, disable=not main_process, mininterval=1)
    since = time.perf_counter(), step
    while step < args.max_train_steps:
        reseed(args.seed, step, accelerator.process_index)
        batch = {name: value.to(accelerator.device) for name, value in next(batches).items()}
        if args.random_flip:
            batch = mirrored(batch)
        level = draw_levels(denoiser, next(iter(heads.values())), len(batch["image"]))
        features, timestep = noisy_features(denoiser, args, batch, level, layers)
        loss = model(features, timestep, batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"The loss of step {step} is {losses[-1]}. Lower --learning_rate, or check labels."
            )
        step += 1
        bar.set_postfix_str(f"loss={losses[-1]:.4f}", refresh=False)
        bar.update()
        if step % args.logging_steps == 0 or step == args.max_train_steps:
            speed = (step - since[1]) * size_of_step / (time.perf_counter() - since[0])
            lines.append({"step": step, "loss": sum(losses) / len(losses), "rows_per_second": round(speed, 1)})
            since, losses = (time.perf_counter(), step), []
            if main_process:
                with (folder / "loss.jsonl").open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
        if main_process and (step % args.checkpointing_steps == 0 or step == args.max_train_steps):
            state = {"step": step, "losses": losses, "identity": json.dumps(identity)}
            state |= {"heads": heads.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(folder / "checkpoint.pt", state)
    bar.close()
    if main_process:
        errors = evaluate(denoiser, args, heads, layers, size) if args.eval_split else {}
        publish(folder, args, heads, lines, errors)
    accelerator.wait_for_everyone()  # no process takes the group down while another still works
    del model
    end_processes(accelerator)


def start_log(path: Path, step: int, accelerator: Accelerator) -> list[dict]:
    """The lines of the log up to a step, and the file with these alone."""
    lines = read_log(path, step)
    accelerator.wait_for_everyone()  # all have read what the first now writes
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def mirrored(batch: Batch) -> Batch:
    """Half of the rows from right to left, their labels with them."""
    image = batch["image"]
    mirror = torch.rand(len(image), device=image.device)[:, None, None, None] < 0.5
    return {name: torch.where(mirror, value.flip(3), value) for name, value in batch.items()}


def publish(folder: Path, args: ReadoutArgs, heads: torch.nn.ModuleDict, lines: list[dict], errors: dict) -> None:
    """Save the heads, and push them if asked for."""
    save_heads(folder, args, heads, lines, errors, folder.resolve().name)
    if args.push_to_hub:
        with tempfile.TemporaryDirectory() as fresh:  # without the checkpoint
            save_heads(Path(fresh), args, heads, lines, errors, args.hub_model_id)
            print(push_folder(fresh, args.hub_model_id))


def main(argv: list[str]) -> None:
    args = parse_args(argv, description=__doc__.split("\n")[0])
    print(args.to_yaml(), end="") if args.dry_run else train(args)


if __name__ == "__main__":
    main(sys.argv[1:])
