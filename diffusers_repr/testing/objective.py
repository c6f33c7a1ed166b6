"""`check_objective` and `check_auxiliary_loss`: what `train` relies on in a training method."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.models import SiTTransformer2DModel
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.objectives import AuxiliaryLoss, Batch, DiffusionObjective, Objective
from diffusers_repr.objectives.artifacts import ModelArtifact, check_places, trained_parts


def tiny_denoiser(layers: int = 4) -> Denoiser:
    """A SiT of some thousand random weights for images of 8 x 8 and 5 classes, to try a loss on.

    Args:
        layers: Number of its blocks, `blocks.0` and so on.
    """
    network = SiTTransformer2DModel(
        sample_size=8, patch_size=2, num_layers=layers, hidden_size=16, num_attention_heads=2, num_classes=5,
        in_channels=3,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():  # a new SiT is the identity, in which half of all gradients are 0
            parameter.normal_(0, 0.2, generator=generator)
    return Denoiser(network, schedule=NoiseSchedule("flow", "velocity"))


def tiny_batch(count: int = 3) -> Batch:
    """Images and classes for `tiny_denoiser`."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    return {"pixel_values": images, "class_labels": torch.arange(count) % 5}


def check_objective(objective: Objective, batch: Batch) -> None:
    """Check that an objective keeps what `train` relies on: losses, gradients, state, and what it saves.

    Args:
        objective: On the CPU; it is left in training mode, with gradients.
        batch: As its data give it.

    Raises:
        AssertionError: Naming what does not hold.
    """
    objective.train()
    objective.check_batch(batch)
    for phase in objective.phases:
        check_phase(objective, batch, phase)
    check_state(objective)
    check_artifacts(objective)


def check_phase(objective: Objective, batch: Batch, phase: str) -> None:
    """The losses of a phase are finite scalars; its gradient reaches what it trains, and nothing frozen."""
    objective.zero_grad()
    out = objective({**batch, "micro": 0}, phase=phase)
    for name, value in out.items():
        _holds(isinstance(value, Tensor) and value.ndim == 0, f"{name!r} of the phase {phase!r} is no scalar tensor")
        _holds(name == "loss" or not value.requires_grad, f"{name!r} is logged with its graph; detach it")
    _holds(bool(out["loss"].isfinite()), f"the loss of the phase {phase!r} is {float(out['loss'].detach())}")
    groups = objective.param_groups(phase)
    trained = {id(p): p for group in groups for p in group["params"]}
    names = {id(p): name for name, p in objective.named_parameters()}
    _holds(trained.keys() <= names.keys(), "param_groups names parameters that are none of the objective's")
    _holds(bool(trained), f"the phase {phase!r} trains nothing")
    out["loss"].backward()
    untouched = sorted(names[key] for key, p in trained.items() if p.grad is None)
    _holds(not untouched, f"no gradient of the phase {phase!r} reaches {untouched}, which it trains")
    wrong = sorted(name for name, p in _frozen_parameters(objective) if p.grad is not None)
    _holds(not wrong, f"the frozen {wrong} got gradients")


def check_state(objective: Objective) -> None:
    """Frozen parts are in eval mode and no part of the state; the average is kept of submodules; settings are JSON."""
    owned = {id(p) for p in objective.parameters()}
    for name, part in objective.frozen.items():
        modes = [module.training for module in part.modules()] if isinstance(part, nn.Module) else []
        _holds(not any(modes), f"the frozen {name!r} is in training mode; keep it by `freeze`, not as a submodule")
    inside = sorted(name for name, p in _frozen_parameters(objective) if id(p) in owned)
    _holds(not inside, f"the frozen {inside} are parameters of the objective")
    state, kept = objective.state_dict(), objective.trained_state()
    places = {p.data_ptr() for _, p in _frozen_parameters(objective)}
    more = sorted(name for name in kept.keys() - state.keys() if kept[name].data_ptr() not in places)
    _holds(not more, f"trained_state holds {more}, which neither state_dict nor a frozen part has")
    for path, module in objective.ema_modules().items():
        _holds(_lies_at(objective, path, module), f"ema_modules names {path!r}, and another module lies there")
    identity = objective.identity()
    try:
        plain = json.loads(json.dumps(identity))
    except TypeError as error:
        raise AssertionError(f"The contract does not hold: identity is no JSON ({error}).") from error
    _holds(isinstance(plain, dict), f"identity is a {type(identity).__name__}, not a dict")
    objective.on_step_end(0, _Average(objective))


