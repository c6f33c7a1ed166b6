"""Lanes of a network call by the executor, and by passes of their own with hooks as an oracle."""

import functools
from contextlib import ExitStack

import torch

from diffusers_repr.capture.batching import index_batch, map_rows
from diffusers_repr.capture.executor import Executor
from diffusers_repr.capture.lanes import Lane, NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.family import BatchLanes
from tests.capture.models import NAMES, hook_count
from tests.testers.models import CONDITIONS, SIZES, build

# Network -> attention layers from the first to the last.
LAYERS = {
    "ddpm": ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.1"),
    "sd": (
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1",
        "mid_block.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.3.attentions.0.transformer_blocks.0.attn1",
    ),
    "sdxl": (
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1",
        "mid_block.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1",
    ),
    "dit": tuple(f"transformer_blocks.{at}.attn1" for at in (0, 1, 2)),
    "pixart": tuple(f"transformer_blocks.{at}.attn1" for at in (0, 1)),
    "sd3": tuple(f"transformer_blocks.{at}.attn" for at in (0, 1)),
    "flux": (
        "transformer_blocks.0.attn",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    ),
    "sana": tuple(f"transformer_blocks.{at}.attn1" for at in (0, 1)),
}
LAYERS |= {"ddim": LAYERS["ddpm"], "class_unet": LAYERS["ddpm"], "flux_guidance": LAYERS["flux"]}
CASES = [(name, layer) for name in NAMES for layer in LAYERS[name]]


@functools.cache
def denoiser_of(name):
    """One a process: do not change it."""
    return Denoiser.from_pipe(build(name))


@functools.cache
def _inputs_of(name, rows):
    denoiser = denoiser_of(name)
    size, draw = SIZES[name], torch.Generator().manual_seed(0)
    h, w = (side // denoiser.stride for side in size)
    x = torch.randn(rows, denoiser.family.channels(), h, w, generator=draw)
    with torch.no_grad():
        condition = denoiser.condition(**CONDITIONS[name], batch=rows, size=size).kwargs()
    if "class_labels" in condition:
        condition = {**condition, "class_labels": torch.arange(rows) + 2}
    kept = {"encoder_attention_mask", "guidance", "img_ids", "txt_ids", "time_ids"}

    def differ(value):
        return value + torch.randn(value.shape, generator=draw) if value.is_floating_point() else value

    condition = map_rows(condition, rows, differ, kept)
    low, high = denoiser.schedule.timestep_range
    return denoiser.network_inputs(x, denoiser.level(round(low + 0.3 * (high - low))), condition)


def inputs_of(name, rows):
    """Keyword inputs of a network with `rows` different rows."""
    return dict(_inputs_of(name, rows))


def call_of(denoiser, inputs, rows, batch=None):
    x = denoiser.family.sample(inputs)
    return NetworkCall(inputs, rows, batch or BatchLanes(slice(0, rows)), x, denoiser.level(300))


def changed_by(factor):
    """A lane's function: the module's own output times a factor."""

    def run(module, args, kwargs, call):
        return scaled(module.forward(*args, **kwargs), factor)

    return run


def scaled(output, factor):
    return output * factor if isinstance(output, torch.Tensor) else tuple(scaled(item, factor) for item in output)


def lane(name, layers, factor):
    return Lane(name, dict.fromkeys(layers, changed_by(factor)))


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def together(denoiser, call, lanes, which=None, taps=(), all_taps=None):
    """`(rows of the call, lane -> its rows)`, in one pass."""
    executor = Executor(denoiser.model, denoiser.family, lanes, all_taps)
    before = hook_count(denoiser.model)
    with ExitStack() as stack:
        executor.install(stack)
        given = executor.begin(call, which or slice(0, call.rows), lanes, taps)
        try:
            found = executor.split(forward(denoiser.model, given))
        finally:
            executor.end()
    assert hook_count(denoiser.model) == before
    return found


def alone(denoiser, call, layers, factor):
    """The conditional rows by a pass of their own."""
    rows = {key: index_batch(value, call.rows, call.batch.cond) for key, value in call.inputs.items()}
    rows |= {key: call.inputs[key] for key in ("img_ids", "txt_ids") if key in rows}
    handles = [
        denoiser.model.get_submodule(path).register_forward_hook(lambda m, a, out: scaled(out, factor))
        for path in layers
    ]
    try:
        return forward(denoiser.model, rows)
    finally:
        for handle in handles:
            handle.remove()


def close(found, expected):
    size = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(size, 1e-3))


def check(denoiser, call, lanes, which=None):
    """Every lane equals a pass of its own; the call's rows are those of the network as it is.

    Args:
        lanes: Name -> (layers, factor).
    """
    plain = forward(denoiser.model, call.inputs)
    own, found = together(denoiser, call, [lane(key, *value) for key, value in lanes.items()], which)
    which = which or slice(0, call.rows)
    close(own, plain[which])
    assert list(found) == list(lanes)
    for key, (layers, factor) in lanes.items():
        expected = alone(denoiser, call, layers, factor)
        close(found[key], expected)
        assert (expected - plain[call.batch.cond]).abs().max() > 1e-4 * plain.abs().max()
    return own


def units_by_call(model, inputs):
    """The network's children (elements of lists) in the order in which its forward calls them, and rows they see."""
    units, seen, handles = dict(model.named_children()), [], []
    for name, child in list(units.items()):
        if isinstance(child, torch.nn.ModuleList):
            del units[name]
            units |= {f"{name}.{at}": element for at, element in enumerate(child)}

    def note(path):
        def hook(module, args, kwargs):
            first = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim)
            if path not in ("pos_embed", "add_time_proj"):  # of position ids; of all size numbers in one row
                seen.append((path, first.shape[0]))

        return hook

    for path, unit in units.items():
        handles.append(unit.register_forward_pre_hook(note(path), with_kwargs=True))
    return seen, handles
