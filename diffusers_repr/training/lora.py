"""Low-rank adapters by peft: tune a pretrained denoiser by a small part of its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffusers_repr.objectives import Objective, PipelineArtifact

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def add_lora(objective: Objective, rank: int) -> None:
    """Freeze each of `objective.networks()` and put adapters into its attention (Hu et al. 2021, arXiv 2106.09685).

    Only the adapters, and whatever else the objective trains (projectors, heads), are trained then. The saved
    pipeline has them merged into its weights, and beside these the adapters alone, as diffusers loads them, where it
    does; `not_apart` says where not.

    Args:
        objective: Before it is prepared.
        rank: Of the adapters; their alpha is the same, so that they enter with factor 1.

    Raises:
        ValueError: If a network has no attention layer by diffusers' names.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for path, module in objective.networks().items():
        names = [name for name, child in module.named_modules() if _targeted(name, child)]
        if not names:
            raise ValueError(
                f"--lora_rank found no attention projection ({', '.join(TARGETS)}) in {type(module).__name__} "
                f"({path}); train all weights (--lora_rank 0)."
            )
        module.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), module)


def not_apart(objective: Objective) -> str | None:
    """Why the result of a run with adapters has them in its merged weights alone; None where they lie apart, too."""
    first = objective.artifacts()[0]
    networks = list(objective.networks().values())
    loadable = any(hasattr(module, "load_lora_adapter") for module in networks)
    if not isinstance(first, PipelineArtifact) or loadable or hasattr(first.pipeline, "load_lora_weights"):
        return None
    kinds = ", ".join(type(module).__name__ for module in networks)
    return (
        f"Low-rank adapters are merged into the weights that are saved, and not saved apart: diffusers loads none "
        f"into a {kinds}."
    )


def _targeted(name: str, module: Any) -> bool:
    ends = any(name == target or name.endswith(f".{target}") for target in TARGETS)
    return ends and isinstance(module, nn.Linear)
