"""`TokenizerObjective`: a `VQModel` whose codes are all used, for models of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from diffusers_repr.config.recipe import setting, take_arguments
from diffusers_repr.models.gathered import gathered
from diffusers_repr.models.vq_tokens import check_tokenizer, decode_embeddings, vocabulary_size
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact
from diffusers_repr.objectives.auxiliary.base import full_precision, widen
from diffusers_repr.objectives.base import Batch, Objective, weighted_sum


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer and its loss; the fields are keys of a recipe.

    Raises:
        ValueError: If an argument of the tokenizer is unknown, or a weight is out of its range.
    """

    model: dict | str | None = setting(None, "arguments of VQModel, a mapping (JSON in a flag)")
    distance: str = setting("l1", "of image and reconstruction: l1 or mse")
    commitment_weight: float = setting(0.25, "of the distance of the latents from their codes")
    entropy_weight: float = setting(0.1, "of what keeps codes in use: certain ones a latent, many in a batch")
    entropy_temperature: float = setting(0.1, "of the softmax over squared distances to the codes")

    def __post_init__(self) -> None:
        take_arguments(self, model=VQModel)
        if dict(self.model or {}).get("lookup_from_codebook"):  # type: ignore[arg-type]
            raise ValueError("`model` has lookup_from_codebook, whose decoder gives no gradient to the encoder.")
        if self.distance not in ("l1", "mse"):
            raise ValueError(f"`distance` is l1 or mse, got {self.distance!r}.")
        if min(self.commitment_weight, self.entropy_weight) < 0 or self.entropy_temperature <= 0:
            raise ValueError(
                "`commitment_weight` and `entropy_weight` are 0 or more, `entropy_temperature` above 0; got "
                f"{self.commitment_weight}, {self.entropy_weight}, {self.entropy_temperature}."
            )


def new_tokenizer(config: TokenizerConfig) -> VQModel:
    """A tokenizer with random weights; its codes are as wide apart as latents are, of which none is out of reach."""
    vqvae = VQModel(**config.model)  # type: ignore[arg-type]
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    return vqvae


def code_entropies(squared: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean entropy of the codes of a latent, and entropy of the mean: how certain each is, how many are used.

    The first less the second is what MaskGIT's tokenizer keeps small beside its other losses (Chang et al. 2022,
    arXiv 2202.04200, its code).

    Args:
        squared: Distances `(M, V)` of latents from codes, squared.
        temperature: Of the softmax.
    """
    logs = (-squared / temperature).log_softmax(-1)
    mean = logs.exp().mean(0)
    if dist.is_initialized() and dist.get_world_size() > 1:
        mean = gathered(mean[None]).mean(0)  # of the batch of all processes: its entropy is no mean over samples
    return -(logs.exp() * logs).sum(-1).mean(), -(mean * mean.clamp_min(1e-12).log()).sum()


class TokenizerObjective(Objective):
    """A `VQModel` (van den Oord et al. 2017, arXiv 1711.00937): distance, codebook, commitment and entropy.

    Without the perceptual and adversarial losses of a VQGAN: for small or plain images. Logs how many codes a batch
    uses as `perplexity`.

    Args:
        vqvae: What is trained.
        config: Weights of the losses.
    """

    card = {"kind": "`VQModel`", "library_name": "diffusers", "pipeline_tag": None, "tags": ["diffusers", "vq"]}

    def __init__(self, vqvae: VQModel, config: TokenizerConfig | None = None) -> None:
        super().__init__()
        self.vqvae, self.config = check_tokenizer(vqvae).requires_grad_(True), config or TokenizerConfig()

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """`loss`, and unweighted `reconstruction`, `codebook`, `commitment` and `entropy`."""
        images, config = batch["pixel_values"], self.config
        latents = self.vqvae.encode(images, return_dict=False)[0]
        with full_precision(images.device):
            flat = widen(latents).permute(0, 2, 3, 1).flatten(0, 2)  # M, D
            codes = widen(self.vqvae.quantize.embedding.weight)
            squared = flat.square().sum(1, True) - 2 * flat @ codes.T + codes.square().sum(1)
            ids = squared.detach().argmin(1)
            chosen = codes[ids]
            straight = flat + (chosen - flat).detach()  # the gradient passes the codes by
            sure, used = code_entropies(squared, config.entropy_temperature)
            terms = {
                "codebook": F.mse_loss(chosen, flat.detach()),
                "commitment": F.mse_loss(flat, chosen.detach()),
                "entropy": sure - used,
            }
        grid = (latents.shape[2], latents.shape[3])
        codes_in = straight.to(latents.dtype).view(len(images), -1, flat.shape[1])
        made = decode_embeddings(self.vqvae, codes_in, grid)
        distance = F.l1_loss if config.distance == "l1" else F.mse_loss
        with full_precision(images.device):
            terms["reconstruction"] = distance(widen(made), widen(images))
        weights = {"commitment": config.commitment_weight, "entropy": config.entropy_weight}
        counts = torch.bincount(ids, minlength=vocabulary_size(self.vqvae)).to(squared.dtype)
        shares = counts / counts.sum()
        perplexity = (-(shares * shares.clamp_min(1e-12).log()).sum()).exp()
        return {**weighted_sum(terms, weights), "perplexity": perplexity}

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Images must be there, of sides that the tokenizer halves without a rest.

        Raises:
            ValueError: With the size.
        """
        images = batch.get("pixel_values")
        if images is None:
            raise ValueError("A tokenizer is trained on images (pixel_values), not on cached latents or tokens.")
        stride = 2 ** (len(self.vqvae.config["block_out_channels"]) - 1)
        if images.shape[2] % stride or images.shape[3] % stride:
            raise ValueError(
                f"Images are {images.shape[2]} x {images.shape[3]}; a token of this tokenizer is {stride} pixels "
                "wide, which must divide both sides."
            )

    def identity(self) -> dict[str, Any]:
        """The losses."""
        return {key: value for key, value in dataclasses.asdict(self.config).items() if key != "model"}

    def artifacts(self) -> list[Artifact]:
        """The tokenizer as a folder of diffusers."""
        return [ModelArtifact(self.vqvae, "vqvae")]


__all__ = ["TokenizerConfig", "TokenizerObjective", "code_entropies", "new_tokenizer"]
