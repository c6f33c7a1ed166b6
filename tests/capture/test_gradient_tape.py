"""The gradient tape against finite differences and plain autograd; what it leaves behind."""

import copy
from contextlib import ExitStack

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch import nn

from diffusers_repr.capture.gradient import GradientStop, GradientTape, gradient_of, refuse_swapped_weights
from tests.testers.models import unet2d

UP = "up_blocks.1.resnets.0.conv2"
LAYERS = ["down_blocks.1", "mid_block.attentions.0", UP]


def seeded(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return unet2d(2).double().eval()


X = seeded(2, 2, 16, 8)


def of_layers(features, output, x):
    """Smooth, reads several layers and x itself, other weights for every entry."""
    parts = [(torch.sin(f) * seeded(*f.shape, seed=3).to(f)).sum() for f in features.values()]
    return sum(parts) + (x**2).sum()


def of_output(features, output, x):
    return (torch.tanh(output) * seeded(*output.shape, seed=4).to(output)).sum() + (output * x).sum()


def run(model, loss, layers, x=X, stop=False, at_output=False, tape=None, **options):
    """The gradient by the tape, and the network's output where the forward reached it."""
    leaf, output = x.clone().requires_grad_(True), None
    with ExitStack() as stack, torch.no_grad():
        if tape is None:
            tape = GradientTape(model, LAYERS)
            tape.install(stack)
        tape.begin(leaf, loss, layers, at_output=at_output, stop=stop, **options)
        try:
            output = model(leaf, 500).sample
            tape.finish(output)
        except GradientStop:
            assert stop
        finally:
            tape.end()
    return tape.gradient, output


def plain(model, loss, layers, x=X, at_output=False):
    """The loss as an ordinary function of x."""
    found, handles = {}, []
    for path in layers:

        def keep(module, args, output, path=path):
            found[path] = output[0] if isinstance(output, tuple) else output

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    output = model(x, 500).sample
    for handle in handles:
        handle.remove()
    return loss({path: found[path] for path in layers}, output if at_output else None, x)


def plain_gradient(*args, x=X, **kwargs):
    leaf = x.clone().requires_grad_(True)
    return torch.autograd.grad(plain(*args, x=leaf, **kwargs), leaf)[0]


@pytest.mark.parametrize(
    ("loss", "layers", "at_output"),
    [(of_layers, LAYERS, False), (of_layers, [UP], False), (of_output, [], True)],
    ids=["three layers", "one layer", "output"],
)
def test_equals_central_differences_in_five_directions(unet, loss, layers, at_output):
    gradient, _ = run(unet, loss, layers, at_output=at_output)
    step = 1e-5
    for seed in range(5):
        direction = seeded(*X.shape, seed=10 + seed)
        with torch.no_grad():
            ends = [plain(unet, loss, layers, X + sign * step * direction, at_output) for sign in (1, -1)]
        measured = float(ends[0] - ends[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("layers", [LAYERS, ["mid_block.attentions.0"], [UP]], ids=["all", "middle", "inside a block"])
def test_equals_plain_autograd_however_it_runs(unet, layers, stop, checkpoint):
    expected = plain_gradient(unet, of_layers, layers)
    gradient, output = run(unet, of_layers, layers, stop=stop, checkpoint=checkpoint)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert (output is None) == stop
    assert not unet.is_gradient_checkpointing


@pytest.mark.parametrize("checkpoint", [False, True])
def test_layers_and_output_together(unet, checkpoint):
    def loss(features, output, x):
        return of_layers(features, None, x) + of_output({}, output, x)

    expected = plain_gradient(unet, loss, LAYERS, at_output=True)
    gradient, _ = run(unet, loss, LAYERS, at_output=True, checkpoint=checkpoint)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_checkpointing_that_is_on_stays_on_and_models_without_it_are_refused(unet):
    unet.enable_gradient_checkpointing()
    run(unet, of_layers, LAYERS, checkpoint=True)
    assert unet.is_gradient_checkpointing
    tape = GradientTape(nn.Linear(1, 1), [])
    with pytest.raises(ValueError, match="Linear has no gradient checkpointing"):
        tape.begin(torch.ones(1, 1), of_layers, [], at_output=True, stop=False, checkpoint=True)
    assert all(parameter.requires_grad for parameter in tape.model.parameters())


def test_stops_after_the_last_layer_and_keeps_no_graph_behind_it(unet):
    called = []
    for path, module in unet.named_modules():
        module.register_forward_hook(lambda module, args, output, path=path: called.append(path))
    run(unet, of_layers, ["mid_block.attentions.0"], stop=True)
    assert "mid_block.attentions.0" in called
    assert not [path for path in called if path.startswith(("up_blocks", "conv_out"))]
    called.clear()
    graphs = {}
    for path in ("up_blocks.0", "up_blocks.2", "conv_out"):
        module = unet.get_submodule(path)
        module.register_forward_hook(lambda m, args, output, path=path: graphs.update({path: output.requires_grad}))
    _, output = run(unet, of_layers, ["mid_block.attentions.0"])
    assert graphs == {"up_blocks.0": False, "up_blocks.2": False, "conv_out": False}
    assert not output.requires_grad
    # Not bit by bit: with a graph and without one some processors take other kernels.
    torch.testing.assert_close(output, unet(X, 500).sample, rtol=1e-12, atol=1e-12)


def state(model):
    return [(p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]


def same_state(before, after):
    return all(
        a[0] == b[0] and a[1] is b[1] and (a[1] is None or torch.equal(a[2], b[1]))
        for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("where", ["nowhere", "loss", "forward"])
def test_leaves_parameters_gradients_and_mode_as_they_were(unet, where, mode):
    parameters = list(unet.parameters())
    parameters[0].requires_grad_(False)  # some are frozen
    parameters[3].grad = torch.ones_like(parameters[3])  # training has left a gradient
    head = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(16, 1, 1).double())
    before, seen = state(unet), []

    def loss(features, output, x):
        seen.append((head.training, head[0].training, head[1].weight.requires_grad, parameters[5].requires_grad))
        if where == "loss":
            raise RuntimeError("in the loss")
        return head(features["mid_block.attentions.0"]).sum()

    if where == "forward":

        def fail(module, args):
            raise RuntimeError("in the forward")

        unet.down_blocks[1].register_forward_pre_hook(fail)
    options = {"modules": (head,), "checkpoint": True}
    with torch.set_grad_enabled(mode):
        if where == "nowhere":
            run(unet, loss, ["mid_block.attentions.0"], **options)
        else:
            with pytest.raises(RuntimeError, match=f"in the {where}"):
                run(unet, loss, ["mid_block.attentions.0"], **options)
        assert torch.is_grad_enabled() == mode
    assert seen == ([] if where == "forward" else [(False, False, False, False)])
    assert head.training
    assert head[0].training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in head.parameters())
    assert same_state(before, state(unet))
    assert not unet.is_gradient_checkpointing


@pytest.mark.parametrize("restored", [False, True], ids=["at the end", "by the next pass"])
def test_an_interrupt_leaves_nothing_either(unet, restored):
    """Torch calls no hook after a KeyboardInterrupt, so `end` may never come."""
    stack = ExitStack()
    tape = GradientTape(unet, LAYERS)
    tape.install(stack)
    with torch.no_grad():  # the pipeline's own
        tape.begin(X.clone().requires_grad_(True), of_layers, LAYERS, at_output=False, stop=False)
    assert torch.is_grad_enabled()
    if restored:
        gradient, _ = run(unet, of_layers, LAYERS, tape=tape)
        torch.testing.assert_close(gradient, plain_gradient(unet, of_layers, LAYERS), rtol=1e-12, atol=1e-12)
    stack.close()
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in unet.parameters())
    assert not any(module._forward_hooks for module in unet.modules())


def test_small_gradients_survive_in_float16(unet):
    """A mean over many entries: its gradient is below what float16 holds, unless it is scaled on the way."""
    unet = unet.float()
    x = seeded(1, 2, 16, 8, dtype=torch.float32)

    def loss(features, output, x):
        return 1e-7 * features["mid_block.attentions.0"].square().mean()

    expected, _ = run(unet, loss, ["mid_block.attentions.0"], x)
    half = copy.deepcopy(unet).half()
    found, _ = run(half, loss, ["mid_block.attentions.0"], x.half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))

    leaf = x.half().requires_grad_(True)
    kept = {}
    half.mid_block.attentions[0].register_forward_hook(lambda m, a, out: kept.update(out=out))
    half(leaf, 500)
    naive = torch.autograd.grad(1e-7 * kept["out"].float().square().mean(), leaf)[0]
    assert not naive.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_see_float32(unet, dtype):
    seen = {}

    def loss(features, output, x):
        seen.update(output=output.dtype, x=x.dtype, **{path: f.dtype for path, f in features.items()})
        return output.square().mean() + features[UP].mean() + x.mean()

    gradient, _ = run(unet.to(dtype), loss, [UP], X.to(dtype), at_output=True)
    assert set(seen.values()) == {torch.float32}
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


def test_energies_without_dependence_are_refused(unet):
    def constant(features, output, x):
        return torch.ones(())

    def detached(features, output, x):
        return nn.Linear(1, 1).double()(features[UP].detach().mean()[None]).sum()

    def of_time(features, output, x):
        return features["time_embedding"].sum()

    with pytest.raises(RuntimeError, match="does not depend on x_t"):
        run(unet, constant, [UP])
    with pytest.raises(RuntimeError, match="does not depend on x_t"):
        run(unet, detached, [UP])
    with ExitStack() as stack:
        tape = GradientTape(unet, ["time_embedding"])
        tape.install(stack)
        with pytest.raises(RuntimeError, match="does not depend on x_t"):
            run(unet, of_time, ["time_embedding"], tape=tape)
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_a_layer_that_never_runs_and_inference_mode_raise(unet):
    unet.unused = nn.Identity()
    tape = GradientTape(unet, ["unused"])
    tape.begin(X.clone().requires_grad_(True), of_layers, ["unused"], at_output=False, stop=False)
    with pytest.raises(RuntimeError, match="'unused'.*were not called"):
        tape.finish(unet(X, 500).sample)
    tape.end()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode.*no_grad"):
        tape.begin(X, of_layers, [], at_output=True, stop=False)


def test_a_loss_of_x_alone_needs_no_network():
    x = seeded(2, 3).requires_grad_(True)
    assert torch.equal(gradient_of(lambda features, output, x: (x**3).sum(), x, {}), 3 * x.detach() ** 2)


@pytest.mark.parametrize("stop", [False, True])
def test_weights_that_accelerate_offloads(unet, stop):
    expected = plain_gradient(unet, of_layers, LAYERS)
    cpu_offload(unet, execution_device=torch.device("cpu"))
    gradient, _ = run(unet, of_layers, LAYERS, stop=stop)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert all(parameter.requires_grad for parameter in unet.parameters())  # those in place now, on meta


def test_weights_that_are_exchanged_meanwhile_are_refused(unet):
    """Their exchange in place goes unnoticed by autograd: the gradient would be that of other weights."""
    refuse_swapped_weights(unet)
    casting = copy.deepcopy(unet).float()
    casting.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="layerwise casting"):
        refuse_swapped_weights(casting)
    device = torch.device("cpu")
    apply_group_offloading(unet, device, device, offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="group offloading.*enable_model_cpu_offload"):
        refuse_swapped_weights(unet)
