"""Do features of a small diffusion model find points again? Against raw pixels, SIFT and the network untrained.

    python examples/studies/correspondence.py --output_dir outputs/correspondence
    python examples/studies/correspondence.py --base PIPELINE --output_dir outputs/correspondence

Photographs that scikit-image ships, under known homographies, crops, flips and colour changes, and its stereo pair of
a motorcycle with the measured disparity. Layer, level and noise policy are chosen by PCK on two photographs
(`select_features(..., metric="pck")`), of the untrained network likewise, and the patch size of the raw pixels, too;
measured is on the others. The points are SIFT's own key points. Writes `report.json`, `report.md`, `matches.jpg`,
`similarity.jpg` and `changes.jpg`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr import Denoiser
from diffusers_repr.data.image_pairs import ImagePairs
from diffusers_repr.data.known_pairs import CHOSEN_ON, KINDS, MEASURED_ON, pairs_of, sift_matches
from diffusers_repr.features.pixel_source import PixelSource
from diffusers_repr.metrics.pck import correct_points, pck, reference_length
from diffusers_repr.pictures.match_lines import stack_pictures
from diffusers_repr.sweep import PCKMeasure, Selection, select_features
from diffusers_repr.tasks.correspondence import Correspondence

MODEL = Path(__file__).parents[1] / "models" / "cifar10-ddpm"
PATCHES = (1, 5, 9, 15)


def untrained(base: str, seed: int) -> Denoiser:
    """The network with random weights, as it begins training."""
    denoiser = Denoiser.from_pretrained(base)
    torch.manual_seed(seed)
    for module in denoiser.model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
            module.reset_parameters()
    return denoiser


def choose(denoiser: Denoiser, pairs: ImagePairs, args: argparse.Namespace, seeds: tuple[int, ...]) -> Selection:
    measure = PCKMeasure("pck", alpha=args.alpha, reference="image")
    return select_features(
        denoiser, pairs, None, args.timesteps, args.layers, metric=measure, noise=("per_image", "clean"), seeds=seeds,
        finalists=3, image_size=tuple(args.image_size), batch_size=2,
    )  # fmt: skip


def shares(pairs: ImagePairs, answers: list[Tensor], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """PCK per point at both thresholds, over all pairs and by the kind of change."""
    result = {}
    for alpha in (args.alpha, args.wide):
        kinds: dict[str, list[Tensor]] = {"all": []}
        for answer, pair in zip(answers, pairs.pairs, strict=True):
            length = reference_length("image", pairs.size(pair.target))
            one = correct_points(answer, pair.target_points, length, alpha)
            for kind in ("all", str(pair.category)):
                kinds.setdefault(kind, []).append(one)
        result[str(alpha)] = {kind: pck(found).per_point for kind, found in kinds.items()}
    return result


def measure(task: Correspondence, pairs: ImagePairs, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    sources = {pair.source: task.encode(pairs.image(pair.source)) for pair in pairs.pairs}
    answers = [task(sources[p.source], pairs.image(p.target), p.source_points).matches for p in pairs.pairs]
    return shares(pairs, answers, args)


def sift_scores(pairs: ImagePairs, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """SIFT answers each point by a key point of the target."""
    found: dict[int, Any] = {}
    return shares(pairs, [sift_matches(pairs, pair, found) for pair in pairs.pairs], args)


def with_members(found: Selection, denoiser: Denoiser, args: argparse.Namespace) -> Correspondence:
    members = 1 if found.best.noise == "clean" else args.ensemble_size
    return Correspondence(found.extractor(denoiser, ensemble_size=members, batch_size=2))


def draw(task: Correspondence, pairs: ImagePairs, args: argparse.Namespace) -> None:
    """Green lines are within alpha of the truth, red ones are not."""
    pictures = []
    for kind in ("stereo", *KINDS):
        pair = next(p for p in pairs.pairs if p.category == kind)
        few = slice(0, 24 if kind == "stereo" else 16)
        found = task(pairs.image(pair.source), pairs.image(pair.target), pair.source_points[few])
        length = reference_length("image", found.target_size)
        correct = correct_points(found.matches, pair.target_points[few], length, args.alpha)
        title = f"{kind}: {int(correct.sum())} of {len(correct)} within {args.alpha:g} of the longer side"
        pictures.append(found.plot(correct=correct, title=title, height=300 if kind == "stereo" else 220))
        if kind == "stereo":
            maps = task(pairs.image(pair.source), pairs.image(pair.target), pair.source_points[:4], similarity=True)
            maps.plot(height=300, title="stereo: four points and where the features see them").save(
                args.output_dir / "similarity.jpg", quality=88
            )
    pictures[0].save(args.output_dir / "matches.jpg", quality=88)
    stack_pictures(pictures[1:]).save(args.output_dir / "changes.jpg", quality=85)


def table(rows: dict[str, dict[str, dict[str, float]]], alpha: float) -> list[str]:
    kinds = list(next(iter(rows.values()))[str(alpha)])
    lines = [
        f"| PCK at {alpha:g} of the longer side (%) | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for name, found in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * found[str(alpha)][kind]:.1f}" for kind in kinds) + " |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/correspondence"))
    parser.add_argument("--base", default=str(MODEL), help="pipeline folder or Hub id of a model of RGB images")
    parser.add_argument("--image_size", nargs=2, type=int, default=(96, 128), metavar=("H", "W"))
    parser.add_argument("--timesteps", nargs="+", type=int, default=[50, 200])
    parser.add_argument("--layers", nargs="+", help="to choose from; all of them if not given")
    parser.add_argument("--points", type=int, default=24, help="a pair, at most")
    parser.add_argument("--alpha", type=float, default=0.02)
    parser.add_argument("--wide", type=float, default=0.1)
    parser.add_argument("--ensemble_size", type=int, default=2)
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the noise, and of untrained networks"
    )
    parser.add_argument("--photographs", nargs="+", default=list(MEASURED_ON))
    args = parser.parse_args(argv)

    began, torch_threads = time.time(), torch.get_num_threads()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    chosen_on = pairs_of(CHOSEN_ON, args.points, stereo=False, seed=1)
    measured_on = pairs_of(args.photographs, args.points, stereo=True)
    denoiser = Denoiser.from_pretrained(args.base)
    size = tuple(args.image_size)
    name = Path(args.base).name

    found = choose(denoiser, chosen_on, args, tuple(args.seeds))
    found.save(args.output_dir / "selection", heatmap=False)
    task = with_members(found, denoiser, args)
    rows = {name: measure(task, measured_on, args)}
    draw(task, measured_on, args)

    random = []
    for seed in args.seeds:
        other = untrained(args.base, seed)
        random.append(measure(with_members(choose(other, chosen_on, args, (0,)), other, args), measured_on, args))
    mean = {
        alpha: {kind: statistics.fmean(one[alpha][kind] for one in random) for kind in random[0][alpha]}
        for alpha in random[0]
    }
    rows[f"{name} untrained (mean of {len(random)})"] = mean

    patches = {
        patch: Correspondence(PixelSource(denoiser, patch, centred=patch > 1, image_size=size)) for patch in PATCHES
    }
    best = max(patches, key=lambda p: measure(patches[p], chosen_on, args)[str(args.alpha)]["all"])
    rows[f"raw pixels, patches of {best} x {best}"] = measure(patches[best], measured_on, args)
    rows["SIFT among its own key points"] = sift_scores(measured_on, args)

    best_cell = {k: getattr(found.best, k) for k in ("layer", "timestep", "noise", "score", "mean", "std")}
    report = {
        "base": name, "image_size": list(size), "photographs": args.photographs, "chosen_on": list(CHOSEN_ON),
        "pairs": len(measured_on), "points": sum(len(p.source_points) for p in measured_on.pairs),
        "selected": best_cell, "patch": best, "rows": rows, "untrained": random, "ensemble_size": args.ensemble_size,
        "minutes": round((time.time() - began) / 60, 1), "threads": torch_threads,
    }  # fmt: skip
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [*table(rows, args.alpha), "", *table(rows, args.wide), ""]
    lines.append(
        f"{report['points']} points of {report['pairs']} pairs. Read: `{found.best.layer}` at timestep "
        f"{found.best.timestep:g}, noise {found.best.noise}, chosen on other photographs."
    )
    (args.output_dir / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
