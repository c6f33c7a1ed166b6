"""Lanes that share a pass equal passes of their own, on every family and at every depth; shared work is shared."""

from contextlib import ExitStack

import pytest
import torch

from diffusers_repr.capture.batching import index_batch
from diffusers_repr.capture.executor import Executor
from diffusers_repr.denoiser.family import BatchLanes
from tests.capture.lane_cases import (
    CASES,
    LAYERS,
    call_of,
    check,
    close,
    denoiser_of,
    forward,
    inputs_of,
    lane,
    together,
    units_by_call,
)
from tests.capture.models import NAMES
from tests.testers.cases import pairs, rotating

# Every family


# Without guidance one layer a network: the last, after all others. test_batches_of_every_size has its rows.
@pytest.mark.parametrize(
    ("case", "guided"),
    pairs(CASES, (False, True), *((case, True) for case in CASES), *(((n, LAYERS[n][-1]), False) for n in NAMES)),
)
def test_a_lane_equals_a_pass_of_its_own(case, guided):
    name, layer = case
    denoiser = denoiser_of(name)
    rows = 4 if guided else 2
    batch = BatchLanes(slice(2, 4), slice(0, 2)) if guided else None
    call = call_of(denoiser, inputs_of(name, rows), rows, batch)
    check(denoiser, call, {"one": ([layer], 0.0)})
    assert call.joined == ("" if name == "sana" else ".".join(layer.split(".")[: 1 if "mid" in layer else 2]))


@pytest.mark.parametrize("name", NAMES)
def test_several_lanes_with_layers_of_their_own(name):
    denoiser = denoiser_of(name)
    first, *_, last = LAYERS[name]
    call = call_of(denoiser, inputs_of(name, 4), 4, BatchLanes(slice(0, 2), slice(2, 4)))
    lanes = {"last": ([last], 0.0), "both": ([first, last], 0.5), "first": ([first], -1.0)}
    check(denoiser, call, lanes)
    assert call.joined == ("" if name == "sana" else ".".join(first.split(".")[:2]))


@pytest.mark.parametrize(("name", "rows"), rotating(NAMES, (1, 3, 2)))
def test_batches_of_every_size(name, rows):
    denoiser = denoiser_of(name)
    call = call_of(denoiser, inputs_of(name, rows), rows)
    check(denoiser, call, {"a": ([LAYERS[name][-1]], 0.0), "b": ([LAYERS[name][-1]], 0.5)})
    guided = call_of(denoiser, inputs_of(name, 2 * rows), 2 * rows)
    guided.batch = BatchLanes(slice(rows, 2 * rows), slice(0, rows))
    check(denoiser, guided, {"a": ([LAYERS[name][1]], 0.0)})
    check(denoiser, guided, {"a": ([LAYERS[name][1]], 0.0)}, which=guided.batch.cond)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_what_lies_before_is_computed_once(name, layer):
    denoiser = denoiser_of(name)
    call = call_of(denoiser, inputs_of(name, 4), 4, BatchLanes(slice(2, 4), slice(0, 2)))
    lanes = [lane("a", [layer], 0.0), lane("b", [layer], 0.5)]
    executor = Executor(denoiser.model, denoiser.family, lanes)
    with ExitStack() as stack:
        executor.install(stack)
        given = executor.begin(call, slice(0, 4), lanes)
        seen, handles = units_by_call(denoiser.model, given)
        inside = []
        module = denoiser.model.get_submodule(layer)
        forward_of = module.forward
        module.forward = lambda *a, **k: (inside.append(len(_first(a, k))), forward_of(*a, **k))[1]
        forward(denoiser.model, given)
        for handle in handles:
            handle.remove()
        del module.forward
    order = [path for path, _ in seen]
    unit = next(path for path in order if layer.startswith(path + "."))
    start = 0 if name == "sana" else order.index(unit)
    assert [rows for _, rows in seen] == [4] * start + [8] * (len(order) - start)
    assert inside == [4, 2, 2]  # its own forward: the call's rows; twice more by the lanes of this test themselves
    assert call.joined == ("" if name == "sana" else unit)


def _first(args, kwargs):
    return next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("name", ["sd", "pixart", "flux"])
def test_whole_blocks_and_other_layers_can_be_changed(name):
    """Any module whose arguments have rows: top-level ones too."""
    paths = {
        "sd": ["mid_block.resnets.0", "up_blocks.1.resnets.2.conv1", "up_blocks.2.attentions.0"],
        "pixart": ["transformer_blocks.1.ff", "transformer_blocks.1"],
        "flux": ["transformer_blocks.1", "transformer_blocks.0.ff", "single_transformer_blocks.1"],
    }[name]
    denoiser = denoiser_of(name)
    call = call_of(denoiser, inputs_of(name, 2), 2)
    for path in paths:
        check(denoiser, call, {"a": ([path], -20.0)})