def check_artifacts(objective: Objective) -> None:
    """What is saved has the weights of the state it is given, shares none with it, and loads again by its class."""
    artifacts = objective.artifacts()
    try:
        check_places(artifacts, type(objective).__name__)
    except ValueError as error:
        raise AssertionError(f"The contract does not hold: {error}") from error
    state = {name: value + 1 if value.is_floating_point() else value for name, value in objective.state_dict().items()}
    before = {name: value.clone() for name, value in state.items()}
    for part in trained_parts(artifacts):
        _holds(_lies_at(objective, part.path, part.module), f"{part} says that it lies at {part.path!r}")
        if type(part) is ModelArtifact:
            _same_weights(part, part.build(state), state, "made")
    with tempfile.TemporaryDirectory() as folder:
        objective.save_pretrained(folder, state, torch.float32)
        _holds(any(Path(folder).iterdir()), "save_pretrained wrote nothing")
        for artifact in artifacts:
            if type(artifact) is ModelArtifact:
                again = type(artifact.build(state)).from_pretrained(Path(folder) / artifact.folder)
                _same_weights(artifact, again, state, "saved")
    changed = [name for name, value in before.items() if not torch.equal(value, state[name])]
    _holds(not changed, f"saving changed the state: {changed}")


def _lies_at(objective: Objective, path: str, module: nn.Module) -> bool:
    return dict(objective.named_modules(remove_duplicate=False)).get(path) is module


def _same_weights(part: ModelArtifact, model: nn.Module, state: Mapping[str, Tensor], how: str) -> None:
    found = model.state_dict()
    wrong = [n for n in part.module.state_dict() if not torch.equal(found[n], state[f"{part.path}.{n}"])]
    _holds(not wrong, f"{part} is {how} with other weights than those at {part.path!r}: {wrong}")


def check_auxiliary_loss(
    loss: AuxiliaryLoss,
    *,
    encoders: Sequence[Any] | Mapping[str, Any] = (),
    denoiser: Denoiser | None = None,
    batch: Batch | None = None,
) -> DiffusionObjective:
    """Check that an auxiliary loss adds itself to a denoising loss, and nothing else.

    Args:
        loss: New, attached to nothing yet.
        encoders: Teachers that it needs.
        denoiser: What it is attached to, with its VAE and conditioner; `tiny_denoiser()` if None.
        batch: Its data; images and classes for that if None.

    Returns:
        The objective that it was tried in.

    Raises:
        AssertionError: Naming what does not hold.
    """
    denoiser, batch = denoiser or tiny_denoiser(), batch or tiny_batch()
    middle = round(sum(denoiser.schedule.timestep_range) / 2)
    settled = {**batch, "time": torch.full((len(batch["pixel_values"]),), middle)}
    plain = DiffusionObjective(denoiser, label_dropout=0.0).train()  # before the loss is attached: nothing of it acts
    torch.manual_seed(0)
    wanted = plain(settled)["loss"].detach()
    objective = DiffusionObjective(denoiser, losses=[loss], encoders=encoders, label_dropout=0.0).train()
    torch.manual_seed(0)
    out = objective(settled)
    value = out.get(loss.name)
    _holds(value is not None and value.ndim == 0 and bool(value.isfinite()), f"{loss.name!r} is no finite scalar")
    assert value is not None
    _holds(value.dtype in (torch.float32, torch.float64), f"{loss.name!r} is {value.dtype}; make losses in float32")
    _holds(torch.equal(out["denoising"], wanted), f"{loss.name!r} changes what the network returns")
    total = out["denoising"] + loss.weight * value
    _holds(torch.allclose(out["loss"].detach(), total), f"the loss is no denoising + {loss.weight} {loss.name}")
    step, loss.stop_step = loss.stop_step, 0
    ended = objective(settled)
    loss.stop_step = step
    _holds(loss.name not in ended, f"{loss.name!r} is told after its stop_step")
    check_heads(objective, loss)
    check_phase(objective, settled, "main")
    check_state(objective)
    return objective


def check_heads(objective: DiffusionObjective, loss: AuxiliaryLoss) -> None:
    """The heads of a loss load by their class, with their weights."""
    state = objective.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        for head in objective.losses.artifacts("terms"):
            head.save(Path(folder), state, torch.float32)
            again = type(head.build(state)).from_pretrained(Path(folder) / head.folder)
            _same_weights(head, again, state, f"saved by {loss.name!r}")


class _Average:
    """Stands for the moving average of the loop."""

    def __init__(self, objective: Objective) -> None:
        self.shadow = {name: value.detach().clone() for name, value in objective.state_dict().items()}


def _frozen_parameters(objective: Objective) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the frozen parts, also of those that are no modules but hold one (an `Encoder`)."""
    parts = {name: getattr(part, "module", part) for name, part in objective.frozen.items()}
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    return [(f"{name}.{place}", p) for name, part in modules.items() for place, p in part.named_parameters()]


def _holds(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"The contract does not hold: {message}.")


__all__ = ["check_auxiliary_loss", "check_objective", "tiny_batch", "tiny_denoiser"]
