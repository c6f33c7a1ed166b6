"""`LDAEObjective`: l-DAE, a denoising autoencoder whose noise lives in a PCA of patches."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffusers_repr.capture import capture
from diffusers_repr.config.recipe import setting, take_arguments
from diffusers_repr.models import PatchPCA, SiTTransformer2DModel, plain_vit
from diffusers_repr.models.patch_pca import Basis
from diffusers_repr.objectives.artifacts import Artifact, FixedArtifact, ModelArtifact, State, rebuild
from diffusers_repr.objectives.base import Batch, Objective, weighted_sum
from diffusers_repr.objectives.preprocessor import Preprocessor

NoiseRule = Literal["linear", "gamma", "single"]

_SETTLED = {"num_classes": 0, "condition_dim": None, "qk_norm": False, "time_divisor": 1.0}


@dataclasses.dataclass(frozen=True)
class LDAEConfig:
    """The network, the space of the noise, and how much of it; the fields are keys of a recipe.

    Raises:
        ValueError: For a rule or basis that does not exist, or a number out of range.
    """

    model: dict | str | None = setting(None, "arguments of SiTTransformer2DModel, a mapping (JSON in a flag)")
    num_directions: int = setting(16, "d, coordinates of a patch that get noise; the paper's 16 are 2 % of its 768")
    basis: Basis = setting("pca", "pca, or pixels: the patch at a lower resolution, at d = D the pixels themselves")
    noise_rule: NoiseRule = setting("linear", "linear: sigma grows, the signal stays; gamma: gamma^2 falls; single")
    max_sigma: float = setting(math.sqrt(2), "of the rule linear at the last timestep; that of the rule single")
    residual_weight: float = setting(0.1, "of the coordinates beyond d; 0: only what the input shows is predicted")
    num_train_timesteps: int = setting(1000, "T")
    encoder_layers: int | None = setting(None, "blocks of the encoder; half of all if None")
    feature_timestep: float = setting(10.0, "that the encoder is told with clean images")
    pca_images: int = setting(50_000, "images that the PCA is fitted on, at most")

    def __post_init__(self) -> None:
        take_arguments(self, model=SiTTransformer2DModel)
        settled = sorted({*_SETTLED} & self.model.keys())  # type: ignore[union-attr]
        if settled:
            raise ValueError(f"`model` has no condition and is told whole timesteps; leave out {', '.join(settled)}.")
        for name, kind in (("basis", Basis), ("noise_rule", NoiseRule)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"`{name}` is one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}.")
        if not (0 < self.max_sigma < math.inf and 0 <= self.residual_weight < math.inf):
            raise ValueError(
                f"`max_sigma` is above 0 and `residual_weight` at least 0; got {self.max_sigma}, "
                f"{self.residual_weight}."
            )
        if self.num_train_timesteps < 2 or not 0 <= self.feature_timestep < self.num_train_timesteps:
            raise ValueError(
                f"`num_train_timesteps` is 2 or more and `feature_timestep` below it; got {self.num_train_timesteps} "
                f"and {self.feature_timestep}."
            )

    def build(self) -> SiTTransformer2DModel:
        """A new network."""
        return SiTTransformer2DModel(**self.model, **_SETTLED)  # type: ignore[arg-type]

    def fit(self, batches: Iterable[Tensor]) -> PatchPCA:
        """The space of the noise, by batches of images `(B, C, H, W)` in [-1, 1]; of `pixels` none are looked at.

        Raises:
            ValueError: As `PatchPCA`.
        """
        patch, channels = (inspect.signature(SiTTransformer2DModel).parameters[name].default
                           for name in ("patch_size", "in_channels"))  # fmt: skip
        patch, channels = self.model.get("patch_size", patch), self.model.get("in_channels", channels)  # type: ignore[union-attr]
        if self.basis == "pixels":
            return PatchPCA.of_pixels(patch, channels, self.num_directions)
        return PatchPCA.fit(batches, patch, self.num_directions)


def ldae_level(timestep: Tensor, config: LDAEConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of signal and noise, and the weight of the loss, at whole timesteps `(B,)`.

    - `linear`: gamma = 1, sigma = `max_sigma t / (T - 1)`, weight `1 / (1 + sigma^2)`: what the paper ends with.
    - `gamma`: `gamma^2 = 1 - t / (T - 1)`, `sigma^2 = 1 - gamma^2`, weight gamma^2: a stage before.
    - `single`: gamma = 1 and sigma = `max_sigma` at every timestep, weight 1.

    Returns:
        gamma, sigma and weight, `(B,)` float32.

    Example:
        >>> gamma, sigma, weight = ldae_level(torch.tensor([0, 999]), LDAEConfig())
        >>> sigma.tolist(), weight.tolist()
        ([0.0, 1.4142135381698608], [1.0, 0.3333333432674408])
    """
    share = timestep.float() / (config.num_train_timesteps - 1)
    one = torch.ones_like(share)
    if config.noise_rule == "gamma":
        return (1 - share).sqrt(), share.sqrt(), 1 - share
    if config.noise_rule == "single":
        return one, config.max_sigma * one, one
    sigma = config.max_sigma * share
    return one, sigma, 1 / (1 + sigma**2)


