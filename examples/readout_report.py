"""How well a readout head reads, by noise level, and its folder with a card."""

from pathlib import Path

import torch
from image_batches import load_split
from readout_args import ReadoutArgs
from readout_data import ReadoutRows, labels_of, noisy_features
from torch.utils.data import DataLoader

from diffusers_repr import Denoiser
from diffusers_repr.heads import MapHead
from diffusers_repr.hub import atomic_write, is_repo_id, model_card
from diffusers_repr.training.seeds import reseed


@torch.no_grad()
def evaluate(denoiser: Denoiser, args: ReadoutArgs, heads: torch.nn.ModuleDict, layers: list[str], size) -> dict:
    """Mean error by timestep over the evaluation split, and that of the labels' mean, one constant for all."""
    rows = ReadoutRows(load_split(args.dataset_name, args.eval_split), args, denoiser.image_channels, size)
    error = torch.nn.L1Loss(reduction="sum") if args.kind == "depth" else torch.nn.MSELoss(reduction="sum")
    low, high = next(iter(heads.values())).config.level_range
    table, labels = {}, []
    for place in (0.1, 0.3, 0.5, 0.7, 0.9):
        timestep, sums, count = float(round(low + place * (high - low), 4 if high < 10 else 0)), {}, 0
        for at, batch in enumerate(DataLoader(rows, args.train_batch_size)):
            reseed(args.seed, at, 0)
            batch = {name: value.to(denoiser.device) for name, value in batch.items()}
            features, _ = noisy_features(denoiser, args, batch, denoiser.level(timestep), layers)
            for name, head in heads.items():
                read = head(features, timestep)
                label = labels_of(batch, args, tuple(read.shape[2:]))
                sums[name] = sums.get(name, 0.0) + error(read, label).item()
            count += label.numel()
            labels += [label.cpu()] if not table else []
        table[timestep] = {name: value / count for name, value in sums.items()}
    every = torch.cat(labels)
    constant = error(every, every.mean().expand_as(every)).item() / every.numel()
    return {"by_timestep": table, "constant": constant, "images": len(rows)}


def save_heads(folder: Path, args: ReadoutArgs, heads: torch.nn.ModuleDict, lines: list[dict], errors: dict, title):
    """Each head as a folder (the weak depth head inside the strong one's), and a card."""
    for name, head in heads.items():
        head.save_pretrained(folder / name if name == "weak" else folder)
    atomic_write(folder / "README.md", card(args, next(iter(heads.values())), lines, errors, title))


def card(args: ReadoutArgs, head: MapHead, lines: list[dict], errors: dict, title: str) -> str:
    base, what = args.pretrained_model_name_or_path, args.target if args.kind in ("spatial", "depth") else args.kind
    public = is_repo_id(base) and not Path(base).is_dir()
    measured = ""
    if errors:
        names = list(next(iter(errors["by_timestep"].values())))
        measured = f"\n## {'L1' if args.kind == 'depth' else 'Mean squared'} error\n\n"
        measured += f"On {errors['images']:,} images of split `{args.eval_split}`, by timestep of the noise; the best "
        measured += f"constant has {errors['constant']:.4f}.\n\n| timestep | {' | '.join(names)} |\n"
        measured += f"|---|{'---|' * len(names)}\n"
        for timestep, row in errors["by_timestep"].items():
            measured += f"| {timestep:g} | {' | '.join(f'{row[name]:.4f}' for name in names)} |\n"
    low, high = head.config.level_range
    text = f"""A `{type(head).__name__}` that reads {what} from the features of `{base}` at any noise level, trained by
`examples/train_readout.py` of diffusers-repr for guidance.

```python
from diffusers_repr.heads import {type(head).__name__}

head = {type(head).__name__}.from_pretrained("{title}")
```

- Layers: {", ".join(f"`{path}`" for path in head.config.layers)}.
- Noise: one timestep a sample, {low:g} to {high:g}.
- Steps: {lines[-1]["step"]:,} of {args.train_batch_size} rows a process, seed {args.seed}.
- Last training loss: {lines[-1]["loss"]:.4f}.
{measured}
## Recipe

```yaml
{args.to_yaml()}```
"""
    tags = ["readout-guidance", args.kind]
    return model_card(title=title, text=text, base_model=base if public else None, tags=tags)
