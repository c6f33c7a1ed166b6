"""Tuning the whole network to classify: the loss written out on four families, what it sees, the result."""

import copy
import json

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch.nn import functional

from diffusers_repr import Denoiser
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.objectives import FinetuneConfig, FinetuneObjective
from diffusers_repr.tasks import finetuned_probe
from diffusers_repr.testing import check_objective
from tests.objectives.cases import shake, sit
from tests.testers.models import build

NAMES = ["cat", "dog", "owl"]


def denoiser(kind):
    torch.manual_seed(0)
    if kind == "sit":
        return sit(num_classes=7)
    if kind == "edm":
        return Denoiser(build("ddim").unet, EDMEulerScheduler())
    return Denoiser.from_pipe(build(kind))


LAYERS = {
    "ddim": (["mid_block", "up_blocks.0"], 40),
    "edm": (["up_blocks.0"], -0.7),
    "dit": (["transformer_blocks.0"], 81),
    "sit": (["blocks.1"], 300),
}


def made(kind, **settings):
    layers, timestep = LAYERS[kind]
    config = FinetuneConfig(kind, layers=layers, timestep=timestep, **settings)
    return FinetuneObjective(denoiser(kind), config, NAMES).train()


def data(objective, count=3):
    generator = torch.Generator().manual_seed(3)
    side, channels = objective.denoiser.image_size[0], objective.denoiser.image_channels
    latent = objective.denoiser.latent_size((side, side))
    return {
        "pixel_values": torch.rand(count, channels, side, side, generator=generator) * 2 - 1,
        "class_labels": torch.arange(count) % 3,
        "noise": torch.randn(count, objective.denoiser.family.channels(), *latent, generator=generator),
    }


def plain_features(kind, objective, batch):
    """By torch's own hooks, the network called as its authors call it, with the formula of its process."""
    network, x0, noise = objective.network, objective.clean({**batch, "generator": generator()}), batch["noise"]
    timestep, found, handles = LAYERS[kind][1], [], []
    for path in objective.layers:

        def keep(module, args, out):
            out = out if isinstance(out, torch.Tensor) else out[0]
            found.append(out.mean((2, 3)) if out.ndim == 4 else out.mean(1))

        handles.append(network.get_submodule(path).register_forward_hook(keep))  # fmt: skip
    null = {"dit": 1000, "sit": 7}.get(kind)
    labels = {} if null is None else {"class_labels": torch.full((len(x0),), null)}
    if kind == "edm":
        sigma = torch.tensor(4.0 * timestep).exp()
        network((x0 + sigma * noise) / (sigma**2 + 0.25).sqrt(), torch.full((len(x0),), timestep))
    elif kind == "sit":
        network(0.7 * x0 + 0.3 * noise, torch.full((len(x0),), 300), **labels)
    else:
        times = torch.full((len(x0),), timestep)
        network(objective.denoiser.scheduler.add_noise(x0, noise, times), times, **labels)
    for handle in handles:
        handle.remove()
    return torch.cat(found, dim=1)


