"""Which features find points again: of a network tuned by CleanDIFT, and of its base with noise and without?

    python examples/studies/clean_features.py outputs/digits-cleandift --base examples/models/digits-ddpm

Held-out images are paired with moved, recoloured copies of themselves; PCK at a tenth of the longer side, of each
layer that was aligned. Prints a table in Markdown. The base is read at a few levels with one draw of noise an image,
and once as the tuned network is: the clean image, told the same timestep.
"""

import argparse

import torch
from torch.utils.data import DataLoader, Subset

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.data.pairs import PairConfig, load_pairs
from diffusers_repr.features import cleandift_extractor
from diffusers_repr.metrics.cosine_map import CosineMap, sample_map
from diffusers_repr.metrics.pck import correct_points, pck
from diffusers_repr.training.seeds import reseed


@torch.no_grad()
def measure(sources: dict[str, FeatureExtractor], data: Subset, size: tuple[int, int]) -> dict[tuple[str, str], float]:
    correct: dict[tuple[str, str], list[torch.Tensor]] = {}
    for at, batch in enumerate(DataLoader(data, 16)):
        reseed(0, at, 0)
        pairs = data.dataset.on_device(batch)
        for name, source in sources.items():
            outputs = [
                source.from_pixels(images, ids=[f"{side} {at} {row}" for row in range(len(images))])
                for side, images in enumerate(pairs["images"])
            ]
            for layer in source.layers:
                maps = (output.as_map(layer) for output in outputs)
                for first, second, here, there, valid in zip(*maps, *pairs["points"], pairs["valid"], strict=True):
                    found = CosineMap(second, size).best(sample_map(first, here[valid], size)).points
                    hits = correct_points(found, there[valid], max(size))
                    correct.setdefault((name, layer), []).append(hits)
    return {key: pck(hits).per_point for key, hits in correct.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tuned", help="folder that train_cleandift.py wrote")
    parser.add_argument("--base", required=True, help="folder of the base")
    parser.add_argument("--dataset_name", default="digits")
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--timesteps", type=float, nargs="+", default=[50, 100, 261])
    parser.add_argument("--pairs", type=int, default=128)
    args = parser.parse_args()
    tuned, base = cleandift_extractor(args.tuned), Denoiser.from_pretrained(args.base, dtype=torch.float32)
    layers, told = tuned.layers, tuned.levels[0].timestep
    sources = {f"base, noise of timestep {t:g}": FeatureExtractor(base, layers, t) for t in args.timesteps}
    sources[f"base, clean image, told {told:g}"] = FeatureExtractor(base, layers, told, "clean")
    sources["tuned, clean image"] = tuned
    moves = {"random_rotation": 15, "random_shift": 0.06, "random_scale": 0.15, "max_points": 16}
    config = PairConfig(args.dataset_name, args.dataset_split, **moves)
    data = load_pairs(config, base.image_channels, base.image_size)
    scores = measure(sources, Subset(data, range(min(args.pairs, len(data)))), base.image_size)
    print(f"| PCK@0.1, {args.pairs} pairs | " + " | ".join(f"`{layer}`" for layer in layers) + " |")
    print("|---" * (len(layers) + 1) + "|")
    for name in sources:
        print(f"| {name} | " + " | ".join(f"{scores[name, layer]:.3f}" for layer in layers) + " |")


if __name__ == "__main__":
    main()
