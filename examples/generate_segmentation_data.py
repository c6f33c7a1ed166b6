"""Label generated images by a segmenter and keep the certain ones: a data set for a network that needs no diffusion.

    diffusers-repr segment fit MODEL annotated --out outputs/segmenter
    python examples/generate_segmentation_data.py MODEL outputs/segmenter --num_samples 10000 --out outputs/labelled

DatasetDDPM (Baranchuk et al. 2022, arXiv 2112.03126). The segmenter is best fitted on annotated images of the same
model (`examples/sample_for_fid.py` samples some). Sample n has the seed `seed + n`; the same command goes on where it
was stopped. `--cut certain` leaves out the most uncertain tenth (`--drop`); `--cut paper` keeps what the paper's code
keeps, which also leaves out the 30 most certain images and needs more than 300. In `--out` lie `all/`, every image
with its mask, `scores.jsonl`, and `train/`, those that are kept, which `load_images(out, mask_column="mask")` and
`diffusers-repr segment fit MODEL out` read.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar, Literal

from sample_for_fid import Sampler
from sample_for_fid import Settings as Sampling

from diffusers_repr import Segmenter
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.recipe import REQUIRED, setting
from diffusers_repr.metrics import certain_rows
from diffusers_repr.pictures.masks import mask_image
from diffusers_repr.store.processes import process_state


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is sampled, labelled and kept."""

    POSITIONAL: ClassVar = ("model", "segmenter")

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    segmenter: str = setting(REQUIRED, "folder or Hub id of a segmenter on this model")
    out: str = setting("outputs/labelled", "folder to write; the same command goes on in it")
    num_samples: int = setting(10_000, "how many images are labelled")
    drop: float = setting(0.1, "share of them that is left out")
    cut: Literal["certain", "paper"] = setting("certain", "which: the most uncertain; or as the paper's code does")
    classes: Literal["random", "balanced", "none"] = setting("random", "of a class-conditional model")
    num_inference_steps: int = setting(100, "steps of the sampler")
    scheduler: str | None = setting(None, "class of the sampler; default: as saved")
    seed: int = setting(0, "sample n has the seed `seed + n`")
    batch_size: int = setting(16, "images of a call")
    quiet: bool = setting(False, "no line a batch")

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"--drop is a share of the images, from 0 and below 1; got {self.drop}.")


def label(settings: Settings, folder: Path, scores: Path) -> list[dict[str, Any]]:
    """Sample and segment what is not done yet; a line an image."""
    same = ("model", "num_samples", "classes", "num_inference_steps", "scheduler", "seed", "batch_size")
    sampler = Sampler(Sampling(**{name: getattr(settings, name) for name in same}), process_state().device)
    segmenter = Segmenter.from_pretrained(settings.segmenter, base=sampler.denoiser)
    segmenter.to(process_state().device)
    done = [json.loads(line) for line in scores.read_text().splitlines()] if scores.is_file() else []
    keys = sampler.keys()
    for start in range(len(done), len(keys), settings.batch_size):
        images = sampler(keys[start : start + settings.batch_size])
        output = segmenter(images)
        rows = []
        for place, (image, mask) in enumerate(zip(images, output.masks, strict=True)):
            name = f"{start + place:06d}"
            image.save(folder / f"{name}.png")
            mask_image(mask.numpy(), len(output.label_names)).save(folder / f"{name}_mask.png")
            rows.append({"name": name, "uncertainty": float(output.scores[place])})
        with scores.open("a") as file:  # after the files: what has a line is whole
            file.writelines(json.dumps(row) + "\n" for row in rows)
        done += rows
        if not settings.quiet:
            print(f"{len(done)} of {len(keys)} images", flush=True)
    return done[: len(keys)]


def keep(rows: list[dict[str, Any]], settings: Settings, every: Path, kept: Path) -> int:
    """Copy the certain ones, the most certain first, with the file that `datasets` reads."""
    chosen = [rows[row] for row in certain_rows([row["uncertainty"] for row in rows], settings.drop, settings.cut)]
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    lines = []
    for row in chosen:
        names = {"file_name": f"{row['name']}.png", "mask_file_name": f"{row['name']}_mask.png"}
        for name in names.values():
            shutil.copyfile(every / name, kept / name)
        lines.append(json.dumps({**names, "uncertainty": row["uncertainty"]}))
    (kept / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return len(chosen)


def main(argv: list[str]) -> None:
    (settings,) = parse_recipe((Settings,), argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    out = Path(settings.out)
    (out / "all").mkdir(parents=True, exist_ok=True)
    rows = label(settings, out / "all", out / "scores.jsonl")
    count = keep(rows, settings, out / "all", out / "train")
    print(f"kept {count} of {len(rows)} images (--cut {settings.cut}): {out / 'train'}")


if __name__ == "__main__":
    run_script(main)
