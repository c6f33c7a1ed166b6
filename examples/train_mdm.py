"""Train a U-Net to paint masked patches of images (MDM), for features of its decoder.

    accelerate launch examples/train_mdm.py --config examples/configs/mdm_digits.yaml

The share of masked patches is drawn anew for each image, and the network is told it, as a diffusion model its noise
(arXiv 2308.05695). The folder is a `DDPMPipeline` with a `PatchMaskScheduler`: `Denoiser.from_pretrained(folder)`
reads it as any other, and what is noise elsewhere is masks here. With `eval_split` its errors with half of the patches
masked are measured: `evaluation.jsonl`, the card; and `reconstructions.png` shows images, masked ones and predictions.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr import Denoiser
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.measured import MeasuredSplit
from diffusers_repr.data import DataConfig, TrainData, load_train_data
from diffusers_repr.metrics import ssim
from diffusers_repr.noise.patch_mask import noise_mask
from diffusers_repr.objectives import MDMConfig, MDMObjective
from diffusers_repr.pictures.grid import image_grid
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


class MaskedErrors:
    """Errors of the images of a split with half of their patches masked, and a picture of the first ones.

    Args:
        data: The split, its images as they are.
        window: Of SSIM.
        picture: Where it is written.
    """

    def __init__(self, data: TrainData, window: int, picture: Path) -> None:
        rows = [data[row]["pixel_values"] for row in range(len(data))]
        self.images = data.on_device({"pixel_values": torch.stack(rows)})["pixel_values"]
        self.noise = torch.randn(self.images.shape, generator=torch.Generator().manual_seed(0))
        self.window, self.picture = window, picture

    @torch.no_grad()
    def __call__(self, pipe, step: int) -> dict[str, float]:
        denoiser = Denoiser.from_pipe(pipe)
        level = denoiser.level(denoiser.schedule.num_train_timesteps // 2)
        squared, similar, count = torch.zeros(3), 0.0, torch.zeros(2)
        with denoiser.evaluating():
            for images, noise in zip(self.images.split(64), self.noise.split(64), strict=True):
                x0 = images.to(denoiser.device, denoiser.dtype)
                masked = denoiser.add_noise(x0, level, noise.to(x0.device))
                painted = denoiser.predict(masked, level).x0.float()
                visible = noise_mask(noise, level).expand_as(images).to(x0.device)
                errors = [((a - x0) ** 2 * part).sum() for a, part in ((painted, ~visible), (painted, visible))]
                squared += torch.stack([*errors, ((masked - x0) ** 2).sum()]).float().cpu()
                count += torch.tensor([float((~visible).sum()), float(visible.sum())])
                similar += float(ssim(*(_unit(x) for x in (painted, x0)), self.window, edges="reflect").sum())
                if images.data_ptr() == self.images.data_ptr():
                    rows = [_unit(x[:8].float()) for x in (x0, masked, painted)]
                    image_grid(torch.cat(rows), 8).save(self.picture)
        masked_mse, visible_mse, zero_fill = squared / count[[0, 1, 0]]
        found = {"mse_masked": masked_mse, "mse_visible": visible_mse, "mse_masked_zero_fill": zero_fill}
        return {**{name: float(value) for name, value in found.items()}, "ssim": similar / len(self.images)}


def _unit(images: torch.Tensor) -> torch.Tensor:
    return (images / 2 + 0.5).clamp(0, 1)


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, MDMConfig, MeasuredSplit)
    config, data_config, mdm, evaluation = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name)
    torch.manual_seed(config.seed)
    objective = MDMObjective(mdm.build(), mdm.reconstruction, mdm.ssim_window)
    network = objective.network.config
    data_config = dataclasses.replace(data_config, label_column="none")
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers}
    data = load_train_data(data_config, network.in_channels, network.sample_size, **loading)
    errors = None
    if evaluation.eval_split:
        test = load_train_data(data_config.held_out(evaluation.eval_split), network.in_channels, network.sample_size)
        errors = MaskedErrors(test, mdm.ssim_window, Path(config.output_dir) / "reconstructions.png")
    train(objective, data, config, recipe=recipe_of(config, data_config, mdm, evaluation), evaluate=errors)


if __name__ == "__main__":
    run_script(main)