def test_taps_see_the_rows_of_the_call_only():
    denoiser = denoiser_of("sd")
    down, mid, up = LAYERS["sd"]
    call = call_of(denoiser, inputs_of("sd", 4), 4, BatchLanes(slice(2, 4), slice(0, 2)))

    def keep(module, args, kwargs, call):
        return _first(args, kwargs).clone()

    taps = {"down": (down, keep), "mid": (mid, keep), "up": (up, keep), "unasked": (mid, keep)}
    together(denoiser, call, [lane("a", [mid], 0.0)], taps=("down", "mid", "up"), all_taps=taps)
    assert set(call.observers) == {"down", "mid", "up"}
    found, call.observers = call.observers, {}
    together(denoiser, call, [], taps=("down", "mid", "up"), all_taps=taps)
    for key, value in call.observers.items():
        assert value.shape[0] == 4
        close(found[key], value)


# Rows and other dimensions


def test_a_dimension_that_equals_the_rows_by_chance():
    """FLUX's position ids and rotations have as many entries as rows here: 4 image, 4 text, 8 tokens."""
    denoiser = denoiser_of("flux")
    config = denoiser.config
    for rows in (1, 4, 8):
        draw = torch.Generator().manual_seed(rows)
        condition = {
            "encoder_hidden_states": torch.randn(rows, 4, config["joint_attention_dim"], generator=draw),
            "pooled_projections": torch.randn(rows, config["pooled_projection_dim"], generator=draw),
            "txt_ids": torch.zeros(4, 3),
        }
        x = torch.randn(rows, 4, 4, 4, generator=draw)
        call = call_of(denoiser, denoiser.network_inputs(x, denoiser.level(300), condition), rows)
        for layer in LAYERS["flux"]:
            check(denoiser, call, {"a": ([layer], 0.0)})


def test_rows_are_found_in_any_nesting():
    batched, other, parameter = torch.arange(6.0).view(3, 2), torch.ones(4), torch.nn.Parameter(torch.ones(3))
    nested = {"a": [batched, (other, {"b": batched})], "img_ids": batched, "n": 3, "p": parameter, "s": batched.shape}
    found = index_batch(nested, 3, slice(1, 3))
    assert torch.equal(found["a"][0], batched[1:])
    assert torch.equal(found["a"][1][1]["b"], batched[1:])
    assert found["a"][1][0] is other
    assert found["img_ids"] is batched
    assert found["p"] is parameter
    assert (found["n"], found["s"]) == (3, batched.shape)
    assert type(found["a"]) is list
    assert type(found["a"][1]) is tuple
    whole = index_batch(nested, 3, slice(0, 3))
    assert whole["a"] is not nested["a"]
    assert whole["a"][0] is batched


def test_containers_that_a_network_empties():
    """A forward that pops from what it is given finds it whole in the next pass of the same call."""
    denoiser = denoiser_of("sd")
    inputs = inputs_of("sd", 2)
    inputs["cross_attention_kwargs"] = {"scale": 1.0, "list": [torch.ones(2, 1)]}
    call = call_of(denoiser, inputs, 2)
    executor = Executor(denoiser.model, denoiser.family, [])
    for _ in range(2):
        given = executor.begin(call, slice(0, 2))
        given["cross_attention_kwargs"].pop("scale")
        given["cross_attention_kwargs"]["list"].clear()
        executor.end()
    assert call.inputs["cross_attention_kwargs"].keys() == {"scale", "list"}
    assert len(call.inputs["cross_attention_kwargs"]["list"]) == 1


def test_after_a_failed_pass_the_next_one_is_clean():
    denoiser = denoiser_of("sd")
    call = call_of(denoiser, inputs_of("sd", 2), 2)
    mid = LAYERS["sd"][1]
    lanes = [lane("a", [mid], 0.0)]
    executor = Executor(denoiser.model, denoiser.family, lanes)

    def fail(module, args):
        raise KeyboardInterrupt

    expected, _ = together(denoiser, call, lanes)
    with ExitStack() as stack:
        executor.install(stack)
        handle = denoiser.model.conv_out.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            forward(denoiser.model, executor.begin(call, slice(0, 2), lanes))
        handle.remove()
        executor.end()
        plain = forward(denoiser.model, call.inputs)  # by hand: no lanes
        assert plain.shape[0] == 2
        found, _ = executor.split(forward(denoiser.model, executor.begin(call, slice(0, 2), lanes)))
        executor.end()
    assert torch.equal(found, expected)
    assert torch.equal(found, plain) or (found - plain).abs().max() < 1e-5
