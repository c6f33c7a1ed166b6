"""JDM: its loss as its terms, who gets which gradient, rows without labels, accuracy on the digits."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline

from diffusers_repr.capture import encode_partial
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads import JointHead
from diffusers_repr.models import JointViTModel
from diffusers_repr.objectives.joint.jdm import JDMObjective, clean_inputs
from diffusers_repr.objectives.joint.objective import masked_cross_entropy
from tests.testers.models import unet2d

CLASSIFY = ("clean", "noised", "both")


def make(classify="clean", scheduler=None, seed=0, dropout=0.0, **settings) -> JDMObjective:
    torch.manual_seed(seed)
    unet = unet2d(1)
    head = JointHead.for_unet(unet, 4, dropout=dropout)
    return JDMObjective(Denoiser(unet, scheduler or DDPMScheduler()), head, classify=classify, **settings)


def batch(labels=(0, 3, 1, 2), **given):
    generator = torch.Generator().manual_seed(3)
    count = len(labels)
    return {
        "pixel_values": torch.randn(count, 1, 16, 8, generator=generator).clamp(-1, 1),
        "class_labels": torch.tensor(labels),
        "noise": torch.randn(count, 1, 16, 8, generator=generator),
        "time": torch.tensor([0, 250, 600, 999, 3, 40])[:count],
        **given,
    }


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("classify", CLASSIFY)
def test_the_loss_is_written_out(classify, loss):
    """By calls of the network alone: noise prediction, and logits by the head on the encoder's blocks."""
    objective = make(classify, loss=loss, generation_weight=2.0, classification_weight=0.3, label_smoothing=0.1)
    given = batch()
    out = objective(given)
    scheduler, unet, head = objective.denoiser.scheduler, objective.network, objective.head
    x_t = scheduler.add_noise(given["pixel_values"], given["noise"], given["time"])

    def logits(x, t):
        emb = unet.time_embedding(unet.time_proj(t))
        h = unet.conv_in(x)
        skips = [h]
        for block in unet.down_blocks:
            h, more = block(h, emb)
            skips += more
        return head(unet.mid_block(h, emb), skips, t)

    error = unet(x_t, given["time"]).sample - given["noise"]
    want = {"eps_l1": error.abs().mean()} if loss == "l1" else {"eps_mse": error.square().mean()}
    zero = torch.zeros(4, dtype=torch.long)
    clean = logits(given["pixel_values"] * (1 - 1e-4) ** 0.5, zero)  # beta_0 = 1e-4
    noised = logits(x_t, given["time"])
    smooth = {"label_smoothing": 0.1}
    if classify != "noised":
        want["ce"] = F.cross_entropy(clean, given["class_labels"], **smooth)
    if classify != "clean":
        want["ce" if classify == "noised" else "ce_noised"] = F.cross_entropy(noised, given["class_labels"], **smooth)
    assert set(out) == {"loss", "accuracy", "labelled", *want}
    for name, value in want.items():
        torch.testing.assert_close(out[name], value.detach(), rtol=1e-5, atol=1e-6)
        assert not out[name].requires_grad
    first, *rest = want
    total = 2.0 * want[first] + 0.3 * sum(want[name] for name in rest)
    torch.testing.assert_close(out["loss"], total, rtol=1e-5, atol=1e-6)
    weights = {first: 2.0, **dict.fromkeys(rest, 0.3)}
    torch.testing.assert_close(out["loss"].detach(), sum(weights[name] * out[name] for name in want))
    got = (noised if classify == "noised" else clean).argmax(1)
    assert out["accuracy"].item() == pytest.approx((got == given["class_labels"]).float().mean().item())
    assert out["labelled"].item() == 1


@pytest.mark.parametrize(("classify", "encoder", "decoder"), [("noised", 1, 1), ("clean", 2, 1), ("both", 2, 1)])
def test_passes(classify, encoder, decoder):
    objective, calls = make(classify), []
    for name in ("conv_in", "mid_block", "conv_out"):
        part = getattr(objective.network, name)
        part.register_forward_hook(lambda m, args, out, name=name: calls.append(name))
    objective(batch())
    assert [calls.count(name) for name in ("conv_in", "mid_block", "conv_out")] == [encoder, encoder, decoder]


