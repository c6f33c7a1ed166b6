"""How many network evaluations does the Diffusion Classifier need, by the paper's schedule, by racing, by averaging?

    python examples/studies/zero_shot.py --output_dir outputs/zero_shot --results outputs/zero_shot-results

The class-conditional digits model tells digits apart that it was not trained on. Every error of an image, a class and
a level is evaluated once and kept, so a run that was stopped goes on where it was, and all rules are replayed on the
same table: they see the same noise, image by image.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.cli.guard import run_script
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.data.transforms import augment
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.noise_policy import pixel_keys
from diffusers_repr.tasks.denoising_errors.calibration import Calibration, class_errors, rank_levels
from diffusers_repr.tasks.denoising_errors.conditions import encode_conditions
from diffusers_repr.tasks.denoising_errors.levels import even_timesteps
from diffusers_repr.tasks.denoising_errors.network import NetworkErrors
from diffusers_repr.tasks.denoising_errors.pairs import PairTable, ask
from diffusers_repr.tasks.denoising_errors.rules import Units

CLASSES, CHUNK = 10, 100


def held_out(count: int) -> tuple[Tensor, Tensor, int]:
    """Pixels and labels of digits that the model was not trained on, and how many of them are as they were written.

    These are validation and test together, 800; beyond them come copies, turned, moved and scaled as in training.
    """
    splits = load_digits_splits()
    images = [image for split in ("test", "validation") for image in splits[split]["image"]]
    labels = torch.tensor([label for split in ("test", "validation") for label in splits[split]["label"]])
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))[:, None].float() / 127.5 - 1
    real = min(count, len(pixels))
    more = torch.arange(count - real) % len(pixels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        moved = augment(pixels[more], False, 10.0, 0.0875, 0.1)
    return torch.cat([pixels[:real], moved]), torch.cat([labels[:real], labels[more]]), real


class Kept:
    """The errors of some images under one seed, kept in a file.

    Args:
        denoiser: The model.
        pixels: Of the images.
        seed: Of the noise.
        path: Of the file.
    """

    def __init__(self, denoiser: Denoiser, pixels: Tensor, seed: int, path: Path, conditions: object) -> None:
        self.path, count = path, len(pixels)
        x0, keys = denoiser.encode_pixels(pixels), pixel_keys(pixels)
        network = NetworkErrors(denoiser, x0, keys, conditions, seed=seed, batch_size=256)
        self.table = PairTable(network, count, len(conditions))
        if path.is_file():
            with np.load(path) as file:
                held = {tuple(json.loads(name)): torch.from_numpy(file[name]) for name in file.files}
            self.table.held = {(float(time), int(draw)): values for (time, draw), values in held.items()}

    def fill(self, levels: list[float], draws: int = 1) -> None:
        """Evaluate all classes at these levels, some images at a time."""
        for start in range(0, self.table.images, CHUNK):
            live = torch.zeros(self.table.images, self.table.prompts, dtype=torch.bool)
            live[start : start + CHUNK] = True
            before = self.table.evaluations
            for draw in range(draws):
                self.table(ask(live, levels, draw))
            if self.table.evaluations > before:
                self.save()
                print(f"{self.path.name}: images to {start + CHUNK}", flush=True)

    def save(self) -> None:
        """Write what is held, whole or not at all."""
        fresh = self.path.with_suffix(".tmp.npz")
        np.savez_compressed(fresh, **{json.dumps(key): values.numpy() for key, values in self.table.held.items()})
        fresh.replace(self.path)


def calibrated(denoiser: Denoiser, conditions: object, out: Path, count: int, levels: list[float]) -> Calibration:
    """The order of the levels, from images of the training."""
    train = load_digits_splits()["train"].select(range(count))
    kept = Kept(denoiser, denoiser.pixels(train["image"]), 1000, out / "calibration.npz", conditions)
    kept.fill(levels, draws=2)
    units = Units.of(range(CLASSES))
    errors = class_errors(kept.table, units, count, levels, 2)
    return rank_levels(errors, units.classes, torch.tensor(train["label"]), levels)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="examples/models/digits-class-ddim")
    parser.add_argument("--output_dir", default="outputs/zero_shot", help="where errors are kept")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--calibration_images", type=int, default=60)
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    denoiser = Denoiser.from_pretrained(args.model)
    conditions = encode_conditions(denoiser, class_labels=list(range(CLASSES)), size=denoiser.image_size)
    levels = even_timesteps(denoiser.schedule, args.levels)
    calibration = calibrated(denoiser, conditions, out, args.calibration_images, levels)
    print(calibration, flush=True)
    pixels, labels, real = held_out(args.images)
    for seed in range(args.seeds):
        kept = Kept(denoiser, pixels, seed, out / f"seed{seed}.npz", conditions)
        kept.fill(levels)


if __name__ == "__main__":
    run_script(main)
