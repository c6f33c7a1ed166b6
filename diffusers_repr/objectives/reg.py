"""REG (arXiv 2507.01467): the teacher's class token is noised and denoised together with the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.hooks import Turn, hook_after, hook_before, remove_hook
from diffusers_repr.noise import add_noise, training_target
from diffusers_repr.objectives.base import rebuild
from diffusers_repr.objectives.diffusion import NoisyBatch
from diffusers_repr.objectives.matching import Tokens
from diffusers_repr.objectives.repa import REPAObjective
from diffusers_repr.objectives.sra import SelfAlignmentTerm
from diffusers_repr.objectives.teachers import Teachers
from diffusers_repr.objectives.terms import Step, full_precision, widen


class ClassTokenHead(ModelMixin, ConfigMixin):
    """The way of a class token into a transformer's width and out of it.

    Args:
        hidden_dim: The transformer's width.
        token_dim: Of the teacher's class token.
    """

    @register_to_config
    def __init__(self, hidden_dim: int, token_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(token_dim, hidden_dim)
        self.read = nn.Linear(hidden_dim, token_dim)
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)
        for parameter in self.read.parameters():  # as the layer that the image leaves by
            nn.init.zeros_(parameter)


class ClassTokenSlot:
    """A place for one more token in a `SiTTransformer2DModel`, behind those of the image; hooks, no copied forward.

    Between `holding` blocks the network is as it was. The token enters before the first block, without a position, and
    is taken out after the last norm.

    Args:
        network: The transformer.

    Attributes:
        state: The token after the last norm, `(B, D)`, of the newest forward inside `holding`.

    Raises:
        TypeError: For another network.
    """

    def __init__(self, network: nn.Module) -> None:
        blocks, norm = getattr(network, "blocks", None), getattr(network, "norm_out", None)
        if not isinstance(blocks, nn.ModuleList) or not isinstance(norm, nn.Module):
            raise TypeError(
                f"A class token needs a SiTTransformer2DModel; got {type(network).__name__}. Use REPAObjective."
            )
        self.state: Tensor | None = None
        self._token: Tensor | None = None
        self._open = False
        self._turn = Turn()
        self._handles = [hook_before(blocks[0], self._put, self._puts), hook_after(norm, self._take, self._turn)]

    @contextmanager
    def holding(self, token: Tensor) -> Iterator[None]:
        """Inside, forwards carry `token` `(B, D)`.

        It stays known after: gradient checkpointing runs the first block once more in the backward pass.

        Raises:
            RuntimeError: If another thread holds one.
        """
        self._turn.take("Another thread trains this network; give each thread a network of its own.")
        self._token, self._open, self.state = token, True, None
        try:
            yield
        finally:
            self._open = False
            self._turn.end()

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            remove_hook(handle)

    def _puts(self) -> bool:
        # In a recomputation, which may run in a thread of autograd's, the block is closed and the token still wanted.
        return self._turn() or torch._C._current_graph_task_id() != -1

    def _put(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._token is None or not (self._open or torch._C._current_graph_task_id() != -1):
            return None
        return (torch.cat([args[0], self._token.to(args[0].dtype)[:, None]], dim=1), *args[1:]), kwargs

    def _take(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if not self._open:
            return None
        self.state = output[:, -1]
        return output[:, :-1]


class REGObjective(REPAObjective):
    """REPA with the class token of the first encoder denoised as one more token of the sequence.

    Loss: denoising, `coefficient` times the alignment, whose targets include the class token, and `class_weight` times
    the squared error of the class token's own target, with the coefficients of each sample's time. Of the settings,
    0.03 and 0.5 are those of the paper's repository; its README reports sampling with guidance 2.3 of image and class
    token. Both must be denoised together: `sample_with_class_token`. The saved pipeline alone samples without the
    token, as the network never saw it in training.

    Args:
        denoiser: Of a `SiTTransformer2DModel`.
        encoders: Their global features must be class tokens; at least one.
        layer: As `REPAObjective`.
        coefficient: lambda.
        class_weight: Of the class token's loss.
        **options: As `REPAObjective`.

    Raises:
        TypeError: For another network.
        ValueError: Without encoders, with a convolution as projector, or together with self-alignment.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        encoders: Sequence[Any] | Mapping[str, Any],
        layer: str | None = None,
        coefficient: float = 0.5,
        *,
        class_weight: float = 0.03,
        **options: Any,
    ) -> None:
        if not encoders:
            raise ValueError("REG denoises the class token of a teacher; pass encoders.")
        if options.get("projector_kind", "mlp") != "mlp":
            raise ValueError("REG projects its class token as it does the others; take projector_kind='mlp'.")
        if any(isinstance(term, SelfAlignmentTerm) for term in options.get("terms", ())):
            raise ValueError("The teacher of self-alignment has no class token; drop REG or SRA.")
        if not 0 <= class_weight < float("inf"):
            raise ValueError(f"class_weight must be finite and not negative; got {class_weight}.")
        slot = ClassTokenSlot(denoiser.model)  # first: it refuses other networks
        super().__init__(denoiser, encoders, layer, coefficient, **options)
        self.slot, self.class_weight = slot, class_weight
        self.source = next(iter(self.encoders))
        self.class_token = ClassTokenHead(denoiser.config["hidden_size"], self.encoders[self.source].dim)

    def observe(self, noisy: NoisyBatch, teachers: Teachers | None = None) -> tuple[dict[str, Tensor], Step]:
        """As `REPAObjective.observe`, with the class token in the sequence; adds its loss."""
        teachers = teachers or self.teachers_of(noisy)
        clean = widen(teachers.global_features(self.source))
        noise = torch.randn(clean.shape, generator=noisy.batch.get("generator"), device=clean.device)
        target = training_target(clean, noise, noisy.level, self.denoiser.schedule)
        entering = add_noise(clean, noisy.level, noise)
        with self.slot.holding(self.class_token.embed(entering.to(self.class_token.dtype))):
            losses, step = super().observe(noisy, teachers)
        state = self.slot.state
        assert state is not None
        predicted = self.class_token.read(state.to(self.class_token.dtype))
        with full_precision(clean.device):
            losses["class_token"] = F.mse_loss(widen(predicted), target)
        return losses, step

    def layer_tokens(self, path: str, value: Tensor, size: tuple[int, int]) -> Tokens:
        """The class token is set apart from the image's tokens."""
        if value.ndim != 3 or not path.startswith("blocks."):
            return super().layer_tokens(path, value, size)
        return replace(super().layer_tokens(path, value[:, :-1], size), class_token=value[:, -1])

    def queries_and_keys(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Without the class token."""
        return query[:, :, :-1], key[:, :, :-1]

    def weights(self) -> dict[str, float]:
        """With that of the class token."""
        return {**super().weights(), "class_token": self.class_weight}

    def heads(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """With `class-token`."""
        return {**super().heads(state), "class-token": rebuild(self.class_token, state, "class_token.")}

    def identity(self) -> dict[str, Any]:
        """With the weight of the class token."""
        return {**super().identity(), "class_weight": self.class_weight}

    def pipeline(self, state: Mapping[str, Tensor]) -> Any:
        """As `REPAObjective`; the class token's head hangs on it for previews, and is not saved with it."""
        pipe = super().pipeline(state)
        pipe.__dict__["class_token_head"] = rebuild(self.class_token, state, "class_token.")
        return pipe

    def preview(self, pipe: Any, count: int, generator: torch.Generator, steps: int) -> list[Any]:
        """Samples of image and class token together."""
        from diffusers.image_processor import VaeImageProcessor

        denoiser = Denoiser.from_pipe(pipe, schedule=self.denoiser.schedule)
        head = pipe.__dict__["class_token_head"].to(denoiser.device)
        labels = [place // 8 % self.num_classes for place in range(count)] if self.num_classes else None
        x0, _ = sample_with_class_token(denoiser, head, count, labels, steps=steps, generator=generator)
        return VaeImageProcessor.numpy_to_pil(denoiser.decode(x0).cpu().permute(0, 2, 3, 1).numpy())


@torch.no_grad()
def sample_with_class_token(
    denoiser: Denoiser,
    head: ClassTokenHead,
    count: int,
    class_labels: Sequence[int] | None = None,
    *,
    steps: int = 50,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoise images and class tokens together, by Euler steps of the probability-flow ODE on equal times.

    Args:
        denoiser: With a network that predicts velocity.
        head: Saved as `heads/class-token`.
        count: Samples.
        class_labels: One a sample; None: null.
        steps: Network evaluations (each of two halves under guidance).
        guidance_scale: Of image and class token alike; 1: none.
        guidance_interval: Times in [0, 1] between which is guided; 1 is pure noise.
        generator: On the CPU.

    Returns:
        `(x0, tokens)`: `(B, C, h, w)` and `(B, token_dim)`.

    Raises:
        ValueError: For a network that does not predict velocity.
    """
    if denoiser.schedule.output != "velocity":
        raise ValueError(f"Euler steps need a network of velocity; this one gives {denoiser.schedule.output}.")
    model, device = denoiser.model, denoiser.device
    shape = (count, denoiser.family.channels(denoiser.config), *denoiser.family.size(denoiser.config))
    x = torch.randn(shape, generator=generator).to(device)
    token = torch.randn((count, head.config["token_dim"]), generator=generator).to(device)
    # Without labels the condition is null already, and there is nothing to guide by.
    wanted = denoiser.condition(class_labels=class_labels, batch=count).kwargs()
    null = denoiser.condition(batch=count).kwargs()
    slot = ClassTokenSlot(model)
    try:
        with denoiser.evaluating():
            times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
            for now, after in zip(times, times[1:], strict=False):
                low, high = guidance_interval
                guided = guidance_scale != 1 and class_labels is not None and low <= now <= high
                rows = [(wanted, guidance_scale), (null, 1 - guidance_scale)] if guided else [(wanted, 1.0)]
                level = denoiser.level(torch.full((count,), 1000 * now, dtype=torch.float64))
                change, turn = torch.zeros_like(x), torch.zeros_like(token)
                for condition, share in rows:
                    condition = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in condition.items()}
                    with slot.holding(head.embed(token.to(head.dtype))):
                        inputs = denoiser.network_inputs(x.to(denoiser.dtype), level, condition)
                        change += share * denoiser.family.output(denoiser.config, model(**inputs), x).float()
                    assert slot.state is not None
                    turn += share * head.read(slot.state.to(head.dtype)).float()
                x, token = x + (after - now) * change, token + (after - now) * turn
    finally:
        slot.close()
    return x, token


__all__ = ["ClassTokenHead", "ClassTokenSlot", "REGObjective", "sample_with_class_token"]
