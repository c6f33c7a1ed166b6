"""`ADDPObjective`: a transformer that reads pixels of half-known images and tells their tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.config.recipe import setting, take_arguments
from diffusers_repr.hub.identity import weights_hash
from diffusers_repr.hub.own_pipelines import named_pipeline
from diffusers_repr.models.masked_token_model import MaskedTokenModel
from diffusers_repr.models.pixel_token_model import PixelTokenModel
from diffusers_repr.models.vq_tokens import check_vocabulary, decode_embeddings, mixed_embeddings
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact, PipelineArtifact
from diffusers_repr.objectives.base import Batch, Objective
from diffusers_repr.objectives.token_masks import (
    batch_tokens,
    check_token_batch,
    masked_cross_entropy,
    ratio_ladder,
)


@dataclasses.dataclass(frozen=True)
class ADDPConfig:
    """The student and its masks; the fields are keys of a recipe.

    Raises:
        ValueError: For a value out of its range, and arguments that the network does not have.
    """

    model: dict | str | None = setting(None, "arguments of PixelTokenModel, but for what the tokenizer tells")
    mask_ratio_min: float = setting(0.5, "smallest share of masked tokens")
    mask_ratio_mean: float = setting(0.55, "of the normal distribution by which shares are drawn")
    mask_ratio_std: float = setting(0.25, "of the same distribution")
    ladder_steps: int = setting(100, "steps of the cosine ladder of shares")
    most_steps: int = setting(5, "on it from the mask of the target to that of the canvas, at most")
    label_smoothing: float = setting(0.1, "share of a target that is spread over all ids")

    def __post_init__(self) -> None:
        take_arguments(self, model=PixelTokenModel)
        own = sorted({"vocab_size", "sample_size", "patch_size", "in_channels"} & set(self.model or {}))
        if own:
            raise ValueError(f"`model` takes {', '.join(own)} from the tokenizer and its predictor; leave them out.")
        if not 0 < self.mask_ratio_min < 1 or self.mask_ratio_std <= 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                "`mask_ratio_min` lies between 0 and 1, `mask_ratio_std` above 0 and `label_smoothing` from 0 to "
                f"below 1; got {self.mask_ratio_min}, {self.mask_ratio_std}, {self.label_smoothing}."
            )
        if self.most_steps < 1 or self.ladder_steps < 1:
            raise ValueError(
                f"`most_steps` and `ladder_steps` are 1 or more; got {self.most_steps}, {self.ladder_steps}."
            )
        ratio_ladder(self.mask_ratio_min, 1.0, self.mask_ratio_mean, self.mask_ratio_std, self.ladder_steps)


class ADDPObjective(Objective):
    """Alternating denoising diffusion process (ADDP, Tian et al. 2023, arXiv 2306.05423).

    A frozen predictor, a `MaskedTokenModel` of MAGE, tells the tokens from those that are not masked. With a mask
    that is up to `most_steps` further on the ladder its mean code fills the canvas where a token is masked; the
    canvas is decoded to pixels, which the student reads. What it shall tell there is what the predictor says. Both
    passes of the predictor are one batch. Saved as a `TokenGenerationPipeline`, which generates from pixel to token
    and back, and which `Encoder.from_pretrained` reads: then it sees plain images.

    A batch has `tokens` (B, N), or `pixel_values`, which are encoded. `mask_noise` (B, N) and `mask_counts`, the
    masked tokens of target and canvas, in it are used instead of drawn ones.

    Args:
        network: The student.
        tokenizer: A `VQModel`; frozen.
        predictor: A `MaskedTokenModel` without condition, of the same tokenizer; frozen.
        config: Masks and loss.

    Raises:
        TypeError: For what is no tokenizer, or no predictor.
        ValueError: For vocabularies and grids that differ, and a predictor that is conditioned on vectors.
    """

    card = {
        "kind": "encoder of pixels and generator of visual tokens",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "diffusers-repr", "addp", "image-feature-extraction"],
    }

    def __init__(
        self,
        network: PixelTokenModel,
        tokenizer: Any,
        predictor: MaskedTokenModel,
        config: ADDPConfig | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(predictor, MaskedTokenModel):
            raise TypeError(f"The predictor is a MaskedTokenModel, as MAGE trains it; got {type(predictor).__name__}.")
        check_vocabulary(predictor, tokenizer, "predictor")
        check_vocabulary(network, tokenizer, "student")
        if predictor.grid != network.grid or predictor.config["condition_dim"]:
            raise ValueError(
                f"The predictor is one without condition on {network.grid[0]} x {network.grid[1]} tokens; got one on "
                f"{predictor.grid[0]} x {predictor.grid[1]} with condition_dim={predictor.config['condition_dim']}."
            )
        self.network, self.config = network, config or ADDPConfig()
        self.freeze("tokenizer", tokenizer)
        self.freeze("predictor", predictor)
        ends = (self.config.mask_ratio_min, 1.0, self.config.mask_ratio_mean, self.config.mask_ratio_std)
        self.ladder, self.chances = ratio_ladder(*ends, self.config.ladder_steps)

    def counts(self, batch: Batch) -> tuple[int, int]:
        """Masked tokens of the target and, at least as many, of the canvas; one draw for all samples."""
        if "mask_counts" in batch:
            target, canvas = batch["mask_counts"]
            return int(target), int(canvas)
        # On the CPU: they decide shapes, and the device is not waited for.
        drawn = batch.get("generator")
        generator = drawn if drawn is not None and drawn.device.type == "cpu" else None
        at = int(torch.multinomial(self.chances, 1, generator=generator))
        step = int(torch.randint(1, self.config.most_steps + 1, (), generator=generator))
        shares = self.ladder[at], self.ladder[min(at + step, len(self.ladder) - 1)]
        target, canvas = (math.ceil(self.network.num_tokens * share) for share in shares)
        return target, canvas

    @torch.no_grad()
    def predictions(self, ids: Tensor, target_mask: Tensor, canvas_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the predictor says with either mask, `(B, N, V)` each, float32: one forward of both."""
        predictor = self.frozen["predictor"]
        both = torch.cat([ids, ids]).masked_fill(torch.cat([target_mask, canvas_mask]), predictor.mask_token_id)
        logits = predictor(both, return_dict=False)[0]
        target, canvas = logits.float().softmax(-1).chunk(2)
        return target, canvas

    @torch.no_grad()
    def canvas(self, ids: Tensor, mask: Tensor, probabilities: Tensor) -> Tensor:
        """Pixels in [-1, 1]: codes of the ids, and expected codes where a token is masked, decoded."""
        tokenizer = self.frozen["tokenizer"]
        return decode_embeddings(
            tokenizer, mixed_embeddings(tokenizer, ids, mask, probabilities), self.network.grid
        ).clamp(-1, 1)

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """`loss`, the `mask_ratio`, and how often the most likely token is that of the image: `accuracy`."""
        ids = batch_tokens(batch, self.frozen["tokenizer"])
        masked, more = self.counts(batch)
        noise = batch.get("mask_noise")
        if noise is None:
            noise = torch.rand(ids.shape, generator=batch.get("generator"), device=ids.device)
        order = noise.argsort(1)
        rank = order.argsort(1)
        mask = rank < masked
        target, guess = self.predictions(ids, mask, rank < more)
        known = order[:, masked:].sort(1).values
        logits = self.network(self.canvas(ids, mask, guess), ids, mask, known, return_dict=False)[0]
        loss = masked_cross_entropy(logits, target, mask, self.config.label_smoothing)
        right = (logits.detach().argmax(-1).eq(ids) & mask).sum(1) / mask.sum(1)
        return {"loss": loss, "accuracy": right.mean(), "mask_ratio": mask.float().mean()}

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Tokens of the vocabulary, as many as the network has.

        Raises:
            ValueError: Naming what is wrong.
        """
        check_token_batch(batch, self.network, self.frozen["tokenizer"])

    def identity(self) -> dict[str, Any]:
        """Tokenizer, predictor and masks."""
        own = {key: value for key, value in dataclasses.asdict(self.config).items() if key != "model"}
        return {**{name: weights_hash(part) for name, part in self.frozen.items()}, **own}

    def artifacts(self) -> list[Artifact]:
        """The pipeline: tokenizer and student."""
        pipe = named_pipeline("TokenGenerationPipeline")(self.frozen["tokenizer"], self.network)
        return [PipelineArtifact(pipe, {"transformer": ModelArtifact(self.network, "network")})]


__all__ = ["ADDPConfig", "ADDPObjective"]
