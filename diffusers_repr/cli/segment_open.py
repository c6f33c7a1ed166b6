"""`diffusers-repr segment open SEGMENTER IMAGES... --vocabulary NAME...`: segments of images, named in words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers_repr.cli import options
from diffusers_repr.cli.saved_task import SavedTaskSettings, find_images, load_task
from diffusers_repr.cli.segment_predict import mask_names
from diffusers_repr.config.recipe import REQUIRED, setting

LINES = "segments.jsonl"
OUT = options.Out("folder of segments", (LINES,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(SavedTaskSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("segmenter", "images")

    segmenter: str = setting(REQUIRED, "folder or Hub id of an open-vocabulary segmenter")
    out: str = setting(REQUIRED, "folder for masks/ (ids of segments), pictures/ and segments.jsonl")
    vocabulary: list[str] | None = setting(
        None, 'what may be on them, synonyms parted by commas in quotes: "dog, puppy" cat; default: what it learned'
    )
    stuff: list[str] | None = setting(None, "names of --vocabulary that have no single things, such as sky")
    clip: str | None = setting(None, "folder or Hub id of the CLIP; default: the recorded one")
    weights: list[float] | None = setting(None, "CLIP's share for names it learned and for others; default: recorded")
    short_side: int | None = setting(None, "to which the shorter side of an image is brought; default: as it is")
    overlap: float = setting(0.8, "least share of a mask that other segments leave")
    threshold: float = setting(0.0, "least probability of a segment's name")
    batch_size: int | None = setting(None, "windows of an image a forward; default: all")
    overwrite: bool = setting(False, "write into a folder of segments that is there")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stuff is not None and self.vocabulary is None:
            raise ValueError(
                "--stuff tells which names of --vocabulary have no single things; give --vocabulary, too."
            )
        if self.vocabulary is not None:
            from diffusers_repr.heads.odise.vocabulary import Vocabulary

            Vocabulary.of(self.vocabulary, self.stuff or [])  # doubles and empty names are told before models load


def run(args: Settings) -> int:
    """Load, segment, write and print, one line an image."""
    files = find_images(args.images)[: args.limit]

    from diffusers_repr.data.image_files import read_image
    from diffusers_repr.heads.odise.vocabulary import Vocabulary
    from diffusers_repr.tasks import OpenVocabularySegmenter

    segmenter = load_task(OpenVocabularySegmenter, args.segmenter, args, clip=args.clip, weights=args.weights)
    words = None if args.vocabulary is None else Vocabulary.of(args.vocabulary, args.stuff or [])
    out, rows = Path(args.out), []
    for file, name in zip(files, mask_names(files), strict=True):
        image = read_image(file, "The image", "RGB")
        output = segmenter(image, words, short_side=args.short_side, overlap=args.overlap, threshold=args.threshold)
        rows.append(_write(out, file, name, image, output))
        print(json.dumps(rows[-1]) if args.json else _line(file, rows[-1]["segments"]))
    (out / LINES).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options.say(f"Wrote the segments of {len(rows)} images to {args.out}", aside=args.json)
    return 0


def _write(out: Path, file: Path, name: str, image: Any, output: Any) -> dict[str, Any]:
    """Mask and picture of an image; its line."""
    from diffusers_repr.pictures.masks import mask_image

    for folder in ("masks", "pictures"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    found, scores = output.maps[0], output.scores[0]
    mask_image(found.ids.numpy(), max(found.classes, default=0) + 1).save(out / "masks" / f"{name}.png")
    output.pictures([image])[0].save(out / "pictures" / f"{name}.png")
    segments = [
        {"id": number, "name": output.names[label], "score": round(scores[number], 4),
         "pixels": int((found.ids == number).sum())}
        for number, label in found.classes.items()
    ]  # fmt: skip
    return {"image": str(file), "mask": f"masks/{name}.png", "picture": f"pictures/{name}.png", "segments": segments}


def _line(file: Path, segments: Sequence[dict[str, Any]]) -> str:
    from diffusers_repr.hub.schema import printable

    told = "  ".join(f"{printable(one['name'])} {one['score']:.2f} ({one['pixels']} pixels)" for one in segments)
    return f"{printable(str(file))}  {told or 'nothing found'}"