def generator():
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize("kind", list(LAYERS))
def test_the_loss_written_out(kind):
    objective = made(kind)
    objective.network.eval()  # DiT drops labels in train mode: to the null label, which they are
    batch = data(objective)
    out = objective({**batch, "generator": generator()})
    features = plain_features(kind, objective, batch)
    logits = features @ objective.head.linear.weight.T + objective.head.linear.bias
    loss = functional.cross_entropy(logits, batch["class_labels"])
    assert float(out["loss"]) == pytest.approx(float(loss), rel=1e-4)
    assert float(out["accuracy"]) == pytest.approx(float((logits.argmax(1) == batch["class_labels"]).float().mean()))
    parameters = [p for p in objective.network.parameters() if p.requires_grad]
    ours = torch.autograd.grad(out["loss"], parameters)
    for a, b in zip(ours, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_contract():
    objective = made("ddim", head="mlp", head_options={"hidden_features": [8]})
    check_objective(objective, data(objective))


def test_no_label_reaches_the_network():
    """Labels of a conditional model's own range, and others: the logits are the same."""
    objective = made("dit")
    objective.network.eval()
    batch, seen = data(objective), []
    objective.network.register_forward_pre_hook(lambda m, args, kw: seen.append(kw["class_labels"]), with_kwargs=True)
    losses = [objective({**batch, "class_labels": torch.tensor(ids), "generator": generator()})["loss"] for ids in
              ([0, 0, 0], [1, 1, 1])]  # fmt: skip
    assert all(labels.tolist() == [1000] * 3 for labels in seen)
    assert losses[0] != losses[1]


def test_what_is_trained():
    """What the layers reach, at a rate of its own, and the head; a step lowers the loss."""
    objective = made("edm", network_lr_scale=0.5)
    trained = {name for name, p in objective.network.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("conv_out", "conv_norm_out")) for name in trained)
    assert {"conv_in.weight", "mid_block.resnets.0.conv1.weight"} <= trained
    head, network = objective.param_groups()
    assert (head.get("lr_scale", 1), network["lr_scale"]) == (1, 0.5)
    batch = data(objective)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        out = objective(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(float(out["loss"].detach()))
    assert losses[-1] < losses[0] - 0.3


def test_clean_images_at_a_level():
    objective = made("edm", clean=True)
    batch = data(objective)
    seen = []
    objective.network.register_forward_pre_hook(lambda m, args, kw: seen.append(kw), with_kwargs=True)
    objective(batch)
    torch.testing.assert_close(seen[0]["sample"], 2 * batch["pixel_values"])  # 1 / sigma_data
    assert float(seen[0]["timestep"].flatten()[0]) == pytest.approx(-0.7)
    assert objective.record()["noise"] == "clean"


def test_the_result_is_a_probe(tmp_path):
    """Pipeline, head and record; read back, logits are those of the objective under the probe's noise."""
    objective = made("ddim", pooling="adaptive:2")
    shake(objective.head, std=0.3)
    state = {k: v.detach().clone() for k, v in objective.state_dict().items()}
    objective.save_pretrained(tmp_path / "out", state, torch.float32)
    probe = finetuned_probe(tmp_path / "out")
    images = data(objective)["pixel_values"] / 2 + 0.5
    extractor = probe.source
    keys = ["a", "b", "c"]
    noise = extractor.noise.draw(keys, [0] * 3, images.shape[1:])
    parts = objective.result(state)
    wanted = objective.eval().logits(2 * images - 1, noise, parts=parts)
    features = extractor(images, ids=keys)
    found = probe.head(torch.cat([features[path] for path in probe.recipe.layers], 1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert probe.recipe.label_names == tuple(NAMES)
    probe.save_pretrained(tmp_path / "probe")
    again = type(probe).from_pretrained(tmp_path / "probe")
    assert torch.equal(again.logits(images), probe.logits(images))
    with pytest.warns(UserWarning, match="other weights"):  # the untuned base is told apart
        type(probe).from_pretrained(tmp_path / "probe", base=shaken_base(objective))
    told = json.loads((tmp_path / "out" / "finetune.json").read_text())
    (tmp_path / "out" / "finetune.json").write_text(json.dumps({**told, "label_names": ["one"]}))
    with pytest.raises(ValueError, match="label_names"):
        finetuned_probe(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no finetune\.json"):
        finetuned_probe(tmp_path / "probe")


def shaken_base(objective):
    pipe = copy.copy(objective.denoiser.pipe)
    pipe.unet = shake(copy.deepcopy(pipe.unet))
    return pipe


def test_bad_input():
    with pytest.raises(ValueError, match="two classes; the data have 1"):
        FinetuneObjective(denoiser("ddim"), FinetuneConfig("x", layers=["mid_block"], timestep=3), ["only"])
    with pytest.raises(ValueError, match="both `layers` and `timestep`"):
        FinetuneConfig("x", layers=["mid_block"])
    with pytest.raises(ValueError, match="has another architecture"):
        FinetuneObjective(denoiser("ddim"), FinetuneConfig("x"), NAMES)
    with pytest.raises(ValueError, match="not fitted by gradient steps"):
        FinetuneObjective(denoiser("ddim"), FinetuneConfig("x", layers=["mid_block"], timestep=3, head="knn",
                                                           head_options={"bank_size": 3, "k": 1}), NAMES)  # fmt: skip
    objective = made("ddim")
    batch = data(objective)
    for labels, said in (
        ([0, 1, 3], "run from 0 to 3; class ids run from 0 to 2"),
        ([-1, 1, 2], "row without a class"),
    ):
        with pytest.raises(ValueError, match=said):
            objective.check_batch({**batch, "class_labels": torch.tensor(labels)})
    with pytest.raises(ValueError, match="no class labels"):
        objective.check_batch({"pixel_values": batch["pixel_values"]})
    assert isinstance(objective.level, NoiseLevel)
