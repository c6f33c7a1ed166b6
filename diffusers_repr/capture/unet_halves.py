"""A `UNet2DModel` in two halves: what its encoder gives, and a forward whose decoder gets something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from diffusers_repr.capture.capture import Tape, recording, refuse_compiled
from diffusers_repr.denoiser.hooks import Hooks

# (hidden, skips) => what the decoder gets in their place; None leaves them.
Move = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Sequence[Tensor]] | None]

_MIDDLE = "mid_block"


@dataclass(frozen=True)
class UNetFeatures:
    """What the encoder of a U-Net made of its input.

    Attributes:
        hidden: Output of the middle block, `(B, C, h, w)`.
        skips: Activations that the decoder joins again, `conv_in`'s first: `(B, C_i, h_i, w_i)`.
        inputs: The network's inputs by name.
    """

    hidden: Tensor
    skips: tuple[Tensor, ...]
    inputs: dict[str, Any] = field(repr=False)


def encode_partial(
    unet: nn.Module,
    sample: Tensor,
    timestep: Tensor | float,
    class_labels: Tensor | None = None,
    *,
    stop_early: bool = True,
) -> UNetFeatures:
    """The encoder and the middle of a `UNet2DModel`, bit-equal to those of a full forward; gradients pass.

    Args:
        unet: A `UNet2DModel` of any blocks.
        sample: x_t, `(B, C, H, W)`.
        timestep: As its forward takes it.
        class_labels: For networks with classes.
        stop_early: Leave the decoder out. A sharded network has to run to its end.

    Raises:
        TypeError: For a network that is no such U-Net.
        RuntimeError: For a compiled one.
    """
    inputs = {"sample": sample, "timestep": timestep, "class_labels": class_labels}
    tape = Tape([_MIDDLE], stop_early)
    encoder = _Encoder(unet)
    with recording(tape, unet) as hooks:
        encoder.install(hooks)
        middle = unet.get_submodule(_MIDDLE)
        hooks.after(middle, lambda module, args, kwargs, output: tape._record(_MIDDLE, output, None))
        unet(**inputs)
    return UNetFeatures(tape[_MIDDLE], tuple(encoder.skips), inputs)


def decode_partial(unet: nn.Module, features: UNetFeatures) -> Tensor:
    """The prediction that the decoder makes of features, `(B, C, H, W)`.

    The network's own forward runs, with these features in the place of what its encoder gives, so it costs a full
    pass; `bottleneck` changes features on their way and costs none.

    Args:
        unet: The network that `encode_partial` was given.
        features: Of `encode_partial`, as they are or changed.

    Raises:
        TypeError: For a network that is no `UNet2DModel`.
        ValueError: For features of other shapes.
        RuntimeError: For a compiled network.
    """
    with bottleneck(unet, lambda hidden, skips: (features.hidden, features.skips)):
        return unet(**features.inputs, return_dict=False)[0]


@contextmanager
def bottleneck(unet: nn.Module, move: Move) -> Iterator[None]:
    """Inside, `move` is called in every forward between encoder and decoder, and what it returns is decoded.

    Forwards of this thread; those of others are as ever.

    Args:
        unet: A `UNet2DModel` of any blocks.
        move: From the middle block's output and the skips, `conv_in`'s first, to others of the same shapes; None
            leaves them.

    Raises:
        TypeError: For a network that is no such U-Net.
        ValueError: In the forward, for activations of other shapes or another number of them.
        RuntimeError: For a compiled network.
    """
    with ExitStack() as stack:
        encoder, hooks = _Encoder(unet), Hooks(stack)
        encoder.install(hooks)
        hooks.after(unet.get_submodule(_MIDDLE), encoder.moved_by(move))
        for block in unet.get_submodule("up_blocks").children():
            hooks.before(block, encoder.decode)
        yield


class _Encoder:
    """Hooks that gather the skips of a forward, and those that give the decoder others."""

    def __init__(self, unet: nn.Module) -> None:
        refuse_compiled(unet, "Take the plain module, and train without torch_compile.")
        self.unet = unet
        parts = ("conv_in", "down_blocks", _MIDDLE, "up_blocks")
        missing = [name for name in parts if getattr(unet, name, None) is None]
        if missing:
            raise TypeError(
                f"{type(unet).__name__} has no {', '.join(missing)}: only a UNet2DModel with a middle block has the "
                "two halves that are asked for."
            )
        self.skips: list[Tensor] = []
        self._others: dict[int, Tensor] = {}  # id of a skip -> what is decoded in its place

    def install(self, hooks: Hooks) -> None:
        """Gather the skips."""
        hooks.after(self.unet.get_submodule("conv_in"), self._begin)
        for block in self.unet.get_submodule("down_blocks").children():
            hooks.after(block, self._add)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self.skips, self._others = [output], {}

    def _add(self, module: nn.Module, args: Any, kwargs: Any, output: tuple[Any, ...]) -> None:
        self.skips.extend(output[1])

    def moved_by(self, move: Move) -> Callable[..., Tensor | None]:
        """The middle block's hook."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            moved = move(output, tuple(self.skips))
            if moved is None:
                return None
            hidden, skips = moved
            want, got = ([tuple(t.shape) for t in side] for side in ((output, *self.skips), (hidden, *skips)))
            if want != got:
                raise ValueError(f"The decoder takes activations of the shapes {want}; got {got}.")
            self._others = {id(old): new for old, new in zip(self.skips, skips, strict=True)}
            return hidden

        return hook

    def decode(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An up block's hook, before it runs: its skips are replaced."""
        if not self._others:
            return None
        name = "res_hidden_states_tuple"
        if name in kwargs:
            return args, {**kwargs, name: self._other(kwargs[name])}
        hidden, skips, *rest = args
        return (hidden, self._other(skips), *rest), kwargs

    def _other(self, skips: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._others[id(skip)] for skip in skips)


__all__ = ["Move", "UNetFeatures", "bottleneck", "decode_partial", "encode_partial"]
