"""What of a trained representation can be looked at, and measured of its images: by the class of what was written."""

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffusers_repr import Denoiser
from diffusers_repr.metrics import measure_generation
from diffusers_repr.pictures.figure import png_of, require_matplotlib
from diffusers_repr.pictures.grid import image_grid
from diffusers_repr.tasks.reconstruction import is_codec, measure_reconstruction, open_codec, reconstruct

SHOWN = 8
PLAIN = ("DDPMPipeline", "DDIMPipeline")


def kind_of(folder: Path) -> str:
    """Class of the pipeline in a folder; empty where there is none."""
    index = folder / "model_index.json"
    return str(json.loads(index.read_text()).get("_class_name", "")) if index.is_file() else ""


def is_plain(folder: Path) -> bool:
    """Whether a folder is a plain diffusion model, of noise."""
    return kind_of(folder) in PLAIN and not is_masked(folder)


def is_masked(folder: Path) -> bool:
    """Whether a folder is a model of masked patches."""
    config = folder / "scheduler" / "scheduler_config.json"
    return config.is_file() and "PatchMask" in config.read_text()


def autoencoder(folder: Path):
    """The diffusion autoencoder in a folder; None for what is none."""
    return open_codec(folder) if is_codec(str(folder)) else None


def token_generator(folder: Path):
    """The generator of tokens in a folder; None for what is none."""
    if kind_of(folder) != "TokenGenerationPipeline":
        return None
    from diffusers_repr.pipelines.token_generation import TokenGenerationPipeline

    pipe = TokenGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reconstruction_scores(folder: Path, images: Tensor, judge, steps: int, seed: int) -> dict[str, float]:
    """Of a diffusion autoencoder from inferred and from drawn noise; of a plain model from inferred noise alone."""
    if is_codec(str(folder)) or is_plain(folder):
        return measure_reconstruction(folder, images, steps=steps, encoder=judge, seed=seed)
    return {}


def sample_scores(folder: Path, real: Tensor, judge, count: int, steps: int, seed: int) -> dict:
    """Fréchet distance of samples to real images in the features of a judge, and its record; of what samples."""
    made = samples(folder, count, steps, seed)
    if made is None:
        return {}
    record = measure_generation(judge, real, made, features="tokens", seed=seed)["frechet_distance"]
    return {"frechet_distance": record.value, "frechet_record": record.to_dict()}


def samples(folder: Path, count: int, steps: int, seed: int) -> Tensor | None:
    """`(N, C, H, W)` in [0, 1]; None of what does not sample without more training."""
    generator = torch.Generator().manual_seed(seed)
    pipe = token_generator(folder)
    if pipe is not None:
        most = int(pipe.transformer.num_tokens)
        given = {"num_inference_steps": min(steps, most), "generator": generator, "output_type": "pt"}
        return pipe(batch_size=count, **given).images.float().cpu()
    pipe = autoencoder(folder)
    if pipe is not None:
        if not (pipe.config.normal_codes or pipe.prior is not None):
            return None
        return pipe(batch_size=count, num_inference_steps=steps, generator=generator, output_type="pt").images.cpu()
    if not is_plain(folder):
        return None
    denoiser = Denoiser.from_pretrained(folder)
    from diffusers import DDIMPipeline

    plain = DDIMPipeline(denoiser.model, DDIMScheduler.from_config(denoiser.scheduler.config))
    plain.set_progress_bar_config(disable=True)
    arrays = plain(batch_size=count, num_inference_steps=steps, generator=generator, output_type="np").images
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def curves(folders: dict[str, Path], path: Path) -> None:
    """The loss of every row's last stage, of the first seed."""
    found = {}
    for name, folder in folders.items():
        file = folder / "loss.jsonl"
        if file.is_file():
            found[name] = [json.loads(line) for line in file.read_text().splitlines()]
    if not found:
        return
    across = min(4, len(found))
    down = -(-len(found) // across)
    figure = require_matplotlib().Figure(figsize=(3 * across, 2.3 * down), layout="constrained", dpi=100)
    for at, (name, lines) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(down, across, at)
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1.2)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    path.write_bytes(png_of(figure))


def pictures(
    folders: dict[str, Path],
    images: Tensor,
    results: Path,
    steps: int,
    known: tuple[Tensor, Tensor, str] | None = None,
) -> None:
    """What each row shows, of the first seed: a picture a row and kind.

    `known` is images with an attribute, whether each has it, and its name: codes are edited along its direction.
    """
    for name, folder in folders.items():
        stem = "".join(c if c.isalnum() else "_" for c in name).lower()
        if autoencoder(folder) is not None:
            code_pictures(folder, images, steps, name, results / stem)
            if known is not None:
                edit_pictures(folder, images, steps, name, results / f"{stem}_edits.png", known)
        elif token_generator(folder) is not None:
            token_pictures(folder, name, results / f"{stem}_tokens.png")
        elif (folder / "loss.jsonl").is_file() and "mutual_information" in (folder / "loss.jsonl").read_text():
            policy_pictures(folder, name, results / f"{stem}_levels.png")
        elif is_masked(folder):
            masked_pictures(folder, images, name, results / f"{stem}_masked.png")


