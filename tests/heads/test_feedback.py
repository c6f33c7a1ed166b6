"""DifFeed: the two forwards against plain full ones with hooks of the test's own, and what must not be left behind."""

import functools
import threading

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch.nn import functional

from diffusers_repr.capture import FeedbackPasses
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.hooks import count_hooks
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.heads import AttentionHead, FeedbackExtractor, FeedbackHead, feedback_pairs
from diffusers_repr.models.weights import build_on_meta

ADM = {
    "sample_size": 256, "out_channels": 6, "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "layers_per_block": 2, "attention_head_dim": 64, "upsample_type": "resnet", "downsample_type": "resnet",
    "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
}  # fmt: skip


def unet(conditional=False):
    settings = {
        "sample_size": 16, "in_channels": 1, "out_channels": 1, "layers_per_block": 2, "norm_num_groups": 4,
        "block_out_channels": (8, 16), "attention_head_dim": 4, "mid_block_type": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not conditional:
            del settings["mid_block_type"]
            return UNet2DModel(**settings).eval()
        kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                 "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
        settings["mid_block_type"] = "UNetMidBlock2DCrossAttn"
        return UNet2DConditionModel(**{**settings, **kinds}, cross_attention_dim=6).eval()


@functools.cache
def options_of(conditional=False):
    """Of the pairs of a network, from its table of layers, which takes a while."""
    return FeedbackHead.options_for(Denoiser(unet(conditional), DDPMScheduler()))


def setting(conditional=False):
    """A denoiser, a head with drawn weights for its pairs, and a call of the network."""
    denoiser = Denoiser(unet(conditional), DDPMScheduler())
    read = "up_blocks.0.attentions.1"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        options = options_of(conditional)
        head = FeedbackHead([read], [16], [[4, 4]], 3, width=8, num_attention_heads=2, **options).eval()
        for parameter in head.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(3, 1, 16, 16)
        text = {"encoder_hidden_states": torch.randn(3, 5, 6)} if conditional else {}
    return denoiser, head, lambda: denoiser.model(x, 150, **text)


def plain(model, run, read, changes=()):
    """What layers return in one whole forward; `changes`: layer -> what is added there, by hooks of the test."""
    found, handles = {}, []

    def keep(name):
        def hook(module, args, output):
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def add(value):
        def hook(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            wide = functional.interpolate(value, first.shape[2:], mode="bilinear", align_corners=False)
            return (first + wide,) if isinstance(output, tuple) else first + wide

        return hook

    for name, value in dict(changes).items():
        handles.append(model.get_submodule(name).register_forward_hook(add(value)))
    handles += [model.get_submodule(name).register_forward_hook(keep(name)) for name in read]
    run()
    for handle in handles:
        handle.remove()
    return found


def feed(head, features):
    """The feedback of the paper's `C_B_R`, by torch's own functions."""
    w, found = head.state_dict(), {}
    for at, (source, target) in enumerate(zip(head.config["sources"], head.config["targets"], strict=True)):
        x = functional.conv2d(features[source], w[f"feeds.{at}.projection.weight"])
        norm = (w[f"feeds.{at}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        found[target] = functional.batch_norm(x, *norm).clamp(min=0)
    return found


def passes_of(denoiser, head, share=True, layers=None):
    return FeedbackPasses(denoiser.model, head.config["sources"], head.config["targets"],
                          layers or head.config["layers"], share)  # fmt: skip


@pytest.mark.parametrize("conditional", [False, True])
def test_two_forwards_are_two_plain_ones(conditional):
    """Bit for bit, with and without what they share; every layer of the encoder behind a fed one is another then."""
    denoiser, head, run = setting(conditional)
    model, read = denoiser.model, list(head.config["layers"])
    with torch.no_grad():
        whole = plain(model, run, head.config["sources"])
        wanted = plain(model, run, read, feed(head, whole))
        for share in (True, False):
            passes = passes_of(denoiser, head, share)
            first = passes.first(run)
            assert all(torch.equal(first.features[name], whole[name]) for name in whole)
            assert bool(first.shared.outputs) == share
            found = passes.second(run, first, head.feedback(first.features))
            assert torch.equal(found[read[0]], wanted[read[0]])
            assert not torch.equal(found[read[0]], plain(model, run, read)[read[0]])
    logits = head(first.features, second_pass=lambda fed: passes.second(run, first, fed))
    torch.testing.assert_close(logits, AttentionHead.forward(head, wanted))
    assert all(count_hooks(module) == (0, 0, 0) and "forward" not in module.__dict__ for module in model.modules())


def test_only_what_is_needed_runs():
    """No layer behind the last that feeds, or is read; and of the second forward none before the first that is fed."""
    denoiser, head, run = setting()
    ran = []
    blocks = [n for n, _ in denoiser.model.named_modules() if n.rpartition(".")[0].endswith(("resnets", "attentions"))]
    for name in [*blocks, "conv_in", "conv_out"]:
        module = denoiser.model.get_submodule(name)
        own = module.forward
        module.forward = lambda *a, own=own, name=name, **k: (ran.append(name), own(*a, **k))[1]
    passes = passes_of(denoiser, head)
    first = passes.first(run)
    order = list(ran)
    assert order[-1] == "up_blocks.1.resnets.1" == head.config["sources"][-1]
    assert {"up_blocks.1.resnets.2", "conv_out"}.isdisjoint(order)
    ran.clear()
    passes.second(run, first, head.feedback(first.features))
    start = order.index("down_blocks.0.resnets.0")
    assert ran == order[start + 1 : order.index("up_blocks.0.attentions.1") + 1]
    assert set(first.shared.outputs) == {"time_proj", "time_embedding", "conv_in", "down_blocks.0.resnets.0"}


def test_without_feedback_it_is_the_first_forward():
    """Check 4 of the paper's spec: batch norms of zeros, and one pair alone."""
    denoiser, head, run = setting()
    for feeding in head.feeds:
        feeding.norm.weight.data.zero_()
        feeding.norm.bias.data.zero_()
    encoder = [f"down_blocks.{i}.{kind}.{j}" for i, kind in ((0, "resnets"), (1, "attentions")) for j in range(2)]
    layers = [*encoder, "mid_block", "up_blocks.0.attentions.1"]
    passes = passes_of(denoiser, head, layers=layers)
    first = passes.first(run)
    with torch.no_grad():
        found = passes.second(run, first, head.feedback(first.features))
        whole = plain(denoiser.model, run, layers)
    assert all(torch.equal(found[name], whole[name]) for name in layers)

    one = FeedbackPasses(denoiser.model, ["up_blocks.0.attentions.1"], ["down_blocks.1.attentions.0"], layers)
    first = one.first(run)
    fed = {"down_blocks.1.attentions.0": 0.1 * first.features["up_blocks.0.attentions.1"]}
    with torch.no_grad():
        found = one.second(run, first, fed)
    same = {name for name in layers if torch.equal(found[name], whole[name])}
    assert same == set(encoder[:2])  # what runs before the fed layer


@pytest.mark.parametrize("freeze", [True, False])
def test_gradients_pass_through_the_feedback_alone(freeze):
    """Against autograd through the plain second forward; no weight of the network gets one, frozen or not."""
    denoiser, head, run = setting()
    denoiser.model.requires_grad_(not freeze)
    passes = passes_of(denoiser, head)
    first = passes.first(run)
    head(first.features, second_pass=lambda fed: passes.second(run, first, fed)).square().sum().backward()
    assert all(p.grad is None for p in denoiser.model.parameters())
    assert all(p.requires_grad != freeze for p in denoiser.model.parameters())
    ours = {name: p.grad for name, p in head.named_parameters()}
    assert all(value is not None and bool(value.any()) for value in ours.values())
    head.zero_grad()
    maps = plain(denoiser.model, run, head.config["layers"], head.feedback(first.features))
    AttentionHead.forward(head, maps).square().sum().backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_pairs_of_adm_are_the_papers():
    """b of 21, 24, ..., 36 with 38 - b, in the names of diffusers (the table of the spec)."""
    with torch.device("meta"):
        network = build_on_meta(UNet2DModel, ADM)
    denoiser = Denoiser(network, DDPMScheduler())
    found = [(a.path, b.path, a.channels, b.channels) for a, b in feedback_pairs(denoiser)]
    assert found == [
        ("up_blocks.0.attentions.1", "down_blocks.5.attentions.0", 1024, 1024),
        ("up_blocks.1.attentions.1", "down_blocks.4.attentions.0", 1024, 1024),
        ("up_blocks.2.attentions.1", "down_blocks.3.attentions.0", 512, 512),
        ("up_blocks.3.resnets.1", "down_blocks.2.resnets.0", 512, 512),
        ("up_blocks.4.resnets.1", "down_blocks.1.resnets.0", 256, 256),
        ("up_blocks.5.resnets.1", "down_blocks.0.resnets.0", 256, 256),
    ]
    assert [p for p, *_ in ((a.path, b.path) for a, b in feedback_pairs(setting(True)[0]))] == [
        "up_blocks.0.attentions.1", "up_blocks.1.resnets.1",
    ]  # fmt: skip


def test_as_a_source_of_features():
    """As an extractor, whose batches, levels and settings are those of the plain one."""
    denoiser, head, _ = setting()
    plainly = FeatureExtractor(denoiser, list(head.config["layers"]), [50, 300], pooling="map:4", batch_size=4)
    source = FeedbackExtractor.of(head, plainly)
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = source(images)["up_blocks.0.attentions.1"]
    assert found.shape == (2, 3, 16, 4, 4)
    for level, maps in enumerate(found):
        single = source.replace(timestep=[50, 300][level], batch_size=1)
        assert type(single) is FeedbackExtractor
        torch.testing.assert_close(single(images)["up_blocks.0.attentions.1"], maps, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plainly(images)["up_blocks.0.attentions.1"], atol=1e-3)


def test_levels_in_training_have_statistics_of_their_own():
    options = options_of()
    torch.manual_seed(0)
    head = FeedbackHead(["up_blocks.0.attentions.1"], [16], [[4, 4]], 3, 2, width=8, num_attention_heads=2, **options)
    maps = {name: torch.randn(8, count, 4, 4) for name, count in zip(options["sources"], options["source_channels"],
                                                                     strict=True)}  # fmt: skip
    found = head.train().feedback(maps)
    halves = [head.train().feedback({k: v[rows].repeat(2, 1, 1, 1) for k, v in maps.items()})
              for rows in (slice(4), slice(4, 8))]  # fmt: skip
    for target, value in found.items():
        torch.testing.assert_close(value, torch.cat([half[target][:4] for half in halves]))


def test_other_threads_are_left_alone():
    """While the second forward runs here, a plain forward in another thread is what it ever is."""
    denoiser, head, run = setting()
    with torch.no_grad():
        wanted = run().sample
        passes = passes_of(denoiser, head)
        first = passes.first(run)
        seen = []

        def meanwhile(value, path):
            def other():
                with torch.no_grad():
                    seen.append(run().sample)

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

        passes.second(run, first, head.feedback(first.features), meanwhile)
    assert len(seen) == 1
    assert torch.equal(seen[0], wanted)


def test_what_is_refused():
    denoiser, head, run = setting()
    model = denoiser.model
    passes = passes_of(denoiser, head)
    first = passes.first(run)
    with pytest.raises(ValueError, match="the fed layers are"):
        passes.second(run, first, {})
    early = FeedbackPasses(model, head.config["sources"], ["down_blocks.1.attentions.0"], ["down_blocks.0.resnets.1"])
    with pytest.raises(ValueError, match=r"did not run before the last layer that is read.*acts on nothing"):
        early.second(run, early.first(run), {"down_blocks.1.attentions.0": torch.zeros(3, 16, 8, 8)})
    with pytest.raises(ValueError, match=r"gives \(3, 8, 16, 16\), fed back came \(3, 9, 4, 4\)"):
        passes.second(
            run, first, {**head.feedback(first.features), "down_blocks.0.resnets.0": torch.zeros(3, 9, 4, 4)}
        )
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="recomputes its activations"):
        passes.second(run, first, head.feedback(first.features))
    model.disable_gradient_checkpointing()
    first.shared.outputs["conv_in"][0].add_(1)
    with pytest.raises(RuntimeError, match="changed the output of conv_in in place"):
        passes.second(run, first, head.feedback(first.features))
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="compiled"):
        FeedbackPasses(compiled, ["_orig_mod.mid_block"], ["_orig_mod.conv_in"], ["_orig_mod.mid_block"]).first(run)
    with pytest.raises(ValueError, match="is fed by 'up_blocks.0.attentions.1' as"):
        head.feedback({})
    with pytest.raises(ValueError, match="must go together, each target once"):
        FeedbackHead(["a"], [4], [[2, 2]], 3, sources=["a"], source_channels=[4], targets=["b"], width=8)
