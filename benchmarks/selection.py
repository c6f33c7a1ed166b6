"""Selection over all layers and ten levels, against DDAE's way: for each cell one forward and one probe by gradient.

The peer is kinder than DDAE (arXiv 2303.09769, `linear.py`), which runs the network anew in every epoch: here each
cell runs it once over both splits, by a plain forward hook, and trains on the features kept. The probe is DDAE's, a
linear layer on pooled features, cross-entropy, Adam, cosine schedule, batches of 128, no weight decay, made stronger:
features are standardised, and since its 15 epochs would be 120 steps on this small set, there are 100 at rate 0.01.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import report
from diffusers_repr import Denoiser, list_layers
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.denoiser.block_outputs import block_output
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.sweep import select_features

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "models" / "digits-ddpm"
LEVELS = (0, 10, 30, 60, 100, 150, 200, 300, 400, 600)
EPOCHS, LEARNING_RATE, BATCH = 100, 1e-2, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="run the peer on every cell, not on one in twelve")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the peer's probe")
    parser.add_argument("--model", default=str(MODEL), help="pipeline folder")
    args = parser.parse_args()
    if not (Path(args.model) / "model_index.json").is_file():
        sys.exit(f"No pipeline in {args.model}: train it with examples/train_unconditional.py, or pass --model.")
    digits = load_digits_splits()
    denoiser = Denoiser.from_pretrained(args.model)
    cells = [(layer.path, level) for level in LEVELS for layer in list_layers(denoiser)]
    data = {
        split: (to_pixels(list(digits[split]["image"]), 1), torch.tensor(digits[split]["label"][:]))
        for split in ("train", "validation")
    }
    warm = {"layers": ["conv_in"], "max_layers": 1, "max_levels": 1, "seeds": (0,), "progress": False}
    select_features(denoiser, digits["train"], digits["validation"], [0], **warm)
    peer(denoiser, data, cells[0], 0, 1)

    table = partial(select, denoiser, digits, seeds=(0,), max_layers=1, max_levels=1)
    before_s, selection = clock(table)
    whole_s, whole = clock(partial(select, denoiser, digits))
    best = (selection.best.layer, selection.best.timestep)
    run = cells if args.full else [cell for at, cell in enumerate(cells) if at % 12 == 5 or cell == best]
    times, accuracy = [], {}
    for at, cell in enumerate(run):
        spent, accuracy[cell] = clock(partial(peer, denoiser, data, cell, at, args.epochs))
        times.append(spent)
        print(f"\rpeer: cell {at + 1} of {len(run)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    table_s = (before_s + clock(table)[0]) / 2  # the peer runs between the two
    peer_s = sum(times) if args.full else sum(times) / len(times) * len(cells)
    peer_best = max(accuracy, key=accuracy.get)
    report(
        "selection",
        cells=len(cells),
        ours_s=table_s,
        ours_with_seeds_and_sets_s=whole_s,
        peer_s=peer_s,
        peer_cells_run=len(run),
        peer_is_extrapolated=not args.full,
        peer_epochs=args.epochs,
        ratio=peer_s / table_s,
        ratio_with_seeds_and_sets=peer_s / whole_s,
        ours_best=f"{best[0]} at {best[1]:g}",
        ours_accuracy=selection.best.score,
        ours_accuracy_over_seeds=[whole.best.mean, whole.best.std],
        ours_set_accuracy=whole.sets["levels"].score,
        peer_best=f"{peer_best[0]} at {peer_best[1]:g}",
        peer_accuracy=accuracy[peer_best],
        peer_accuracy_at_our_best=accuracy[best],
        target="ratio >= 20, within 0.01 of peer_accuracy",
    )


def clock(run):
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def select(denoiser, digits, **settings):
    return select_features(
        denoiser, digits["train"], digits["validation"], LEVELS, batch_size=BATCH, progress=False, **settings
    )


def peer(denoiser, data, cell, seed, epochs):
    return train_probe(cell_features(denoiser, data, *cell, seed), epochs)


@torch.no_grad()
def cell_features(denoiser, data, layer, timestep, seed):
    """One full forward over both splits, one layer pooled: `[(features, labels), (features, labels)]`."""
    generator = torch.Generator().manual_seed(seed)
    module, kept = denoiser.model.get_submodule(layer), []
    handle = module.register_forward_hook(lambda m, _, out: kept.append(block_output(m, out, layer).mean((2, 3))))
    parts = []
    with denoiser.evaluating():
        for pixels, labels in data.values():
            for x0 in pixels.to(denoiser.dtype).split(BATCH):
                noise = torch.randn(x0.shape, generator=generator)
                denoiser.predict(denoiser.add_noise(x0, timestep, noise), timestep)
            parts.append((torch.cat(kept).float(), labels))
            kept.clear()
    handle.remove()
    return parts


def train_probe(parts, epochs):
    """Validation accuracy of a linear probe by Adam."""
    (features, labels), (held, held_labels) = parts
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    features, held = (features - mean) / scale, (held - mean) / scale
    torch.manual_seed(0)
    head = nn.Linear(features.shape[1], 10)
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(features)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (head(held).argmax(1) == held_labels).float().mean().item()


if __name__ == "__main__":
    main()
