"""How often does a text-to-image model of the composed scenes draw what a caption says, of pairs it never saw too?

    python examples/studies/scenes_text.py --model examples/models/digits-text --output_dir outputs/scenes-text

The judge is a rule and no network: things are connected bright regions of a sample; a thing's colour is the one of
`COLOURS` with the nearest direction, its kind that of the nearest among things of training scenes, cut out and brought
to one size. A sample is right if colours, kinds and counts are all those of the caption. The same judge is applied to
real scenes, the best it can say, and to the samples with their captions dealt anew, which is chance.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from scipy import ndimage

from diffusers_repr.cli.guard import run_script
from diffusers_repr.data.scenes import COLOURS, scenes
from diffusers_repr.hub import write_json
from diffusers_repr.pictures.grid import image_grid

BRIGHT, FEWEST, CUT = 110, 8, 12  # least value and pixels of a thing; side of a thing that is cut out
PALETTE = np.array(list(COLOURS.values()), float) / np.linalg.norm(list(COLOURS.values()), axis=1, keepdims=True)


def cut_out(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(CUT * CUT,): a thing's brightness, its longer side brought to `CUT` pixels, in the middle."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    bright = np.where(mask, image.max(2), 0)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    side = max(bright.shape)
    square = np.zeros((side, side), np.float32)
    top, left = ((side - length) // 2 for length in bright.shape)
    square[top : top + bright.shape[0], left : left + bright.shape[1]] = bright / bright.max()
    return np.asarray(Image.fromarray(square).resize((CUT, CUT), Image.Resampling.BILINEAR)).ravel()


class Judge:
    """Names the things of a picture by those of training scenes.

    Args:
        count: Number of training scenes to know things from.
    """

    def __init__(self, count: int = 2000) -> None:
        known = [
            (cut_out(s.image, t.mask & bright(s.image)), t.kind) for s in scenes("train", count) for t in s.things
        ]
        self.bank, self.kinds = np.stack([cut for cut, _ in known]), [kind for _, kind in known]

    def __call__(self, image: np.ndarray) -> Counter:
        """(colour, kind) -> count in a picture (H, W, 3), uint8."""
        regions, number = ndimage.label(bright(image), structure=np.ones((3, 3)))
        masks = [regions == region for region in range(1, number + 1)]
        return Counter(self.name(image, mask) for mask in masks if mask.sum() >= FEWEST)

    def name(self, image: np.ndarray, mask: np.ndarray) -> tuple[str, str]:
        distances = np.square(self.bank - cut_out(image, mask)).sum(1)
        nearest = Counter(self.kinds[place] for place in np.argsort(distances)[:5])
        cosines = PALETTE @ image[mask].astype(float).mean(0)
        return list(COLOURS)[cosines.argmax()], nearest.most_common(1)[0][0]


def bright(image: np.ndarray) -> np.ndarray:
    return image.max(2) > BRIGHT


def score(found: list[Counter], wanted: list[Counter]) -> dict[str, float]:
    """Shares of pictures with the wanted number of things, colours, kinds, and all of it together."""

    def right(part) -> float:
        return float(np.mean([part(a) == part(b) for a, b in zip(found, wanted, strict=True)]))

    def only(place: int):
        return lambda things: Counter(name[place] for name in things.elements())

    return {"count": right(Counter.total), "colours": right(only(0)), "kinds": right(only(1)), "all": right(Counter)}


def sample(pipe, captions: list[str], args: argparse.Namespace) -> list[np.ndarray]:
    images = []
    for start in range(0, len(captions), args.batch_size):
        generator = torch.Generator().manual_seed(args.seed + start)
        how = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "output_type": "np"}
        drawn = pipe(captions[start : start + args.batch_size], generator=generator, **how).images
        images += list(np.rint(drawn * 255).astype(np.uint8))
    return images


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="examples/models/digits-text", help="a StableDiffusionPipeline of scenes")
    parser.add_argument("--output_dir", default="outputs/scenes-text")
    parser.add_argument("--count", type=int, default=200, help="captions of each split")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder, judge = Path(args.output_dir), Judge()
    folder.mkdir(parents=True, exist_ok=True)
    pipe = DiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    report = {"settings": {k: v for k, v in vars(args).items() if k != "output_dir"}}
    for split in ("test", "held_out"):
        real = list(scenes(split, args.count, colourless=0.0))
        wanted = [Counter((thing.colour, thing.kind) for thing in scene.things) for scene in real]
        images = sample(pipe, [scene.caption for scene in real], args)
        found = [judge(image) for image in images]
        dealt = random.Random(0).sample(wanted, len(wanted))
        report[split] = {
            "real": score([judge(scene.image) for scene in real], wanted),
            "samples": score(found, wanted),
            "chance": score(found, dealt),
        }
        print(json.dumps({split: report[split]}))
        image_grid([Image.fromarray(image) for image in images[:64]], 8).save(folder / f"{split}.png")
        (folder / f"{split}.txt").write_text("".join(f"{scene.caption}\n" for scene in real[:64]))
    write_json(folder / "report.json", report)


if __name__ == "__main__":
    run_script(main)
