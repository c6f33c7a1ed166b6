"""`PAG`: perturbed-attention guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffusers_repr.capture.batching import index_batch, without_rows
from diffusers_repr.capture.lanes import Lane, NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.attention.layers import resolve_attentions
from diffusers_repr.guidance.attention.perturbations import PERTURBATIONS, Drop, Identity, Perturbation, perturbed
from diffusers_repr.guidance.attention.projections import Needs, check_supported, named_arguments
from diffusers_repr.guidance.base import Guidance, GuidanceTerm
from diffusers_repr.guidance.step import GuidedStep


@dataclass(frozen=True)
class PAG(Guidance):
    """Perturbed-attention guidance: `eps + s (eps - eps_perturbed)` (Ahn et al. 2024, arXiv 2403.17377, eq. 16).

    The perturbed lane is the conditional one with the attention of some layers replaced, for image tokens, by the
    identity; it needs no condition and no training. With classifier-free guidance both terms add.

    Attributes:
        scale: s, the paper's; 0 is off. `guide_scale` of its code is s + 1. Default: diffusers' `pag_scale`.
        layers: Self-attention modules by exact path or whole-path pattern (`*` does not stop at dots); None takes the
            default of the architecture (`describe(pipe)`).
        perturbation: `identity` (the paper), `drop` (nothing attended), `blur` (queries smoothed over the image: SEG,
            arXiv 2408.00760), `mask` (a fixed random share of the pairs cut), or a `Blur(...)`, `Mask(...)`.

    Example:
        >>> PAG(4.0, layers="mid_block.*", interval=(200, 900)).scale
        4.0
    """

    scale: float = 3.0
    layers: str | Sequence[str] | None = None
    perturbation: str | Perturbation = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ", ".join(PERTURBATIONS)
        if not isinstance(self.perturbation, str | Perturbation):
            raise TypeError(f"perturbation is one of {known}, or a Blur or Mask; got {self.perturbation!r}.")
        if isinstance(self.perturbation, str) and self.perturbation not in PERTURBATIONS:
            raise ValueError(f"perturbation={self.perturbation!r}; it is one of {known}.")

    def bind(self, denoiser: Denoiser) -> PAGTerm:
        """Ready for a model.

        Raises:
            ValueError: For layers that match nothing or cross-attention only, and attention whose parts are hidden.
        """
        return PAGTerm(self, denoiser)


class PAGTerm(GuidanceTerm):
    """The perturbed lane, and its difference from the conditional one."""

    videos = True

    def __init__(self, config: PAG, denoiser: Denoiser) -> None:
        super().__init__(config, denoiser)
        chosen = config.layers
        self.layers = denoiser.default_layers("pag").layers if chosen is None else resolve_attentions(denoiser, chosen)
        named = config.perturbation
        self.perturbation: Any = PERTURBATIONS[named]() if isinstance(named, str) else named
        needs: Needs = "values" if isinstance(self.perturbation, Identity | Drop) else "queries"
        model, family = denoiser.model, denoiser.family
        self._layouts = {path: check_supported(family, model.get_submodule(path), path, needs) for path in self.layers}
        self.lane = Lane(self.key, {path: self._of(path) for path in self.layers})

    def _of(self, path: str) -> Any:
        layout, family = self._layouts[path], self.denoiser.family
        unbatched = without_rows(family)

        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], call: NetworkCall) -> Any:
            arguments = named_arguments(module, args, kwargs)
            hidden = arguments.get("hidden_states", next(iter(arguments.values())))
            if hidden.ndim == 4:
                return perturbed(module, layout, arguments, self.perturbation, (hidden.shape[2], hidden.shape[3]))
            found = self.denoiser.token_grid(path, hidden.shape[1], call.size)
            image = None
            if layout.single:
                inputs = index_batch(call.inputs, call.rows, call.batch.cond, unbatched)
                image = family.image_tokens(layout, inputs, hidden.shape[1])
            return perturbed(module, layout, arguments, self.perturbation, found[0] if found else None, image)

        return run

    def correction(self, step: GuidedStep) -> Tensor:
        """`eps - eps_perturbed`: of one input, so the same in every form of the prediction."""
        return step.cond - step.lanes[self.key]
