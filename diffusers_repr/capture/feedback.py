"""Two forwards of one network on the same input: what the first made of it is fed back into layers of the second.

By hooks alone. Up to the first layer that gets something both forwards are equal: there the second takes what the
first computed. Each is left after the last layer that is wanted of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.capture.capture import Transform, capture
from diffusers_repr.capture.gradient import frozen, refuse_inference_mode, refuse_swapped_weights
from diffusers_repr.capture.names import check_layers
from diffusers_repr.capture.prefix import Prefix, units_around
from diffusers_repr.denoiser.block_outputs import block_output, replaced_output
from diffusers_repr.denoiser.hooks import AfterHook, Hooks

Run = Callable[[], Any]


@dataclass(frozen=True)
class FirstPass:
    """What the first forward leaves.

    Attributes:
        features: Layer path -> what it returned, of the layers that feed.
        shared: What was done when the first fed layer was.
    """

    features: Mapping[str, Tensor]
    shared: Prefix = field(repr=False)

    def check(self) -> None:
        """Raise RuntimeError if what the forwards share was changed in place since."""
        changed = self.shared.changed
        if changed:
            raise RuntimeError(
                f"The network changed the output of {', '.join(changed)} in place after it was computed, and the "
                "second forward cannot take it over; pass share=False."
            )


class FeedbackPasses:
    """The two forwards, in the calls of the running thread; nothing is left behind.

    Args:
        model: The network; not compiled.
        sources: Paths of the layers that feed.
        targets: Paths of the layers that are fed, whose output is a map.
        layers: Paths of the layers to be read in the second forward.
        share: Take over what both forwards have in common; it is the same either way.

    Raises:
        ValueError: For layers that do not exist.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
        >>> passes = FeedbackPasses(net, ["2"], ["0"], ["1"])
        >>> run = lambda: net(torch.ones(1, 1, 4, 4))
        >>> first = passes.first(run)
        >>> passes.second(run, first, {"0": first.features["2"]})["1"].shape
        torch.Size([1, 2, 4, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Sequence[str],
        targets: Sequence[str],
        layers: Sequence[str],
        share: bool = True,
    ) -> None:
        self.model = model
        self.sources, self.layers = list(check_layers(model, list(sources))), list(check_layers(model, list(layers)))
        self.targets = check_layers(model, list(targets))
        inside = [*self.targets, *self.sources, *self.layers]
        self._units = {
            path: unit
            for path, unit in units_around(model, list(self.targets))
            if share and not any(one.startswith(f"{path}.") for one in inside)  # what is read inside of it has to run
        }

    @torch.no_grad()
    def first(self, run: Run) -> FirstPass:
        """The first forward, without gradients, left after the last layer that feeds.

        Args:
            run: Calls the network.

        Raises:
            ValueError: If a layer that feeds did not run.
            RuntimeError: For a compiled network.
        """
        shared = Prefix(self._units)
        with ExitStack() as stack:
            shared.record(Hooks(stack), list(self.targets.values()))
            with capture(self.model, self.sources) as tape:
                run()
        shared.renew()
        return FirstPass(tape.features, shared)

    def second(
        self, run: Run, first: FirstPass, feedback: Mapping[str, Tensor], transform: Transform | None = None
    ) -> dict[str, Any]:
        """The second forward: `output + feedback`, brought to its size, in every fed layer.

        Gradients pass through what is fed back and never to the network's own weights, which need not be frozen.

        Args:
            run: Calls the network with what the first forward was called with.
            first: What `first` gave.
            feedback: Fed layer -> map `(B, C, h, w)`, of any size; made bilinear to that of the layer's output.
            transform: As in `capture`.

        Returns:
            Layer path -> what it returned, of the layers to be read.

        Raises:
            ValueError: If a fed layer comes after the last one that is read, for feedback of other layers or channels,
                and with gradients for a network whose activations are recomputed or whose weights are swapped.
            RuntimeError: In inference mode with gradients asked for, for a compiled network, and if what the forwards
                share was changed in place.
        """
        if set(feedback) != set(self.targets):
            raise ValueError(f"Feedback for {list(feedback)} came; the fed layers are {list(self.targets)}.")
        first.check()
        fed: set[str] = set()
        with ExitStack() as stack:
            stack.enter_context(self._without_weights(any(value.requires_grad for value in feedback.values())))
            hooks = Hooks(stack)
            first.shared.replay(stack)
            for path, module in self.targets.items():
                hooks.after(module, _adding(path, feedback[path], fed))
            with capture(self.model, self.layers, transform=transform) as tape:
                run()
        missed = [path for path in self.targets if path not in fed]
        if missed:
            raise ValueError(
                f"{', '.join(missed)} did not run before the last layer that is read, {self.layers}: what is fed back "
                "there acts on nothing. Read later layers, or feed earlier ones."
            )
        return tape.features

    def _without_weights(self, differentiated: bool) -> Any:
        if not (differentiated and torch.is_grad_enabled()):
            return nullcontext()
        refuse_inference_mode()
        refuse_swapped_weights(self.model)
        if getattr(self.model, "is_gradient_checkpointing", False):
            raise ValueError(
                f"{type(self.model).__name__} recomputes its activations in the backward pass, where nothing is fed "
                "back any more; call disable_gradient_checkpointing()."
            )
        return frozen(self.model)


def _adding(path: str, value: Tensor, fed: set[str]) -> AfterHook:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        found = block_output(module, output, path)
        if path in fed:
            raise ValueError(f"Layer {path!r} ran twice in one forward; which call is to be fed is not clear.")
        if found.ndim != 4 or value.ndim != 4 or found.shape[:2] != value.shape[:2]:
            raise ValueError(f"Layer {path!r} gives {tuple(found.shape)}, fed back came {tuple(value.shape)}.")
        fed.add(path)
        size = (found.shape[2], found.shape[3])
        same = tuple(value.shape[2:]) == size
        sized = value if same else functional.interpolate(value, size, mode="bilinear", align_corners=False)
        return replaced_output(module, output, path, found + sized.to(found.dtype))

    return hook


__all__ = ["FeedbackPasses", "FirstPass"]
