"""`check_guidance`: what every guidance promises, checked on a pipeline."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.hooks import count_hooks
from diffusers_repr.guidance import CFG, Guidance, GuidanceStats, guide
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.testing.checks import expect


def check_guidance(pipe: Any, guidance: Guidance, *, seed: int = 0, **call: Any) -> None:
    """Raise AssertionError, with a sentence, unless a guidance keeps what every one promises.

    - The config is checked when made; scale 0 is bit-equal to the pipeline alone, with as many network calls.
    - It acts, where its interval lies and nowhere else, and its correction is finite and linear in the scale.
    - The same seed gives the same samples: in the next run, and whatever the random state of torch.
    - Hooks, forwards, processors, weights, `requires_grad`, `.grad`, train mode, gradient mode, random state and
      the scheduler's class are as before; also after an exception in the network.

    It samples nine times: take a small model and few steps.

    Args:
        pipe: A pipeline of diffusers.
        guidance: A config with a scale other than 0, no `CFG`. At the scale and at twice it samples must be finite.
        seed: Of the noise.
        **call: Arguments of the pipeline's call, its `generator` left out. `output_type` is "np" if not given.

    Raises:
        TypeError: For what is no guidance, and for `CFG`, which stands in for the pipeline's own.
        ValueError: For scale 0.
        AssertionError: If a promise is not kept.

    Example:
        >>> from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
        >>> from diffusers_repr import EnergyGuidance
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> pipe = DDIMPipeline(unet, DDIMScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> check_guidance(pipe, EnergyGuidance(lambda features, x0, condition: x0.square().mean((1, 2, 3))),
        ...     num_inference_steps=2)
    """
    if not isinstance(guidance, Guidance) or isinstance(guidance, CFG):
        raise TypeError(f"check_guidance takes a guidance other than CFG; got {type(guidance).__name__}.")
    if guidance.scale == 0:
        raise ValueError("A guidance of scale 0 is off; give it the scale that is to be checked.")
    _check_settings(guidance)
    sampler = _Sampler(pipe, Denoiser.from_pipe(pipe).model, seed, {"output_type": "np", **call})
    before = _state(pipe)
    plain = sampler.run(None)
    _check_off(sampler, guidance, plain)
    stats = _check_repeats(sampler, guidance, plain)
    _check_linear(sampler, guidance, plain)
    _check_interval(sampler, guidance, stats)
    _expect_same(before, _state(pipe), "after sampling")
    _check_interrupted(sampler, guidance)
    _expect_same(before, _state(pipe), "after an exception in the network")
    _expect(sampler.run(None).equals(plain), "the pipeline alone gives other samples than before it was guided")


@dataclass
class _Sampled:
    """Samples, what the network gave its caller in each call, and how often it really ran."""

    samples: Tensor
    outputs: list[Tensor]
    runs: int

    def equals(self, other: _Sampled) -> bool:
        return torch.equal(self.samples, other.samples)


@dataclass
class _Sampler:
    """The pipeline and its call."""

    pipe: Any
    model: nn.Module
    seed: int
    call: Mapping[str, Any]

    def run(self, guidance: Guidance | None) -> _Sampled:
        """Samples with a guidance, or without."""
        if guidance is None:
            return self.sample()
        with guide(self.pipe, guidance):
            return self.sample()

    def sample(self) -> _Sampled:
        outputs: list[Tensor] = []
        runs: list[nn.Module] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append((output if isinstance(output, Tensor) else output[0]).detach().clone())

        handle = self.model.register_forward_hook(keep)
        try:
            with _before_each(self.leaves()[:1], runs.append):
                found = self.pipe(**self.call, generator=torch.Generator().manual_seed(self.seed))[0]
        finally:
            handle.remove()
        return _Sampled(torch.as_tensor(found), outputs, len(runs))

    def leaves(self) -> list[nn.Module]:
        """Modules of the network that hold no others."""
        return [module for module in self.model.modules() if not list(module.children())]


def _check_settings(guidance: Guidance) -> None:
    changed = guidance.replace(scale=2 * guidance.scale)
    _expect(type(changed) is type(guidance), "replace() gives another class: the config is a frozen dataclass")
    try:
        guidance.replace(scale=math.nan)
    except (TypeError, ValueError):
        return
    _expect(False, "a scale of NaN is accepted: __post_init__ calls super().__post_init__()")


def _check_off(sampler: _Sampler, guidance: Guidance, plain: _Sampled) -> None:
    off = sampler.run(guidance.replace(scale=0.0, adaptive=0.0))
    _expect(off.equals(plain), "at scale 0 the samples are not those of the pipeline alone")
    _expect(off.runs == plain.runs, "at scale 0 the network is called another number of times")


def _check_repeats(sampler: _Sampler, guidance: Guidance, plain: _Sampled) -> GuidanceStats:
    torch_state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught, guide(sampler.pipe, guidance) as handle:
        warnings.simplefilter("always")
        first = sampler.sample()
        _expect(torch.equal(torch.get_rng_state(), torch_state), "torch's random state has moved; use a generator")
        second = sampler.sample()
        stats = handle.stats
    _expect(bool(first.samples.isfinite().all()), "the samples hold NaN or infinity")
    nothing = first.equals(plain) or any("changed nothing" in str(warning.message) for warning in caught)
    _expect(not nothing, "the correction is zero at every step: it changed nothing")
    _expect(second.equals(first), "a second run gives other samples: state of a run is forgotten in term.starts()")
    return stats


def _check_linear(sampler: _Sampler, guidance: Guidance, plain: _Sampled) -> None:
    """Where it first acts, all scales see the same input: the changes of the network's output are compared there."""
    request = guidance.bind(Denoiser.from_pipe(sampler.pipe)).gradient
    if request is not None and request.update != "eps":
        return  # it moves the latents, hence the network's input
    base = guidance.replace(adaptive=0.0)
    once, twice = (sampler.run(base.replace(scale=factor * base.scale)).outputs for factor in (1, 2))
    for own, one, two in zip(plain.outputs, once, twice, strict=False):
        if torch.equal(own, one):
            continue
        own, one, two = own.float(), one.float(), two.float()
        change, rounding = (one - own).abs().max(), torch.finfo(plain.outputs[0].dtype).eps
        allowed = 1e-4 * float(change) + 16 * rounding * float(torch.stack([own, one, two]).abs().max())
        off = float((two - own - 2 * (one - own)).abs().max())
        text = f"twice the scale is not twice the correction: {off:.3g} off, changes up to {float(change):.3g}"
        _expect(off <= allowed, text)
        return


def _check_interval(sampler: _Sampler, guidance: Guidance, stats: GuidanceStats) -> None:
    acted = [step.level for step in stats.steps if step.acted]
    _expect(bool(acted), "no call of the network is recorded as guided")
    last = NoiseLevel(nsr=float(acted[-1].nsr))
    with guide(sampler.pipe, guidance.replace(interval=(last, last), adaptive=0.0)) as handle:
        sampler.sample()
    outside = [step for step in handle.stats.steps if step.acted and not _near(step.level, last)]
    _expect(not outside, f"it acts outside of its interval, at {[float(step.level.nsr) for step in outside]} (nsr)")


def _near(level: NoiseLevel, other: NoiseLevel) -> bool:
    return math.isclose(float(level.nsr), float(other.nsr), rel_tol=1e-3)


class _Broken(Exception):
    """What is raised in the middle of the network."""


def _check_interrupted(sampler: _Sampler, guidance: Guidance) -> None:
    ran: list[nn.Module] = []
    with _before_each(sampler.leaves(), ran.append):
        sampler.run(None)

    def stop(module: nn.Module) -> None:
        raise _Broken

    try:
        with guide(sampler.pipe, guidance), _before_each([ran[len(ran) // 2]], stop):
            sampler.sample()
    except _Broken:
        return
    _expect(False, "an exception in the network does not reach the caller")


@contextmanager
def _before_each(modules: list[nn.Module], run: Callable[[nn.Module], None]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(lambda module, args: run(module)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _state(pipe: Any) -> dict[str, Any]:
    """What a guidance must leave as it was, by what it is called."""
    modules = [module for part in pipe.components.values() if isinstance(part, nn.Module) for module in part.modules()]
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    return {
        "hooks": [count_hooks(module) for module in modules],
        "forwards of modules": ["forward" in vars(module) for module in modules],
        "train mode": [module.training for module in modules],
        "requires_grad": [p.requires_grad for p in parameters],
        "attention processors": [id(getattr(module, "processor", None)) for module in modules],
        ".grad": [p.grad is None for p in parameters],
        "weights": [p.detach().clone() for p in parameters],
        "gradient mode": torch.is_grad_enabled(),
        "torch's random state": torch.get_rng_state(),
        "class of the scheduler": type(pipe.scheduler),
    }


def _expect_same(before: Mapping[str, Any], after: Mapping[str, Any], when: str) -> None:
    for name, value in before.items():
        _expect(_same(value, after[name]), f"{name}: not as before, {when}")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return one == other


def _expect(holds: bool, text: str) -> None:
    expect(holds, f"{text[0].upper()}{text[1:]}.")
