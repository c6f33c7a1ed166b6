"""`REPAObjective`: denoising with representation alignment, and whatever other terms are read in the same forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.capture.names import check_layers
from diffusers_repr.capture.persistent import PersistentCapture
from diffusers_repr.denoiser import Denoiser, FeatureMap, list_layers
from diffusers_repr.denoiser.layers import Layer
from diffusers_repr.heads.projector import ProjectorKind
from diffusers_repr.objectives.alignment import AlignmentTerm
from diffusers_repr.objectives.base import Batch, rebuild, weighted_sum
from diffusers_repr.objectives.blocks import repa_layer
from diffusers_repr.objectives.diffusion import DiffusionObjective, NoisyBatch
from diffusers_repr.objectives.haste import AttentionAlignmentTerm
from diffusers_repr.objectives.matching import MatchGrid
from diffusers_repr.objectives.teachers import Teachers, missing, name_encoders
from diffusers_repr.objectives.terms import AuxiliaryLoss, Step
from diffusers_repr.objectives.times import TimeSampler


class REPAObjective(DiffusionObjective):
    """Denoising loss plus `coefficient` times the alignment loss (Yu et al. 2024, arXiv 2410.06940, eq. 8 and 9).

    The hidden states of one layer, through a small projector, are drawn to the patch features that frozen encoders
    give of the clean image. Any family of `Denoiser`, any noise process, any layer of maps or tokens. The projectors
    are no part of the network: the saved pipeline is a plain one.

    Args:
        denoiser: As in `DiffusionObjective`.
        encoders: `Encoder`s, or name -> `Encoder`; `CachedFeatures` where all features lie in a cache. None of them:
            the plain denoising loss.
        layer: Path of the one layer that is aligned, such as `blocks.3`; `repa_layer(denoiser)` if None. Papers count
            blocks from 1, paths from 0: REPA's encoder depth 8 is `blocks.7`.
        coefficient: lambda.
        match_grid: Where the token grids of layer and encoder differ: `resize_image` gives the encoder images of
            another size, `pool_student` averages the layer's tokens, `interpolate_teacher` resizes the encoder's
            features. None refuses.
        projector_dim: Hidden width of the projector.
        projector_kind: `mlp`, or `conv` as iREPA.
        projector_kernel: Side of that convolution.
        spatial_norm: Standardise the targets over their tokens with this gamma, as iREPA; None: not.
        stop_step: Optimizer steps after which the alignment ends, as HASTE; None: never.
        terms: Further losses: `DispersiveTerm`, `AttentionAlignmentTerm`, `SelfAlignmentTerm`, or an `AuxiliaryLoss`
            of one's own.
        **options: `time_sampling`, `label_dropout`, `null_label` of `DiffusionObjective`.

    Raises:
        ValueError: For a layer that does not exist or is no image, grids that differ without `match_grid`, two terms
            of one name.
        RuntimeError: If the network is compiled already.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from diffusers_repr.encoders import Encoder
        >>> unet = UNet2DModel(8, 3, 3, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> teacher = Encoder.from_module(nn.Conv2d(3, 5, 2, stride=2), patch_size=2, name="teacher")
        >>> objective = REPAObjective(Denoiser(unet, DDPMScheduler()), [teacher], "mid_block", projector_dim=16)
        >>> sorted(objective({"pixel_values": torch.zeros(2, 3, 8, 8)}))
        ['alignment', 'denoising', 'loss']
    """

    def __init__(
        self,
        denoiser: Denoiser,
        encoders: Sequence[Any] | Mapping[str, Any] = (),
        layer: str | None = None,
        coefficient: float = 0.5,
        *,
        match_grid: MatchGrid | None = None,
        projector_dim: int = 2048,
        projector_kind: ProjectorKind = "mlp",
        projector_kernel: int = 3,
        spatial_norm: float | None = None,
        stop_step: int | None = None,
        terms: Sequence[AuxiliaryLoss] = (),
        time_sampling: TimeSampler | None = None,
        label_dropout: float = 0.1,
        null_label: int | None = None,
    ) -> None:
        super().__init__(denoiser, time_sampling=time_sampling, label_dropout=label_dropout, null_label=null_label)
        self.encoders = name_encoders(encoders)
        chosen = list(terms)
        if self.encoders:
            layer = repa_layer(denoiser) if layer is None else layer
            chosen.insert(
                0,
                AlignmentTerm(
                    layer,
                    coefficient,
                    match_grid,
                    projector_dim,
                    projector_kind,
                    projector_kernel,
                    spatial_norm,
                    stop_step,
                ),
            )
        self.terms = nn.ModuleDict(_by_name(chosen))
        self._layers: dict[str, Layer] | None = None
        for term in chosen:
            term.attach(self)
        for name, encoder in self.encoders.items():
            if hasattr(encoder, "encode_pixels"):
                self.freeze(f"encoder-{name}", encoder)
        layers = dict.fromkeys(path for term in chosen for path in term.layers)
        attentions = dict.fromkeys(path for term in chosen for path in term.attentions)
        self.capture = PersistentCapture(self.network, list(layers), list(attentions))

    def place(self, path: str) -> Layer:
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

    # Loss

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """`loss`, and unweighted `denoising` and each term: the loss is exactly their weighted sum."""
        return self.combine(*self.observe(self.noised(batch)))

    def observe(self, noisy: NoisyBatch, teachers: Teachers | None = None) -> tuple[dict[str, Tensor], Step]:
        """Run the network on a noisy batch.

        Args:
            noisy: From `noised`.
            teachers: Of this batch, where the caller has them already.

        Returns:
            The losses that the network's output gives, unweighted, and what terms may look at.
        """
        with self.capture.recording() as seen:
            prediction = self.predict(noisy)
        size = (noisy.x0.shape[2], noisy.x0.shape[3])
        step = Step(
            noisy,
            prediction,
            {path: self.layer_tokens(path, seen[path], size) for path in self.capture.layers},
            {path: self.queries_and_keys(*seen[path]) for path in self.capture.attentions},
            teachers or self.teachers_of(noisy),
        )
        return {"denoising": F.mse_loss(prediction, noisy.target)}, step

    def teachers_of(self, noisy: NoisyBatch) -> Teachers:
        """The encoders' features for a batch."""
        stride = self.denoiser.stride
        size = (noisy.x0.shape[2] * stride, noisy.x0.shape[3] * stride)
        wanted = {
            str(term.encoder): term.teacher_layers
            for _, term in self.each_term()
            if isinstance(term, AttentionAlignmentTerm) and term.active
        }
        return Teachers(self.encoders, noisy.batch, size, noisy.x0.device, wanted)

    def combine(self, losses: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """Add the terms to the losses, and weigh them."""
        weights = self.weights()
        idle: list[Tensor] = []
        for name, term in self.each_term():
            if term.active:
                losses[name] = term(step)
            else:
                idle.append(term.untouched().to(step.prediction.device))
        out = weighted_sum(losses, weights)
        if idle:
            out["loss"] = out["loss"] + sum(idle)
        return out

    def weights(self) -> dict[str, float]:
        """Factor of each term; 1 for those left out."""
        return {name: term.weight for name, term in self.each_term()}

    def each_term(self) -> Iterator[tuple[str, AuxiliaryLoss]]:
        """The terms by name, in order."""
        for name, term in self.terms.items():
            assert isinstance(term, AuxiliaryLoss)
            yield name, term

    def layer_tokens(self, path: str, value: Tensor, size: tuple[int, int]) -> FeatureMap:
        """What a layer returned, as tokens of the image."""
        return self.denoiser.feature_map(path, value, size)

    def queries_and_keys(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the image's tokens, `(B, heads, N, d)`."""
        return query, key

    # What the loop asks for

    @property
    def needs_pixels(self) -> bool:  # type: ignore[override]
        """True where an encoder is loaded: without cached features it wants images."""
        return any(hasattr(encoder, "encode_pixels") for encoder in self.encoders.values())

    def on_step_end(self, step: int, ema: Any) -> None:
        """Tell every term."""
        for _, term in self.each_term():
            term.on_step_end(step, ema)

    def heads(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The projectors, `projector-<encoder>` each, and what other terms train; as trained, not averaged."""
        found: dict[str, Any] = {}
        for name, term in self.each_term():
            for folder, path in term.head_modules().items():
                found[folder] = rebuild(term.get_submodule(path), state, f"terms.{name}.{path}.")
        return found

    def head_modules(self) -> dict[str, nn.Module]:
        """See `heads`."""
        terms = [term for _, term in self.each_term()]
        return {name: term.get_submodule(path) for term in terms for name, path in term.head_modules().items()}

    def head_config(self, name: str) -> dict[str, Any]:
        """As the term tells that the head is of."""
        return next((term.head_config(name) for _, term in self.each_term() if name in term.head_modules()), {})

    def identity(self) -> dict[str, Any]:
        """Settings of every term, and the fingerprints of the encoders."""
        return {
            **super().identity(),
            "terms": {name: term.describe() for name, term in self.each_term()},
            "encoders": {name: encoder.fingerprint() for name, encoder in self.encoders.items()},
        }

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Also: features of every encoder must be there, or images to make them from.

        Raises:
            ValueError: Naming what is missing.
        """
        super().check_batch(batch)
        for name, encoder in self.encoders.items():
            problem = None if name in batch.get("features", {}) else missing(name, encoder, batch)
            if problem is None and any(term.reads_pixels for _, term in self.each_term()):
                problem = missing(name, encoder, batch)
            if problem:
                raise ValueError(problem)


def _by_name(terms: Sequence[AuxiliaryLoss]) -> dict[str, AuxiliaryLoss]:
    named: dict[str, AuxiliaryLoss] = {}
    for term in terms:
        if not isinstance(term, AuxiliaryLoss):
            raise TypeError(f"terms holds a {type(term).__name__}; each must be a AuxiliaryLoss.")
        if term.name in named or term.name == "denoising":
            raise ValueError(f"Two losses are called {term.name!r}; give one another name.")
        named[term.name] = term
    return named


__all__ = ["REPAObjective"]
