"""What `check_family` tries with a family: guidance by three methods, training and alignment."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser import list_layers
from diffusers_repr.encoders import Encoder
from diffusers_repr.guidance import CFG, PAG, EnergyGuidance, Guidance, guide
from diffusers_repr.objectives import DiffusionObjective, REPAObjective
from diffusers_repr.testing.family_case import FamilyCase, Lacks, Wrong

_SCALE = 2.0


def check_pag(case: FamilyCase) -> str:
    """The default layers are attention among image tokens, and perturbing them acts."""
    denoiser, family = case.denoiser, case.denoiser.family
    known = family.self_attentions(denoiser.model)
    if not known:
        near = [path for path, part in denoiser.model.named_modules() if "attention" in type(part).__name__.lower()]
        hint = f" (perhaps {near[0]!r})" if near else ""
        raise Lacks(
            f"no attention among image tokens is known{hint}. Where there is some, write `attentions = {{pattern of "
            "its paths: AttentionLayout(...)}`."
        )
    layers = denoiser.default_layers("pag").layers
    outside = [path for path in layers if not family.is_image(path)]
    if outside:
        raise Wrong(f"the default layer {outside[0]!r} is no image by `not_image`. Write `layer_defaults` for 'pag'.")
    _check_image_tokens(case, layers[0])
    plain, guided = case.output(), _guided(case, PAG(_SCALE))
    if torch.equal(plain, guided):
        raise Wrong(f"perturbing {', '.join(layers)} changes nothing. Write `layer_defaults` for 'pag'.")
    return f"{', '.join(layers)}"


def _check_image_tokens(case: FamilyCase, path: str) -> None:
    denoiser, seen = case.denoiser, []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 3]
        seen.append(tensors[0].shape[1] if tensors else 0)

    module = denoiser.model.get_submodule(path)
    layout = denoiser.family.attention(path, module)
    if not layout.single:
        return
    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        case.output()
    finally:
        handle.remove()
    tokens, inputs = seen[0], case.inputs()
    try:
        image = denoiser.family.image_tokens(layout, inputs, tokens)
    except KeyError as error:
        raise Wrong(
            f"`image_tokens` looks for the input {error}, which the network has not. Write `def image_tokens(self, "
            f"layout, inputs, tokens)`: which of the {tokens} tokens of {path!r} are the image's."
        ) from error
    count = image.shape[1] if isinstance(image, Tensor) else len(range(*image.indices(tokens)))
    grid = denoiser.token_grid(path, tokens, case.latent)
    cells = None if grid is None else torch.Size(grid[0]).numel()
    if cells is not None and count != cells:
        raise Wrong(f"`image_tokens` finds {count} tokens of the image in {path!r}, and `grid` {cells} of {tokens}.")
    if cells is not None and grid is not None and isinstance(image, slice) and image.indices(tokens)[0] != grid[1]:
        raise Wrong(
            f"`image_tokens` has the image from token {image.indices(tokens)[0]} of {path!r} on, and `grid` from "
            f"{grid[1]} on."
        )


def check_cfg(case: FamilyCase) -> str:
    """`null + s (cond - null)`, from two calls by hand."""
    if case.null is None:
        raise Lacks(f"{case.why_no_null}.")
    cond, null = case.output(), case.output(case.null)
    if torch.allclose(cond, null):
        raise Wrong("the condition and the null one give one prediction: the condition does not reach the network.")
    found = _guided(case, CFG(_SCALE), null=case.null)
    wanted = null + _SCALE * (cond - null)
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * max(1.0, float(wanted.abs().max()))):
        apart = float((found - wanted).abs().max())
        raise Wrong(f"the guided prediction is not null + s (cond - null), by {apart:.3g}.")
    return ""


def check_energy(case: FamilyCase) -> str:
    """A gradient comes back through the network, from the estimate and from a layer."""
    if case.denoiser.family.axes != 2:
        raise Lacks("it is for networks of images.")
    plain = case.output()
    layer = list_layers(case.denoiser, case.size)[-1].path

    def bright(features: Any, x0: Tensor | None, condition: Any) -> Tensor:
        value = features[layer] if x0 is None else x0
        return value.square().mean((1, 2, 3))

    energies = {
        "the estimate": EnergyGuidance(bright, scale=50.0),
        repr(layer): EnergyGuidance(bright, scale=50.0, layers=layer, x0=False),
    }
    for what, energy in energies.items():
        found = _guided(case, energy)
        if not bool(found.isfinite().all()) or torch.equal(found, plain):
            raise Wrong(f"the gradient of an energy of {what} changes nothing, or is not finite.")
    return ""


def _guided(case: FamilyCase, guidance: Guidance, **null: Any) -> Tensor:
    with torch.no_grad(), case.denoiser.evaluating(), guide(case.denoiser, guidance, **null):
        return case.denoiser.predict(case.x_t, case.level, case.condition).output.detach()


def check_training(case: FamilyCase) -> str:
    """A loss whose gradient reaches the network."""
    batch = _batch(case)
    _step(DiffusionObjective(copy.deepcopy(case.denoiser), label_dropout=0.0), batch)
    return ""


def check_repa(case: FamilyCase) -> str:
    """The default layer is found, gives an image, and is aligned."""
    batch = _batch(case)
    try:
        layer = case.denoiser.default_layers("repa").layers[0]
    except ValueError as error:
        raise Lacks(f"{error} In a family: `stacks = (path of the list of blocks,)`.") from error
    own = case.denoiser.image_size
    found = {one.path: one for one in list_layers(case.denoiser, own, "all")}
    if layer not in found:
        raise Wrong(f"the default layer {layer!r} gives no image. Write `layer_defaults` for 'repa', or `grid`.")
    patch, channels = own[0] // found[layer].grid[0], case.denoiser.image_channels
    teacher = Encoder.from_module(
        nn.Conv2d(channels, 4, patch, stride=patch), patch_size=patch, channels=channels, name="teacher"
    )
    _step(REPAObjective(copy.deepcopy(case.denoiser), [teacher], projector_dim=8, label_dropout=0.0), batch)
    return layer


def _batch(case: FamilyCase) -> dict[str, Any]:
    """Two images of the model's own size, with the condition that training asks for."""
    denoiser = case.denoiser
    if denoiser.family.axes != 2:
        raise Lacks("networks of videos are not trained.")
    size = denoiser.resize_to()
    if size is None:
        raise Lacks("size() tells none, which training needs. Write `def size(self)`.")
    generator = torch.Generator().manual_seed(3)
    batch: dict[str, Any] = {
        "pixel_values": torch.rand(2, denoiser.image_channels, *size, generator=generator) * 2 - 1
    }
    conditioner = denoiser.conditioner
    if conditioner.argument == "prompt":
        if denoiser.pipe is None:
            raise Lacks("captions need a pipeline that encodes them: Denoiser.from_pipe(pipe).")
        try:
            denoiser.condition(["a cat", "a dog"])
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise Lacks(f"this pipeline encodes no prompt ({type(error).__name__}: {text}).") from error
        return {**batch, "caption": ["a cat", "a dog"]}
    if conditioner.kind == "vectors":
        shape = denoiser.family.example(2, "cpu")[denoiser.family.vector_input() or ""].shape
        return {**batch, conditioner.column: torch.randn(shape, generator=generator)}
    return {**batch, "class_labels": torch.tensor([0, 1 % max(1, denoiser.family.classes()[0])])}


def _step(objective: DiffusionObjective, batch: dict[str, Any]) -> None:
    """Of an objective whose denoiser is a copy: it is left with hooks and gradients."""
    denoiser = objective.denoiser
    device = denoiser.device
    objective.train()
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    objective.check_batch(given)
    loss = objective.to(device)({**given, "micro": 0})["loss"]
    loss.backward()
    if not bool(loss.isfinite()):
        raise Wrong(f"the loss is {float(loss.detach())}.")
    if not any(p.grad is not None and bool(p.grad.any()) for p in denoiser.model.parameters()):
        raise Wrong("no gradient of the loss reaches the network: see that `inputs` and `output` detach nothing.")


__all__ = ["check_cfg", "check_energy", "check_pag", "check_repa", "check_training"]
