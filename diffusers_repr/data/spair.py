"""SPair-71k (Min et al. 2019, arXiv 1908.10543): 70,958 pairs of images of 18 categories with key points."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from diffusers_repr.data.image_pairs import ImagePairs, PairPoints
from diffusers_repr.data.points import read_points
from diffusers_repr.hub.files import read_json
from diffusers_repr.hub.schema import anything, integer, listing, number, record, text

SPAIR_URL = "https://cvlab.postech.ac.kr/research/SPair-71k/"
_HOW = (
    f"Get SPair-71k.tar.gz from {SPAIR_URL} and unpack it; pass the folder that holds PairAnnotation and JPEGImages."
)
_SIZE = listing(integer(1, 100_000), 2, 3)  # width, height, channels
_BOX = listing(number(), 4, 4)
_POINTS = listing(listing(number(), 2, 2), 0, 1000)
_PAIR = record(
    {
        "src_imname": text(500),
        "trg_imname": text(500),
        "src_imsize": _SIZE,
        "trg_imsize": _SIZE,
        "trg_bndbox": _BOX,
        "category": text(100),
        "src_kps": _POINTS,
        "trg_kps": _POINTS,
    },
    others=True,
)


def load_spair(
    folder: str | Path,
    split: Literal["trn", "val", "test"] = "test",
    size: Literal["large", "small"] = "large",
    category: str | None = None,
    limit: int | None = None,
) -> ImagePairs:
    """Pairs of a local copy of SPair-71k, with the box of the object in the target image.

    Args:
        folder: That holds `PairAnnotation`, `JPEGImages` and `Layout`, or one above it.
        split: `test` is what papers report.
        size: `large`: all pairs of the split; `small`: the list of `Layout/small`.
        category: Pairs of one category alone.
        limit: The first pairs, for a quick try.

    Raises:
        FileNotFoundError: If it is not there; says how to get it.
        ValueError: For another split or size, a category without pairs, or an annotation that is none.
    """
    root = _root(Path(folder).expanduser(), split, size)
    place = root / "PairAnnotation" / split
    if size == "small":
        names = (root / "Layout" / size / f"{split}.txt").read_text().split()
        files = [place / f"{name}.json" for name in names]
    else:
        files = sorted(place.glob("*.json"))
    if category is not None:  # of a file `000001-2008_000033-2008_001546:aeroplane.json`
        files = [file for file in files if file.stem.rpartition(":")[2] == category]
    if not files:
        asked = "" if category is None else f" of category {category!r}"
        raise ValueError(f"{str(place)!r} holds no pairs{asked}.")
    places: dict[Path, int] = {}
    sizes: dict[int, tuple[int, int]] = {}
    pairs = [_pair(file, root, places, sizes) for file in files[:limit]]
    return ImagePairs(list(places), tuple(pairs), f"SPair-71k {split}", sizes)


def _root(folder: Path, split: str, size: str) -> Path:
    if split not in ("trn", "val", "test") or size not in ("large", "small"):
        raise ValueError(f"SPair-71k has splits trn, val, test and sizes large, small; got {split!r}, {size!r}.")
    for root in (folder, folder / "SPair-71k"):
        if (root / "PairAnnotation" / split).is_dir() and (root / "JPEGImages").is_dir():
            return root
    raise FileNotFoundError(f"No SPair-71k in {str(folder)!r} (PairAnnotation/{split}, JPEGImages). {_HOW}")


def _pair(file: Path, root: Path, places: dict[Path, int], sizes: dict[int, tuple[int, int]]) -> PairPoints:
    held: dict[str, Any] = _PAIR(anything()(read_json(file), file.name), file.name)
    found, points = [], []
    for side in ("src", "trg"):
        image = root / "JPEGImages" / Path(held["category"]).name / Path(held[f"{side}_imname"]).name
        at = places.setdefault(image, len(places))
        width, height = held[f"{side}_imsize"][:2]
        sizes[at] = height, width
        found.append(at)
        points.append(read_points(held[f"{side}_kps"], f"{side}_kps of {file.name}", sizes[at])[0])
    left, top, right, bottom = held["trg_bndbox"]
    box = float(left), float(top), float(right), float(bottom)
    return PairPoints(found[0], found[1], points[0], points[1], box, held["category"], file.stem)


__all__ = ["SPAIR_URL", "load_spair"]
