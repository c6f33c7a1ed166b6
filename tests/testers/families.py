"""What a family's own pipeline does: the calls of its network and the steps of its scheduler, kept."""

import inspect
from typing import Any

import torch


def network_of(pipe) -> torch.nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def network_calls(pipe, call: dict[str, Any], size: tuple[int, int], steps: int = 1) -> tuple[list[dict], list[dict]]:
    """Arguments by name of each network call and of each scheduler step of a run."""
    network, calls, made = network_of(pipe), [], []
    names = list(inspect.signature(type(network).forward).parameters)[1:]
    own = pipe.scheduler.step

    def before(module, args, kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given.pop("return_dict", None)
        calls.append(given)

    def step(*args, **kwargs):
        given = {**dict(zip(("model_output", "timestep", "sample"), args, strict=False)), **kwargs}
        made.append({**given, "scheduler": pipe.scheduler})
        return own(*args, **kwargs)

    handle = network.register_forward_pre_hook(before, with_kwargs=True)
    pipe.scheduler.step = step
    try:
        pipe(
            **call, height=size[0], width=size[1], num_inference_steps=steps, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    finally:
        handle.remove()
        del pipe.scheduler.step
    return calls, made
