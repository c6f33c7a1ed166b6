"""`PixelEnsembleHead`: several small networks that classify the pixels of an image by features of many layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.heads.base import Head, register_head
from diffusers_repr.heads.dense.parts import resize
from diffusers_repr.hub.checks import check_sizes, check_whole
from diffusers_repr.metrics.uncertainty import EnsembleSums
from diffusers_repr.models.layers import wide_dtype
from diffusers_repr.models.outputs import ClassifierOutput, packed

_MANY = 30  # classes from which the paper's networks are wider


class MemberLinear(nn.Module):
    """A linear layer of each member, in the dtype of its input.

    Args:
        members: E.
        in_features: Values that enter.
        out_features: Values that leave.
    """

    def __init__(self, members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(members, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(members, out_features))

    def forward(self, x: Tensor, member: int | None = None, columns: Sequence[slice] | None = None) -> Tensor:
        """All members at once, `(E, B, in)` to `(E, B, out)`; or one of them on maps.

        Args:
            x: See above; with `member` maps `(B, in, h, w)`.
            member: Which one.
            columns: With `member`: the parts of the inputs that `x` holds side by side; only where the first input is
                among them the bias is added.
        """
        if member is None:
            return torch.baddbmm(self.bias.to(x.dtype)[:, None], x, self.weight.to(x.dtype).mT)
        weight, bias = self.weight[member].to(x.dtype), self.bias[member].to(x.dtype)
        if columns is not None:
            weight = torch.cat([weight[:, part] for part in columns], 1)
        y = torch.matmul(weight, x.flatten(2))
        if columns is None or any(part.start == 0 for part in columns):
            y = y + bias[:, None]
        return y.unflatten(2, x.shape[2:])


class MemberBatchNorm(nn.Module):
    """A batch norm of each member over its own rows, in the dtype of its input; as `nn.BatchNorm1d`.

    Args:
        members: E.
        features: Values of a row.
        eps: Added to the variance.
        momentum: Of the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, members: int, features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(members, features))
        self.bias = nn.Parameter(torch.zeros(members, features))
        self.register_buffer("running_mean", torch.zeros(members, features))
        self.register_buffer("running_var", torch.ones(members, features))

    def forward(self, x: Tensor, member: int | None = None) -> Tensor:
        """All members at once, `(E, B, features)`; or one of them on maps `(B, features, h, w)`.

        Raises:
            ValueError: In training, for running statistics of another dtype.
        """
        if member is None:
            rows = x.transpose(0, 1).flatten(1)  # (B, E features): every value has its own statistics
            return self._norm(rows, slice(None)).unflatten(1, x.shape[::2]).transpose(0, 1)
        return self._norm(x, slice(member, member + 1))

    def _norm(self, x: Tensor, of: slice) -> Tensor:
        mean, variance = self.running_mean[of].view(-1), self.running_var[of].view(-1)  # views: they are updated
        if self.training and mean.dtype != x.dtype:
            raise ValueError(
                f"Batch norm is trained in float32: its running statistics need it; these are {mean.dtype}. Cast the "
                "head with .float() before training."
            )
        weight, bias = (value[of].reshape(-1).to(x.dtype) for value in (self.weight, self.bias))
        mean, variance = mean.to(x.dtype), variance.to(x.dtype)
        return functional.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)


