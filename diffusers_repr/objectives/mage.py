"""`MAGEObjective`: a transformer that tells masked visual tokens, at shares of masks from half to all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.config.recipe import setting, take_arguments
from diffusers_repr.denoiser.prior import Prior
from diffusers_repr.hub.identity import weights_hash
from diffusers_repr.hub.own_pipelines import named_pipeline
from diffusers_repr.models.masked_token_model import MaskedTokenModel
from diffusers_repr.models.vq_tokens import check_vocabulary
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact, PipelineArtifact
from diffusers_repr.objectives.base import Batch, Objective
from diffusers_repr.objectives.token_masks import (
    batch_tokens,
    check_token_batch,
    masked_cross_entropy,
    truncated_normal,
)


@dataclasses.dataclass(frozen=True)
class MAGEConfig:
    """The network and its masks; the fields are keys of a recipe.

    Raises:
        ValueError: For a value out of its range, and arguments that the network does not have.
    """

    model: dict | str | None = setting(None, "arguments of MaskedTokenModel, but for vocabulary and condition")
    mask_ratio_min: float = setting(0.5, "smallest share of masked tokens; as many the encoder does not see")
    mask_ratio_max: float = setting(1.0, "largest share of masked tokens")
    mask_ratio_mean: float = setting(0.55, "of the normal distribution that is cut to these ends; 0.75 in RCG")
    mask_ratio_std: float = setting(0.25, "of the same distribution")
    label_smoothing: float = setting(0.1, "share of a target that is spread over all ids")
    condition_dropout: float = setting(0.1, "share of the vectors that become the null vector, where there are such")

    def __post_init__(self) -> None:
        take_arguments(self, model=MaskedTokenModel)
        own = sorted({"vocab_size", "condition_dim"} & set(self.model or {}))
        if own:
            raise ValueError(f"`model` takes {', '.join(own)} from the tokenizer and the data; leave them out.")
        if not 0 < self.mask_ratio_min <= self.mask_ratio_max <= 1 or self.mask_ratio_std <= 0:
            raise ValueError(
                "`mask_ratio_min` lies above 0 and up to `mask_ratio_max`, that up to 1, and `mask_ratio_std` above "
                f"0; got {self.mask_ratio_min}, {self.mask_ratio_max}, {self.mask_ratio_std}."
            )
        if not 0 <= self.label_smoothing < 1 or not 0 <= self.condition_dropout <= 1:
            raise ValueError(
                "`label_smoothing` lies from 0 to below 1 and `condition_dropout` from 0 to 1; got "
                f"{self.label_smoothing}, {self.condition_dropout}."
            )


class MAGEObjective(Objective):
    """Masked generative encoder (MAGE, Li et al. 2022, arXiv 2211.09117), without labels or on vectors as in RCG.

    `-log p(z | z masked)` of the masked tokens, the share of which is drawn from a truncated normal distribution. The
    encoder sees a fixed number of tokens, so each sample of a batch may have a share of its own; the authors' code
    draws one for all. Saved as a `TokenGenerationPipeline`, which generates and which `load_encoder` reads.

    A batch has `tokens` (B, N), or `pixel_values`, which are encoded; and `condition` (B, D) for a network with
    vectors. `mask_noise` (B, N) and `mask_ratio` (B,) in it are used instead of drawn ones.

    Args:
        network: What is trained.
        tokenizer: A `VQModel` of the network's vocabulary; frozen.
        config: Masks and loss.
        prior: Of the vectors, kept in the pipeline's folder, to draw from.

    Raises:
        TypeError: For what is no tokenizer.
        ValueError: For a tokenizer of another vocabulary.
    """

    card = {
        "kind": "masked model of visual tokens",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "diffusers-repr", "mage", "image-feature-extraction"],
    }

    def __init__(
        self, network: MaskedTokenModel, tokenizer: Any, config: MAGEConfig | None = None, prior: Prior | None = None
    ) -> None:
        super().__init__()
        check_vocabulary(network, tokenizer)
        self.network, self.config, self.prior = network, config or MAGEConfig(), prior
        self.freeze("tokenizer", tokenizer)
        self.kept = network.num_tokens - math.ceil(network.num_tokens * self.config.mask_ratio_min)

    @property
    def tokenizer(self) -> Any:
        """Images to tokens."""
        return self.frozen["tokenizer"]

    def masks(self, batch: Batch, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Masked tokens `(B, N)`, boolean, and the places `(B, M)` that the encoder sees."""
        config, places = self.config, self.network.num_tokens
        draw: dict[str, Any] = {"generator": batch.get("generator"), "device": device}
        noise = batch["mask_noise"] if "mask_noise" in batch else torch.rand(count, places, **draw)
        ratio = batch.get("mask_ratio")
        if ratio is None:
            ends = (config.mask_ratio_min, config.mask_ratio_max)
            ratio = truncated_normal(torch.rand(count, **draw), *ends, config.mask_ratio_mean, config.mask_ratio_std)
        order = noise.argsort(1)
        # The first in this order are masked; those that the encoder does not see are the first of these.
        rank = order.argsort(1)
        mask = rank < (places * ratio).ceil().clamp(places - self.kept, places)[:, None]
        return mask, order[:, places - self.kept :].sort(1).values

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """`loss`, and of the masked tokens `mask_ratio` and `accuracy`."""
        ids = batch_tokens(batch, self.tokenizer)
        mask, kept = self.masks(batch, len(ids), ids.device)
        masked = ids.masked_fill(mask, self.network.mask_token_id)
        logits = self.network(masked, **self._condition(batch, len(ids)), kept=kept, return_dict=False)[0]
        loss = masked_cross_entropy(logits, ids, mask, self.config.label_smoothing)
        right = (logits.detach().argmax(-1).eq(ids) & mask).sum(1) / mask.sum(1)
        return {"loss": loss, "accuracy": right.mean(), "mask_ratio": mask.float().mean()}

    def _condition(self, batch: Batch, count: int) -> dict[str, Tensor]:
        if self.network.condition_embed is None:
            return {}
        condition = batch["condition"]
        drawn = torch.rand(count, generator=batch.get("generator"), device=condition.device)
        return {"condition": condition, "drop_mask": drawn < self.config.condition_dropout}

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Tokens of the vocabulary, as many as the network has, and vectors where it is conditioned on them.

        Raises:
            ValueError: Naming what is wrong.
        """
        check_token_batch(batch, self.network, self.tokenizer)
        width, given = self.network.config["condition_dim"], batch.get("condition")
        if width and (not isinstance(given, Tensor) or given.ndim != 2 or given.shape[1] != width):
            found = "none" if given is None else tuple(given.shape)
            raise ValueError(
                f"The network is conditioned on vectors (B, {width}); the batch's `condition` is {found}."
            )

    def identity(self) -> dict[str, Any]:
        """The tokenizer and the masks."""
        own = {key: value for key, value in dataclasses.asdict(self.config).items() if key != "model"}
        return {"tokenizer": weights_hash(self.tokenizer), **own}

    def artifacts(self) -> list[Artifact]:
        """The pipeline: tokenizer and network."""
        pipe = named_pipeline("TokenGenerationPipeline")(self.tokenizer, self.network)
        pipe.stored_prior = self.prior
        return [PipelineArtifact(pipe, {"transformer": ModelArtifact(self.network, "network")})]


__all__ = ["MAGEConfig", "MAGEObjective"]
