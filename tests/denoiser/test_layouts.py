"""Layouts: what is where, as boxes and masks; one null for training, sampling and guidance (the checks of A1)."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline

from diffusers_repr import CFG, PAG, Denoiser, DiffusionObjective
from diffusers_repr.denoiser import LayoutConditioner, StoredPrior
from diffusers_repr.denoiser.conditioner import bare_conditioner
from diffusers_repr.testing import check_conditioner

GENERATORS = [torch.Generator() for _ in range(2)]


def network(level, **changes):
    """Masks of 3 classes or boxes of 4."""
    torch.manual_seed(0)
    boxes, masks = {"num_class_embeds": 5, "in_channels": 2}, {"class_embed_type": "identity", "in_channels": 4}
    own = masks if level == "mask" else boxes
    return UNet2DModel(
        sample_size=8, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **{**own, **changes},
    ).eval()  # fmt: skip


def layouts(level):
    if level == "mask":
        values = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
        values[0, :2], values[1] = 255, values[1].clamp(max=1)
        return values
    values = torch.full((2, 8, 8), 255)
    values[0, 2:5, 2:6], values[1, 1:7, :3] = 3, 1
    return values


def pipeline(level):
    pipe = GuidedUnconditionalPipeline(network(level), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **settings):
    for seed, generator in enumerate(GENERATORS):
        generator.manual_seed(seed)
    return pipe(generator=GENERATORS, num_inference_steps=2, output_type="latent", **settings).images


def by_hand(net, x, t, values):
    """The network's call, pixel by pixel."""
    boxes = net.config.num_class_embeds is not None
    maps = torch.zeros(len(x), 1 if boxes else 3, 8, 8)
    classes = torch.full((len(x),), 4) if boxes else torch.zeros(len(x), 32)
    for at, row in enumerate(values):
        for i in range(8):
            for j in range(8):
                found = int(row[i, j])
                if found == 255:
                    continue
                maps[at, 0 if boxes else found, i, j] = 1
                if boxes:
                    classes[at] = found
                else:
                    classes[at, found] = 1
    return net(torch.cat([x, maps], 1), t, class_labels=classes).sample


@pytest.mark.parametrize("level", ["mask", "box"])
class TestLevels:
    @torch.no_grad()
    def test_enters_as_written(self, level):
        net, values = network(level), layouts(level)
        denoiser = Denoiser(net, DDIMScheduler())
        assert isinstance(denoiser.conditioner, LayoutConditioner)
        assert denoiser.image_channels == 1
        check_conditioner(denoiser, {"masks": values})
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        got = denoiser.predict(x, 400, denoiser.condition(values=values)).eps
        assert torch.equal(got, by_hand(net, x, 400, values))
        null = denoiser.predict(x, 400, denoiser.condition(batch=2)).eps
        assert torch.equal(null, by_hand(net, x, 400, torch.full((2, 8, 8), 255)))
        assert float((null - got).abs().max()) > 1e-3

    def test_dropped_together(self, level):
        """At 1 the output does not depend on the layout, at 0 no null is given; one draw a sample for both."""
        denoiser, values = Denoiser.from_pipe(pipeline(level)), layouts(level)
        batch = {"pixel_values": torch.rand(2, 1, 8, 8) * 2 - 1, "masks": values}
        fixed = {"time": torch.tensor([100, 700]), "noise": torch.randn(2, 1, 8, 8)}
        always = DiffusionObjective(denoiser, label_dropout=1.0)
        other = {**batch, "masks": values.flip(0)}
        assert torch.equal(always({**batch, **fixed})["loss"], always({**other, **fixed})["loss"])
        never = DiffusionObjective(denoiser, label_dropout=0.0)
        assert not torch.equal(never({**batch, **fixed})["loss"], never({**other, **fixed})["loss"])
        conditioner = denoiser.conditioner
        many = values.repeat(50, 1, 1)
        dropped = conditioner.draw_dropped(many, 0.4, torch.Generator().manual_seed(0))
        inputs = conditioner.inputs(many, dropped)
        maps = inputs["map_channels"].flatten(1).any(1)
        told = inputs["class_labels"].ne(4) if level == "box" else inputs["class_labels"].any(1)
        assert torch.equal(maps, ~dropped)
        assert torch.equal(told, ~dropped)
        assert 20 < int(dropped.sum()) < 60

    def test_sampled_guided_and_loaded(self, level, tmp_path):
        pipe, values = pipeline(level), layouts(level)
        cond, null = sample(pipe, layout=values), sample(pipe)
        assert float((cond - null).abs().max()) > 1e-2
        guided = sample(pipe, layout=values, guidance_scale=2.0)
        assert float((guided - cond).abs().max()) > 1e-3
        # The pipeline's own guidance and that of the engine, which must tell the two halves apart by x_t alone.
        stepped = sample(pipe, layout=values, guidance_scale=1.5, guidance=CFG(2.0))
        torch.testing.assert_close(stepped, guided, rtol=1e-4, atol=1e-4)
        assert float((sample(pipe, layout=values, guidance=PAG(1.0, layers="mid_block.*")) - cond).abs().max()) > 1e-3
        stored = StoredPrior(values.to(torch.uint8), in_order=True)  # map and class of an image are drawn as one
        assert torch.equal(sample(pipe, batch_size=2, prior=stored), cond)
        large = values.repeat_interleave(3, 1).repeat_interleave(3, 2)
        assert torch.equal(sample(pipe, layout=large), cond)  # resized to the nearest pixel
        pipe.save_pretrained(tmp_path)
        again = GuidedUnconditionalPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert torch.allclose(sample(again, layout=values), cond, atol=1e-5)

    def test_refused(self, level):
        pipe, values = pipeline(level), layouts(level)
        for wrong, message in (
            ({"layout": values + 9}, "has the class"),
            ({"layout": values.float()}, "whole numbers"),
            ({"layout": values[None]}, r"\(B, H, W\)"),
            ({"class_labels": [1]}, "takes no class_labels"),
            ({"guidance_scale": 2.0}, "pass layout"),
            ({"layout": values, "prior": StoredPrior(values)}, "one of both"),
        ):
            with pytest.raises(ValueError, match=message):
                sample(pipe, **wrong)


def test_a_box_has_one_class():
    two = layouts("box")
    two[0, 0, 0] = 2
    with pytest.raises(ValueError, match="one box"):
        bare_conditioner(network("box")).check(two)


def test_networks_that_take_no_layouts():
    plain = network("box", in_channels=1)
    with pytest.raises(ValueError, match="takes no layouts"):
        LayoutConditioner().bound_to(Denoiser(plain, DDIMScheduler()))
    with pytest.raises(ValueError, match="A box is one channel"):
        LayoutConditioner().bound_to(Denoiser(network("box", in_channels=4), DDIMScheduler()))
    with pytest.raises(ValueError, match="takes no layout;"):
        sample(GuidedUnconditionalPipeline(plain, DDIMScheduler()), layout=layouts("box"))