@torch.no_grad()
def code_pictures(folder: Path, images: Tensor, steps: int, name: str, stem: Path) -> None:
    """Reconstructions, interpolations, and swaps of code and noise."""
    pipe = autoencoder(folder)
    back = reconstruct(pipe, images, steps=steps)
    rows = torch.cat([images, back["inferred"], back["random"]])
    titles = ["image", "inferred noise", "random noise"]
    image_grid(rows, len(images), title=f"{name}: reconstructions", row_titles=titles).save(f"{stem}_back.png")
    half = len(images) // 2
    first, second = images[:half], images[half : 2 * half]
    weights = [0, 0.2, 0.4, 0.6, 0.8, 1]
    outputs = pipe.interpolate(first, second, weights, steps, output_type="pt")
    made = torch.stack([output.images.cpu() for output in outputs], 1).flatten(0, 1)
    title = f"{name}: from one image to another"
    image_grid(made, len(weights), title=title, column_titles=[f"{w:g}" for w in weights]).save(f"{stem}_between.png")
    code = pipe.encode(images[:6], steps)
    swapped = [pipe.decode(code.code[at : at + 1], code.x_T, steps, output_type="pt").images.cpu() for at in range(6)]
    grid = torch.cat([torch.cat([torch.ones_like(images[:1]), images[:6]])] + [
        torch.cat([images[at : at + 1], row]) for at, row in enumerate(swapped)
    ])  # fmt: skip
    title = f"{name}: the code of the row, the noise of the column"
    image_grid(grid, 7, title=title).save(f"{stem}_swaps.png")


@torch.no_grad()
def edit_pictures(
    folder: Path, images: Tensor, steps: int, name: str, path: Path, known: tuple[Tensor, Tensor, str]
) -> None:
    """Images whose codes are moved along the direction of an attribute, their noise as it was."""
    pipe = autoencoder(folder)
    seen, has, attribute = known
    direction = pipe.fit_direction(pipe.encode(seen, None).code, has)
    strengths = [-0.4, -0.2, 0.0, 0.2, 0.4]
    rows = [pipe.edit(images, direction, one, steps, output_type="pt").images.cpu() for one in strengths]
    titles = [f"{one:+g}" if one else "as it is" for one in strengths]
    title = f"{name}: edited towards {attribute}"
    image_grid(torch.cat(rows), len(images), title=title, row_titles=titles).save(path)


@torch.no_grad()
def masked_pictures(folder: Path, images: Tensor, name: str, path: Path) -> None:
    """Masked images, and what the network makes of them, by level."""
    denoiser = Denoiser.from_pretrained(folder)
    x0, rows, titles = 2 * images - 1, [images], ["image"]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    total = denoiser.schedule.num_train_timesteps
    for share in (0.25, 0.5, 0.75):
        level = denoiser.level(int(share * total))
        with denoiser.evaluating():
            masked = denoiser.add_noise(x0, level, noise)
            painted = denoiser.predict(masked, level).x0
        rows += [(one / 2 + 0.5).clamp(0, 1) for one in (masked, painted)]
        titles += [f"{share:.0%} masked", "painted"]
    image_grid(torch.cat(rows), len(images), title=f"{name}: masked inputs", row_titles=titles).save(path)


def policy_pictures(folder: Path, name: str, path: Path) -> None:
    """Which timesteps a policy chose while it learned, how sure it was, and how much of that the image told."""
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    keys = {
        "timestep": "timestep chosen, mean",
        "entropy": "entropy, nats",
        "mutual_information": "of the image, nats",
    }
    figure = require_matplotlib().Figure(figsize=(3 * len(keys), 2.4), layout="constrained", dpi=100)
    for at, (key, title) in enumerate(keys.items(), start=1):
        axes = figure.add_subplot(1, len(keys), at)
        axes.plot([line["step"] for line in lines if key in line], [line[key] for line in lines if key in line])
        axes.set_title(f"{name}: {title}", fontsize=8)
        axes.tick_params(labelsize=7)
    path.write_bytes(png_of(figure))


@torch.no_grad()
def token_pictures(folder: Path, name: str, path: Path) -> None:
    """Samples as their tokens are fixed, step by step."""
    pipe = token_generator(folder)
    steps = min(6, int(pipe.transformer.num_tokens))
    seen: list[Tensor] = []

    def keep(owner, step: int, left, tensors: dict) -> dict:
        seen.append((pipe.decode(tensors["embeddings"]).cpu() / 2 + 0.5).clamp(0, 1))
        return {}

    given = {"batch_size": SHOWN, "num_inference_steps": steps, "output_type": "pt", "callback_on_step_end": keep,
             "callback_on_step_end_tensor_inputs": ["embeddings"],
             "generator": torch.Generator().manual_seed(0)}  # fmt: skip
    pipe(**given)
    titles = [f"step {at + 1}" for at in range(len(seen))]
    image_grid(torch.cat(seen), SHOWN, title=f"{name}: token generation", row_titles=titles).save(path)
