"""Conditioners: vectors, tokens and maps are trained, sampled and guided with one null; labels and captions too."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from diffusers_repr import CFG, PAG, Denoiser, DiffusionObjective, guide
from diffusers_repr.denoiser import (
    LabelConditioner,
    MapConditioner,
    SeveralConditioner,
    TokenConditioner,
    VectorConditioner,
)
from diffusers_repr.testing import check_conditioner
from tests.pipelines.sit_cases import network as sit
from tests.testers.models import build

NULL_TOKENS = torch.linspace(-1, 1, 16).view(2, 8)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(cls, blocks, **changes):
    torch.manual_seed(0)
    down, up = blocks
    return cls(
        sample_size=8, out_channels=3, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", down), up_block_types=(up, "UpBlock2D"), attention_head_dim=4, **changes,
    ).eval()  # fmt: skip


class Tokens:
    """A text U-Net that is told neighbours' embeddings instead, its null a fixed set."""

    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"

    def __init__(self):
        blocks = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
        self.net = unet(UNet2DConditionModel, blocks, in_channels=3, cross_attention_dim=8)
        self.denoiser = Denoiser(self.net, DDIMScheduler(), conditioner=TokenConditioner(null=NULL_TOKENS))
        self.batch = {"tokens": randn(3, 2, 8, seed=1)}

    def by_hand(self, x, t, values):
        values = NULL_TOKENS.expand(len(x), 2, 8) if values is None else values
        return self.net(x, t, encoder_hidden_states=values).sample


class Vectors:
    """A SiT whose null vector is learned."""

    layer = "blocks.1.attn"

    def __init__(self):
        self.net = sit(num_classes=0, condition_dim=6)
        self.denoiser = Denoiser(self.net, FlowMatchODEScheduler())
        self.batch = {"condition": randn(3, 6, seed=1)}

    def by_hand(self, x, t, values):
        return self.net(x, torch.as_tensor(t).expand(len(x)), condition=values).sample


class Maps:
    """A U-Net with two more channels of input; null is no segment."""

    layer = "mid_block.attentions.0"

    def __init__(self):
        self.net = unet(UNet2DModel, ("AttnDownBlock2D", "AttnUpBlock2D"), in_channels=5)
        self.denoiser = Denoiser(self.net, DDIMScheduler(), conditioner=MapConditioner(2))
        self.batch = {"map": randn(3, 2, 8, 8, seed=1)}

    def by_hand(self, x, t, values):
        values = torch.zeros(len(x), 2, 8, 8) if values is None else values
        return self.net(torch.cat([x, values], 1), t).sample


CASES = pytest.mark.parametrize("case", [Tokens, Vectors, Maps], ids=lambda case: case.__name__)


@CASES
def test_the_contract(case):
    made = case()
    assert made.denoiser.image_channels == 3
    check_conditioner(made.denoiser, made.batch)


def test_the_contract_of_labels_and_captions():
    check_conditioner(Denoiser(sit(), FlowMatchODEScheduler()), {"class_labels": torch.tensor([0, 3, 1])})
    pipe = build("class_unet")
    check_conditioner(
        Denoiser.from_pipe(pipe, conditioner=LabelConditioner(0)), {"class_labels": torch.tensor([1, 2])}
    )
    check_conditioner(Denoiser.from_pipe(build("sd")), {"caption": ["ab", "c"]})


@CASES
def test_a_training_step_by_hand(case):
    """The loss with some samples dropped, and the null of a SiT trained by them alone."""
    made = case()
    batch = {
        "pixel_values": randn(3, 3, 8, 8), "noise": randn(3, 3, 8, 8, seed=2), "time": torch.tensor([100, 400, 800]),
        "generator": torch.Generator().manual_seed(5), **made.batch,
    }  # fmt: skip
    objective = DiffusionObjective(made.denoiser, label_dropout=0.5).train()
    objective.check_batch(batch)
    found = objective(batch)["loss"]
    gone = torch.rand(3, generator=torch.Generator().manual_seed(5)) < 0.5
    assert 0 < gone.sum() < 3
    made.net.eval()
    x_t = made.denoiser.add_noise(batch["pixel_values"], batch["time"].float(), batch["noise"])
    (values,) = made.batch.values()
    rows = [made.by_hand(x_t[i : i + 1], batch["time"][i], None if gone[i] else values[i : i + 1]) for i in range(3)]
    wanted = batch["noise"] - batch["pixel_values"] if case is Vectors else batch["noise"]
    torch.testing.assert_close(found, (torch.cat(rows) - wanted).square().mean(), rtol=1e-4, atol=1e-5)
    found.backward()
    before = [p.detach().clone() for p in made.net.parameters()]
    torch.optim.SGD(made.net.parameters(), 0.1).step()
    assert sum(not torch.equal(a, b) for a, b in zip(before, made.net.parameters(), strict=True)) > 0.9 * len(before)
    assert objective.identity()["conditioner"]["kind"] == made.denoiser.conditioner.kind


