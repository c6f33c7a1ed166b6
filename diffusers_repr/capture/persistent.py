"""`PersistentCapture`: hooks that stay, for layers that are read in every step of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from diffusers_repr.capture.attention import check_attention_layers
from diffusers_repr.capture.capture import refuse_compiled
from diffusers_repr.capture.names import check_layers
from diffusers_repr.denoiser.block_outputs import block_output
from diffusers_repr.denoiser.hooks import AfterHook, BeforeHook, Turn, hook_after, hook_before, remove_hook
from diffusers_repr.hub.compiled import is_compiled_in_place


class PersistentCapture:
    """Keeps what named layers return, with its graph, while a network is trained.

    `capture` sets its hooks anew for each forward and can stop the forward early; both are right for reading features,
    and wrong for training: a compiled network sees no hooks that come after it was compiled, and the forward has to
    run to its end. It sets its hooks once, before `network.compile()`, and they become part of the graph. What
    gradient checkpointing computes a second time in the backward pass is not recorded, for the block is closed then.
    Nor is what other threads call; of a compiled network that cannot be told, so it belongs to one thread.

    Args:
        model: The network, not compiled yet.
        layers: Exact full module paths whose output is kept.
        attentions: Paths of self-attentions whose queries and keys are kept.

    Attributes:
        layers: The paths.
        attentions: The paths.

    Raises:
        ValueError: For a layer that does not exist (with the closest names), or an attention whose logits are not
            those of its queries and keys: cross-attention, joint attention, a fused projection.
        RuntimeError: If the model is compiled already.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> reads = PersistentCapture(net, ["0"])
        >>> with reads.recording() as seen:
        ...     _ = net(torch.ones(1, 2))
        >>> seen["0"].shape, seen["0"].requires_grad
        (torch.Size([1, 3]), True)
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], attentions: Sequence[str] = ()) -> None:
        refuse_compiled(model, "Make the objective first, and compile its network after.")
        modules = check_layers(model, layers) if layers else {}
        attending = check_attention_layers(model, attentions) if attentions else {}
        for path, module in attending.items():
            _check_self_attention(path, module)
        self.layers, self.attentions = tuple(modules), tuple(attending)
        self._model, self._open, self._turn = model, False, Turn()
        self._found: dict[str, Any] = {}
        self._hooked: dict[str, nn.Module] = {}
        self._handles: list[Any] = []
        self._set_hooks()

    def _set_hooks(self) -> None:
        """Set them anew where a module has been replaced since, as adapters of LoRA do."""
        parts = [f"{path}.{part}" for path in self.attentions for part in ("to_q", "to_k")]
        now = {path: self._model.get_submodule(path) for path in (*self.layers, *self.attentions, *parts)}
        if now.keys() == self._hooked.keys() and all(now[path] is module for path, module in self._hooked.items()):
            return
        self.close()
        self._hooked = now
        for path in self.layers:
            self._handles.append(hook_after(now[path], self._hook(path), self._turn))
        for path in parts:
            self._handles.append(hook_after(now[path], self._projection_hook(f"{path}:"), self._turn))
        for path in self.attentions:
            self._handles.append(hook_before(now[path], _refuse_rotary(path), self._turn))
            self._handles.append(hook_after(now[path], self._attention_hook(path), self._turn))

    @contextmanager
    def recording(self) -> Iterator[dict[str, Any]]:
        """Record the forward that is run inside.

        Yields:
            A dict, filled when the block ends: layer path -> tensor; attention path -> `(q, k)`, each
            `(B, heads, N, d)`, as the softmax gets them.

        Raises:
            ValueError: If a layer did not run.
            RuntimeError: If another thread is recording: a training step and its gradients belong to one.
        """
        self._turn.take(
            f"Another thread is recording this {type(self._model).__name__}: its weights and gradients are trained by "
            "one thread. Give each thread a network of its own, or use `capture` to read features."
        )
        seen: dict[str, Any] = {}
        try:
            self._set_hooks()
            self._found, self._open = {}, True
            with _records_in_checkpoints(self._model):
                yield seen
            wanted = (*self.layers, *self.attentions)
            missed = [path for path in wanted if path not in self._found]
            if missed:
                raise ValueError(
                    f"Never called in the forward: {missed}. `list_layers(denoiser)` shows the layers that run; fused "
                    "projections and a network compiled on its own hide theirs."
                )
            seen.update({path: self._found[path] for path in wanted})
        finally:
            self._found, self._open = {}, False
            self._turn.end()

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            remove_hook(handle)
        self._handles.clear()
        self._hooked.clear()

    def _keep(self, path: str, value: Any) -> None:
        if path in self._found:
            raise ValueError(f"Layer {path!r} ran twice in one forward; which call is meant is not clear.")
        self._found[path] = value

    def _hook(self, path: str) -> AfterHook:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._open:
                self._keep(path, block_output(module, output, path))

        return hook

    def _projection_hook(self, name: str) -> AfterHook:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if self._open:
                self._keep(name, output)

        return hook

    def _attention_hook(self, path: str) -> AfterHook:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # Here and not later: sharded parameters of the norms are whole only while the block runs.
            names = [f"{path}.{part}:" for part in ("to_q", "to_k")]
            if self._open and all(name in self._found for name in names):
                self._keep(path, _queries_and_keys(module, *(self._found.pop(name) for name in names)))

        return hook


def _records_in_checkpoints(model: nn.Module) -> AbstractContextManager[Any]:
    """Let a compiled network with gradient checkpointing be one graph.

    Without it the checkpointed blocks that hold a hook stay outside of the graph: a hook's record counts as a side
    effect that the backward pass would have to repeat. Ours must not be repeated.
    """
    if not is_compiled_in_place(model) or not getattr(model, "gradient_checkpointing", False):
        return nullcontext()
    # Private settings of torch's compiler: without this one each such block is compiled by itself, which is slower.
    import torch._dynamo.config as settings

    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    return settings.patch(name, True) if hasattr(settings, name) else nullcontext()


def _check_self_attention(path: str, module: Any) -> None:
    reasons = {
        "it joins two streams": getattr(module, "add_k_proj", None) is not None,
        "it is a cross-attention": bool(getattr(module, "is_cross_attention", False)),
        "its projections are fused": bool(getattr(module, "fused_projections", False))
        or not (hasattr(module, "to_q") and hasattr(module, "to_k")),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"The attention {path!r} ({type(module).__name__}) cannot be aligned: {reason}. Take a self-attention "
                "of image tokens alone; `attention_layers(model)` lists all."
            )


def _refuse_rotary(path: str) -> BeforeHook:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if any(value is not None for name, value in kwargs.items() if "rotary" in name or name == "freqs_cis"):
            raise ValueError(
                f"The attention {path!r} turns its queries and keys by rotary embeddings after their projection; its "
                "logits are not known. Take a network without them."
            )

    return hook


def _queries_and_keys(module: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """`(B, N, heads d)` to `(B, heads, N, d)` each, normed as the module does, grouped keys repeated."""
    width = query.shape[-1] // module.heads
    parts = []
    for value, norm in ((query, getattr(module, "norm_q", None)), (key, getattr(module, "norm_k", None))):
        weight = getattr(norm, "weight", None)
        across = weight is not None and weight.numel() == value.shape[-1] != width
        value = norm(value) if norm is not None and across else value
        value = value.unflatten(-1, (-1, width)).transpose(1, 2)
        parts.append(norm(value) if norm is not None and not across else value)
    query, key = parts
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query, key


__all__ = ["PersistentCapture"]
