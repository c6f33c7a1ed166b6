"""`RepresentationMLPModel`: a network that denoises vectors, the representation diffusion model of RCG."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.outputs import SampleOutput


class RepresentationMLPBlock(nn.Module):
    """`h + W2 drop(silu(norm(W1 silu(norm(h)) + embeddings)))`, W2 being 0 at first.

    Args:
        channels: Of the residual stream.
        bottleneck: Inside.
        time_channels: Of the time embedding.
        class_channels: Of the class embedding; 0: there is none.
        dropout: Before W2.
    """

    def __init__(
        self, channels: int, bottleneck: int, time_channels: int, class_channels: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(channels)
        self.linear_in = nn.Linear(channels, bottleneck)
        self.time_proj = nn.Linear(time_channels, bottleneck)
        self.class_proj = nn.Linear(class_channels, bottleneck) if class_channels else None
        self.norm_out = nn.LayerNorm(bottleneck)
        self.dropout = nn.Dropout(dropout)
        self.linear_out = nn.Linear(bottleneck, channels)

    def forward(self, hidden_states: Tensor, temb: Tensor, class_emb: Tensor | None = None) -> Tensor:
        """`(B, channels)` to `(B, channels)`; both embeddings have gone through SiLU."""
        inner = self.linear_in(functional.silu(self.norm_in(hidden_states))) + self.time_proj(temb)
        if self.class_proj is not None and class_emb is not None:
            inner = inner + self.class_proj(class_emb)
        return hidden_states + self.linear_out(self.dropout(functional.silu(self.norm_out(inner))))


class RepresentationMLPModel(ReprModelMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Residual layers on noisy vectors `(B, D)`: RCG's representation diffusion model (Li et al. 2023, 2312.03701).

    The defaults are those of its code for features of 256 channels. What it predicts (x_0 there) its scheduler's
    `prediction_type` says. It predicts 0 until it is trained.

    Args:
        in_channels: D.
        hidden_size: Width.
        num_layers: Residual blocks.
        bottleneck_size: Width inside a block; `hidden_size` if None.
        time_embed_dim: Channels of the time embedding.
        num_classes: Classes it is conditioned on; 0: none.
        class_embed_dim: Channels of the class embedding.
        null_class: Whether there is a null class, of the id `num_classes`; RCG's class-conditional checkpoints, which
            know no guidance, have none.
        dropout: In the blocks.

    Raises:
        ValueError: For sizes below 1.

    Example:
        >>> model = RepresentationMLPModel(6, hidden_size=16, num_layers=2, num_classes=3)
        >>> model(torch.ones(2, 6), torch.tensor([1, 999]), torch.tensor([0, 3])).sample.abs().max().item()
        0.0
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["RepresentationMLPBlock"]
    _repeated_blocks = ["RepresentationMLPBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        hidden_size: int = 1536,
        num_layers: int = 12,
        bottleneck_size: int | None = None,
        time_embed_dim: int = 256,
        num_classes: int = 0,
        class_embed_dim: int = 512,
        null_class: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, hidden_size=hidden_size, num_layers=num_layers)
        check_sizes(time_embed_dim=time_embed_dim, class_embed_dim=class_embed_dim)
        if num_classes < 0 or not 0 <= dropout < 1:
            raise ValueError(f"num_classes is 0 or more, dropout from 0 to below 1; got {num_classes}, {dropout}.")
        inner, classes = bottleneck_size or hidden_size, class_embed_dim if num_classes else 0
        self.gradient_checkpointing = False
        self.proj_in = nn.Linear(in_channels, hidden_size)
        self.time_embed = TimestepEmbedding(hidden_size, time_embed_dim)
        self.label_embed = nn.Embedding(num_classes + null_class, class_embed_dim) if num_classes else None
        self.blocks = nn.ModuleList(
            RepresentationMLPBlock(hidden_size, inner, time_embed_dim, classes, dropout) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size, eps=1e-6)
        self.proj_out = nn.Linear(hidden_size, in_channels)
        for block in self.blocks:
            for parameter in block.linear_out.parameters():  # type: ignore[union-attr]
                nn.init.zeros_(parameter)
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> SampleOutput | tuple[Tensor]:
        """Predict from noisy vectors.

        Args:
            sample: x_t, `(B, in_channels)`.
            timestep: In the scheduler's units, a number for all or `(B,)`; may be fractional.
            class_labels: `(B,)`, of a network with classes; None: the null class for all.
            return_dict: Whether to return an output object, else a tuple.

        Returns:
            `sample`: `(B, in_channels)`.

        Raises:
            ValueError: For inputs of other shapes, and labels that the network has not, or needs.
        """
        channels = self.config["in_channels"]
        if sample.ndim != 2 or sample.shape[1] != channels:
            raise ValueError(f"RepresentationMLPModel takes x_t (B, {channels}); got {tuple(sample.shape)}.")
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if len(times) not in (1, len(sample)):
            raise ValueError(f"{len(times)} timesteps for {len(sample)} samples; pass one for all, or one for each.")
        waves = get_timestep_embedding(
            # Half precision cannot tell neighbouring timesteps apart.
            times.expand(len(sample)).to(torch.promote_types(times.dtype, torch.float32)),
            self.config["hidden_size"],
            flip_sin_to_cos=True,
            downscale_freq_shift=0,
        )
        temb = functional.silu(self.time_embed(waves.to(sample.dtype)))
        class_emb = self._embed_labels(class_labels, sample)
        hidden = self.proj_in(sample)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden, temb, class_emb)
            else:
                hidden = block(hidden, temb, class_emb)
        out = self.proj_out(functional.silu(self.norm_out(hidden)))
        return SampleOutput(sample=out) if return_dict else (out,)

    def _embed_labels(self, labels: Tensor | None, sample: Tensor) -> Tensor | None:
        classes, null = self.config["num_classes"], self.config["null_class"]
        if self.label_embed is None:
            if labels is not None:
                raise ValueError("This RepresentationMLPModel has no classes (num_classes=0); drop class_labels.")
            return None
        if labels is None:
            if not null:
                raise ValueError("This RepresentationMLPModel has no null class; give class_labels.")
            labels = torch.full((len(sample),), classes, device=sample.device)
        if labels.shape != (len(sample),):
            raise ValueError(f"class_labels must be ({len(sample)},); got {tuple(labels.shape)}.")
        # On a GPU the check would wait for all work before it.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            last = classes if null else classes - 1
            if bool(((labels < 0) | (labels > last)).any()):
                raise ValueError(f"class_labels must lie in 0..{last}; got {labels.tolist()}.")
        return functional.silu(self.label_embed(labels.to(sample.device)))


__all__ = ["RepresentationMLPBlock", "RepresentationMLPModel"]