@CASES
@torch.no_grad()
def test_guidance_by_hand(case):
    """A loop with CFG, and one with PAG too, against two calls a step and the terms added."""
    made = case()
    (values,) = made.batch.values()
    inputs = made.denoiser.condition(values=values, batch=3).kwargs()
    scheduler = made.denoiser.scheduler
    scheduler.set_timesteps(3)
    x = wanted = randn(3, 3, 8, 8)
    null = made.denoiser.conditioner.null()

    def call(x, t):
        level = made.denoiser.level(t.float())
        network = made.denoiser.network_inputs(x, level, inputs)
        return made.net(**network, return_dict=False)[0]

    with guide(made.denoiser, CFG(3.0), scheduler=scheduler, null=null):
        for t in scheduler.timesteps:
            x = scheduler.step(call(x, t), t, x, return_dict=False)[0]
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        cond, none = made.by_hand(wanted, t, values), made.by_hand(wanted, t, None)
        assert not torch.allclose(cond, none)
        wanted = scheduler.step(none + 3 * (cond - none), t, wanted, return_dict=False)[0]
    torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-5)

    t, x = torch.tensor(500), randn(3, 3, 8, 8)
    outputs = []
    for guidance, given in (([CFG(3.0)], null), ([PAG(2.0, layers=made.layer)], None),
                            ([CFG(3.0), PAG(2.0, layers=made.layer)], null)):  # fmt: skip
        with guide(made.denoiser, guidance, null=given):
            outputs.append(call(x, t))
    plain = call(x, t)
    assert (outputs[1] - plain).abs().max() > 1e-5
    torch.testing.assert_close(outputs[2], outputs[0] + outputs[1] - plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_pipeline_of_vectors_has_the_same_null():
    made = Vectors()
    pipe = SiTPipeline(made.net, FlowMatchODEScheduler())
    pipe.set_progress_bar_config(disable=True)
    (values,) = made.batch.values()
    start = randn(3, 3, 8, 8)
    found = pipe(condition=values, latents=start, guidance_scale=2.5, num_inference_steps=3, output_type="latent")
    wanted, scheduler = start, pipe.scheduler
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        cond, none = made.by_hand(wanted, t, values), made.by_hand(wanted, t, None)
        wanted = scheduler.step(none + 2.5 * (cond - none), t, wanted, return_dict=False)[0]
    torch.testing.assert_close(found.images, wanted, rtol=1e-4, atol=1e-5)


def test_a_null_of_ones_own_and_none():
    net = unet(UNet2DModel, ("AttnDownBlock2D", "AttnUpBlock2D"), in_channels=3, class_embed_type="identity")
    batch = {"condition": randn(2, 32)}
    none = Denoiser(net, DDIMScheduler())
    check_conditioner(none, batch)  # the default of this network, which has no null
    with pytest.raises(ValueError, match=r"no null vectors to drop to.*VectorConditioner\(null=\.\.\.\)"):
        DiffusionObjective(none)
    with pytest.raises(ValueError, match=r"UNet2DModel has none of its own"):
        none.condition()
    learned = torch.nn.Parameter(randn(32, seed=4))
    own = Denoiser(net, DDIMScheduler(), conditioner=VectorConditioner(null=learned))
    check_conditioner(own, batch)
    assert own.conditioner.describe() == {"kind": "vectors", "column": "condition", "input": None, "null": "learned"}
    given = {**batch, "pixel_values": randn(2, 3, 8, 8)}
    DiffusionObjective(own, label_dropout=1.0)(given)["loss"].backward()
    assert learned.grad.abs().max() > 0


@torch.no_grad()
def test_several_are_dropped_together():
    """A class and a vector in one network: half of each is never seen."""
    net = sit(condition_dim=6)
    parts = (LabelConditioner(), VectorConditioner())
    denoiser = Denoiser(net, FlowMatchODEScheduler(), conditioner=SeveralConditioner(*parts))
    labels, vectors = torch.tensor([0, 3, 1]), randn(3, 6)
    given = {
        "pixel_values": randn(3, 3, 8, 8), "noise": randn(3, 3, 8, 8, seed=2), "time": torch.full((3,), 400),
        "class_labels": labels, "condition": vectors, "generator": torch.Generator().manual_seed(5),
    }  # fmt: skip
    check_conditioner(denoiser, {"class_labels": labels, "condition": vectors})
    same = {"class_labels": labels, "condition": vectors[[0, 0, 1]]}
    with pytest.raises(AssertionError, match="part 1 of the condition does not reach the network"):
        check_conditioner(denoiser, same)
    objective = DiffusionObjective(denoiser, label_dropout=0.5).train()
    objective.check_batch(given)
    noisy = objective.noised(given)
    gone = torch.rand(3, generator=torch.Generator().manual_seed(5)) < 0.5
    assert noisy.condition["drop_mask"].tolist() == gone.tolist()
    wanted = net.eval()(noisy.x_t, torch.full((3,), 400), labels.masked_fill(gone, 5), vectors, drop_mask=gone).sample
    assert torch.equal(objective.predict(noisy), wanted)
    null = denoiser.predict(noisy.x_t, 400, denoiser.conditioner.null(3)).output
    assert torch.equal(null, net(noisy.x_t, torch.full((3,), 400)).sample)
    assert [part["kind"] for part in objective.identity()["conditioner"]["parts"]] == ["labels", "vectors"]
    asked = denoiser.predict(noisy.x_t, 400, denoiser.condition(values=(labels, vectors))).output
    assert torch.equal(asked, net(noisy.x_t, torch.full((3,), 400), labels, vectors).sample)
    with pytest.raises(ValueError, match="values are a tuple of 2: labels, vectors"):
        denoiser.condition(values=labels)
    mapped = SeveralConditioner(MapConditioner(2), MapConditioner(3)).bound_to(denoiser)
    assert mapped.map_channels == 5
    with pytest.raises(ValueError, match="enter the network by 'map_channels'"):
        mapped.null()


def test_what_is_refused():
    tokens, maps, vectors = (case().denoiser for case in (Tokens, Maps, Vectors))
    with pytest.raises(ValueError, match=r"tokens are floats \(B, k, 8\); got \(3, 2, 7\)"):
        tokens.condition(values=torch.zeros(3, 2, 7))
    with pytest.raises(ValueError, match="takes no prompt; it is conditioned on tokens: pass values="):
        tokens.condition("a cat")
    with pytest.raises(ValueError, match="have NaN or infinite values"):
        vectors.condition(values=torch.full((1, 6), torch.nan))
    with pytest.raises(ValueError, match=r"Maps \(1, 2, 4, 4\) do not fit x_t \(1, 3, 8, 8\)"):
        maps.predict(torch.zeros(1, 3, 8, 8), 5, maps.condition(values=torch.zeros(1, 2, 4, 4)))
    with pytest.raises(ValueError, match=r"conditioned on maps and the data have no column 'map'"):
        DiffusionObjective(maps).check_batch({"pixel_values": torch.zeros(1, 3, 8, 8)})
    with pytest.raises(ValueError, match="null_label=3, but the model is conditioned on vectors"):
        DiffusionObjective(vectors, null_label=3)
    with pytest.raises(RuntimeError, match="is bound to no model"):
        TokenConditioner().null()


def test_a_null_class_that_is_named():
    network = unet(UNet2DModel, ("DownBlock2D", "UpBlock2D"), in_channels=3, num_class_embeds=6)
    named = Denoiser(network, DDIMScheduler(), conditioner=LabelConditioner(2))
    assert named.condition(batch=2).kwargs()["class_labels"].tolist() == [2, 2]
    unnamed = Denoiser(network, DDIMScheduler())
    with pytest.warns(UserWarning, match=r"the last id, 5, is taken, as in training.*LabelConditioner\(5\)"):
        taken = unnamed.condition(batch=2).kwargs()["class_labels"]
    assert taken.tolist() == unnamed.conditioner.null(2)["class_labels"].tolist() == [5, 5]
    with pytest.raises(ValueError, match="does not tell a null class"):
        Denoiser(network, DDIMScheduler(), conditioner=LabelConditioner(-1)).condition(batch=2)
    with pytest.raises(ValueError, match=r"null class 6 is not in the table .* 0 to 5"):
        DiffusionObjective(named, null_label=6)


@pytest.mark.parametrize(("name", "tower"), [("sd", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_new_captions_are_encoded_together(name, tower):
    """One call of the text tower for those not kept yet, which gives each what it gives it alone."""
    pipe, calls = build(name), []
    getattr(pipe, tower).register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    together = Denoiser.from_pipe(pipe).conditioner
    found = together.condition(["ab", "c", "ab", "dd"])
    assert calls == [3]
    together.inputs(["ab", "c"])
    together.inputs(["c", "e"])
    assert calls[1:] == [2, 1]  # `condition` kept nothing, for it got no cache; training keeps "c"
    for at, text in enumerate(["ab", "c", "ab", "dd"]):
        alone = Denoiser.from_pipe(pipe).conditioner.inputs([text])
        torch.testing.assert_close(found.take([at]), alone)
