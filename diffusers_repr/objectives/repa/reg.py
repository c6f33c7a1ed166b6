"""REG (arXiv 2507.01467): the teacher's class token is noised and denoised together with the image."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser, FeatureMap
from diffusers_repr.denoiser.condition import forward_names
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.models.class_token import ClassTokenHead
from diffusers_repr.noise import add_noise, training_target
from diffusers_repr.objectives.artifacts import ModelArtifact
from diffusers_repr.objectives.auxiliary.base import Observation, full_precision, widen
from diffusers_repr.objectives.noisy import NoisyBatch
from diffusers_repr.objectives.repa.objective import REPAObjective
from diffusers_repr.objectives.teachers import Teachers


class REGObjective(REPAObjective):
    """REPA with the class token of the first encoder denoised as one more token of the sequence.

    Loss: denoising, `coefficient` times the alignment, whose targets include the class token, and `class_weight` times
    the squared error of the class token's own target, with the coefficients of each sample's time. The settings 0.03
    and 0.5 are those of the paper's repository. The saved `SiTPipeline` has the token's head as its component
    `class_token`, averaged as the network is, and denoises both together.

    Args:
        denoiser: Of a `SiTTransformer2DModel`; of a pipeline that has a `class_token`, that one is trained on.
        encoders: Their global features must be class tokens; at least one.
        layer: As `REPAObjective`.
        coefficient: lambda.
        class_weight: Of the class token's loss.
        **options: As `REPAObjective`.

    Raises:
        TypeError: For another network, or a pipeline that cannot hold a class token.
        ValueError: Without encoders, with a convolution as projector, together with self-alignment, or for a teacher
            whose class token has another width than the pipeline's.
    """

    trains_class_token = True
    own_losses = (*REPAObjective.own_losses, "class_token")
    card = {
        **REPAObjective.card,
        "text": "The network was trained together with a class token of its teacher (REG, arXiv 2507.01467): "
        "`SiTPipeline` denoises image and token together by its component `class_token`, and gives the tokens as "
        "`class_tokens`. The network alone, without the token, is not what was trained.\n",
    }

    def __init__(
        self,
        denoiser: Denoiser,
        encoders: Sequence[Any] | Mapping[str, Any],
        layer: str | None = None,
        coefficient: float | None = None,
        *,
        class_weight: float = 0.03,
        **options: Any,
    ) -> None:
        if not encoders:
            raise ValueError("REG denoises the class token of a teacher; pass encoders.")
        alignment = options.get("alignment")
        if alignment is not None and alignment.projector["kind"] != "mlp":
            raise ValueError("REG projects its class token as it does the others; take projector_kind='mlp'.")
        if any(loss.runs_network for loss in options.get("losses", ())):
            raise ValueError("The network that self-alignment runs has no class token; drop REG or SRA.")
        if not 0 <= class_weight < float("inf"):
            raise ValueError(f"class_weight must be finite and not negative; got {class_weight}.")
        _check_network(denoiser)
        super().__init__(denoiser, encoders, layer, coefficient, **options)
        self.class_weight, self.source = class_weight, next(iter(self.encoders))
        self._state: Tensor | None = None
        width, dim = denoiser.config["hidden_size"], self.encoders[self.source].dim
        self.class_token = self.frozen.pop("class_token", None) or ClassTokenHead(width, dim)
        self.class_token.requires_grad_(True)
        if self.class_token.config["token_dim"] != dim:
            raise ValueError(
                f"The pipeline denoises class tokens of {self.class_token.config['token_dim']} channels, those of "
                f"{self.source!r} have {dim}. Go on with the teacher it was trained with, or start the token anew: "
                "pipe.register_modules(class_token=None)."
            )

    def observe(self, noisy: NoisyBatch, teachers: Teachers | None = None) -> tuple[dict[str, Tensor], Observation]:
        """As `REPAObjective.observe`, with the class token in the sequence; adds its loss."""
        teachers = teachers or self.teachers_of(noisy)
        clean = widen(teachers.global_features(self.source))
        noise = torch.randn(clean.shape, generator=noisy.batch.get("generator"), device=clean.device)
        target = training_target(clean, noise, noisy.level, self.denoiser.schedule)
        entering = add_noise(clean, noisy.level, noise)
        token = self.class_token.enter(entering)
        noisy = replace(noisy, condition={**noisy.condition, "class_token": token})
        losses, seen = super().observe(noisy, teachers)
        state, self._state = self._state, None
        assert state is not None
        predicted = self.class_token.leave(state)
        with full_precision(clean.device):
            losses["class_token"] = F.mse_loss(widen(predicted), target)
        return losses, seen

    def predict(self, noisy: NoisyBatch) -> Tensor:
        """As `DiffusionObjective.predict`; what became of the class token is kept for `observe`."""
        x_t = noisy.x_t.to(floating_dtype(self.network))
        raw = self.network(**self.denoiser.network_inputs(x_t, noisy.level, noisy.condition))
        self._state = raw.class_token
        return self.denoiser.family.output(raw, noisy.x_t).float()

    def layer_tokens(self, path: str, value: Tensor, size: tuple[int, int]) -> FeatureMap:
        """The class token is set apart from the image's tokens."""
        if value.ndim != 3 or path == "proj_out":
            return super().layer_tokens(path, value, size)
        found = super().layer_tokens(path, value[:, :-1], size)
        return replace(found, values=value, class_at=-1)

    def queries_and_keys(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Without the class token."""
        return query[:, :, :-1], key[:, :, :-1]

    def loss_weights(self) -> dict[str, float]:
        """With that of the class token."""
        return {**super().loss_weights(), "class_token": self.class_weight}

    def networks(self) -> dict[str, nn.Module]:
        """The network alone: the head has no blocks and no attention."""
        return {"network": self.network}

    def identity(self) -> dict[str, Any]:
        """With the weight of the class token."""
        return {**super().identity(), "class_weight": self.class_weight}

    def trained_components(self) -> dict[str, ModelArtifact]:
        """The network and the class token's head: both are sampled with, and averaged."""
        return {**super().trained_components(), "class_token": ModelArtifact(self.class_token, "class_token")}


def _check_network(denoiser: Denoiser) -> None:
    """Raise TypeError unless network and pipeline have a place for a class token."""
    model, pipe = denoiser.model, denoiser.pipe
    if "class_token" not in forward_names(model):
        raise TypeError(f"A class token needs a SiTTransformer2DModel; got {type(model).__name__}. Use REPAObjective.")
    if pipe is not None and "class_token" not in inspect.signature(type(pipe).__init__).parameters:
        raise TypeError(f"A class token is saved in a SiTPipeline; got {type(pipe).__name__}.")


__all__ = ["REGObjective"]
