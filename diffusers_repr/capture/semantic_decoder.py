"""`SemanticDecoder`: a U-Net that is told a code, or a frozen one and its gradient network, as one network."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusers_repr.capture.capture import refuse_compiled
from diffusers_repr.capture.film import Modulated
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.family_registry import family_of
from diffusers_repr.denoiser.hooks import Hooks
from diffusers_repr.models.film import FiLM
from diffusers_repr.models.gradient_unet import GradientUNet, encoder_parts
from diffusers_repr.noise import NoiseLevel, NoiseSchedule
from diffusers_repr.noise.conversions import eps_shift_to_output, to_x0_eps
from diffusers_repr.noise.schedule import Output

Coefficient = Literal["posterior", "score"]
COEFFICIENTS: tuple[Coefficient, ...] = ("posterior", "score")
CODE = "code"  # name of the decoder's input


class SemanticDecoder(nn.Module):
    """The decoder of a diffusion autoencoder, as a network of `Denoiser`: `(x_t, t, code=z)`.

    Without a gradient network the code modulates the U-Net (DiffAE, InfoDiffusion). With one the U-Net is frozen, its
    encoder half runs once for both, and `eps = eps_frozen - c_t G(x_t, t, z)` (PDAE, arXiv 2212.12990, eq. 10).

    Args:
        unet: Its forward takes `sample` and `timestep`.
        film: Of the blocks of `unet`, or of the gradient network.
        gradient: PDAE's G.
        schedule: The noise process of `unet`; needed beside a gradient network.
        coefficient: c_t; see `gradient_coefficients`.

    Raises:
        ValueError: For a gradient network beside another process than `vp`, and another coefficient.
    """

    def __init__(
        self,
        unet: nn.Module,
        film: FiLM,
        gradient: GradientUNet | None = None,
        schedule: NoiseSchedule | None = None,
        coefficient: Coefficient = "posterior",
    ) -> None:
        super().__init__()
        self.unet, self.film, self.gradient, self.schedule = unet, film, gradient, schedule
        network = unet if gradient is None else gradient
        prefix = "" if gradient is None else "unet."
        _check_film(film, network, prefix)
        self._prefix, self._modulated = prefix, Modulated(network, [prefix + path for path in film.config["blocks"]])
        if gradient is not None:
            assert schedule is not None
            # No buffer: it follows the samples, and is not cast with the weights.
            self._table = torch.stack([gradient_coefficients(schedule, coefficient), *_levels(schedule)]).float()

    @property
    def config(self) -> Mapping[str, Any]:
        """That of the U-Net."""
        unet: Any = self.unet
        return unet.config

    def forward(
        self, sample: Tensor, timestep: Tensor | float, code: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor]:
        """What the U-Net predicts, told the code, in the form of its own output.

        Args:
            sample: x_t, `(B, C, H, W)`.
            timestep: `(B,)` or one for all.
            code: z, `(B, D)`; None: the frozen U-Net alone.
            **inputs: Of the U-Net.

        Raises:
            ValueError: Without a code where the U-Net was trained with one.
        """
        if self.gradient is None:
            if code is None:
                raise ValueError("This U-Net was trained with codes; pass code=.")
            with self._applied(code):
                return (self.unet(sample, timestep, **inputs, return_dict=False)[0],)
        output, shift, level = self._passes(sample, timestep, code, inputs)
        if shift is None:
            return (output,)
        return (output + eps_shift_to_output(-shift, level, self._output),)

    def halves(self, sample: Tensor, timestep: Tensor | float, code: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Noise as the frozen U-Net estimates it, and what the code takes off: `c_t G`; float32 or wider."""
        output, shift, level = self._passes(sample, timestep, code, inputs)
        assert shift is not None
        return to_x0_eps(output.to(shift.dtype), sample, level, self._output)[1](), shift

    def _passes(
        self, sample: Tensor, timestep: Tensor | float, code: Tensor | None, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None, NoiseLevel]:
        """What the frozen U-Net returns, `c_t G`, None without a code, and the level."""
        assert self.gradient is not None
        encoded: dict[str, Any] = {}
        with torch.no_grad(), ExitStack() as stack:
            if code is not None:
                _record(self.unet, encoded, Hooks(stack))
            output = self.unet(sample, timestep, **inputs, return_dict=False)[0][:, : sample.shape[1]]
        times, coefficients, alphas, sigmas = self._at(timestep, sample)
        level = NoiseLevel(times, alpha=alphas, sigma=sigmas)
        if code is None:
            return output, None, level
        with self._applied(code):
            gradient = self.gradient(encoded, sample, timestep, return_dict=False, **inputs)[0]
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return output, coefficients[:, None, None, None] * gradient.to(wide), level

    @property
    def _output(self) -> Output:
        assert self.schedule is not None
        return self.schedule.output

    def _applied(self, code: Tensor) -> Any:
        values = self.film(code)
        return self._modulated.applied({self._prefix + path: value for path, value in values.items()})

    def _at(self, timestep: Tensor | float, sample: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Timesteps, c_t, alpha and sigma, `(B,)`; the clean image, which DDIM calls timestep -1, comes first."""
        if self._table.device != sample.device:
            self._table = self._table.to(sample.device)
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample)).round()
        rows = (times.long() + 1).clamp(0, self._table.shape[1] - 1)
        coefficients, alphas, sigmas = self._table[:, rows]
        return times, coefficients, alphas, sigmas


def semantic_denoiser(
    decoder: SemanticDecoder, scheduler: Any, vae: Any = None, schedule: NoiseSchedule | None = None, pipe: Any = None
) -> Denoiser:
    """A decoder as a `Denoiser`: `predict(x_t, level, {"code": z})`, DDIM both ways, and all else.

    Args:
        decoder: The network.
        scheduler: Of its U-Net.
        vae: Of a latent one.
        schedule: Of the U-Net; as the scheduler tells if None.
        pipe: Whose device it runs on.
    """
    return Denoiser(decoder, scheduler, vae, family=family_of(decoder.unet), schedule=schedule, pipe=pipe)


def gradient_coefficients(schedule: NoiseSchedule, kind: Coefficient = "posterior") -> Tensor:
    """c_t of `eps = eps_frozen - c_t G`, float64 `(T + 1,)`: of the clean image first, then of timesteps 0 to T - 1.

    Args:
        schedule: Of kind `vp`.
        kind: `posterior`: `sqrt(a_t) (1 - ab_{t-1}) / sqrt(1 - ab_t)`, by which G, times the posterior's variance,
            shifts the posterior's mean: what is trained. `score`: `sqrt(1 - ab_t)`, as PDAE's code steps by DDIM.

    Raises:
        ValueError: For another process or kind.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> gradient_coefficients(NoiseSchedule.from_scheduler(DDPMScheduler()))[:2].abs()
        tensor([0., 0.], dtype=torch.float64)
    """
    if schedule.kind != "vp" or schedule.log_alpha_bar is None:
        raise ValueError(
            f"PDAE shifts the mean of the posterior of a discrete diffusion (DDPM); this base's process is "
            f"{schedule.kind}. Train without a frozen base (frozen_base: false), which takes every process."
        )
    if kind not in COEFFICIENTS:
        raise ValueError(f"coefficient is one of {', '.join(COEFFICIENTS)}; got {kind!r}.")
    log_ab = torch.cat([torch.zeros(1, dtype=torch.float64), schedule.log_alpha_bar.double()])
    noise = -torch.expm1(log_ab)  # 1 - ab
    if kind == "score":
        return noise.sqrt()
    ratio = (0.5 * log_ab[1:].sub(log_ab[:-1])).exp() * noise[:-1] / noise[1:].sqrt()
    return torch.cat([torch.zeros(1, dtype=torch.float64), ratio])


def _levels(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Alpha and sigma, the clean image first."""
    assert schedule.log_alpha_bar is not None
    log_ab = torch.cat([torch.zeros(1, dtype=torch.float64), schedule.log_alpha_bar.double()])
    return (0.5 * log_ab).exp(), (-torch.expm1(log_ab)).sqrt()


def _record(unet: nn.Module, encoded: dict[str, Any], hooks: Hooks) -> None:
    """Keep what the encoder half returns in the forward that follows."""
    refuse_compiled(unet, "Take the plain module, and train without torch_compile.")
    for name in encoder_parts(unet):
        hooks.after(unet.get_submodule(name), _keep(encoded, name))


def _keep(encoded: dict[str, Any], name: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        encoded[name] = _contiguous(output)

    return hook


def _contiguous(value: Any) -> Any:
    """In the plain layout: of a channels-last input without a gradient torch's group norm crashes in the backward."""
    if isinstance(value, Tensor):
        return value.contiguous()
    return tuple(_contiguous(part) for part in value) if isinstance(value, (tuple, list)) else value


def _check_film(film: FiLM, network: nn.Module, prefix: str) -> None:
    modules = dict(network.named_modules())
    for path, width in film.config["blocks"].items():
        block: Any = modules.get(prefix + path)
        if block is None or getattr(getattr(block, "norm2", None), "num_channels", None) != width:
            raise ValueError(
                f"The code modulates {path!r} of {width} channels, which this {type(network).__name__} does not have: "
                "FiLM and network are not of one autoencoder."
            )


__all__ = ["CODE", "COEFFICIENTS", "Coefficient", "SemanticDecoder", "gradient_coefficients", "semantic_denoiser"]
