"""`capture`: equal to a full forward for every layer of every family; names, ends and bad input."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from diffusers_repr.capture import capture, check_layers, match_layers
from diffusers_repr.denoiser.block_outputs import block_output
from tests.capture.models import NAMES, hook_count, setting


def full_forward(model, inputs, paths, where="output"):
    """Oracle: plain hooks on one full forward, all copied."""
    found, handles = {}, []

    def after(path):
        return lambda module, args, output: found.__setitem__(path, block_output(module, output, path).clone())

    def before(path):
        def hook(module, args, kwargs):
            found[path] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    for path in paths:
        module = model.get_submodule(path)
        if where == "output":
            handles.append(module.register_forward_hook(after(path)))
        else:
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def same(found, expected):
    assert set(found) == set(expected)
    for path, value in expected.items():
        assert torch.equal(found[path], value), path


# Bit-equal


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_at_once_equal_a_full_forward(name):
    model, inputs, layers = setting(name)
    paths = [layer.path for layer in layers]
    expected = full_forward(model, inputs, paths)
    before = hook_count(model)
    with torch.no_grad(), capture(model, paths) as tape:
        model(**inputs)
    same(tape.features, expected)
    assert hook_count(model) == before
    for layer in layers:
        value = tape[layer.path]
        if layer.kind == "map":
            assert value.shape == (2, layer.channels, *layer.grid)
        else:
            assert value.shape == (2, layer.text_tokens + layer.grid[0] * layer.grid[1], layer.channels)


@pytest.mark.parametrize("name", NAMES)
def test_one_layer_with_early_exit_equals_a_full_forward(name):
    model, inputs, layers = setting(name)
    paths = [layer.path for layer in layers]
    few = dict.fromkeys([paths[0], *paths[1 :: max(1, len(paths) // 8)], paths[-1]])
    expected = full_forward(model, inputs, few)
    for path in few:
        with torch.no_grad(), capture(model, path) as tape:
            model(**inputs)
            pytest.fail("the forward went on after the last layer")
        same(tape.features, {path: expected[path]})


@pytest.mark.parametrize("name", NAMES)
def test_inputs_equal_a_full_forward(name):
    model, inputs, layers = setting(name)
    blocks = [p for p in (layer.path for layer in layers) if p.split(".")[-1].isdigit()]
    expected = full_forward(model, inputs, blocks, "input")
    for paths in (blocks, blocks[:1], blocks[len(blocks) // 2 :]):
        with torch.no_grad(), capture(model, paths, where="input") as tape:
            model(**inputs)
        same(tape.features, {path: expected[path] for path in paths})


@pytest.mark.parametrize("name", ["ddpm", "sd", "sdxl"])
@pytest.mark.parametrize("stop_early", [True, False])
def test_the_residual_plus_the_shortcut_is_the_blocks_output(name, stop_early):
    model, inputs, _ = setting(name)
    blocks = match_layers(model, "*.resnets.?")
    assert len(blocks) > 4
    taken = full_forward(model, inputs, blocks, "input")
    given = full_forward(model, inputs, blocks)
    with torch.no_grad(), capture(model, blocks, where="residual", stop_early=stop_early) as tape:
        model(**inputs)
    for path in blocks:
        block = model.get_submodule(path)
        with torch.no_grad():
            skip = taken[path] if block.conv_shortcut is None else block.conv_shortcut(taken[path].contiguous())
        torch.testing.assert_close((skip + tape[path]) / block.output_scale_factor, given[path])


def test_residual_of_anything_else_is_refused():
    model, _, _ = setting("ddpm")
    with (
        pytest.raises(ValueError, match="'mid_block' is a UNetMidBlock2D.*'up_blocks.1.resnets.0'"),
        capture(model, ["mid_block"], where="residual"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="expected 'output', 'input' or 'residual'"),
        capture(model, ["mid_block"], where="outputs"),
    ):
        pass


def test_joint_blocks_give_the_image_stream():
    for name, path, module_index in (("sd3", "transformer_blocks.0", 1), ("flux", "transformer_blocks.1", 1)):
        model, inputs, layers = setting(name)
        seen = []
        handle = model.get_submodule(path).register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        with torch.no_grad(), capture(model, [path], stop_early=False) as tape:
            model(**inputs)
        handle.remove()
        text, image = seen[0]
        assert tape[path] is seen[0][module_index] is image
        (layer,) = (layer for layer in layers if layer.path == path)
        assert image.shape[1] == layer.grid[0] * layer.grid[1] != text.shape[1]
        assert layer.text_tokens == 0


def test_without_early_exit_the_model_returns_as_ever():
    model, inputs, _ = setting("sd")
    with torch.no_grad():
        plain = model(**inputs).sample
        with capture(model, ["mid_block"], stop_early=False) as tape:
            out = model(**inputs).sample
    assert torch.equal(out, plain)
    assert tape.calls == 1


def test_transform_is_applied_at_once_and_only_its_result_kept():
    model, inputs, _ = setting("sd")
    paths = ["mid_block", "up_blocks.1"]
    expected = full_forward(model, inputs, paths)
    seen = []

    def pooled(x, path):
        seen.append(path)
        return x.mean(dim=(2, 3))

    with torch.no_grad(), capture(model, paths, transform=pooled) as tape:
        model(**inputs)
    assert seen == paths
    same(tape.features, {path: value.mean(dim=(2, 3)) for path, value in expected.items()})


# Names


def test_a_path_is_matched_exactly():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(1, 1) for _ in range(12))})
    assert list(check_layers(model, "blocks.1")) == ["blocks.1"]
    assert check_layers(model, ["blocks.1"])["blocks.1"] is model["blocks"][1]
    assert match_layers(model, "blocks.1") == ["blocks.1"]
    assert match_layers(model, "blocks.1*") == ["blocks.1", "blocks.10", "blocks.11"]
    with pytest.raises(ValueError, match="matches 'locks.1'"):
        match_layers(model, "locks.1")


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("up_block.1", ValueError, r"No layer 'up_block.1' in UNet2DConditionModel. Closest: \['up_blocks.1'"),
        (["mid_block", "nonsense!"], ValueError, "Closest: .*match_layers"),
        ([""], ValueError, "No layer ''"),
        ([3], TypeError, "Layer 3 is int; .* never by an index"),
        (3, TypeError, "full module paths"),
        ({"mid_block"}, TypeError, "full module paths"),
        ([], ValueError, "the list is empty"),
        (["mid_block", "mid_block"], ValueError, "given twice"),
    ],
)
def test_names_that_are_no_layers(layers, error, message):
    model, _, _ = setting("sd")
    before = hook_count(model)
    with pytest.raises(error, match=message), capture(model, layers):
        pytest.fail("the block was entered")
    assert hook_count(model) == before


# What a forward may do


def test_the_model_was_not_called():
    model, _, _ = setting("sd")
    with pytest.raises(ValueError, match="the model was not called inside"), capture(model, "mid_block"):
        pass


def test_a_layer_that_never_runs():
    model, inputs, _ = setting("ddpm")
    paths = ["mid_block", "up_blocks.0.resnets.0.dropout", "time_proj"]
    model.spare = nn.Linear(2, 2)
    try:
        with (
            pytest.raises(ValueError, match=r"Never called in the forward: \['spare'\] \(called: \['mid_block'"),
            torch.no_grad(),
            capture(model, [*paths, "spare"]),
        ):
            model(**inputs)
    finally:
        del model.spare


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.layer(self.layer(x)))


def test_a_layer_that_runs_twice():
    model = Twice()
    with pytest.raises(ValueError, match="'layer' ran twice in one forward"), capture(model, ["layer", "last"]):
        model(torch.ones(1, 3))
    assert hook_count(model) == 0


def test_one_module_under_two_names():
    model = Twice()
    model.alias = model.last
    with capture(model, ["last", "alias"]) as tape:
        model(torch.ones(1, 3))
    assert torch.equal(tape["last"], tape["alias"])


def test_two_calls_keep_the_last():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    one, two = torch.randn(2, 1, 3).unbind()
    with capture(model, ["0"], stop_early=False) as tape:
        model(one)
        model(two)
    assert tape.calls == 2
    assert torch.equal(tape["0"], model[0](two))
    with pytest.raises(KeyError, match="'1' was not captured"):
        tape["1"]


class Pair(nn.Module):
    def forward(self, x):
        return x, {"a": x}


@pytest.mark.parametrize(
    ("where", "x", "message"),
    [("output", torch.ones(1), "register_block_output"), ("input", "text", "no tensor first; got str")],
)
def test_layers_that_give_no_tensor(where, x, message):
    model = nn.Sequential(Pair())
    with pytest.raises(TypeError, match=message), capture(model, ["0"], where=where):
        model(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("transform", [None, lambda x, path: x.float()])
def test_a_tensor_changed_in_place_is_never_given_out(mode, transform):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    expected = model[0](x)
    inference = mode is torch.inference_mode  # no version to compare: kept as a copy
    refused = nullcontext() if inference else pytest.raises(RuntimeError, match=r"'0' in place .*x.clone\(\)")
    with refused, mode(), capture(model, ["0", "2"], transform=transform) as tape:
        model(x)
    assert not inference or torch.equal(tape["0"], expected)
    with mode(), capture(model, ["0", "2"], transform=lambda x, path: x.clone()) as tape:
        model(x)
    assert torch.equal(tape["0"], expected)


# Blocks in blocks


@pytest.mark.parametrize(("outer", "inner"), [("mid_block", "up_blocks.0"), ("up_blocks.0", "mid_block")])
def test_nested_blocks_on_one_model(outer, inner):
    model, inputs, _ = setting("sd")
    expected = full_forward(model, inputs, ["mid_block", "up_blocks.0"])
    with torch.no_grad(), capture(model, outer) as one:
        with capture(model, inner) as two:
            model(**inputs)
            pytest.fail("the forward went on after the last layer")
        after = True
    assert after
    same({**one.features, **two.features}, expected)
    assert hook_count(model) == 0


def test_a_nested_block_does_not_cut_a_full_forward_short():
    model, inputs, _ = setting("sd")
    with torch.no_grad(), capture(model, "mid_block", stop_early=False):
        with capture(model, "conv_in") as tape:
            out = model(**inputs).sample
        assert torch.equal(out, model(**inputs).sample)
    assert list(tape.features) == ["conv_in"]


def test_nested_blocks_on_two_models():
    one, inputs_one, _ = setting("sd")
    two, inputs_two, _ = setting("ddpm")
    with torch.no_grad(), capture(one, "mid_block") as a, capture(two, "mid_block") as b:
        one(**inputs_one)
        two(**inputs_two)
    same(a.features, full_forward(one, inputs_one, ["mid_block"]))
    same(b.features, full_forward(two, inputs_two, ["mid_block"]))
