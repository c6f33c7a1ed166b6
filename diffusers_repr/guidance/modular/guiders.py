"""`CFGGuider`, `PAGGuider`, `AutoGuidanceGuider`: guidances for diffusers' modular pipelines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import eval_mode, forward_names
from diffusers_repr.denoiser.family import BatchLanes
from diffusers_repr.denoiser.hooks import Hooks
from diffusers_repr.guidance.attention.perturbations import PERTURBATIONS, Perturbation
from diffusers_repr.guidance.auto import AutoGuidance, AutoGuidanceTerm, network_of
from diffusers_repr.guidance.base import Interval, make_guider
from diffusers_repr.guidance.cfg import CFG
from diffusers_repr.guidance.modular.guider import Guider, NegativePrediction
from diffusers_repr.guidance.pag import PAG, PAGTerm
from diffusers_repr.noise import NoiseLevel, NoiseSchedule

Timesteps = Sequence[float]

# A guider gets neither the noise process nor a level; what it uses of a model and of a call asks for none.
_UNREAD = NoiseSchedule("flow", "velocity")
_LEVEL = NoiseLevel(timestep=0)


class CFGGuider(Guider):
    """`CFG` as a guider: classifier-free guidance within an interval of training timesteps.

    Made by `CFG(...).as_guider()`. The loops of diffusers ask it for a prediction a condition, so outside of the
    interval the null condition is not run.

    Args:
        guidance_scale: s; 1 is off.
        guidance_interval: `(low, high)`, both included, in training timesteps; None is all steps.
        guidance_rescale: Share of the result that is brought to the conditional prediction's standard deviation.
        enabled: False gives the conditional prediction.
    """

    @register_to_config
    def __init__(
        self,
        *,
        guidance_scale: float = 7.5,
        guidance_interval: Timesteps | None = None,
        guidance_rescale: float = 0.0,
        enabled: bool = True,
    ) -> None:
        interval = timesteps(guidance_interval)
        self.register_to_config(guidance_interval=interval)
        super().__init__(CFG(guidance_scale, interval=interval, rescale=guidance_rescale), None, 1000, enabled)


class PAGGuider(Guider):
    """`PAG` as a guider: `null + s (cond - null) + w (cond - perturbed)`; without CFG `cond + w (cond - perturbed)`.

    Made by `PAG(...).as_guider()`. The perturbed prediction has the conditional inputs and perturbed attention among
    image tokens, at all steps by default. (`PerturbedAttentionGuidance` of diffusers 0.42 without CFG runs the null
    condition unperturbed in its place, stops after a fifth of the steps, and skips attention whose back-end it does
    not know.)

    Args:
        guidance_scale: s, of classifier-free guidance; 1 is off.
        pag_scale: w; 0 is off.
        pag_layers: As `PAG.layers`, found in the network when it is called.
        perturbation: As `PAG.perturbation`; in the saved config `{"name": "blur", "sigma": 2.0}`.
        pag_interval: `(low, high)`, both included, in training timesteps; None is all steps.
        pag_adaptive: As `PAG.adaptive`.
        num_train_timesteps: T of the adaptive scale.
        guidance_interval: As `CFGGuider`.
        guidance_rescale: As `CFGGuider`; the perturbed term is added after.
        enabled: False gives the conditional prediction.

    Example:
        >>> from diffusers_repr.guidance import Blur
        >>> guider = PAG(2.0, perturbation=Blur(1.5)).as_guider(cfg=5.0)
        >>> guider.new(pag_scale=4.0).config.perturbation
        {'name': 'blur', 'sigma': 1.5}
    """

    @register_to_config
    def __init__(
        self,
        *,
        guidance_scale: float = 1.0,
        pag_scale: float = 3.0,
        pag_layers: str | Sequence[str] | None = None,
        perturbation: str | Perturbation | Mapping[str, Any] = "identity",
        pag_interval: Timesteps | None = None,
        pag_adaptive: float = 0.0,
        num_train_timesteps: int = 1000,
        guidance_interval: Timesteps | None = None,
        guidance_rescale: float = 0.0,
        enabled: bool = True,
    ) -> None:
        own, other = timesteps(pag_interval), timesteps(guidance_interval)
        layers = pag_layers if pag_layers is None or isinstance(pag_layers, str) else list(pag_layers)
        self.register_to_config(
            pag_layers=layers, perturbation=_plain(perturbation), pag_interval=own, guidance_interval=other
        )
        term = PAG(pag_scale, layers, _made(perturbation), interval=own, adaptive=pag_adaptive)
        cfg = CFG(guidance_scale, interval=other, rescale=guidance_rescale)
        super().__init__(cfg, term, num_train_timesteps, enabled)

    def _negative(self, denoiser: nn.Module) -> NegativePrediction:
        assert isinstance(self._term, PAG)
        whole = Denoiser(denoiser, schedule=_UNREAD)
        lane = PAGTerm(self._term.replace(interval=None, adaptive=0.0), whole).lane
        assert lane is not None
        names = forward_names(denoiser)

        def run(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            x = whole.family.sample(inputs)
            rows = x.shape[0]
            call = NetworkCall(inputs, rows, BatchLanes(slice(0, rows)), x, _LEVEL)
            left = set(lane.modules)

            def changed(path: str) -> Callable[..., Any]:
                def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                    left.discard(path)
                    return lane.modules[path](module, args, kwargs, call)

                return hook

            with ExitStack() as stack:
                hooks = Hooks(stack)
                for path in lane.modules:
                    hooks.after(denoiser.get_submodule(path), changed(path))
                output = inner(*args, **kwargs)
            if left:
                raise RuntimeError(f"{sorted(left)} did not run in the forward; nothing was perturbed there.")
            return output

        return run


class AutoGuidanceGuider(Guider):
    """`AutoGuidance` as a guider: `null + s (cond - null) + w (cond - weaker)`, the weaker model with the condition.

    Made by `AutoGuidance(...).as_guider()`. The weaker model is no part of the config: `from_pretrained` and
    `from_config` need `weaker_model=`.

    Args:
        weaker_model: The network; called in place of the pipeline's, with the same inputs.
        guidance_scale: s, of classifier-free guidance; 1 is off.
        auto_scale: w; 0 is off.
        auto_interval: `(low, high)`, both included, in training timesteps; None is all steps.
        auto_adaptive: As `AutoGuidance.adaptive`.
        num_train_timesteps: T of the adaptive scale.
        guidance_interval: As `CFGGuider`.
        guidance_rescale: As `CFGGuider`; the other term is added after.
        enabled: False gives the conditional prediction.

    Raises:
        TypeError: Without a weaker model.
    """

    @register_to_config
    def __init__(
        self,
        *,
        weaker_model: nn.Module | None = None,
        guidance_scale: float = 1.0,
        auto_scale: float = 1.1,
        auto_interval: Timesteps | None = None,
        auto_adaptive: float = 0.0,
        num_train_timesteps: int = 1000,
        guidance_interval: Timesteps | None = None,
        guidance_rescale: float = 0.0,
        enabled: bool = True,
    ) -> None:
        own, other = timesteps(auto_interval), timesteps(guidance_interval)
        self.register_to_config(weaker_model=None, auto_interval=own, guidance_interval=other)
        if not isinstance(weaker_model, nn.Module):
            raise TypeError(f"AutoGuidanceGuider needs weaker_model=, a network; got {type(weaker_model).__name__}.")
        term = AutoGuidance(weaker_model, scale=auto_scale, interval=own, adaptive=auto_adaptive)
        cfg = CFG(guidance_scale, interval=other, rescale=guidance_rescale)
        super().__init__(cfg, term, num_train_timesteps, enabled)

    def new(self, **kwargs: Any) -> AutoGuidanceGuider:
        """The same guider with some settings changed."""
        assert isinstance(self._term, AutoGuidance)
        return super().new(**{"weaker_model": self._term.weaker_model, **kwargs})

    def _negative(self, denoiser: nn.Module) -> NegativePrediction:
        assert isinstance(self._term, AutoGuidance)
        config = self._term.replace(interval=None, adaptive=0.0)
        weaker = AutoGuidanceTerm(config, Denoiser(denoiser, schedule=_UNREAD)).weaker

        def run(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with torch.no_grad(), eval_mode(weaker):
                return weaker(*args, **kwargs)

        return run


def timesteps(interval: Interval | Timesteps | None) -> Any:
    """An interval of a guidance in training timesteps, which is all that a guider gets.

    Raises:
        ValueError: For a noise level without a timestep: it needs the model's noise process.
    """
    if not isinstance(interval, tuple | list):
        return interval
    for end in interval:
        if isinstance(end, NoiseLevel) and end.timestep is None:
            raise ValueError(
                f"A guider gets the timestep and not the noise process; give interval= in training timesteps "
                f"instead of {end!r}, or resolve it: denoiser.level(...)."
            )
    return tuple(float(end.timestep) if isinstance(end, NoiseLevel) else end for end in interval)


def cfg_settings(cfg: float | CFG) -> dict[str, Any]:
    """Arguments of a guider for classifier-free guidance of a scale (1 is off) or by a config."""
    config = cfg if isinstance(cfg, CFG) else CFG(cfg)
    return {
        "guidance_scale": config.scale,
        "guidance_interval": timesteps(config.interval),
        "guidance_rescale": config.rescale,
    }


@make_guider.register(CFG)
def _of_cfg(config: CFG) -> CFGGuider:
    return CFGGuider(**cfg_settings(config))


@make_guider.register(PAG)
def _of_pag(config: PAG, cfg: float | CFG = 1.0) -> PAGGuider:
    return PAGGuider(
        **cfg_settings(cfg),
        pag_scale=config.scale,
        pag_layers=config.layers,
        perturbation=config.perturbation,
        pag_interval=timesteps(config.interval),
        pag_adaptive=config.adaptive,
    )


@make_guider.register(AutoGuidance)
def _of_auto(config: AutoGuidance, cfg: float | CFG = 1.0) -> AutoGuidanceGuider:
    return AutoGuidanceGuider(
        **cfg_settings(cfg),
        weaker_model=network_of(config.weaker_model),
        auto_scale=config.scale,
        auto_interval=timesteps(config.interval),
        auto_adaptive=config.adaptive,
    )


def _plain(perturbation: Any) -> Any:
    """As JSON can hold it: settings that are not the default."""
    if not isinstance(perturbation, Perturbation):
        return perturbation
    name = next(name for name, kind in PERTURBATIONS.items() if type(perturbation) is kind)
    default = PERTURBATIONS[name]()
    own = dataclasses.asdict(perturbation)
    return {"name": name, **{key: value for key, value in own.items() if value != getattr(default, key)}}


def _made(perturbation: Any) -> Any:
    if not isinstance(perturbation, Mapping):
        return perturbation
    settings = dict(perturbation)
    name = settings.pop("name", None)
    if name not in PERTURBATIONS:
        raise ValueError(f"perturbation={perturbation!r} has no name; it is one of {', '.join(PERTURBATIONS)}.")
    return PERTURBATIONS[name](**settings)
