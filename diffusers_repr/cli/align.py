"""`diffusers-repr align MODEL ENCODER DATASET`: how close is each layer, at each noise level, to an encoder?"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.encoders import Encoder
    from diffusers_repr.sweep.alignment import Alignment


OUT = options.Out("alignment", ("alignment.json",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ImageSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("model", "encoder", "dataset")

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    encoder: str = setting(
        REQUIRED, "folder or Hub id of a vision transformer, or MODEL:layer@timestep for a layer of a denoiser"
    )
    dataset: str = setting(REQUIRED, "folder of images or Parquet files, a .parquet file, a Hub id, or digits")
    out: str = setting("alignment", "folder for alignment.json and alignment.png")
    layers: list[str] | None = setting(None, "full module paths; all layers if not given")
    timesteps: list[float] | None = setting(None, "levels; five over the range if not given")
    metric: list[str] = setting(["cknna"], "cknna, cka, linear, knn; the first decides which is best")
    k: int = setting(10, "neighbours of CKNNA")
    samples: int | None = setting(None, "as many images, drawn by the seed; all if not given")
    features: Literal["tokens", "global"] = setting("tokens", "of the encoder: tokens (their mean) or global")
    split: str = setting("train", "of the data set")
    test_split: str | None = setting(None, "on which linear and knn probes are measured")
    protocol: str = setting("ridge", "of the linear probe: ridge, lbfgs, repa, mae, ddae, adam")
    knn_k: int = setting(20, "neighbours of the knn probe")
    noise: str = setting("per_image", "per_image, shared, fresh or clean")
    batch_size: int = setting(64, "images a forward")
    seed: int = setting(0, "of the noise and of the choice of samples")
    memory_gib: float = setting(4.0, "limit on the features held at a time")
    dtype: options.DType = setting("float32", "of the model")
    device: str | None = setting(None, "cuda, cpu, ...; an accelerator if there is one")
    revision: str | None = setting(None, "branch, tag or commit of the model on the Hub")
    encoder_revision: str | None = setting(None, "branch, tag or commit of the encoder on the Hub")
    no_plot: bool = setting(False, "do not draw the picture (it needs matplotlib)")
    quiet: bool = setting(False, "no progress bar")


def run(args: Settings) -> int:
    """Measure, save and print."""
    from diffusers_repr.data.image_data import load_images
    from diffusers_repr.store.processes import process_state
    from diffusers_repr.sweep.align import make_measures, measure_alignment
    from diffusers_repr.sweep.picture import require_matplotlib

    measures = make_measures(args.metric)
    if args.test_split is None and any("held" in measure.roles for measure in measures):
        raise ValueError("--metric linear and knn need a --test_split.")
    if not args.no_plot:
        require_matplotlib()  # before the work, not after
    state = process_state()
    columns = (args.image_column, args.label_column)
    with state.main_process_first():  # the others find it in the cache
        data = load_images(args.dataset, args.split, *columns)
        test = None if args.test_split is None else load_images(args.dataset, args.test_split, *columns)

    import torch

    from diffusers_repr.denoiser import Denoiser

    device = str(state.device) if args.device is None else options.device(args.device)
    dtype = getattr(torch, args.dtype)
    denoiser = Denoiser.from_pretrained(args.model, revision=args.revision, dtype=dtype)
    denoiser.pipe.to(device)
    image_size = options.sides(args.image_size)
    alignment = measure_alignment(
        denoiser,
        _encoder(args, denoiser, device),
        data,
        None if args.timesteps is None else options.numbers(args.timesteps),
        args.layers,
        metrics=args.metric,
        k=args.k,
        samples=args.samples,
        features=args.features,
        test=test,
        protocol=args.protocol,
        knn_k=args.knn_k,
        noise=args.noise,
        seed=args.seed,
        prompt=args.prompt,
        class_labels=args.class_label,
        image_size=image_size,
        batch_size=args.batch_size,
        memory_gib=args.memory_gib,
        progress=not args.quiet,
    )
    if state.is_main_process:
        options.tell_size(denoiser, image_size)
        _print(alignment)
        options.save_or_keep(lambda folder: alignment.save(folder, plot=not args.no_plot), args.out, "alignment")
        print(f"Saved to {args.out}")
    return 0


def _encoder(args: Settings, denoiser: Any, device: str) -> Encoder:
    """The encoder, or a layer of a denoiser: `MODEL:layer@timestep`."""
    import torch

    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.encoders import Encoder

    layer = re.fullmatch(r"(.+):([^:@]+)@([0-9.]+)", args.encoder)
    if layer is None:
        return Encoder.from_pretrained(
            args.encoder, revision=args.encoder_revision, dtype=getattr(torch, args.dtype), device=device
        )
    model, path, timestep = layer.groups()
    if (model, args.encoder_revision) != (args.model, args.revision):
        denoiser = Denoiser.from_pretrained(model, revision=args.encoder_revision, dtype=denoiser.dtype)
        denoiser.pipe.to(device)
    level = float(timestep)
    return Encoder.from_denoiser(
        denoiser, path, int(level) if level.is_integer() else level, noise_seed=args.seed, name=args.encoder
    )


def _print(alignment: Alignment) -> None:
    """Of every metric, the best layer of each level, and the encoder's own score."""
    width = max(len(cell.layer) for cell in alignment.cells)
    for metric in alignment.metrics:
        print(f"{metric}: best layer of each level")
        for timestep in dict.fromkeys(cell.timestep for cell in alignment.cells):
            scored = [
                cell for cell in alignment.cells if cell.timestep == timestep and cell.scores[metric] is not None
            ]
            for cell in sorted(scored, key=lambda c: -(c.scores[metric] or 0.0))[:1]:
                print(f"{cell.layer:<{width}}  {timestep:>8g}  {cell.scores[metric]:.4f}")
        if metric in alignment.encoder_scores:
            print(f"{'(the encoder itself)':<{width}}  {'':>8}  {alignment.encoder_scores[metric]:.4f}")