@register_head("pixel_ensemble")
class PixelEnsembleHead(Head, ModelMixin, ConfigMixin):
    """Baranchuk et al. 2022, DDPM-Seg (arXiv 2112.03126): E networks that classify pixels, each for itself.

    A pixel's feature is that of all maps, resized to the image and put side by side: levels in the outer loop, layers
    in the inner one. Each network is `Linear, ReLU, BatchNorm` for every width of `hidden_features` and a last
    `Linear`. On maps the first layer acts at each map's own resolution and its result is resized, which is the same
    (bilinear weights sum to 1) and neither holds nor multiplies the features of every pixel.

    Args:
        layers: Full module paths of the maps.
        channels: Channels of each.
        num_classes: K.
        levels: Noise levels, each with all of the layers.
        members: E; ten in the paper.
        hidden_features: Widths; (128, 32) below 30 classes and (256, 128) from 30 on, as in the paper, if None.

    Raises:
        ValueError: For layers, channels or widths that do not fit.

    Example:
        >>> head = PixelEnsembleHead(["a", "b"], [8, 4], num_classes=3, members=2).eval()
        >>> maps = {"a": torch.rand(1, 8, 2, 2), "b": torch.rand(1, 4, 4, 4)}
        >>> head(maps).shape, head.predict(maps, (16, 16)).labels().shape
        (torch.Size([1, 2, 3, 4, 4]), torch.Size([1, 16, 16]))
    """

    @register_to_config
    def __init__(
        self,
        layers: Sequence[str],
        channels: Sequence[int],
        num_classes: int,
        levels: int = 1,
        members: int = 10,
        hidden_features: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not layers or len(set(layers)) != len(layers) or len(layers) != len(channels):
            raise ValueError(
                f"layers and channels must pair up, each layer once; got {list(layers)} and {list(channels)}."
            )
        named = {f"channels of {k!r}": c for k, c in zip(layers, channels, strict=True)}
        check_sizes(levels=levels, members=members, **named)
        check_whole("num_classes", num_classes, 2)
        widths = list(hidden_features or ((128, 32) if num_classes < _MANY else (256, 128)))
        check_sizes(**{f"hidden_features[{at}]": width for at, width in enumerate(widths)})
        sizes = [levels * sum(channels), *widths]
        self.widths = widths
        pairs = zip(sizes, widths, strict=False)
        self.linear = nn.ModuleList(MemberLinear(members, a, b) for a, b in pairs)
        self.norm = nn.ModuleList(MemberBatchNorm(members, width) for width in widths)
        self.last = MemberLinear(members, widths[-1], num_classes)

    @property
    def in_features(self) -> int:
        """Values of a pixel's feature."""
        return int(self.config["levels"]) * sum(self.config["channels"])

    def classify(self, pixels: Tensor) -> Tensor:
        """Logits `(E, B, K)` of pixels' features `(E, B, L)`, each member's own; all members in one pass."""
        for linear, norm in zip(self.linear, self.norm, strict=True):
            pixels = norm(functional.relu(linear(pixels)))
        return self.last(pixels)

    def member_logits(self, features: Mapping[str, Tensor], size: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """Logits `(B, K, H, W)` of one member after another; only one is held.

        Args:
            features: Layer path -> map `(B, C, h, w)`; with several levels `(levels, B, C, h, w)`, as
                `FeatureExtractor` gives them. Other layers are ignored.
            size: (H, W) of the result; the largest height and width among the maps if None.

        Raises:
            ValueError: If a layer is missing or a map has another shape than the head was made for.
        """
        maps = self._take(features)
        if size is None:
            size = (max(m.shape[2] for m in maps), max(m.shape[3] for m in maps))
        groups = _by_grid(maps)
        for member in range(int(self.config["members"])):
            first = self.linear[0]
            hidden: Tensor | None = None
            for joined, columns in groups:
                part = first(joined, member, columns)
                hidden = resize(part, size) if hidden is None else hidden + resize(part, size)
            assert hidden is not None
            yield self._rest(hidden, member)

    def _rest(self, hidden: Tensor, member: int) -> Tensor:
        """What follows the first layer's product, on maps."""
        for at, norm in enumerate(self.norm):
            if at:
                hidden = self.linear[at](hidden, member)
            hidden = norm(functional.relu(hidden), member)
        return self.last(hidden, member)

    def predict(self, features: Mapping[str, Tensor], size: tuple[int, int] | None = None) -> EnsembleSums:
        """What the members say together: labels by majority, mean probabilities, uncertainty; see `EnsembleSums`.

        Args:
            features: As for `member_logits`.
            size: As for `member_logits`.
        """
        sums = EnsembleSums(int(self.config["num_classes"]))
        for logits in self.member_logits(features, size):
            sums.add(logits)
        return sums

    def forward(
        self,
        features: Mapping[str, Tensor],
        size: tuple[int, int] | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | ClassifierOutput | tuple[Tensor]:
        """Logits of all members, `(B, E, K, H, W)`; `predict` holds one member's at a time.

        Args:
            features: As for `member_logits`.
            size: As for `member_logits`.
            return_dict: None for the logits themselves, True for an output with `logits`, False for a tuple.
        """
        device = next(iter(features.values())).device.type if features else "cpu"
        with torch.autocast(device, enabled=False):
            logits = torch.stack(list(self.member_logits(features, size)), 1)
        return packed(logits, ClassifierOutput, return_dict)

    def _take(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The maps `(B, C, h, w)` in the order of a pixel's feature."""
        levels, dtype, taken = int(self.config["levels"]), wide_dtype(self), {}
        for path, channels in zip(self.config["layers"], self.config["channels"], strict=True):
            if path not in features:
                raise ValueError(f"The head reads layer {path!r}, which is not among the features {list(features)}.")
            x = features[path]
            x = x[None] if levels == 1 and x.ndim == 4 else x
            if x.ndim != 5 or x.shape[0] != levels or x.shape[2] != channels:
                form = f"(B, {channels}, h, w)" if levels == 1 else f"({levels}, B, {channels}, h, w)"
                raise ValueError(f"The head takes {path!r} as {form}; got {tuple(features[path].shape)}.")
            taken[path] = x.to(dtype)
        rows = {x.shape[1] for x in taken.values()}
        if len(rows) > 1:
            raise ValueError(f"The features have {sorted(rows)} rows; the head takes one batch.")
        return [taken[path][level] for level in range(levels) for path in taken]


def _by_grid(maps: Sequence[Tensor]) -> list[tuple[Tensor, list[slice]]]:
    """Maps of one size side by side, and where each lies in a pixel's feature."""
    grids: dict[tuple[int, ...], tuple[list[Tensor], list[slice]]] = {}
    start = 0
    for one in maps:
        found = grids.setdefault(tuple(one.shape[2:]), ([], []))
        found[0].append(one)
        found[1].append(slice(start, start + one.shape[1]))
        start += one.shape[1]
    return [(torch.cat(parts, 1), columns) for parts, columns in grids.values()]


__all__ = ["MemberBatchNorm", "MemberLinear", "PixelEnsembleHead"]
