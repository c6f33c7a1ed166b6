"""`DiffusionObjective`: the plain denoising loss of any `Denoiser`, and what the methods built on it share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.capture.names import check_layers
from diffusers_repr.denoiser import Denoiser, FeatureMap, LabelConditioner, list_layers
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.denoiser.layers import Layer
from diffusers_repr.denoiser.parts import COMPONENTS
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.denoiser.vae import draw_latents, has_posterior
from diffusers_repr.encoders import ImageEncoder
from diffusers_repr.hub.own_pipelines import named_pipeline
from diffusers_repr.noise import add_noise, training_target
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact, PipelineArtifact
from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss, Observation
from diffusers_repr.objectives.auxiliary.losses import AuxiliaryLosses
from diffusers_repr.objectives.base import Batch, Objective
from diffusers_repr.objectives.card import card_of
from diffusers_repr.objectives.noisy import NoisyBatch
from diffusers_repr.objectives.teachers import Teachers, missing, name_encoders
from diffusers_repr.objectives.times import TimeSampler


class DiffusionObjective(Objective):
    """Mean squared error of what the network predicts (Ho et al. 2020, eq. 14; Lipman et al. 2022, eq. 9).

    Works for every family and noise process that `Denoiser` knows: epsilon, sample, v, flow velocity on the linear and
    cosine path, EDM. All of a denoiser's network is trained unless its parameters say otherwise.

    Args:
        denoiser: From `Denoiser.from_pipe(pipe)`, so that the result can be saved as this pipeline, or from parts.
        losses: Losses beside the denoising loss, read in the same forward: `AlignmentLoss`, `DispersiveLoss`,
            `AttentionAlignmentLoss`, `SelfAlignmentLoss`, or an `AuxiliaryLoss` of one's own.
        encoders: Frozen teachers of these: `Encoder`s, or name -> `Encoder`; `CachedFeatures` where all features lie
            in a cache.
        time_sampling: How noise levels are drawn.
        label_dropout: Probability that a sample's condition (class, caption, vector, ...) becomes null, one draw a
            sample (Ho and Salimans 2022, arXiv 2207.12598, alg. 1). With 1 data without captions will do.
        null_label: Id of the null class where the family does not tell (`UNet2DModel`: the last id by default),
            -1 for none.

    Raises:
        ValueError: If conditions are to be dropped and there is no null one; for a pipeline whose network denoises a
            class token, which this method would not train; for two losses of one name.
        RuntimeError: If losses read layers and the network is compiled already.

    Attributes:
        conditioner: The denoiser's: what batches are to have, and how the network gets it.
        trains_class_token: Whether the method trains the `class_token` of a pipeline (REG).
        own_losses: Names of what the method itself logs.
    """

    trains_class_token: bool = False
    own_losses: tuple[str, ...] = ("loss", "denoising")

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        losses: Sequence[AuxiliaryLoss] = (),
        encoders: Sequence[Any] | Mapping[str, Any] = (),
        time_sampling: TimeSampler | None = None,
        label_dropout: float = 0.1,
        null_label: int | None = None,
    ) -> None:
        super().__init__()
        self.check_denoiser(denoiser)
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout is a probability; got {label_dropout}.")
        self.denoiser, self.network = denoiser, denoiser.model
        own = {key: value for key, value in type(self).card.items() if value != Objective.card.get(key)}
        self.card = {**Objective.card, **card_of(denoiser), **own}  # what a method says of itself stays
        self.time_sampling, self.label_dropout = time_sampling or TimeSampler(), label_dropout
        self.conditioner = denoiser.conditioner
        if null_label is not None:
            if not isinstance(self.conditioner, LabelConditioner):
                raise ValueError(f"null_label={null_label}, but the model is conditioned on {self.conditioner.kind}.")
            self.conditioner = LabelConditioner(null_label).bound_to(denoiser)
        self.conditioner.check_dropout(label_dropout)
        if getattr(denoiser.pipe, "class_token", None) is not None and not self.trains_class_token:
            raise ValueError(
                f"This pipeline denoises images together with a class token (REG), and {type(self).__name__} would "
                "train its network without one, though the result is sampled with it. Go on by REGObjective "
                "(`reg_weight`), or drop the token for good: pipe.register_modules(class_token=None)."
            )
        if denoiser.vae is not None:
            self.freeze("vae", denoiser.vae)
        if denoiser.pipe is not None:
            trained = (self.network, denoiser.vae, *self.conditioner.trained_parts().values())
            for name, part in denoiser.pipe.components.items():
                if isinstance(part, torch.nn.Module) and not any(part is other for other in trained):
                    self.freeze(name, part)
        for name, part in self.conditioner.trained_parts().items():
            self.add_module(name, part)
        self.encoders = name_encoders(encoders)
        self._layers: dict[str, Layer] | None = None
        # "terms" is how checkpoints call the weights of these.
        self.add_module("terms", AuxiliaryLosses(losses, self.own_losses))
        self.losses.attach(self)
        for name, encoder in self.encoders.items():
            if isinstance(encoder, ImageEncoder):
                self.freeze(f"encoder-{name}", encoder)

    @property
    def losses(self) -> AuxiliaryLosses:
        """The auxiliary losses by name."""
        return self._modules["terms"]  # type: ignore[return-value]

    def layer(self, path: str) -> Layer:
        """Channels and grid of a layer, measured without weights.

        Raises:
            ValueError: If it does not exist (names the closest), or gives no image.
        """
        check_layers(self.network, path)
        if self._layers is None:
            self._layers = {found.path: found for found in list_layers(self.denoiser, detail="all")}
        if path not in self._layers:
            raise ValueError(
                f"Layer {path!r} gives no image of maps or tokens. `list_layers(denoiser)` shows the layers that do."
            )
        return self._layers[path]

    def check_denoiser(self, denoiser: Denoiser) -> None:
        """Refuse what the method does not train: by default networks of videos and of vectors.

        Raises:
            ValueError: With the reason.
        """
        require_images(denoiser, "Training")

    # Drawing

    def clean(self, batch: Batch) -> Tensor:
        """x_0 of a batch: pixels, or latents drawn from the VAE's posterior if it has one, float32."""
        if self.denoiser.vae is None:
            return batch["pixel_values"].float()
        if "moments" in batch:
            return draw_latents(batch["moments"], self.denoiser.vae, batch.get("generator"))
        sample = has_posterior(self.denoiser.vae)
        return self.denoiser.encode_pixels(
            batch["pixel_values"], sample=sample, generator=batch.get("generator")
        ).float()

    def noised(self, batch: Batch, x0: Tensor | None = None, drop: bool = True) -> NoisyBatch:
        """Draw time and noise for a batch, and drop its labels.

        Args:
            batch: See `Objective`; `time` and `noise` in it are taken as they are.
            x0: Clean data where the caller has them already.
            drop: False keeps every label.
        """
        x0 = self.clean(batch) if x0 is None else x0
        generator = batch.get("generator")
        if "time" in batch:
            level = self.denoiser.level(batch["time"])
        else:
            level = self.time_sampling.draw(self.denoiser.schedule, len(x0), generator)
        level = level.to(x0.device)
        noise = batch.get("noise")
        if noise is None:
            noise = torch.randn(x0.shape, device=x0.device, generator=generator)
        condition = self.condition(batch, len(x0), drop)
        target = training_target(x0, noise, level, self.denoiser.schedule)
        return NoisyBatch(x0, noise, level, add_noise(x0, level, noise), target, condition, batch)

    def condition(self, batch: Batch, count: int, drop: bool = True) -> dict[str, Any]:
        """The network's further inputs; a dropped condition is null for the whole network."""
        chance = self.label_dropout if drop else 0.0
        values = self.conditioner.from_batch(batch, count)
        dropped = self.conditioner.draw_dropped(values, chance, batch.get("generator"))
        return self.conditioner.inputs(values, dropped)

    # Loss

    def predict(self, noisy: NoisyBatch) -> Tensor:
        """What the network returns for a noisy batch, a learned variance split off, in float32."""
        x_t = noisy.x_t.to(floating_dtype(self.network))  # a network kept in half precision takes halves
        inputs = self.denoiser.network_inputs(x_t, noisy.level, noisy.condition)
        raw = self.network(**inputs)
        return self.denoiser.family.output(raw, noisy.x_t).float()

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """`loss`: the mean squared error over all elements; with further losses their weighted sum, and each."""
        out = self.combine(*self.observe(self.noised(batch)))
        return out if self.losses else {"loss": out["loss"]}

    def observe(self, noisy: NoisyBatch, teachers: Teachers | None = None) -> tuple[dict[str, Tensor], Observation]:
        """Run the network on a noisy batch.

        Args:
            noisy: From `noised`.
            teachers: Of this batch, where the caller has them already.

        Returns:
            The losses that the network's output gives, unweighted, and what the others may look at.
        """
        with self.losses.recording() as recorded:
            prediction = self.predict(noisy)
        seen = self.observation(noisy, prediction, recorded, teachers)
        return {"denoising": F.mse_loss(prediction, noisy.target)}, seen

    def observation(
        self, noisy: NoisyBatch, prediction: Tensor, recorded: Mapping[str, Any], teachers: Teachers | None = None
    ) -> Observation:
        """What the auxiliary losses look at.

        Args:
            noisy: What the network got.
            prediction: What it returned.
            recorded: Of `losses.recording()`, in which it ran.
            teachers: Of this batch, where the caller has them already.
        """
        size, capture = noisy.size, self.losses.capture
        layers, attentions = ((), ()) if capture is None else (capture.layers, capture.attentions)
        return Observation(
            noisy,
            prediction,
            {path: self.layer_tokens(path, recorded[path], size) for path in layers},
            {path: self.queries_and_keys(*recorded[path]) for path in attentions},
            teachers or self.teachers_of(noisy),
        )

    def teachers_of(self, noisy: NoisyBatch) -> Teachers:
        """The encoders' features for a batch."""
        (height, width), stride = noisy.size, self.denoiser.stride
        size = (height * stride, width * stride)
        return Teachers(self.encoders, noisy.batch, size, noisy.x0.device, self.losses.teacher_attentions())

    def combine(self, losses: dict[str, Tensor], seen: Observation) -> dict[str, Tensor]:
        """Add the auxiliary losses, and weigh all: the loss is exactly the weighted sum of what is logged."""
        return self.losses.combine(losses, seen, self.loss_weights())

    def loss_weights(self) -> dict[str, float]:
        """Factor of each loss; 1 for those left out."""
        return {name: loss.current_weight for name, loss in self.losses.each.items()}

    def layer_tokens(self, path: str, value: Tensor, size: tuple[int, int]) -> FeatureMap:
        """What a layer returned, as tokens of the image."""
        return self.denoiser.feature_map(path, value, size)

    def queries_and_keys(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the image's tokens, `(B, heads, N, d)`."""
        return query, key

    def on_step_end(self, step: int, ema: Any) -> None:
        """Tell every auxiliary loss."""
        for loss in self.losses.each.values():
            loss.on_step_end(step, ema)

    def trained_state(self) -> dict[str, Tensor]:
        """With what the auxiliary losses keep, such as a teacher that follows the network."""
        return {**super().trained_state(), **self.losses.kept_state("terms")}

    def identity(self) -> dict[str, Any]:
        """Settings of the conditioner and every auxiliary loss, and the fingerprints of the encoders."""
        own = {"conditioner": self.conditioner.describe()} if self.conditioner.recorded else {}
        if not self.losses:
            return {**super().identity(), **own}
        return {
            **super().identity(),
            **own,
            "terms": {name: loss.describe() for name, loss in self.losses.each.items()},
            "encoders": {name: encoder.fingerprint() for name, encoder in self.encoders.items()},
        }

    # Checks

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """The condition must be there, and in range (captions need not, if `label_dropout` is 1); what encoders need.

        Raises:
            ValueError: Naming what is wrong and what is allowed, or what is missing.
        """
        self.check_encoders(batch)
        self.conditioner.check_batch(batch, self.label_dropout)

    def check_encoders(self, batch: Mapping[str, Any]) -> None:
        """Features of every encoder must be there, or images to make them from.

        Raises:
            ValueError: Naming what is missing.
        """
        live = any(loss.reads_pixels for loss in self.losses.each.values())
        for name, encoder in self.encoders.items():
            if live or name not in batch.get("features", {}):
                problem = missing(name, encoder, batch)
                if problem:
                    raise ValueError(problem)

    def check_data(self, data: Any) -> None:
        """The classes of the data must be those of the model.

        Raises:
            ValueError: Naming both numbers.
        """
        self.conditioner.check_data(data)

    # The result

    def artifacts(self) -> list[Artifact]:
        """The denoiser's pipeline with the trained network in it, and the heads of the losses."""
        return [PipelineArtifact(self.denoiser.pipe, self.trained_components()), *self.losses.artifacts("terms")]

    def trained_components(self) -> dict[str, ModelArtifact]:
        """What is trained of the pipeline, by its name there."""
        pipe = self.denoiser.pipe
        slot = next((name for name in COMPONENTS if pipe and getattr(pipe, name, None) is self.network), "network")
        own = {name: ModelArtifact(part, name) for name, part in self.conditioner.trained_parts().items()}
        return {slot: ModelArtifact(self.network, "network"), **own}

    def preview(self, pipe: Any, count: int, generator: torch.Generator, steps: int) -> list[Any]:
        """Samples; of class-conditional models the classes in turn, rows of 8 a class."""
        given = self.conditioner.preview(count)
        pipe = self.previewing(pipe) if "class_labels" in given else pipe
        return pipe(**given, generator=generator, num_inference_steps=steps).images

    @staticmethod
    def previewing(pipe: Any) -> Any:
        """A pipeline that takes class_labels, of the same network; diffusers has none for a `UNet2DModel`."""
        if "class_labels" in inspect.signature(type(pipe).__call__).parameters:
            return pipe
        pipe = named_pipeline("GuidedUnconditionalPipeline")(pipe.unet, pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def preview_labels(self, count: int) -> Sequence[int] | None:
        """See `Objective`."""
        return self.conditioner.preview(count).get("class_labels")


__all__ = ["DiffusionObjective"]
