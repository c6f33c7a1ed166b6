"""`diffusers-repr match A B --model MODEL --points X Y ...`: points of one image in another."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusers_repr.cli import options
from diffusers_repr.cli.recorded import save_result
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.tasks.homography import Homography
    from diffusers_repr.tasks.matches import Matches

OUT = options.Out("set of matches", ("matches.json",), again="same")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ModelSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("source", "target")

    source: str = setting(REQUIRED, "image file whose points are looked for")
    target: str = setting(REQUIRED, "image file in which they are looked for")
    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    out: str = setting(REQUIRED, "folder for matches.json and matches.png")
    points: list[float] | None = setting(
        None, "x y of each point, in pixels of the source; default: cells of both images that choose each other"
    )
    layer: str | None = setting(None, "full module path; default: the preset's, or one in the middle, which is told")
    timesteps: list[float] | None = setting(None, "one level, larger is noisier; default: the preset's")
    preset: str | None = setting(None, "dift, dift-hpatches, ...; default: dift, for a model of the paper")
    selection: str | None = setting(None, "folder of a selection, whose best layer and level are read")
    prompt: str | None = setting(None, "of both images; default: the preset's, or the empty one")
    category: str | None = setting(None, "of the object, for {category} in the preset's prompt or --prompt")
    class_label: int | None = setting(None, "of class-conditional models; default: the null class, if it has one")
    ensemble_size: int | None = setting(None, "noise draws an image; default: the preset's, or 8")
    image_size: list[str] | None = setting(None, options.IMAGE_SIZE)
    batch_size: int | None = setting(None, "noise draws a forward; default: all at once")
    seed: int = setting(0, "of the noise")
    homography: Literal["none", "ransac", "lmeds"] = setting("none", "find the one that most matches agree with")
    similarity: bool = setting(False, "show a similarity map of each point, too")
    json: bool = setting(False, "print JSON instead of a table")
    overwrite: bool = setting(False, "replace matches of another recipe in --out")

    def __post_init__(self) -> None:
        if self.points is not None and (not self.points or len(self.points) % 2):
            raise ValueError(f"--points takes pairs x y; got {len(self.points)} numbers.")
        if self.timesteps is not None and len(self.timesteps) != 1:
            raise ValueError(f"--timesteps takes one level here; got {len(self.timesteps)}.")
        if self.selection is not None and (self.layer or self.timesteps or self.preset):
            raise ValueError("--selection has its own layer and level; leave out --layer, --timesteps and --preset.")
        if self.category is not None and self.prompt is not None and "{category}" not in self.prompt:
            raise ValueError(
                f"--category {self.category} has no place in --prompt; write {{category}} where it stands."
            )


def run(args: Settings) -> int:
    """Match, save and print."""
    from diffusers_repr.data.image_files import read_image
    from diffusers_repr.data.points import check_points

    images = [_read(name, read_image) for name in (args.source, args.target)]
    points = None
    if args.points is not None:
        pairs = list(zip(args.points[::2], args.points[1::2], strict=True))
        points = check_points(pairs, (images[0].height, images[0].width), "--points")
    if args.homography != "none":
        from diffusers_repr.data.scikit_image import require_scikit_image

        require_scikit_image()  # before the work, not after

    found = _match(args, images, points)
    plane = None if args.homography == "none" else found.homography(args.homography, seed=args.seed)
    values = {"source": args.source, "target": args.target, **found.to_dict()}
    if plane is not None:
        matrix = None if plane.matrix is None else plane.matrix.tolist()
        values["homography"] = {"method": plane.method, "matrix": matrix, "inliers": int(plane.inliers.sum())}
    _print_json(values) if args.json else _print(found, plane)
    save_result(args, "matches", lambda folder: _save(folder, values, found))
    options.say(f"Saved to {args.out}", aside=args.json)
    return 0


def _read(name: str, read_image: Any) -> Any:
    if not Path(name).is_file():
        raise FileNotFoundError(f"No file {name!r}.")
    return read_image(Path(name), "The image", "RGB")


def _match(args: Settings, images: list[Any], points: Any) -> Matches:
    import torch

    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.sweep.selection import Selection
    from diffusers_repr.tasks.correspondence import Correspondence
    from diffusers_repr.tasks.correspondence_source import correspondence_source
    from diffusers_repr.tasks.image_features import fill_prompt

    selection = None if args.selection is None else Selection.load(args.selection)
    denoiser = Denoiser.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.dtype))
    denoiser.pipe.to(options.device(args.device))
    settings: dict[str, Any] = {"batch_size": args.batch_size, "seed": args.seed}
    if args.image_size is not None:
        settings["image_size"] = options.sides(args.image_size)
    if args.ensemble_size is not None:
        settings["ensemble_size"] = args.ensemble_size
    if selection is not None:
        source, own = selection.extractor(denoiser, **settings), None
    else:
        timestep = None if args.timesteps is None else options.numbers(args.timesteps)[0]
        source, own = correspondence_source(denoiser, args.layer, timestep, args.preset, **settings)
    prompt = own if args.prompt is None else args.prompt
    if args.category is not None and "{category}" not in (prompt or ""):
        told = "a selection has no prompt" if selection is not None else f"the prompt is {prompt!r}"
        raise ValueError(
            f"--category {args.category} has no place: {told}. Pass --prompt 'a photo of a {{category}}', or a preset "
            "whose prompt names the category, such as dift."
        )
    prompt = fill_prompt(prompt, args.category)
    level = source.levels[0].timestep
    options.say(f"layer {source.layers[0]} at timestep {level:g}, ensemble of {source.ensemble_size}", aside=args.json)
    task = Correspondence(source)
    return task(images[0], images[1], points, prompt=prompt, class_labels=args.class_label, similarity=args.similarity)


def _save(folder: Path, values: dict[str, Any], found: Matches) -> None:
    from diffusers_repr.hub.files import atomic_files

    picture = io.BytesIO()
    if len(found):
        found.plot().save(picture, format="png")
    files: dict[str, bytes | str] = {"matches.json": json.dumps(values, indent=2) + "\n"}
    atomic_files(folder, {**files, "matches.png": picture.getvalue()} if len(found) else files)


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values))


def _print(found: Matches, plane: Homography | None) -> None:
    print(f"{'source x':>9} {'y':>7}   {'target x':>9} {'y':>7}   score")
    for (x, y), (u, v), score in zip(
        found.points.tolist(), found.matches.tolist(), found.scores.tolist(), strict=True
    ):
        print(f"{x:>9.1f} {y:>7.1f}   {u:>9.1f} {v:>7.1f}   {score:.4f}")
    if plane is not None:
        print(f"homography: {plane!r}" if plane.matrix is None else f"homography: {plane!r}\n{plane.matrix.numpy()}")