class LDAEObjective(Objective):
    """l-DAE (Chen et al. 2024, arXiv 2401.14404), and the stages by which its paper comes to it.

    With patches x, their coordinates `c = V_d (x - mean)` in d principal directions and noise eps of d numbers, the
    network sees the image of `V_d^T (gamma c + sigma eps) + mean` and predicts the whole of x:

        r = V (x - prediction)        loss = weight (sum_{i <= d} r_i^2 + residual_weight sum_{i > d} r_i^2) / D

    the mean over patches and images. Logs `signal` and `residual`, the two sums. With a residual weight of 1 and a
    weight of 1 the loss is the mean squared error of the pixels.

    The result is the encoder, the first blocks of the network at `feature_timestep`, as a plain vision transformer:
    `Encoder.from_pretrained(folder)`. `denoiser/` holds the whole network, `pca/` the directions.

    Args:
        network: Without classes.
        pca: Of its patches, fitted on the images that are trained on.
        config: Noise and weights.

    Raises:
        ValueError: If the network and the PCA have other patches or channels, or the network fewer blocks.
    """

    card = {"kind": "`IJepaModel`", "library_name": "transformers", "pipeline_tag": "image-feature-extraction",
            "tags": ["vision", "l-dae", "denoising-autoencoder"],
            "text": "Trained as a denoising autoencoder (l-DAE, arXiv 2401.14404). "
            '`Encoder.from_pretrained("{folder}")` of `diffusers_repr.encoders` reads it; the whole network lies in '
            "`denoiser/`, the directions of its noise in `pca/`."}  # fmt: skip

    def __init__(self, network: SiTTransformer2DModel, pca: PatchPCA, config: LDAEConfig) -> None:
        super().__init__()
        told, ours = pca.config, network.config
        if (told["patch_size"], told["in_channels"]) != (ours["patch_size"], ours["in_channels"]):
            raise ValueError(
                f"The PCA is of patches of {told['patch_size']} and {told['in_channels']} channels, the network of "
                f"{ours['patch_size']} and {ours['in_channels']}; fit it with those of the network."
            )
        depth = len(network.blocks)
        self.encoder_layers = max(1, depth // 2) if config.encoder_layers is None else config.encoder_layers
        if not 1 <= self.encoder_layers <= depth:
            raise ValueError(f"`encoder_layers` is 1 to {depth}, the network's blocks; got {self.encoder_layers}.")
        self.config, self.directions = config, int(told["num_directions"])
        self.network = network
        self.freeze("pca", pca)

    @property
    def pca(self) -> PatchPCA:
        """The space of the noise; frozen."""
        return self.frozen["pca"]

    # Loss

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss; whole timesteps `time` (B,) and `noise` (B, N, d) of a batch are taken, not drawn."""
        x0, generator, last = batch["pixel_values"].float(), batch.get("generator"), self.config.num_train_timesteps
        time, noise = batch.get("time"), batch.get("noise")
        if time is None:
            time = torch.randint(last, (len(x0),), generator=generator, device=x0.device)
        patches = self.pca.patches(x0)
        if noise is None:
            shape = (*patches.shape[:2], self.directions)
            noise = torch.randn(shape, generator=generator, device=x0.device)
        gamma, sigma, weight = ldae_level(time.to(x0.device), self.config)
        noisy = self.corrupt(patches, gamma, sigma, noise.to(x0.device))
        prediction = self.network(self.pca.images(noisy, (x0.shape[2], x0.shape[3])), time.to(x0.device)).sample
        error = self.pca.project(patches - self.pca.patches(prediction.float()), centred=False).square()
        terms = {"signal": error[..., : self.directions], "residual": error[..., self.directions :]}
        found = {name: (weight * part.sum(-1).mean(1)).mean() / error.shape[-1] for name, part in terms.items()}
        return weighted_sum(found, {"residual": self.config.residual_weight})

    def corrupt(self, patches: Tensor, gamma: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """What the network sees of patches `(B, N, D)`: `V_d^T (gamma c + sigma eps) + mean`.

        Args:
            patches: Clean ones.
            gamma: `(B,)`.
            sigma: `(B,)`.
            noise: eps, `(B, N, d)`.
        """
        coordinates = self.pca.project(patches)[..., : self.directions]
        return self.pca.unproject(gamma[:, None, None] * coordinates + sigma[:, None, None] * noise)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Images must be whole patches."""
        self.pca.patches(batch["pixel_values"][:1].float())

    def identity(self) -> dict[str, Any]:
        """How the noise is made, and the PCA in a few digits."""
        told = {name: value for name, value in dataclasses.asdict(self.config).items() if name != "model"}
        variances = [f"{value:.3g}" for value in self.pca.variances[: self.directions].tolist()]
        return {**super().identity(), "ldae": told, "pca": variances}

    # The result

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The representation `(B, D)` of clean images in [-1, 1]: mean tokens behind the encoder's last block."""
        path = f"blocks.{self.encoder_layers - 1}"
        with capture(self.network, path) as tape:
            self.network(images, float(self.config.feature_timestep))
        return tape[path].float().mean(1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, timestep: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees of images at a timestep, and what it makes of it, both `(B, C, H, W)`.

        Args:
            images: In [-1, 1].
            timestep: From 0 to T - 1.
            noise: `(B, N, d)`.
        """
        time = torch.full((len(images),), timestep, device=images.device)
        gamma, sigma, _ = ldae_level(time, self.config)
        size = (images.shape[2], images.shape[3])
        noisy = self.pca.images(self.corrupt(self.pca.patches(images), gamma, sigma, noise), size)
        return noisy, self.network(noisy, time).sample

    def artifacts(self) -> list[Artifact]:
        """The encoder with its preprocessing, the whole network, and the PCA."""
        size = self.network.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        half = [0.5] * self.network.config["in_channels"]
        return [
            EncoderArtifact(self.network, self.encoder_layers, self.config.feature_timestep),
            FixedArtifact(Preprocessor(size={"height": height, "width": width}, image_mean=half, image_std=half)),
            ModelArtifact(self.network, "network", folder="denoiser"),
            FixedArtifact(self.pca, folder="pca"),
        ]


@dataclasses.dataclass(frozen=True)
class EncoderArtifact(Artifact):
    """The first blocks of the trained network as a folder of transformers.

    Attributes:
        network: As it is in training; in the objective it is `network`.
        layers: How many blocks.
        timestep: What the network is told.
    """

    network: Any
    layers: int
    timestep: float

    @property
    def kind(self) -> str:
        """Class of what is saved."""
        return "IJepaModel"

    def build(self, state: State) -> Any:
        """See `Artifact.build`."""
        return plain_vit(rebuild(self.network, state, "network."), self.layers, self.timestep)

    def save(self, root: Path, state: State, dtype: torch.dtype) -> None:
        """See `Artifact.save`."""
        model = self.build(state).to(dtype)
        model.save_pretrained(root / self.folder)


__all__ = ["LDAEConfig", "LDAEObjective", "ldae_level"]
