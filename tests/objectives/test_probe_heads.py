"""`ProbeObjective`, the data it may read instead of images, and a protocol as settings of the loop."""

import copy

import pytest
import torch
from torch.nn import functional

from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.features.extraction import extract_to_store
from diffusers_repr.features.stored_data import StoredFeatures
from diffusers_repr.heads import PROTOCOLS, AttentionHead, FeedbackHead, LinearHead
from diffusers_repr.heads.fitting.loop_settings import loop_settings
from diffusers_repr.heads.fitting.minibatch import protocol_rate
from diffusers_repr.objectives import ProbeConfig, ProbeObjective
from diffusers_repr.training import TrainingConfig
from diffusers_repr.training.run import make_optimizer
from diffusers_repr.training.seeds import learning_rate
from tests.tasks.planted import dataset, pipeline

LAYERS, TIMES = ["mid_block", "up_blocks.0"], [30, 200]


def objective(kind, pooling="map:4"):
    denoiser = Denoiser.from_pipe(pipeline())
    extractor = FeatureExtractor(denoiser, LAYERS, TIMES, pooling=pooling)
    maps, small = (LAYERS, [16, 16], [[4, 4], [4, 4]], 3, 2), {"width": 8, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "linear":
            head = LinearHead(2 * 2 * 16 * (4 if pooling == "adaptive:2" else 1), 3)
            torch.nn.init.normal_(head.linear.weight)
        elif kind == "attention":
            head = AttentionHead(*maps, **small)
        else:
            head = FeedbackHead(*maps, **small, **FeedbackHead.options_for(denoiser))
    return ProbeObjective(extractor, head)


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    pixels, noise = torch.rand(3, 1, 16, 16, generator=draw) * 2 - 1, torch.randn(6, 1, 16, 16, generator=draw)
    return {"pixel_values": pixels, "class_labels": torch.tensor([0, 2, 1]), "noise": noise}


def features_of(made, given):
    """Level after level, image after image, one forward each."""
    found = {layer: [] for layer in LAYERS}
    model, schedule = made.denoiser.model, made.denoiser.pipe.scheduler
    for level, time in enumerate(TIMES):
        for layer in LAYERS:
            found[layer].append([])
        for image in range(3):
            ab = schedule.alphas_cumprod[time]
            noise = given["noise"][level * 3 + image]
            x_t = ab.sqrt() * given["pixel_values"][image] + (1 - ab).sqrt() * noise
            handles = [
                model.get_submodule(layer).register_forward_hook(
                    lambda module, args, output, layer=layer: found[layer][-1].append(output[0])
                )
                for layer in LAYERS
            ]
            with torch.no_grad():
                model(x_t[None], time)
            for handle in handles:
                handle.remove()
    return {layer: torch.stack([torch.stack(level) for level in levels]) for layer, levels in found.items()}


@pytest.mark.parametrize(("kind", "pooling"), [("linear", "adaptive:2"), ("attention", "map:4")])
def test_the_loss_is_cross_entropy_on_features_of_each_image_and_level(kind, pooling):
    made, given = objective(kind, pooling), batch()
    maps = features_of(made, given)
    if kind == "linear":
        rows = [functional.adaptive_avg_pool2d(maps[k][t], 2).flatten(1) for t in range(2) for k in LAYERS]
        logits = made.head(torch.cat(rows, 1))
    else:
        logits = made.head(maps)
    found = made(given)
    torch.testing.assert_close(found["loss"], functional.cross_entropy(logits, given["class_labels"]))
    assert found["accuracy"] == (logits.argmax(1) == given["class_labels"]).float().mean()
    stored = {layer: functional.adaptive_avg_pool2d(one.flatten(0, 1), 4).unflatten(0, (2, 3)).transpose(0, 1)
              for layer, one in maps.items()}  # fmt: skip
    if kind == "attention":
        again = made({"layer_features": stored, "class_labels": given["class_labels"]})
        torch.testing.assert_close(again["loss"], found["loss"])


@pytest.mark.parametrize("kind", ["linear", "attention", "feedback"])
def test_the_head_alone_is_trained(kind):
    """Every weight of the head gets a gradient, none of the base does, which stays frozen and in eval mode."""
    made = objective(kind, "mean" if kind == "linear" else "map:4").train()
    made(batch())["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.head.parameters())
    base = made.denoiser.model
    assert not base.training
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    assert {id(p) for p in made.parameters()} == {id(p) for p in made.head.parameters()}
    if kind == "feedback":  # the norms learn in training, also once a copy was measured
        before = copy.deepcopy(made.head.feeds[0].norm.running_mean)
        assert made.result(made.state_dict()).training is False
        made(batch(1))
        assert made.head.training
        assert not torch.equal(made.head.feeds[0].norm.running_mean, before)


def test_kept_features_are_those_of_the_extractor(tmp_path):
    """Draw after draw, each with the noise of its seed."""
    images = from_dataset(dataset(9), name="planted", split="train")
    extractor = FeatureExtractor(Denoiser.from_pipe(pipeline()), LAYERS, TIMES, pooling="map:4", batch_size=4)
    data = StoredFeatures([
        extract_to_store(extractor.replace(seed=seed), images, tmp_path / str(seed), progress=False) for seed in (0, 1)
    ])  # fmt: skip
    assert (len(data), data.class_names, data.rows) == (18, ["dark", "left", "right"], 9)
    found = data.batch([2, 11, 9, 17])
    assert found["class_labels"].tolist() == [2, 2, 0, 2]
    read = {layer: [] for layer in LAYERS}
    for seed, row in ((0, 2), (1, 2), (1, 0), (1, 8)):
        one = extractor.replace(seed=seed)([dataset(9)[row]["image"]])
        for layer in LAYERS:
            read[layer].append(one[layer][:, 0])
    for layer in LAYERS:
        wanted = torch.stack(read[layer])
        torch.testing.assert_close(found["layer_features"][layer], wanted, rtol=1e-4, atol=1e-5)
    single = data[11]
    assert all(torch.equal(single["layer_features"][k], found["layer_features"][k][1]) for k in LAYERS)
    assert data.fingerprint()["stores"][0] != data.fingerprint()["stores"][1]


@pytest.mark.parametrize("name", ["gdc", "difformer", "diffeed", "adam-maps", "ddae"])
def test_the_loop_takes_a_protocols_rates(name):
    protocol = PROTOCOLS[name].replace(batch_size=20, **({"epochs": 16} if name != "ddae" else {}))
    if name == "ddae":
        with pytest.raises(ValueError, match=r"'ddae' \(adam, cosine_epoch.*computed once"):
            loop_settings(protocol, 100)
        return
    config = TrainingConfig(**loop_settings(protocol, 97))
    assert (config.max_train_steps, config.train_batch_size, config.ema_max_decay) == (16 * 5, 20, 0)
    later = protocol.warmup_epochs * 5
    for step in range(later, config.max_train_steps):
        assert learning_rate(config, step) == pytest.approx(protocol_rate(protocol, step / 5, 20), rel=1e-6, abs=1e-12)
    if name != "adam-maps":
        weight = torch.nn.Parameter(torch.ones(2))
        plain = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([weight], protocol.learning_rate), 7, 0.1)
        for epoch in range(16):
            assert learning_rate(config, 5 * epoch + 3) == pytest.approx(plain.get_last_lr()[0])
            plain.optimizer.step()
            plain.step()
        made = make_optimizer([{"params": [weight]}], config)
        assert type(made) is torch.optim.SGD
        assert (made.defaults["momentum"], made.defaults["weight_decay"]) == (0, 0)
    assert loop_settings(protocol, 97, 4)["train_batch_size"] == 5
    with pytest.raises(ValueError, match="batches of 20, which 3 processes and micro-batches cannot share"):
        loop_settings(protocol, 97, 3)


def test_settings_of_the_loop_that_do_not_fit():
    for settings, message in [
        ({"lr_scheduler": "piecewise_constant"}, "`lr_step_rules` goes with"),
        ({"lr_step_rules": "1:5,0.1"}, "`lr_step_rules` goes with"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1;5"}, "is like 1:700"),
        ({"optimizer": "sgd", "adam_weight_decay": 0.1}, "of another optimizer"),
        ({"sgd_momentum": 0.9}, "of another optimizer"),
        ({"max_grad_norm": -1.0}, "must be 0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainingConfig(**settings)
    assert "optimizer" not in TrainingConfig().identity()  # a checkpoint of before goes on
    assert TrainingConfig(optimizer="sgd").identity()["optimizer"] == "sgd"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "knn"}, "not trained by gradient steps"),
        ({"head": "other"}, "Unknown head 'other'; expected one of attention"),
        ({"head_options": {"depth": 2}}, "AttentionHead has no option 'depth'"),
        ({"layers": None}, "pass --layers and --timesteps, or --preset"),
        ({"head": "feedback", "feature_cache": "f"}, "changes what it reads as it learns"),
        ({"protocol": "adam", "head": "mlp"}, "computed once and standardised; fit it by Probe.fit"),
        ({"protocol": "gdc@3"}, "version 1 here, and 'gdc@3' was asked for"),
        ({"protocol": "gdc", "protocol_changes": {"rate": 1}}, "protocol_changes"),
        ({"protocol_changes": {"epochs": 1}}, "none is named"),
        ({"pretrained_model_name_or_path": None}, "No base; pass"),
    ],
)
def test_settings_of_a_probe_that_do_not_fit(settings, message):
    given = {"pretrained_model_name_or_path": "base", "layers": ["mid_block"], "timesteps": [50.0], **settings}
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**given)


def test_labels_and_bases_that_cannot_be_trained_on():
    made = objective("attention")
    with pytest.raises(ValueError, match="run from 0 to 7; class ids run from 0 to 2"):
        made.check_batch({"class_labels": torch.tensor([0, 7])})

    class Data:
        class_names = ("a", "b", "c")

        def __init__(self, labels):
            self.labels = labels

    with pytest.raises(ValueError, match="All 4 training labels are 1"):
        made.check_data(Data([1] * 4))
    with pytest.raises(ValueError, match="training labels run from -1 to 2"):
        made.check_data(Data([-1, 0, 2]))
    with pytest.raises(ValueError, match=r"Classes \['b'\] have no image in the training data"):
        made.check_data(Data([0, 2, 2]))
    half = Denoiser.from_pipe(pipeline().to(torch.float16))
    extractor = FeatureExtractor(half, LAYERS, TIMES, pooling="map:4")
    with pytest.raises(ValueError, match="float16 loses small values"):
        ProbeObjective(extractor, objective("feedback").head)