@pytest.mark.parametrize("classify", CLASSIFY)
def test_who_gets_which_gradient(classify):
    objective = make(classify, classification_weight=1.0)

    def grads(generation, classification):
        objective.zero_grad(set_to_none=True)
        objective.weights = {"generation": generation, "classification": classification}
        objective(batch())["loss"].backward()
        return {name: p.grad for name, p in objective.named_parameters()}

    ce, eps, both = grads(0.0, 1.0), grads(1.0, 0.0), grads(1.0, 1.0)
    # every parameter is in the graph of every step, as DDP wants
    assert all(g is not None for part in (ce, eps, both) for g in part.values())
    decoder = ("network.up_blocks", "network.conv_norm_out", "network.conv_out")
    for name in both:
        if name.startswith(decoder):
            assert not ce[name].any(), name
        if name.startswith("head."):
            assert not eps[name].any(), name
    assert any(ce[name].any() and eps[name].any() for name in both if name.startswith("network.down_blocks"))
    assert all(ce[name].any() for name in both if name.startswith("head.linear"))
    for name in both:
        torch.testing.assert_close(both[name], ce[name] + eps[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("classify", CLASSIFY)
def test_rows_without_a_label(classify):
    objective = make(classify, classification_weight=0.5)
    full, some = batch((0, 3, 1, 2)), batch((0, -1, 1, -1))
    rows = torch.tensor([0, 2])
    only = {name: value[rows] for name, value in full.items()}
    out, want = objective(some), objective(only)
    for name in ("ce", "ce_noised", "accuracy"):
        if name in want:
            torch.testing.assert_close(out[name], want[name])
    assert out["labelled"].item() == 0.5
    torch.testing.assert_close(out["eps_mse"], objective(full)["eps_mse"])  # they denoise
    none = objective(batch((-1, -1, -1, -1)))
    assert none["ce"].item() == 0
    assert none["accuracy"].item() == 0
    torch.testing.assert_close(none["loss"].detach(), none["eps_mse"])
    none["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    assert not any(p.grad.any() for p in objective.head.parameters())


def test_masked_cross_entropy_of_mixed_targets():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    first, second = torch.tensor([0, -1, 2]), torch.tensor([-1, 3, 1])
    log_p = logits.log_softmax(1)
    want = -(0.7 * (log_p[0, 0] + log_p[2, 2]) + 0.3 * (log_p[1, 3] + log_p[2, 1])) / (0.7 * 2 + 0.3 * 2)
    torch.testing.assert_close(masked_cross_entropy(logits, [(first, 0.7), (second, 0.3)]), want)
    half = logits.bfloat16()
    want = masked_cross_entropy(half.float(), [(first, 1.0)])
    assert torch.equal(masked_cross_entropy(half, [(first, 1.0)]), want)


def test_mixup_and_augmentation_touch_what_is_classified_alone():
    objective = make(mixup=0.8, flip=True, rotation=10.0)
    given, seen = batch(), []
    objective.network.conv_in.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    torch.manual_seed(1)
    objective(given)
    clean = next(x for x in seen if not torch.equal(x, seen[-1]) or len(seen) == 1)
    noised = objective.denoiser.scheduler.add_noise(given["pixel_values"], given["noise"], given["time"])
    assert any(torch.allclose(x, noised, atol=1e-5) for x in seen)
    assert not torch.allclose(clean, given["pixel_values"], atol=1e-2)
    torch.manual_seed(2)
    plain = make(mixup=0.8)
    images, targets = plain.clean_view(given["pixel_values"], given["class_labels"])
    (first, share), (second, rest) = targets
    assert share >= 0.5
    assert share + rest == pytest.approx(1)
    assert torch.equal(first, given["class_labels"])
    order = [given["class_labels"].tolist().index(label) for label in second.tolist()]
    x = given["pixel_values"]
    torch.testing.assert_close(images, share * x + rest * x[order])
    with pytest.raises(ValueError, match="would not act on it"):
        make("noised", flip=True)


def test_a_seed_fixes_a_step():
    objective = make("noised")
    given = {name: value for name, value in batch().items() if name not in ("noise", "time")}
    losses = [objective({**given, "generator": torch.Generator().manual_seed(seed)})["loss"] for seed in (5, 5, 6)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()])
def test_other_processes(scheduler):
    objective = make("both", scheduler)
    given = batch(time=torch.tensor([-1.0, -0.5, 0.1, 0.8]) if "EDM" in type(scheduler).__name__ else batch()["time"])
    out = objective(given)
    assert out["loss"].isfinite()
    name = "velocity_mse" if "Flow" in type(scheduler).__name__ else "edm_mse"
    assert name in out
    inputs = clean_inputs(objective.denoiser, given["pixel_values"])
    assert (inputs["timestep"] == objective.denoiser.schedule.timestep_range[0]).all()


def test_a_network_kept_in_half_precision():
    full, half = make("both")(batch()), make("both")
    half.network.to(torch.bfloat16)
    for name, value in half(batch()).items():
        assert value.dtype == torch.float32
        if name != "accuracy":
            torch.testing.assert_close(value, full[name], rtol=0.05, atol=0.02)


def test_what_is_refused():
    objective = make()
    objective.check_batch(batch((0, -1, 3, 3)))
    for labels, message in (((0, 4), "from 0 to 4; the classifier's are 0 to 3"), ((-2, 1), "from -2 to 1")):
        with pytest.raises(ValueError, match=message):
            objective.check_batch({"class_labels": torch.tensor(labels)})
    with pytest.raises(ValueError, match="the data have no class_labels"):
        objective.check_batch({"pixel_values": torch.zeros(1)})

    class Data:
        num_classes = 10

    with pytest.raises(ValueError, match="data have 10 classes, the classifier has 4"):
        objective.check_data(Data())
    head = JointHead(88, 4)
    with pytest.raises(ValueError, match="is told the class"):
        JDMObjective(Denoiser(unet2d(1, num_class_embeds=5), DDPMScheduler()), head)
    vit = JointViTModel(8, 2, 1, num_layers=1, hidden_size=8, num_attention_heads=2)
    with pytest.raises(TypeError, match="JointViTModel has no conv_in"):
        JDMObjective(Denoiser(vit, DDPMScheduler()), head)
    for settings, message in (
        ({"loss": "huber"}, "one of l1, l2"),
        ({"classify": "all"}, "one of clean, noised, both"),
        ({"classification_weight": -1.0}, "at least 0"),
        ({"mixup": -1.0}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**settings)


def moved(objective):
    """A state in which every number differs from the module's."""
    return {k: v + 1 if v.is_floating_point() else v for k, v in objective.state_dict().items()}


def test_saved_in_the_pipeline_that_has_a_place_for_the_head(tmp_path):
    torch.manual_seed(0)
    unet = unet2d(1)
    head = JointHead.for_unet(unet, 4, dropout=0.0)
    pipe = JointDiffusionPipeline(unet, DDPMScheduler(), head)
    objective = JDMObjective(Denoiser.from_pipe(pipe), pipe.classifier)
    assert all(p.requires_grad for p in objective.parameters())
    assert head.training or "classifier" not in objective.frozen
    assert objective.ema_modules() == {"network": unet, "head": head}
    state = moved(objective)
    objective.save_pretrained(tmp_path, state, torch.float32)
    assert not (tmp_path / "heads").exists()
    again = JointDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.classifier.linear1.weight, head.linear1.weight + 1)
    assert torch.equal(again.unet.conv_in.weight, unet.conv_in.weight + 1)
    assert pipe.classifier is head
    assert pipe.unet is unet


def test_saved_beside_another_pipeline(tmp_path):
    from diffusers import DDPMPipeline

    torch.manual_seed(0)
    pipe = DDPMPipeline(unet2d(1), DDPMScheduler())
    head = JointHead.for_unet(pipe.unet, 4)
    objective = JDMObjective(Denoiser.from_pipe(pipe), head)
    objective.save_pretrained(tmp_path, moved(objective), torch.float32)
    assert isinstance(DDPMPipeline.from_pretrained(tmp_path), DDPMPipeline)
    again = JointHead.from_pretrained(tmp_path / "heads" / "classifier")
    assert torch.equal(again.linear2.bias, head.linear2.bias + 1)


def test_dropout_of_the_network_is_that_of_training():
    objective = make("noised", dropout=0.5)
    assert not torch.equal(objective(batch())["ce"], objective(batch())["ce"])
    objective.eval()
    assert torch.equal(objective(batch())["ce"], objective(batch())["ce"])


@pytest.mark.parametrize("classify", CLASSIFY)
@pytest.mark.usefixtures("process_group")
def test_ddp_finds_no_unused_parameter(classify):
    """It raises in the next step otherwise."""
    objective = make(classify)
    objective.head.norm1 = torch.nn.BatchNorm1d(objective.head.config.in_features)  # buffers are sent around too
    distributed = torch.nn.parallel.DistributedDataParallel(objective)
    for labels in ((0, 1, 2, 3), (-1, -1, -1, -1), (0, -1, 2, -1)):
        distributed(batch(labels))["loss"].backward()


def digits_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=16, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def digits():
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(source.target)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_digits():
    """500 steps: a classifier above 0.96, and noise prediction within 15 % of a plain DDPM of as many steps.

    Then samples are guided to a class, and away from it, judged by logistic regression on the pixels of real digits.
    """
    from sklearn.linear_model import LogisticRegression

    images, labels = digits()
    train, held_out = slice(0, 1400), slice(1400, None)

    def run(weight):
        torch.manual_seed(0)
        unet = digits_unet()
        head = JointHead.for_unet(unet, 10, dropout=0.1)
        pipe = JointDiffusionPipeline(unet, DDPMScheduler(), head)
        objective = JDMObjective(Denoiser.from_pipe(pipe), head, classification_weight=weight, classify="both")
        optimizer = torch.optim.AdamW(objective.parameters(), 1e-3)
        last = []
        for _ in range(500):
            rows = torch.randint(0, 1400, (128,))
            out = objective({"pixel_values": images[train][rows], "class_labels": labels[train][rows]})
            out["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            last.append(out["eps_mse"].item())
        objective.eval()
        return pipe, sum(last[-50:]) / 50

    pipe, error = run(0.1)
    found = pipe.classify(images[held_out] / 2 + 0.5).class_labels
    assert (found == labels[held_out]).float().mean() > 0.96
    assert error < 1.15 * run(0.0)[1]

    judge = LogisticRegression(max_iter=1000).fit(images.flatten(1).numpy(), labels.numpy())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    asked, shares = torch.arange(200) % 10, {}
    for scale in (0.0, 30.0, -30.0):
        # Clipping x_0 and keeping the old eps, as DDIM does by default, takes away much of what guidance adds.
        call = {"num_inference_steps": 50, "eta": 1.0, "use_clipped_model_output": True, "output_type": "pt"}
        call |= {"guidance_scale": scale}
        samples = pipe(class_labels=asked, generator=torch.Generator().manual_seed(0), **call).images
        shares[scale] = (judge.predict((2 * samples - 1).flatten(1).numpy()) == asked.numpy()).mean()
    assert abs(shares[0.0] - 0.1) < 0.08
    assert shares[30.0] > 0.6
    assert shares[-30.0] < 0.05


def test_the_clean_pass_stops_early_but_for_sharded_networks():
    objective, ran = make(), []
    objective.network.conv_out.register_forward_hook(lambda *_: ran.append(1))
    x = batch()["pixel_values"]
    want = objective.classify_clean(x)
    assert not ran
    kind = type("FSDPUNet2DModel", (type(objective.network),), {})
    objective.network.__class__ = kind
    assert torch.equal(objective.classify_clean(x), want)
    assert ran
    found = encode_partial(objective.network, **clean_inputs(objective.denoiser, x))
    assert torch.equal(objective.head.classify(found), want)
