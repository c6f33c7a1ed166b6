"""Blocks that no guidance changes or reads may be compiled: samples as with the plain network."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from diffusers_repr import PAG, EnergyGuidance, guide
from diffusers_repr.denoiser import Denoiser
from tests.guidance.test_engine import network_of, run
from tests.testers.models import build


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Eager:
    """A backend that runs a graph as it is and counts its graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example):
        self.graphs += 1
        return graph.forward


def blocks(network):
    return [*network.transformer_blocks, *network.single_transformer_blocks]


def compile_some(network, backend, which):
    """Blocks in place."""
    for at in which:
        blocks(network)[at].compile(backend=backend)


def guided(name, pipe, config, steps=2):
    with guide(pipe, config) as handle:
        samples = run(name, pipe, 1.0, steps=steps)
    return samples, handle


@pytest.mark.parametrize(
    ("layer", "which"),
    [
        ("transformer_blocks.1.attn", (0, 2)),
        pytest.param("transformer_blocks.0.attn", (1, 2, 3), marks=pytest.mark.slow),
        pytest.param("single_transformer_blocks.0.attn", (0, 1, 3), marks=pytest.mark.slow),
    ],
)
def test_lanes_join_among_compiled_blocks(layer, which):
    """FLUX: before the changed block nothing is joined, behind it every compiled block gets the lane's rows."""
    pipe, backend = build("flux"), Eager()
    steps = 1 if which == (0, 2) else 2
    wanted, plain_handle = guided("flux", pipe, PAG(3.0, layers=layer), steps)
    plain = run("flux", pipe, 1.0, steps=steps)
    compile_some(pipe.transformer, backend, which)
    own = [block._compiled_call_impl for block in blocks(pipe.transformer)]
    found, handle = guided("flux", pipe, PAG(3.0, layers=layer), steps)
    assert backend.graphs >= 2  # of a block of each kind
    assert not torch.equal(wanted, plain)
    assert torch.equal(found, wanted)
    assert handle.stats.steps[0].joined == plain_handle.stats.steps[0].joined == layer.removesuffix(".attn")
    assert handle.stats.evaluations == plain_handle.stats.evaluations
    assert [block._compiled_call_impl for block in blocks(pipe.transformer)] == own
    assert torch.equal(run("flux", pipe, 1.0, steps=steps), plain)


def test_wrapped_blocks():
    """`torch.compile(block)` put in place of the block; the default layer is that of the plain network."""
    pipe = build("flux")
    wanted, _ = guided("flux", pipe, PAG(3.0))
    default = Denoiser.from_pipe(pipe).default_layers("pag").layers
    pipe.transformer.transformer_blocks[1] = torch.compile(pipe.transformer.transformer_blocks[1], backend="eager")
    assert Denoiser.from_pipe(pipe).default_layers("pag").layers == default
    found, _ = guided("flux", pipe, PAG(3.0))
    assert torch.equal(found, wanted)
    with pytest.raises(RuntimeError, match=r"transformer_blocks.1 \(OptimizedModule\) is compiled.*around, not in"):
        guide(pipe, PAG(3.0, layers="transformer_blocks.1.attn"))


@pytest.mark.slow
def test_regional_compilation_of_a_unet():
    """diffusers compiles every transformer block, PAG's too, which is refused; without the middle's it works."""
    pipe = build("sd")
    wanted, _ = guided("sd", pipe, PAG(3.0), steps=1)
    pipe.unet.compile_repeated_blocks(backend="eager")
    inside = (
        r"mid_block.attentions.0.transformer_blocks.0 \(BasicTransformerBlock\) is compiled; .* on mid_block.*attn1"
    )
    with pytest.raises(RuntimeError, match=f"{inside} would be ignored.*compile the blocks that no guidance"):
        guide(pipe, PAG(3.0))
    pipe = build("sd")  # anew, as the message says
    for path, module in pipe.unet.named_modules():
        if isinstance(module, BasicTransformerBlock) and not path.startswith("mid_block"):
            module.compile(backend="eager")
    found, _ = guided("sd", pipe, PAG(3.0), steps=1)
    assert torch.equal(found, wanted)


def energy(features, x0, condition):
    return features["transformer_blocks.0"].square().mean(dim=(1, 2, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler, of tensors in a graph
def test_gradients_through_compiled_blocks():
    """The block that is read is plain; the gradient goes through none behind it, the samples through all."""
    pipe = build("flux")

    def read(features, x0, condition):
        return features["transformer_blocks.1"].square().mean(dim=(1, 2, 3))

    config = EnergyGuidance(read, layers=["transformer_blocks.1"], scale=2.0)
    wanted, _ = guided("flux", pipe, config)
    assert not torch.equal(wanted, run("flux", pipe, 1.0, steps=2))
    compile_some(pipe.transformer, "aot_eager", (0, 2, 3))
    found, _ = guided("flux", pipe, config)
    assert (found - wanted).abs().max() < 1e-5
    with pytest.raises(RuntimeError, match=r"transformer_blocks.0 \(FluxTransformerBlock\) is compiled"):
        guide(pipe, EnergyGuidance(energy, layers=["transformer_blocks.0"], scale=2.0))
    with pytest.raises(RuntimeError, match=r"single_transformer_blocks.1 .* is compiled; .* on .*attn would be"):
        guide(pipe, PAG(3.0, layers="single_transformer_blocks.1.attn"))
    network_of(pipe).compile(backend="eager")
    with pytest.raises(RuntimeError, match="The model .* is compiled.*load it anew"):
        guide(pipe, config)
