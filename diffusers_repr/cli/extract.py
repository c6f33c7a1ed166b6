"""`diffusers-repr extract MODEL DATASET --out DIR`: a feature store of a data set, also under `accelerate launch`."""

from __future__ import annotations

import argparse

from diffusers_repr.cli import options

OUT = options.Out("store of features", ("manifest.json", "data"))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help="pipeline folder or Hub id")
    parser.add_argument("dataset", help="folder of images or Parquet files, a .parquet file, or a Hub id")
    parser.add_argument("--out", required=True, help="folder of the store; the same command resumes it")
    parser.add_argument("--layers", nargs="+", required=True, help="full module paths (`diffusers-repr layers MODEL`)")
    parser.add_argument("--timestep", nargs="+", type=_number, required=True, help="larger is noisier, e.g. 261")
    parser.add_argument("--split", default="train", help="of the data set: train if not given")
    parser.add_argument("--image_column", help="found by type if not given")
    parser.add_argument("--label_column", help="class ids; found by type if not given")
    parser.add_argument("--pooling", default="mean", help="mean (default), max, adaptive:P or none")
    parser.add_argument("--noise", default="per_image", choices=("per_image", "shared", "clean"))
    parser.add_argument("--where", default="output", choices=("output", "input", "residual"))
    parser.add_argument("--ensemble_size", type=int, default=1, help="noise draws an image, averaged")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of one forward, levels and draws counted")
    parser.add_argument("--shard_size", type=int, help="rows of a file; at most 1000 and 256 MiB if not given")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="of the stored features")
    parser.add_argument("--model_dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    options.add_image_size(parser)
    parser.add_argument("--prompt", help="of text models; {label} stands for the class name")
    parser.add_argument("--class_label", type=int, help="of class-conditional models; the null class if it has one")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--revision", help="of the model on the Hub")
    parser.add_argument("--dataset_revision", help="of the data set on the Hub")
    parser.add_argument("--limit", type=int, help="the first rows only")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Extract, and say where it is."""
    import torch

    from diffusers_repr.data.image_data import load_images
    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.features.extraction import extract_to_store
    from diffusers_repr.features.extractor import FeatureExtractor
    from diffusers_repr.store.processes import process_state

    state = process_state()
    with state.main_process_first():  # the others find it in the cache
        data = load_images(args.dataset, args.split, args.image_column, args.label_column, args.dataset_revision)
        denoiser = Denoiser.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.model_dtype))
    if denoiser.pipe is not None:
        denoiser.pipe.to(state.device)
    extractor = FeatureExtractor(
        denoiser,
        args.layers,
        args.timestep,
        noise=args.noise,
        ensemble_size=args.ensemble_size,
        pooling=None if args.pooling == "none" else args.pooling,
        batch_size=args.batch_size,
        seed=args.seed,
        where=args.where,
        image_size=options.image_size(args),
    )
    store = extract_to_store(
        extractor,
        data,
        args.out,
        prompt=args.prompt,
        class_label=args.class_label,
        dtype=args.dtype,
        shard_size=args.shard_size,
        limit=args.limit,
        progress=not args.quiet,
    )
    if state.is_main_process:
        processes = "" if state.num_processes == 1 else f", written by {state.num_processes} processes"
        shards = f"{store.layout.shards} shard{'s' if store.layout.shards > 1 else ''}"
        print(f"{len(store)} rows in {shards}{processes}: {args.out}")
        for column in store.columns:
            print(f"  {column.name}  {' x '.join(map(str, column.shape))}")
    return 0


def _number(text: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; give timesteps such as 261") from None
    return int(value) if value.is_integer() else value
