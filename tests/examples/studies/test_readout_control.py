import json

import datasets
import numpy as np
import pytest
import readout_control
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from PIL import Image
from scipy.ndimage import correlate

from diffusers_repr import ReadoutGuidance
from diffusers_repr.heads import ReadoutHead
from tests.examples.scripts import picture

MODELS = readout_control.MODELS
ROWS = ["none", readout_control.SHOWN, readout_control.SHOWN_DEPTH]
COUNT, STEPS = 2, 2


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A run of the script on random blobs, its folder, and the blobs in [-1, 1]."""
    folder = tmp_path_factory.mktemp("control")
    coarse = np.random.default_rng(0).integers(0, 256, (COUNT + 1, 6, 6, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR) for pixels in coarse]
    features = datasets.Features({"image": datasets.Image()})
    (folder / "data").mkdir()
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(folder / "data" / "test.parquet")
    command = ["--output_dir", str(folder / "out"), "--dataset_name", str(folder / "data")]
    command += ["--num_samples", str(COUNT), "--num_inference_steps", str(STEPS), "--rows", *ROWS]
    readout_control.main([*command, "--seeds", "0", "1"])
    first = (folder / "out" / "rows.jsonl").read_text()
    with pytest.MonkeyPatch.context() as patch:  # a row that is done is not done again
        patch.setattr(readout_control.Study, "run", None)
        patch.setattr(readout_control, "pictures", lambda *args: None)
        readout_control.main([*command, "--seeds", "1"])
    assert (folder / "out" / "rows.jsonl").read_text() == first
    rows = {(row["row"], row["seed"]): row for row in map(json.loads, first.splitlines())}
    real = torch.from_numpy(np.stack(images[:COUNT])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return folder / "out", rows, real


def sobel(images: torch.Tensor) -> np.ndarray:
    """Edges in [-1, 1] by scipy, `(N, 32, 32)`: 2 x length of the gradient, of the strongest channel."""
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    found = []
    for image in images.double().numpy():
        across, down = ([correlate(x, k, mode="nearest") for x in image] for k in (kernel, kernel.T))
        found.append(np.clip(4 * np.hypot(across, down).max(0) - 1, -1, 1))
    return np.stack(found)


def start(seed: int) -> torch.Tensor:
    return torch.randn(COUNT, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def stock_samples(seed: int) -> torch.Tensor:
    pipe = DDPMPipeline.from_pretrained(MODELS / "cars-ddpm")
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    x = start(seed)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    return x.clamp(-1, 1)


def guided_samples(seed: int, target: np.ndarray) -> torch.Tensor:
    pipe = GuidedUnconditionalPipeline.from_pretrained(MODELS / "cars-ddpm")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    head = ReadoutHead.from_pretrained(MODELS / "cars-edges")
    config = ReadoutGuidance(head, torch.from_numpy(target)[:, None].float(), scale=0.02)
    call = {"latents": start(seed), "num_inference_steps": STEPS, "output_type": "pt", "guidance": config}
    return 2 * pipe(**call).images - 1


def read_at_50(images: torch.Tensor) -> np.ndarray:
    """The head's edges of images at timestep 50, by hooks on the network."""
    pipe, head = DDPMPipeline.from_pretrained(MODELS / "cars-ddpm"), ReadoutHead.from_pretrained(MODELS / "cars-edges")
    share = pipe.scheduler.alphas_cumprod[50]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(50))
    features = {}
    for path in head.config["layers"]:
        module = pipe.unet.get_submodule(path)
        module.register_forward_hook(lambda _, __, output, path=path: features.update({path: output}))
    with torch.no_grad():
        pipe.unet(share.sqrt() * images + (1 - share).sqrt() * noise, 50)
        return head.eval()(features, 50)[:, 0].numpy()


@pytest.mark.parametrize("row", ROWS[:2])
def test_rows_are_right(study, row):
    _, rows, real = study
    target = sobel(real)
    images = stock_samples(0) if row == "none" else guided_samples(0, target)
    found, edges = rows[row, 0], sobel(images)
    pairs = zip(edges, target, strict=True)
    expected = {
        "edge_error": ((edges - target) ** 2).mean(),
        "correlation": np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]),
        "readout_error": ((read_at_50(images) - target) ** 2).mean(),
        "contrast": images.std(dim=(1, 2, 3)).mean().item() / 2,
        "lanes": 1.0 if row == "none" else 2.0,  # a step on the latents runs the network once more
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_guidance_is_at_work(study):
    _, rows, _ = study
    for seed in (0, 1):
        plain, guided, deep = (rows[row, seed] for row in ROWS)
        assert guided["readout_error"] < plain["readout_error"]
        assert deep["disagreement"] != pytest.approx(plain["disagreement"], rel=1e-4)


def test_report_and_pictures(study):
    folder, rows, real = study
    lines = (folder / "report.md").read_text().splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines[4:]}
    assert list(cells) == [*ROWS, "*the car itself*", "*another car*"]
    for row in ROWS:
        for key, cell in zip(readout_control.COLUMNS, cells[row], strict=True):
            values = [rows[row, seed][key] for seed in (0, 1)]
            ends = [float(word) for word in cell.replace("(", "").replace(")", "").split() if word != "to"]
            expected = [np.mean(values), *([min(values), max(values)] if len(ends) == 3 else [])]
            assert ends == pytest.approx(expected, abs=6e-3 if key in ("lanes", "seconds") else 6e-4)
    target, others = sobel(real), np.roll(sobel(real), 1, 0)
    assert float(cells["*another car*"][1]) == pytest.approx(((others - target) ** 2).mean(), abs=1e-4)
    assert float(cells["*the car itself*"][1]) == 0
    height = 6 * 96 + 5 * 4 + 6  # of six rows, from below; a tile is three times as wide as an image
    for name in ("control", "depth"):
        assert picture(folder / f"{name}.png").height > height
    shown = np.array(picture(folder / "control.png"))[-height:][1:96:3, :, 0] / 127.5 - 1
    for edges in np.kron(target, np.ones((1, 1, 3))):  # somewhere behind the row's name
        assert min(np.abs(shown[:, x : x + 96] - edges).max() for x in range(shown.shape[1] - 95)) < 0.01


def test_too_few_images(tmp_path, study):
    folder = study[0].parent / "data"
    with pytest.raises(ValueError, match="--num_samples 9, but .* has 3 images"):
        readout_control.main(["--dataset_name", str(folder), "--num_samples", "9", "--output_dir", str(tmp_path)])
