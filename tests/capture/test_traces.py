"""`capture` leaves nothing behind and lives with gradients, autocast, offloading and compilation."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn

from diffusers_repr.capture import capture
from diffusers_repr.denoiser import Denoiser
from tests.capture.models import hook_count, inputs_of, setting
from tests.testers.cases import some
from tests.testers.hosts import before
from tests.testers.models import CONDITIONS, SIZES, build

LAYERS = {
    "sd": ["mid_block", "up_blocks.1.attentions.0", "up_blocks.1"],
    "ddpm": ["mid_block", "up_blocks.1.attentions.0", "up_blocks.1"],
    "flux": ["transformer_blocks.1", "single_transformer_blocks.0"],
    "sd3": ["transformer_blocks.0", "transformer_blocks.1"],
}


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


# No trace


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("in the model"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("place", ["model", "transform", "block"])
def test_no_hook_is_left_after_an_error(error, place):
    def transform(x, path):
        if place == "transform":
            raise error
        return x

    model = nn.Sequential(nn.Linear(4, 4), Fails(error) if place == "model" else nn.Tanh(), nn.Linear(4, 4))
    model.register_forward_hook(lambda module, args, output: None)  # a user's own

    def run():
        with capture(model, ["0", "2"], transform=transform):
            if place == "block":
                raise error
            model(torch.ones(1, 4))

    with pytest.raises(type(error)) as raised:
        run()
    assert raised.value is error
    assert hook_count(model) == 1
    with capture(model, ["0"]) as tape:  # a later block is not disturbed
        model(torch.ones(1, 4))
    assert "0" in tape.features


def test_modules_and_modes_stay_as_they_were():
    model, inputs, _ = setting("sd")
    model.mid_block.train()
    before = [(module.training, set(vars(module))) for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad(), capture(model, LAYERS["sd"]):
        model(**inputs)
    assert [(module.training, set(vars(module))) for module in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags
    model.mid_block.eval()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("stop_early", [False, True])
def test_no_activation_outlives_the_tape(grad, stop_early):
    model = mlp()
    alive = weakref.WeakSet()
    model[1].register_forward_hook(lambda module, args, output: alive.add(output))
    gc.collect()
    gc.disable()  # what is kept is kept by a reference, not by a cycle
    try:
        for _ in range(100):
            with torch.set_grad_enabled(grad), capture(model, ["0", "1"], stop_early=stop_early) as tape:
                model(torch.ones(2, 4))
            feature = weakref.ref(tape["0"])
            assert len(alive) == 1
            del tape
            assert feature() is None
            assert len(alive) == 0
    finally:
        gc.enable()


def test_nothing_is_kept_after_an_error_either():
    model = mlp()
    kept = []

    def transform(x, path):
        kept.append(weakref.ref(x))
        raise ValueError("no")

    gc.disable()
    try:
        with pytest.raises(ValueError, match="no"), capture(model, ["1"], transform=transform):
            model(torch.ones(2, 4))
    finally:
        gc.enable()
    gc.collect()
    assert [ref() for ref in kept] == [None]


def test_pooled_features_free_the_maps():
    model, inputs, _ = setting("sd")
    maps = []
    with (
        torch.no_grad(),
        capture(model, LAYERS["sd"], transform=lambda x, path: maps.append(weakref.ref(x)) or x.mean((2, 3))) as tape,
    ):
        model(**inputs)
    assert [ref() for ref in maps] == [None] * 3
    assert [tuple(tape[layer].shape) for layer in LAYERS["sd"]] == [(2, 16)] * 3


# Gradients and autocast


@pytest.mark.parametrize("stop_early", [True, False])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_gradients_flow_through_features(name, stop_early):
    model, inputs, _ = setting(name)
    key = next(iter(inputs))
    x = inputs[key].clone().requires_grad_()
    seen, handles = {}, []
    for path in LAYERS[name]:
        hook = lambda m, a, out, path=path: seen.__setitem__(path, out)  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    model(**{**inputs, key: x})
    for handle in handles:
        handle.remove()
    plain = {path: out if isinstance(out, torch.Tensor) else out[-1] for path, out in seen.items()}
    (expected,) = torch.autograd.grad(sum(value.square().sum() for value in plain.values()), x)

    with capture(model, LAYERS[name], stop_early=stop_early) as tape:
        model(**{**inputs, key: x})
    (found,) = torch.autograd.grad(sum(tape[path].square().sum() for path in LAYERS[name]), x)
    assert torch.equal(found, expected)
    assert found.abs().sum() > 0


def test_autocast_is_the_models_own():
    model, inputs, _ = setting("sd")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with capture(model, LAYERS["sd"], stop_early=False) as full:
            model(**inputs)
        with capture(model, LAYERS["sd"]) as early:
            model(**inputs)
    for path in LAYERS["sd"]:
        assert torch.equal(early[path], full[path])
    assert early["mid_block"].dtype == torch.bfloat16 or early["up_blocks.1.attentions.0"].dtype == torch.bfloat16


def test_features_under_inference_mode():
    model, inputs, _ = setting("sd")
    with torch.no_grad(), capture(model, LAYERS["sd"]) as plain:
        model(**inputs)
    with torch.inference_mode(), capture(model, LAYERS["sd"]) as tape:
        model(**inputs)
    for path in LAYERS["sd"]:
        assert torch.equal(tape[path], plain[path])


# Inside other hook systems


def offload(pipe, kind):
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif kind == "sequential":  # as enable_sequential_cpu_offload, whose "cpu:0" accelerate cannot handle
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                cpu_offload(module, torch.device("cpu"), offload_buffers=len(module._parameters) > 0)
    else:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        cpu = torch.device("cpu")
        pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)


def sample(pipe, name):
    generator = torch.Generator().manual_seed(0)
    height, width = SIZES[name]
    size = {} if name == "ddpm" else {"height": height, "width": width}
    kind = "np" if name == "ddpm" else "latent"
    call = {"num_inference_steps": 2, "output_type": kind, "generator": generator, **CONDITIONS[name], **size}
    return torch.as_tensor(pipe(**call).images)


@pytest.mark.parametrize(
    ("name", "kind"),
    some(
        [*((name, kind) for name in ("sd", "flux") for kind in ("model", "sequential", "block_level", "leaf_level")),
         ("ddpm", "model"), ("ddpm", "sequential"), ("ddpm", "leaf_level")],
        ("sd", "sequential"), ("sd", "leaf_level"), ("flux", "model"), ("flux", "block_level"), ("ddpm", "sequential"),
    ),
)  # fmt: skip
def test_offloaded_models(name, kind):
    pipe = build(name)
    denoiser = Denoiser.from_pipe(pipe)
    inputs = inputs_of(denoiser, name)
    with torch.no_grad(), capture(denoiser.model, LAYERS[name]) as plain:
        denoiser.model(**inputs)
    image = sample(pipe, name)
    offload(pipe, kind)
    for stop_early in (True, False, True):
        with torch.no_grad(), capture(pipe.components[component(pipe)], LAYERS[name], stop_early=stop_early) as tape:
            denoiser.model(**inputs)
        for path in LAYERS[name]:
            assert torch.equal(tape[path], plain[path])
    if not (name == "ddpm" and kind == "sequential" and before("diffusers", "0.42")):  # whose noise is on "meta" then
        assert torch.equal(sample(pipe, name), image)


@pytest.mark.filterwarnings("error:module forward hook")
@pytest.mark.parametrize("stop", ["early", "error", "never"])
def test_no_weights_of_a_sequential_offload_stay(stop):
    pipe = build("pixart")  # its blocks, and the network itself, hold parameters besides those of their parts
    inputs = inputs_of(Denoiser.from_pipe(pipe), "pixart")
    offload(pipe, "sequential")
    model = pipe.transformer
    assert all(p.is_meta for p in model.parameters())

    def transform(x, path):
        if stop == "error":
            raise ValueError("an error")
        return x

    layer = "transformer_blocks.0.attn1"
    error = pytest.raises(ValueError, match="an error") if stop == "error" else nullcontext()
    with error, torch.no_grad(), capture(model, layer, stop_early=stop == "early", transform=transform):
        model(**inputs)
    assert [name for name, p in model.named_parameters() if not p.is_meta] == []
    assert hook_count(model) == 0


def counted(plain, change):
    def move(group):
        change(group)
        return plain(group)

    return move


@pytest.mark.filterwarnings("error:module forward hook")
@pytest.mark.parametrize("layer", ["up_blocks.0", "up_blocks.0.resnets.0.conv1", "mid_block.attentions.0"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_no_group_of_a_group_offload_stays(kind, layer, monkeypatch):
    inside = set()
    for name, change in (("onload_", inside.add), ("offload_", inside.discard)):
        monkeypatch.setattr(ModuleGroup, name, counted(getattr(ModuleGroup, name), change))
    pipe = build("sd")
    inputs = inputs_of(Denoiser.from_pipe(pipe), "sd")
    with torch.no_grad(), capture(pipe.unet, layer) as plain:
        pipe.unet(**inputs)
    offload(pipe, kind)
    for _ in range(2):
        with torch.no_grad(), capture(pipe.unet, layer) as tape:
            pipe.unet(**inputs)
        assert torch.equal(tape[layer], plain[layer])
        assert not inside


def component(pipe):
    return "unet" if "unet" in pipe.components else "transformer"


# Compilation


@pytest.fixture
def dynamo():
    import torch._dynamo

    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


def compiled_in_place(model):
    model.compile(backend="aot_eager")
    return model


def compiled_part(model):
    model[0] = torch.compile(model[0], backend="aot_eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: torch.compile(model, backend="aot_eager"),
        compiled_in_place,
        compiled_part,
        compiled_forward,
        lambda model: torch.jit.script(model),
    ],
    ids=["wrapper", "in_place", "part", "forward", "script"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_are_refused(change, dynamo):
    model = change(mlp())
    message = r"is compiled; .* compile inside it, or pass the plain module"
    with pytest.raises(RuntimeError, match=message), capture(model, "0"):
        pytest.fail("the block was entered")


def test_the_plain_module_inside_a_compiled_one_is_fine(dynamo):
    model = mlp()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.ones(2, 4))
    with capture(compiled._orig_mod, "0") as tape:
        compiled._orig_mod(torch.ones(2, 4))
    assert torch.equal(tape["0"], model[0](torch.ones(2, 4)))


@pytest.mark.parametrize(("name", "stop_early"), [("ddpm", True), pytest.param("sd3", False, marks=pytest.mark.slow)])
def test_capture_first_and_compile_after(name, stop_early, dynamo):
    model, inputs, _ = setting(name)
    model = copy.deepcopy(model)
    with torch.no_grad():
        with capture(model, LAYERS[name]) as plain:
            model(**inputs)
        full = model(**inputs, return_dict=False)[0]
        with capture(model, LAYERS[name], stop_early=stop_early) as tape:
            compiled = torch.compile(model, backend="aot_eager")
            out = compiled(**inputs, return_dict=False)[0]
            first = dict(tape.features)
            compiled(**{**inputs, "return_dict": False})
    torch.testing.assert_close(out, full)
    assert tape.calls == 2
    for path in LAYERS[name]:
        torch.testing.assert_close(first[path], plain[path])
        assert torch.equal(tape[path], first[path])
    assert hook_count(model) == 0


def test_a_compiled_copy_called_outside_records_nothing(dynamo):
    model = mlp()
    with capture(model, "0") as tape:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(torch.ones(2, 4))
    before = tape["0"]
    compiled(torch.zeros(2, 4))
    assert tape["0"] is before
