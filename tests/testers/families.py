"""What a family's own pipeline does: the calls of its network and the steps of its scheduler, kept."""

import contextlib
import inspect
from typing import Any

import torch
from torch.nn import functional


def network_of(pipe) -> torch.nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def sides(size: tuple[int, ...]) -> dict[str, int]:
    """A size (H, W), or (frames, H, W), as a pipeline's call takes it."""
    return dict(zip(("num_frames", "height", "width")[-len(size) :], size, strict=True))


def network_calls(pipe, call: dict[str, Any], size: tuple[int, ...], steps: int = 1) -> tuple[list[dict], list[dict]]:
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
        result = own(*args, **kwargs)
        made.append({**given, "scheduler": pipe.scheduler, "result": result[0]})
        return result

    handle = network.register_forward_pre_hook(before, with_kwargs=True)
    pipe.scheduler.step = step
    try:
        pipe(
            **call, **sides(size), num_inference_steps=steps, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    finally:
        handle.remove()
        del pipe.scheduler.step
    return calls, made


@contextlib.contextmanager
def own_image_token_alone(network, paths: list[str], image: int, last: bool):
    """In these attention modules an image token sees itself and what is no image, by a mask over all pairs.

    Args:
        network: Whose attention calls `scaled_dot_product_attention` once a module.
        paths: Attention modules.
        image: Number of image tokens.
        last: Whether they stand last in the softmax, or first.
    """
    plain, inside, handles = functional.scaled_dot_product_attention, [], []

    def attention(query, key, value, attn_mask=None, *args, **more):
        if not inside:
            return plain(query, key, value, attn_mask, *args, **more)
        tokens = key.shape[-2]
        own = slice(tokens - image, tokens) if last else slice(0, image)
        allowed = torch.ones(tokens, tokens, dtype=torch.bool)
        allowed[own, own] = torch.eye(image, dtype=torch.bool)
        scores = torch.zeros(tokens, tokens).masked_fill(~allowed, -torch.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
        return plain(query, key, value, attn_mask=scores if attn_mask is None else scores + attn_mask, **more)

    for path in paths:
        module = network.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda *_: inside.append(1)))
        handles.append(module.register_forward_hook(lambda *_: inside.clear()))
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain
        for handle in handles:
            handle.remove()


def two_lanes(pipe, scale: float, paths: list[str], image: int, last: bool, cond: str) -> None:
    """Make the network of a pipeline give `out + scale (cond - perturbed)` in every row, by a second forward a call.

    Args:
        pipe: Changed for good.
        scale: Of the difference.
        paths: As `own_image_token_alone`.
        image: As there.
        last: As there.
        cond: Where the conditional rows are: `first` or `second` half of a call, or the first `call` at each level.
    """
    network, levels = network_of(pipe), []
    plain = network.forward

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)[0]
        level = kwargs.get("timestep", kwargs.get("t", args[1] if len(args) > 1 else None)).flatten()[0].item()
        if cond == "call" and levels and levels[-1][0] == level:
            return (
                ([value + change for value, change in zip(out, levels[-1][1], strict=True)],)
                if isinstance(out, list)
                else (out + levels[-1][1],)
            )
        with own_image_token_alone(network, paths, image, last):
            other = plain(*args, **kwargs)[0]
        if isinstance(out, list):
            half = len(out) // 2 if cond == "first" else len(out)
            change = [scale * (a - b) for a, b in zip(out[:half], other[:half], strict=True)]
            return ([value + change[at % half] for at, value in enumerate(out)],)
        change = scale * (out - other)
        if cond == "second":
            half = change.shape[0] // 2
            change = torch.cat([change[half:]] * 2)
        levels.append((level, change))
        return (out + change,)

    network.forward = forward
