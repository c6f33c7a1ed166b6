"""`diffusers-repr align MODEL ENCODER DATASET`: how close is each layer, at each noise level, to an encoder?

With `--models` or `--encoders` several are compared, in one table and picture.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusers_repr.cli import options
from diffusers_repr.cli.recorded import save_result
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.encoders import Encoder
    from diffusers_repr.sweep.align_comparison import AlignmentComparison
    from diffusers_repr.sweep.alignment import Alignment, AlignmentCell
    from diffusers_repr.sweep.measure import Measure


OUT = options.Out("alignment", ("alignment.json", "alignments.json"), again="same")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ImageSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("model", "encoder", "dataset")
    EARLIER_KEYS: ClassVar = {"samples": "limit"}

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    encoder: str = setting(
        REQUIRED, "folder or Hub id of a vision transformer, or MODEL:layer@timestep for a layer of a denoiser"
    )
    dataset: str = setting(REQUIRED, "folder of images or Parquet files, a .parquet file, a Hub id, or digits")
    models: list[str] | None = setting(None, "further pipelines, compared with MODEL in one picture")
    encoders: list[str] | None = setting(None, "further encoders, each a row of that picture")
    steps: list[float] | None = setting(None, "of the training of MODEL and --models, for the picture")
    labels: list[str] | None = setting(None, "of MODEL and --models; default: their names")
    encoder_positions: list[str] = setting(
        [], "how encoders resample position embeddings: transformers (default) or repa; one for all or one each"
    )
    out: str = setting("alignment", "folder for alignment.json and .png; of several alignments.json and .png")
    layers: list[str] | None = setting(None, "full module paths; default: all layers")
    timesteps: list[float] | None = setting(None, "levels; larger is noisier; default: five over the range")
    metric: list[str] = setting(["cknna"], "cknna, cka, linear, knn; the first decides which is best")
    k: int = setting(10, "neighbours of CKNNA")
    limit: int | None = setting(None, "as many images, drawn by --seed; default: all")
    features: Literal["tokens", "global"] = setting("tokens", "of the encoder: tokens (their mean) or global")
    split: str = setting("train", "of the data set")
    test_split: str | None = setting(None, "on which linear and knn probes are measured")
    protocol: str = setting("ridge", "of the linear probe: ridge, lbfgs, repa, mae, ddae, adam")
    knn_k: int = setting(20, "neighbours of the knn probe")
    noise: str = setting("per_image", "per_image, shared, fresh or clean")
    batch_size: int = setting(64, "images a forward")
    seed: int = setting(0, "of the noise and of the choice of samples")
    memory_gib: float = setting(4.0, "limit on the features held at a time")
    dtype: options.DType = setting("float32", "of the model, what it computes in")
    device: str | None = setting(None, "cuda, cpu, ...; default: the accelerator, if there is one")
    revision: str | None = setting(None, "branch, tag or commit of MODEL on the Hub")
    encoder_revision: str | None = setting(None, "branch, tag or commit of ENCODER on the Hub")
    no_plot: bool = setting(False, "do not draw the picture (it needs matplotlib)")
    json: bool = setting(False, "print JSON instead of a table")
    overwrite: bool = setting(False, "replace an alignment of another recipe in --out")
    quiet: bool = setting(False, "no progress bar")


def run(args: Settings) -> int:
    """Measure, save and print."""
    from diffusers_repr.data.image_data import load_images
    from diffusers_repr.pictures.figure import require_matplotlib
    from diffusers_repr.store.processes import process_state
    from diffusers_repr.sweep.align import make_measures, open_compared

    several, measures = _check(args), make_measures(args.metric)
    _check_probes(args, measures)
    if not args.no_plot:
        require_matplotlib()  # before the work, not after
    state = process_state()
    columns = (args.image_column, args.label_column)
    with state.main_process_first():  # the others find it in the cache
        data = load_images(args.dataset, args.split, *columns)
        test = None if args.test_split is None else load_images(args.dataset, args.test_split, *columns)
    open_compared(measures, data, test, args.limit, args.seed)  # what is wrong with the data, before models are loaded
    device = str(state.device) if args.device is None else options.device(args.device)
    result: Any = _compare(args, data, device) if several else _measure(args, data, test, device)
    if state.is_main_process:
        if args.json:
            print(json.dumps({"out": args.out, **(_compared(result) if several else _measured(result))}))
        else:
            _print_best(result) if several else _print(result)
        save_result(args, "alignment", lambda folder: result.save(folder, plot=not args.no_plot))
        options.say(f"Saved to {args.out}", aside=args.json)
    return 0


def _check(args: Settings) -> bool:
    """Whether several are compared; raises ValueError for what does not go with it, or only with it, or no encoder."""
    from diffusers_repr.encoders.loading import check_encoder_name

    for spec in (args.encoder, *(args.encoders or [])):
        check_encoder_name(spec)
    several = bool(args.models or args.encoders)
    if not several:
        unused = [f"--{name}" for name in ("steps", "labels") if getattr(args, name)]
        if unused:
            raise ValueError(f"{', '.join(unused)} would not act: one model is measured; --models names further ones.")
        return False
    if len(args.metric) > 1 or args.test_split is not None:
        raise ValueError(
            "Several models or encoders are compared by one --metric, cknna or cka, without --test_split."
        )
    count = 1 + len(args.models or [])
    for name in ("steps", "labels"):
        given = getattr(args, name)
        if given and (len(given) != count or len(set(given)) < len(given) and name == "labels"):
            raise ValueError(f"--{name} has {len(given)} values for {count} models; give each its own, MODEL first.")
    return True


def _check_probes(args: Settings, measures: Sequence[Measure]) -> None:
    """Raise ValueError for settings of a measure that is not asked for, and a probe without images to score on."""
    probed = any("held" in measure.roles for measure in measures)
    if args.test_split is None and probed:
        raise ValueError("--metric linear and knn need a --test_split.")
    taken = {field.name for measure in measures for field in dataclasses.fields(measure)}
    for name, metric in {"protocol": "linear", "knn_k": "knn", "k": "cknna"}.items():
        if getattr(args, name) != getattr(Settings, name) and name not in taken:
            raise ValueError(
                f"--{name} would not act: it is a setting of --metric {metric}; drop it, or measure that."
            )
    if args.test_split is not None and not probed:
        raise ValueError(
            "--test_split would not act: probes are measured on it, and --metric names none (linear, knn); drop it."
        )


def _options(args: Settings) -> dict[str, Any]:
    """What one alignment and a comparison are asked alike."""
    return {
        "k": args.k,
        "samples": args.limit,
        "features": args.features,
        "noise": args.noise,
        "seed": args.seed,
        "prompt": args.prompt,
        "class_labels": args.class_label,
        "image_size": options.sides(args.image_size),
        "batch_size": args.batch_size,
        "memory_gib": args.memory_gib,
        "progress": not args.quiet,
    }


def _measure(args: Settings, data: Any, test: Any, device: str) -> Alignment:
    """One model against one encoder."""
    from diffusers_repr.sweep.align import measure_alignment

    denoiser = _measured_denoiser(args, args.model, args.revision, device)
    (encoder,) = _encoders(args, denoiser, device)
    return measure_alignment(
        denoiser,
        encoder,
        data,
        None if args.timesteps is None else options.numbers(args.timesteps),
        args.layers,
        metrics=args.metric,
        test=test,
        protocol=args.protocol,
        knn_k=args.knn_k,
        **_options(args),
    )


def _compare(args: Settings, data: Any, device: str) -> AlignmentComparison:
    """Several of them."""
    from functools import partial

    from diffusers_repr.encoders.loading import distinct_names
    from diffusers_repr.sweep.align_models import compare_alignments

    names = [args.model, *(args.models or [])]
    revisions = [args.revision] + [None] * (len(names) - 1)
    loaders = [partial(_measured_denoiser, args, name, at, device) for name, at in zip(names, revisions, strict=True)]
    return compare_alignments(
        dict(zip(args.labels or distinct_names(names), loaders, strict=True)),
        _encoders(args, None, device),
        data,
        None if args.timesteps is None else options.numbers(args.timesteps),
        args.layers,
        metric=args.metric[0],
        steps=args.steps,
        **_options(args),
    )


def _measured_denoiser(args: Settings, name: str, revision: str | None, device: str) -> Denoiser:
    """One that is measured: the size at which it sees images is told."""
    from diffusers_repr.store.processes import process_state

    denoiser = _denoiser(args, name, revision, device)
    if process_state().is_main_process:
        options.tell_size(denoiser, options.sides(args.image_size), aside=args.json)
    return denoiser


def _denoiser(args: Settings, name: str, revision: str | None, device: str) -> Denoiser:
    import torch

    from diffusers_repr.denoiser import Denoiser

    denoiser = Denoiser.from_pretrained(name, revision=revision, dtype=getattr(torch, args.dtype))
    denoiser.pipe.to(device)
    return denoiser


def _encoders(args: Settings, denoiser: Denoiser | None, device: str) -> list[Encoder]:
    """All of them: vision transformers, or layers of denoisers, `MODEL:layer@timestep`.

    Args:
        args: Settings.
        denoiser: `args.model`, if it is loaded.
        device: Where they go.
    """
    import torch

    from diffusers_repr.encoders import Encoder
    from diffusers_repr.encoders.loading import distinct_names, split_layer, spread_positions

    specs = [args.encoder, *(args.encoders or [])]
    layers = [split_layer(spec) for spec in specs]
    plain = [spec for spec, layer in zip(specs, layers, strict=True) if layer is None]
    if args.encoder_positions and not plain:
        raise ValueError("--encoder_positions would not act: layers of denoisers are no vision transformers; drop it.")
    called = dict(zip(plain, distinct_names(plain), strict=True))
    positions = dict(zip(plain, spread_positions(args.encoder_positions, len(plain)), strict=True))
    found = []
    for at, (spec, layer) in enumerate(zip(specs, layers, strict=True)):
        revision = None if at else args.encoder_revision
        if layer is not None:
            found.append(_layer_encoder(args, spec, layer[0], revision, denoiser, device))
            continue
        found.append(
            Encoder.from_pretrained(
                spec,
                revision=revision,
                positions=positions[spec],
                dtype=getattr(torch, args.dtype),
                device=device,
                name=called[spec],
            )
        )
    return found


def _layer_encoder(
    args: Settings, spec: str, name: str, revision: str | None, denoiser: Denoiser | None, device: str
) -> Encoder:
    from diffusers_repr.encoders.loading import layer_encoder

    if denoiser is None or (name, revision) != (args.model, args.revision):
        denoiser = _denoiser(args, name, revision, device)
    return layer_encoder(spec, denoiser, args.seed)


def _best(alignment: Alignment, metric: str) -> list[AlignmentCell]:
    """The best layer of each level, where the metric is defined."""
    found: dict[float, AlignmentCell] = {}
    for cell in alignment.cells:
        score, best = cell.scores[metric], found.get(cell.timestep)
        if score is not None and (best is None or score > (best.scores[metric] or 0.0)):
            found[cell.timestep] = cell
    return list(found.values())


def _measured(alignment: Alignment) -> dict[str, Any]:
    """What `_print` prints, as JSON."""
    best = {
        metric: [
            {"layer": cell.layer, "timestep": cell.timestep, "score": cell.scores[metric]}
            for cell in _best(alignment, metric)
        ]
        for metric in alignment.metrics
    }
    return {"best": best, "encoder": alignment.encoder_scores}


def _compared(comparison: AlignmentComparison) -> dict[str, Any]:
    """What `_print_best` prints, as JSON."""
    return {"metric": comparison.metric, "best": comparison.best(), "between": comparison.between}


def _print_best(comparison: AlignmentComparison) -> None:
    """Of every encoder and model, the best layer and level; and how near the encoders are to each other."""
    rows = comparison.best()
    wide, deep = max(len(label) for label in comparison.models), max((len(row["layer"]) for row in rows), default=0)
    for encoder in comparison.encoders:
        print(f"{comparison.metric} with {encoder}: best layer and level of each model")
        for row in (row for row in rows if row["encoder"] == encoder):
            print(f"{row['model']:<{wide}}  {row['layer']:<{deep}}  {row['timestep']:>8g}  {row['score']:.4f}")
        for other, score in comparison.between.get(encoder, {}).items():
            print(f"(the encoder {other})  {'undefined' if score is None else f'{score:.4f}'}")


def _print(alignment: Alignment) -> None:
    """Of every metric, the best layer of each level, and the encoder's own score."""
    width = max(len(cell.layer) for cell in alignment.cells)
    for metric in alignment.metrics:
        print(f"{metric}: best layer of each level")
        for cell in _best(alignment, metric):
            print(f"{cell.layer:<{width}}  {cell.timestep:>8g}  {cell.scores[metric]:.4f}")
        if metric in alignment.encoder_scores:
            print(f"{'(the encoder itself)':<{width}}  {'':>8}  {alignment.encoder_scores[metric]:.4f}")
