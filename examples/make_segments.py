"""Masks and boxes of images without labels, to condition a diffusion model on: patches in clusters, written once.

    python examples/make_segments.py --out outputs/digits-segments

What comes out is the data set anew, with columns of masks `segments` (the cluster of every pixel) and `box` (the
cluster of the box inside, 255 outside), for `train_conditional.py --level mask` and `--level box`.
"""

import argparse

from diffusers_repr import Denoiser, Encoder
from diffusers_repr.assign import assigner_class
from diffusers_repr.assign.segment_data import write_segments
from diffusers_repr.assign.segments import PatchFeatures
from diffusers_repr.cli.guard import run_script
from diffusers_repr.data.image_data import load_images


def encoder_of(args: argparse.Namespace) -> Encoder:
    if args.layer is None:
        return Encoder.from_pretrained(args.encoder)
    return Encoder.from_denoiser(Denoiser.from_pretrained(args.encoder), args.layer, args.timestep)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", default="examples/models/digits-ddpm", help="denoiser or encoder: folder, Hub id")
    parser.add_argument("--layer", help="of a denoiser")
    parser.add_argument("--timestep", type=int, default=100, help="at which the denoiser is read")
    parser.add_argument("--dataset_name", default="digits", help="as everywhere: digits, a folder, a Hub id")
    parser.add_argument("--splits", nargs="+", default=["train", "validation"], help="learned from the first")
    parser.add_argument("--resolution", type=int, nargs=2, default=(8, 8), metavar=("H", "W"), help="of the images")
    parser.add_argument("--segments", type=int, default=8, help="clusters of patches")
    parser.add_argument("--boxes", type=int, default=20, help="clusters of boxes; 0: no boxes")
    parser.add_argument("--seed", type=int, default=0, help="of the clusters")
    parser.add_argument("--out", default="outputs/digits-segments", help="folder to write")
    args = parser.parse_args(argv)
    encoder = encoder_of(args)
    kmeans = assigner_class("kmeans")
    features = PatchFeatures(encoder, tuple(args.resolution))
    splits = {name: load_images(args.dataset_name, name) for name in args.splits}
    found = write_segments(
        args.out,
        splits,
        features,
        kmeans(encoder.dim, args.segments, normalize=True),
        kmeans(encoder.dim, args.boxes, normalize=True) if args.boxes else None,
        seed=args.seed,
    )
    shares = ", ".join(f"{share:.3f}" for share in found.pixels)
    print(f"{args.out}: shares of pixels {shares}; background: {found.background}")
    for name, share in found.boxes.items() if args.boxes else ():
        print(f"{name}: a box in {share:.3f} of the images")


if __name__ == "__main__":
    run_script(main)
