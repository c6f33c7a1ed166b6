"""DIFT: exact cosine at low resolution against the full-resolution one, and a whole pair against an encoding a copy.

`cosine`: six key points of a 1280 x 48 x 48 map on 375 x 500 pixels (Stable Diffusion at 768 px on a photograph of
SPair-71k). The peer brings both maps to the image's size and normalises the target's for every point, as the paper's
code does. `pair`: two images, ensemble of 8, a Stable Diffusion's stages at an eighth of their width: the peer runs
the VAE and a full U-Net on eight copies of each image, then the peer of `cosine`, or ours (`ratio_of_features`).
"""

import resource
import sys

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from benchmarks.common import UP_BLOCK, interleaved, median, report
from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.features.noise_policy import keyed_generator, pixel_keys
from diffusers_repr.metrics.cosine_map import CosineMap, sample_map
from diffusers_repr.tasks.correspondence import Correspondence

SIZE, POINTS, MEMBERS = (375, 500), 6, 8


def full_resolution(source: Tensor, target: Tensor, points: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Places and cosines of the best pixels, by maps of the image's size."""
    a, b = (F.interpolate(m[None], size=size, mode="bilinear", align_corners=False)[0] for m in (source, target))
    places, scores = [], []
    for x, y in points.tolist():
        unit = F.normalize(b.flatten(1).T)
        like = unit @ F.normalize(a[:, y, x], dim=0)
        best = int(like.argmax())
        places.append([best % size[1], best // size[1]])
        scores.append(like[best])
    return torch.tensor(places), torch.stack(scores)


def cosine(repeats: int) -> None:
    torch.manual_seed(0)
    source, target = torch.randn(2, 1280, 48, 48)
    points = torch.stack([torch.randint(0, side, (POINTS,)) for side in SIZE[::-1]], 1)
    found = {}

    def ours() -> None:
        best = CosineMap(target, SIZE).best(sample_map(source, points, SIZE))
        found["ours"] = best.points.long(), best.scores

    def peer() -> None:
        found["peer"] = full_resolution(source, target, points, SIZE)

    times = interleaved({"ours": ours, "peer": peer}, repeats)
    mine, theirs = median(times["ours"]), median(times["peer"])
    report(
        "correspondence_cosine",
        channels=1280,
        map=48,
        image=list(SIZE),
        points=POINTS,
        ours_s=mine,
        peer_s=theirs,
        ratio=theirs / mine,
        target=">= 50",
        equal_places=torch.equal(found["ours"][0], found["peer"][0]),
        max_difference=(found["ours"][1] - found["peer"][1]).abs().max().item(),
        peer_mib_of_maps=2 * 1280 * SIZE[0] * SIZE[1] * 4 / 2**20,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def model() -> Denoiser:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(40, 80, 160, 160), attention_head_dim=8, norm_num_groups=8,
        cross_attention_dim=96,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=512, norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Denoiser(unet.eval(), scheduler, vae.eval())


@torch.no_grad()
def pair(pixels: int, repeats: int) -> None:
    denoiser = model()
    embeddings = {"encoder_hidden_states": torch.randn(1, 77, 96)}
    images = torch.rand(2, 1, 3, pixels, pixels)
    points = torch.stack([torch.randint(0, pixels, (POINTS,)) for _ in range(2)], 1)
    settings = {"ensemble_size": MEMBERS, "image_size": "keep", "sample_posterior": "per_member"}
    task = Correspondence(FeatureExtractor(denoiser, UP_BLOCK, 261, **settings))
    source, found = task.source, {}

    def ours() -> None:
        matches = task(images[0, 0], images[1, 0], points, embeddings=embeddings)
        found["ours"] = matches.matches.long(), matches.scores

    def feature(image: Tensor) -> Tensor:
        """Eight copies through the VAE and the whole U-Net; the layer by a hook; with the noise of ours."""
        unit, kept = 2 * image - 1, {}
        key = pixel_keys(unit)[0]
        drawn = [keyed_generator(0, key, "posterior", member) for member in range(MEMBERS)]
        x0 = denoiser.encode_pixels(unit.expand(MEMBERS, -1, -1, -1), sample=True, generator=drawn)
        noise = source.noise.draw([key] * MEMBERS, range(MEMBERS), x0.shape[1:])
        x_t = denoiser.add_noise(x0, source.levels[0], noise)
        hook = denoiser.model.get_submodule(UP_BLOCK).register_forward_hook(lambda m, args, out: kept.update(out=out))
        states = embeddings["encoder_hidden_states"].expand(MEMBERS, -1, -1)
        denoiser.model(x_t, torch.tensor([261]), encoder_hidden_states=states)
        hook.remove()
        return kept["out"].mean(0)

    def peer() -> None:
        found["peer"] = full_resolution(feature(images[0]), feature(images[1]), points, (pixels, pixels))

    def peer_with_our_cosine() -> None:
        a, b = (feature(image) for image in images)
        CosineMap(b, (pixels, pixels)).best(sample_map(a, points, (pixels, pixels)))

    times = interleaved({"ours": ours, "peer": peer, "features": peer_with_our_cosine}, repeats)
    mine, theirs = median(times["ours"]), median(times["peer"])
    report(
        "correspondence_pair",
        pixels=pixels,
        ensemble=MEMBERS,
        ours_s=mine,
        peer_s=theirs,
        ratio=theirs / mine,
        ratio_of_features=median(times["features"]) / mine,
        target=">= 2",
        equal_places=torch.equal(found["ours"][0], found["peer"][0]),
        max_difference=(found["ours"][1] - found["peer"][1]).abs().max().item(),
    )


def main() -> None:
    pixels, repeats = (int(value) for value in (sys.argv[1:] or ["256", "5"]))
    cosine(repeats)
    pair(pixels, repeats)


if __name__ == "__main__":
    main()
