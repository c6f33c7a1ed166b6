"""Conditions that are tensors: vectors, sets of tokens, maps; of images, of clusters' centres, of neighbours."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.condition import forward_names
from diffusers_repr.denoiser.conditioner.base import Conditioner
from diffusers_repr.denoiser.family import MAP_INPUT, floating_dtype
from diffusers_repr.models.null_tokens import NullTokens
from diffusers_repr.models.vector_embedding import VectorEmbedding

TOKENS = "encoder_hidden_states"


class TensorConditioner(Conditioner):
    """What vectors, tokens and maps share: the null is a row of their shape, or one of the network's own.

    Args:
        name: The network's input.
        column: Of a batch of training data.
        null: Values of the null condition: a number for all, or a tensor that broadcasts to a row. A parameter is
            learned where the objective has it. None: there is none, unless the network has one.
        width: Channels; as the network's config says if None, and not checked if it does not say.
    """

    axes: ClassVar[tuple[str, ...]] = ()
    channel_axis: ClassVar[int] = -1

    def __init__(self, name: str | None, column: str, null: Tensor | float | None, width: int | None = None) -> None:
        self.name, self.column, self.null_value, self.width = name, column, null, width

    @property
    def has_null(self) -> bool:
        """Whether there is one here or in the network."""
        return self.null_value is not None or self._owns_null()

    def _owns_null(self) -> bool:
        """Whether the network puts its own null where its `drop_mask` says."""
        return False

    def channels(self) -> int | None:
        """Channels of the values; None where nothing tells."""
        if self.width is not None:
            return self.width
        example = self.denoiser.family.example(1, "meta").get(self._input())
        return example.shape[self.channel_axis] if isinstance(example, Tensor) else None

    def _input(self) -> str:
        assert self.name is not None
        return self.name

    def inputs(self, values: Any, dropped: Tensor | None = None) -> dict[str, Any]:
        """The values in the network's dtype, null where they are dropped."""
        values = values.to(self.denoiser.dtype)
        if self._owns_null():
            mask = torch.zeros(len(values), dtype=torch.bool, device=values.device) if dropped is None else dropped
            return {self._input(): values, "drop_mask": mask}
        if dropped is None:
            return {self._input(): values}
        null = self._null_value().to(values)
        return {self._input(): torch.where(dropped.view(-1, *[1] * (values.ndim - 1)), null, values)}

    def _null_value(self) -> Tensor:
        if self.null_value is None:
            raise ValueError(
                f"This {type(self).__name__} has no null {self.kind}, and {self._network} has none of its own: "
                f"{type(self).__name__}(null=0.0), or a tensor."
            )
        return torch.as_tensor(self.null_value)

    def null(self, count: int = 1) -> dict[str, Any]:
        """See `Conditioner`."""
        device = self.denoiser.device
        return self.inputs(self._row(device).expand(count, *self._row(device).shape[1:]), self._all(count))

    def _all(self, count: int) -> Tensor:
        return torch.ones(count, dtype=torch.bool, device=self.denoiser.device)

    def _row(self, device: torch.device) -> Tensor:
        """A row `(1, ...)` of the right shape, whose values are dropped."""
        if isinstance(self.null_value, Tensor) and self.null_value.ndim == len(self.axes) - 1:
            return torch.zeros(1, *self.null_value.shape, device=device)
        return torch.zeros(1, *self._shape(), device=device)

    def _shape(self) -> tuple[int, ...]:
        """Shape of one row, where the null's own does not tell it."""
        channels = self.channels()
        if channels is None:
            raise ValueError(f"The width of {self.kind} is not known: {type(self).__name__}(width=...).")
        return (channels,)

    def check(self, values: Any) -> None:
        """Shape and channels, and that all is finite.

        Raises:
            TypeError: For what is no tensor.
            ValueError: For another shape, NaN and infinity.
        """
        if not isinstance(values, Tensor):
            raise TypeError(f"{self.kind} are a tensor ({', '.join(self.axes)}); got {type(values).__name__}.")
        width = self.channels()
        wrong = values.ndim != len(self.axes) or (width is not None and values.shape[self.channel_axis] != width)
        if wrong or not values.is_floating_point():
            axes = [*self.axes]
            axes[self.channel_axis] = self.axes[self.channel_axis] if width is None else str(width)
            raise ValueError(f"{self.kind} are floats ({', '.join(axes)}); got {tuple(values.shape)}, {values.dtype}.")
        if not bool(values.isfinite().all()):
            raise ValueError(f"{self.kind} have NaN or infinite values.")

    def describe(self) -> dict[str, Any]:
        """With the input's name and the null: a hash of a tensor, `learned` of a parameter."""
        null: Any = self.null_value
        if isinstance(null, nn.Parameter):
            null = "learned"
        elif isinstance(null, Tensor):
            null = hashlib.sha256(null.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
        return {**super().describe(), "input": self.name, "null": null}


class VectorConditioner(TensorConditioner):
    """Vectors `(B, D)`: features of an image, a cluster's centre; they enter by adaptive norms or the time embedding.

    By default a SiT's `condition`, whose null is the network's learned vector, and the `class_labels` of a U-Net with
    `class_embed_type="identity"`, which has no null unless one is given. By `encoder_hidden_states` they are one token
    of the cross-attention.

    Args:
        name: The network's input; as the family tells if None.
        column: Of a batch of training data.
        null: See `TensorConditioner`.
        width: D; as the network's config says if None.
        embedding: A `VectorEmbedding` that brings vectors of another width to the network's, with a null of its own;
            trained with the network, and a component of its pipeline, `condition_embedding`.

    Raises:
        ValueError: For an embedding beside a null or a width.
    """

    kind = "vectors"
    axes = ("B", "D")

    def __init__(
        self,
        name: str | None = None,
        column: str = "condition",
        null: Tensor | float | None = None,
        width: int | None = None,
        embedding: VectorEmbedding | None = None,
    ) -> None:
        if embedding is not None and (null is not None or width is not None):
            raise ValueError("A VectorEmbedding has a null and a width of its own; leave out null= and width=.")
        super().__init__(name, column, null, width if embedding is None else embedding.config["in_channels"])
        self.embedding = embedding

    @property
    def has_null(self) -> bool:
        """See `Conditioner`."""
        return self.embedding is not None or super().has_null

    def trained_parts(self) -> dict[str, nn.Module]:
        """The embedding."""
        return {} if self.embedding is None else {"condition_embedding": self.embedding}

    def inputs(self, values: Any, dropped: Tensor | None = None) -> dict[str, Any]:
        """See `TensorConditioner`; through the embedding where there is one, and as a token where they enter so."""
        if self.embedding is None:
            made = super().inputs(values, dropped)
        else:
            made = {self._input(): self.embedding(values.to(floating_dtype(self.embedding)), dropped)}
        if self._input() == TOKENS:
            made[TOKENS] = made[TOKENS][:, None]
        return made

    def describe(self) -> dict[str, Any]:
        """See `TensorConditioner`."""
        own = {} if self.embedding is None else {"embedding": dict(self.embedding.config)}
        return {**super().describe(), **own}

    def _input(self) -> str:
        name = self.name or self.denoiser.family.vector_input()
        if name is None:
            raise ValueError(f"Which input of {self._network} takes vectors is not known: VectorConditioner('name').")
        return name

    def _owns_null(self) -> bool:
        own = self._input() == self.denoiser.family.vector_input()
        return (
            self.null_value is None
            and self.embedding is None
            and own
            and "drop_mask" in forward_names(self.denoiser.model)
        )


class TokenConditioner(TensorConditioner):
    """Sets of tokens `(B, k, D)`, such as embeddings of neighbours; they enter by cross-attention.

    Args:
        name: The network's input.
        column: Of a batch of training data.
        null: See `TensorConditioner`; a row is `(k, D)`. Zeros unless told otherwise. `NullTokens` that are learned
            are trained with the network, and are a component of its pipeline, `null_tokens`.
        width: D; as the network's config says if None.
        count: k of the null condition, where its own shape does not tell.
    """

    kind = "tokens"
    axes = ("B", "k", "D")

    def __init__(
        self,
        name: str = TOKENS,
        column: str = "tokens",
        null: NullTokens | Tensor | float | None = 0.0,
        width: int | None = None,
        count: int = 1,
    ) -> None:
        super().__init__(name, column, null.tokens if isinstance(null, NullTokens) else null, width)
        self.count, self.null_tokens = count, null if isinstance(null, NullTokens) else None

    def trained_parts(self) -> dict[str, nn.Module]:
        """The null tokens, where they are learned."""
        learned = self.null_tokens is not None and self.null_tokens.config["learned"]
        return {"null_tokens": self.null_tokens} if learned and self.null_tokens is not None else {}

    def inputs(self, values: Any, dropped: Tensor | None = None) -> dict[str, Any]:
        """See `TensorConditioner`.

        Raises:
            ValueError: For another number of tokens than `NullTokens` has, if that is not 1.
        """
        if self.null_tokens is None or dropped is None:
            return super().inputs(values, dropped)
        return {self._input(): self.null_tokens(values.to(self.denoiser.dtype), dropped)}

    def _shape(self) -> tuple[int, ...]:
        return (self.count, *super()._shape())

    def _row(self, device: torch.device) -> Tensor:
        null = self.null_value
        if isinstance(null, Tensor) and null.ndim == 2 and len(null) == 1:  # one that stands in every place
            return torch.zeros(1, self.count, null.shape[1], device=device)
        return super()._row(device)


class MapConditioner(TensorConditioner):
    """Maps `(B, C, H, W)` of x_0's size, such as segments, one a channel; they enter as further channels of x_t.

    The network has C more input channels than x_0 has.

    Args:
        channels: C.
        column: Of a batch of training data.
        null: See `TensorConditioner`. Zeros unless told otherwise.
    """

    kind = "maps"
    axes = ("B", "C", "H", "W")
    channel_axis = 1

    def __init__(self, channels: int, column: str = "map", null: Tensor | float | None = 0.0) -> None:
        super().__init__(MAP_INPUT, column, null, channels)

    @property
    def map_channels(self) -> int:
        """C."""
        return self.width or 0

    def _shape(self) -> tuple[int, ...]:
        return (*super()._shape(), *self.denoiser.family.size())


def given_vectors(condition: Any, width: int | None) -> Tensor | None:
    """Vectors that a pipeline is given as a condition, `(B, width)`.

    Args:
        condition: Vectors, one for all, or None.
        width: Their length; None of a network that takes none.

    Raises:
        ValueError: For another shape, numbers that are not finite, and a network without vectors.

    Example:
        >>> given_vectors([0.5, 1.0], 2)
        tensor([[0.5000, 1.0000]])
    """
    if condition is None:
        return None
    if width is None:
        raise ValueError("This model takes no vectors (condition_dim=None); leave condition out.")
    vectors = torch.as_tensor(condition)
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ValueError(f"condition is (B, {width}), or one vector for all; got {tuple(vectors.shape)}.")
    if not bool(vectors.isfinite().all()):
        raise ValueError("condition has NaN or infinite values.")
    return vectors


__all__ = ["MapConditioner", "TensorConditioner", "TokenConditioner", "VectorConditioner", "given_vectors"]
