"""The table of the study of CleanDIFT, by nearest neighbours over maps that are enlarged whole."""

from pathlib import Path

import clean_features
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.data.pairs import PairConfig, load_pairs
from diffusers_repr.objectives import CleanDIFTConfig, CleanDIFTObjective
from diffusers_repr.training.seeds import reseed

DIGITS = Path(__file__).parents[3] / "examples" / "models" / "digits-ddpm"


def test_the_table(tmp_path, monkeypatch, capsys):
    base = Denoiser.from_pretrained(DIGITS, dtype=torch.float32)
    torch.manual_seed(0)
    objective = CleanDIFTObjective(base, CleanDIFTConfig("x", layers=["mid_block"], time_width=8))
    objective.save_pretrained(tmp_path / "tuned", objective.state_dict(), torch.float32)
    flags = [str(tmp_path / "tuned"), "--base", str(DIGITS), "--pairs", "6", "--timesteps", "100"]
    monkeypatch.setattr("sys.argv", ["clean_features.py", *flags])
    clean_features.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| PCK@0.1, 6 pairs | `mid_block` |"
    clean, tuned = (row.split(" | ")[1].strip(" |") for row in rows[2:])
    assert clean == tuned  # nothing has been trained
    moves = {"random_rotation": 15, "random_shift": 0.06, "random_scale": 0.15, "max_points": 16}
    data = load_pairs(PairConfig(dataset_split="test", **moves), 1, (8, 8))
    reseed(0, 0, 0)
    pairs = data.on_device(next(iter(DataLoader(torch.utils.data.Subset(data, range(6)), 16))))
    extractor = FeatureExtractor(base, "mid_block", 261, "clean")
    first, second = (
        functional.interpolate(extractor.from_pixels(images)["mid_block"], (8, 8), mode="bilinear")
        for images in pairs["images"]
    )
    hits = []
    for b in range(6):
        here, there = (points[b][pairs["valid"][b]] for points in pairs["points"])
        place = ((2 * here + 1) / 8 - 1)[None, :, None]
        query = functional.grid_sample(first[b : b + 1], place, padding_mode="border", align_corners=False)[0, :, :, 0]
        like = functional.normalize(query, dim=0).T @ functional.normalize(second[b].flatten(1), dim=0)
        best = like.argmax(1)
        found = torch.stack([best % 8, best // 8], dim=1)
        hits.append((found - there).norm(dim=1) <= 0.8)
    assert abs(float(clean) - float(torch.cat(hits).float().mean())) < 0.04
