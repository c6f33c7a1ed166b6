"""The ensemble of classifiers of pixels: against networks of torch, one after another, on all pixels' features."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from diffusers_repr.features.sampled_maps import SampledMaps
from diffusers_repr.heads import PixelEnsembleHead
from diffusers_repr.heads.fitting.pixels import (
    DDPM_SEG,
    PixelProtocol,
    PixelSet,
    draw_members,
    member_order,
    train_members,
)

LAYERS, CHANNELS = ["x", "y", "z"], [5, 4, 3]
GRIDS = {"x": (2, 3), "y": (4, 6), "z": (4, 6)}
SIZE = (8, 12)


def features(rows=2, levels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.randn(levels, rows, c, *GRIDS[path], generator=generator)
        for path, c in zip(LAYERS, CHANNELS, strict=True)
    }


def stacked(maps, levels=2):
    """Features of every pixel `(B, L, H, W)`: resized and put side by side, levels outside."""
    parts = [functional.interpolate(maps[p][t], SIZE, mode="bilinear") for t in range(levels) for p in LAYERS]
    return torch.cat(parts, 1)


def ensemble(members=3, classes=3, **changes):
    head = PixelEnsembleHead(LAYERS, CHANNELS, classes, 2, members, **{"hidden_features": (16, 8), **changes})
    draw_members(head, 4, 0.4)
    with torch.no_grad():
        for at, norm in enumerate(head.norm):
            norm.running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(at))
            norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(at))
            norm.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(at))
            norm.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(at))
    return head.eval()


def alone(head, member):
    """One member as modules of torch."""
    parts = []
    for linear, norm in zip(head.linear, head.norm, strict=True):
        own = nn.Linear(linear.weight.shape[2], linear.weight.shape[1])
        batch = nn.BatchNorm1d(linear.weight.shape[1])
        parts += [own, nn.ReLU(), batch]
        for target, source in ((own, linear), (batch, norm)):
            for name, value in target.state_dict().items():
                if name != "num_batches_tracked":
                    value.copy_(getattr(source, name)[member])
    last = nn.Linear(head.last.weight.shape[2], head.last.weight.shape[1])
    last.weight.data, last.bias.data = (
        head.last.weight[member].detach().clone(),
        head.last.bias[member].detach().clone(),
    )
    return nn.Sequential(*parts, last).to(head.last.weight.dtype)


@pytest.mark.parametrize(("classes", "widths"), [(2, [128, 32]), (29, [128, 32]), (30, [256, 128]), (34, [256, 128])])
def test_the_widths_of_the_paper(classes, widths):
    head = PixelEnsembleHead(["a"], [6], classes)
    assert [linear.weight.shape[1] for linear in head.linear] == widths
    assert head.linear[0].weight.shape == (10, widths[0], 6)
    assert head.last.weight.shape == (10, classes, widths[1])
    draw_members(head, 0, DDPM_SEG.init_std)
    assert float(head.linear[1].weight.std()) == pytest.approx(0.02, rel=0.05)
    assert not any(layer.bias.any() for layer in [*head.linear, head.last])


def test_the_first_layer_at_low_resolution_is_that_on_all_pixels():
    head, maps = ensemble(), features()
    dense = stacked(maps)
    assert dense.shape[1] == head.in_features == 2 * sum(CHANNELS)
    assert torch.equal(dense[:, :5], functional.interpolate(maps["x"][0], SIZE, mode="bilinear"))
    pixels = dense.permute(0, 2, 3, 1).flatten(0, 2)
    logits = head(maps, SIZE)
    for member in range(3):
        with torch.no_grad():
            expected = alone(head, member).eval()(pixels).view(2, *SIZE, 3).permute(0, 3, 1, 2)
        torch.testing.assert_close(logits[:, member], expected, atol=1e-5, rtol=1e-5)
    together = head.classify(pixels.expand(3, -1, -1))
    torch.testing.assert_close(together.view(3, 2, *SIZE, 3).permute(1, 0, 4, 2, 3), logits, atol=1e-5, rtol=1e-5)
    votes = logits.argmax(2).permute(0, 2, 3, 1)
    assert torch.equal(head.predict(maps, SIZE).labels(), votes.mode(-1).values)
    assert head(maps).shape[-2:] == (4, 6)  # the largest of the maps


def test_what_is_no_feature_of_the_head():
    head, maps = ensemble(), features()
    with pytest.raises(ValueError, match="reads layer 'y', which is not among"):
        head({"x": maps["x"]})
    with pytest.raises(ValueError, match=r"takes 'y' as \(2, B, 4, h, w\); got \(2, 2, 5, 4, 6\)"):
        head({**maps, "y": torch.zeros(2, 2, 5, 4, 6)})
    with pytest.raises(ValueError, match=r"takes 'x' as \(2, B, 5, h, w\); got \(2, 5, 2, 3\)"):
        head({**maps, "x": maps["x"][0]})
    with pytest.raises(ValueError, match=r"have \[1, 2\] rows"):
        head({**maps, "z": maps["z"][:, :1]})
    with pytest.raises(ValueError, match="pair up"):
        PixelEnsembleHead(["a", "a"], [1, 2], 3)
    with pytest.raises(ValueError, match="num_classes must be a whole number from 2"):
        PixelEnsembleHead(["a"], [1], 1)


# Training


def pixel_set(classes=3, seed=0, noise=0.3):
    """Pixels whose class shows in the features, with some noise."""
    maps, held = features(seed=seed), SampledMaps(SIZE)
    held.add([maps[p][t] for t in range(2) for p in LAYERS])
    places = torch.cartesian_prod(torch.arange(2), torch.arange(SIZE[0]), torch.arange(SIZE[1]))
    x = held.sample(*places.unbind(1))
    scores = x @ torch.randn(x.shape[1], classes, generator=torch.Generator().manual_seed(7))
    scores += noise * torch.randn(scores.shape, generator=torch.Generator().manual_seed(8))
    return PixelSet(held, places, scores.argmax(1))


def one_after_another(head, pixels, protocol, seed):
    """The training loop of the paper, in words of torch, a member at a time."""
    networks, steps = [], []
    for member in range(head.config["members"]):
        network, taken, best, worse, stop = alone(head, member).train(), 0, float("inf"), 0, False
        optimizer = torch.optim.Adam(network.parameters(), lr=protocol.learning_rate)
        for epoch in range(protocol.max_epochs):
            order = member_order(seed, member, epoch, len(pixels.labels))
            for batch in order.split(protocol.batch_size):
                if len(batch) < protocol.batch_size:
                    continue
                loss = functional.cross_entropy(network(pixels.features(batch).double()), pixels.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                taken += 1
                if epoch >= protocol.first_counted_epoch:
                    best, worse = (loss.item(), 0) if loss.item() < best else (best, worse + 1)
                    stop = worse > protocol.patience
                    if stop:
                        break
            if stop:
                break
        networks.append(network.eval())
        steps.append(taken)
    return networks, steps


def test_all_members_at_once_are_members_one_after_another():
    """With steps at which each stops, and weights, statistics and moments that never mix; in float64."""
    pixels = pixel_set()
    protocol = DDPM_SEG.replace(batch_size=40, max_epochs=12, first_counted_epoch=2, patience=5, init_std=0.2)
    head = PixelEnsembleHead(LAYERS, CHANNELS, 3, 2, 4, (16, 8)).double()
    draw_members(head, 3, protocol.init_std)
    networks, steps = one_after_another(head, pixels, protocol, 3)
    ends = train_members(head, pixels, protocol, 3)
    assert ends.steps == steps
    assert len(set(steps)) > 1
    assert max(steps) > min(steps) > 2 * (len(pixels.labels) // 40)
    maps = {path: value.double() for path, value in features(seed=9).items()}
    dense = stacked(maps).permute(0, 2, 3, 1).flatten(0, 2)
    logits = head(maps, SIZE)
    for member, network in enumerate(networks):
        with torch.no_grad():
            expected = network(dense).view(2, *SIZE, 3).permute(0, 3, 1, 2)
        torch.testing.assert_close(logits[:, member], expected, atol=1e-7, rtol=1e-7)


def test_planted_classes_are_learned_and_a_seed_decides():
    pixels = pixel_set(noise=0.0)
    protocol, found = DDPM_SEG.replace(learning_rate=1e-2, max_epochs=25), []
    for seed in (0, 0, 1):
        head = PixelEnsembleHead(LAYERS, CHANNELS, 3, 2, 3, (32, 16))
        state = torch.random.get_rng_state()
        ends = train_members(head, pixels, protocol, seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not head.training
        assert all(loss < 0.5 for loss in ends.losses)
        found.append(head.classify(pixels.features(torch.arange(192)).expand(3, -1, -1)))
    right = [(part.argmax(-1) == pixels.labels).float().mean() for part in found[0]]
    assert min(right) > 0.95
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=0.1)
    assert not torch.allclose(found[0][0], found[0][1], atol=0.1)


def test_what_cannot_be_trained_on():
    head, pixels = PixelEnsembleHead(LAYERS, CHANNELS, 3, 2, 2, (4,)), pixel_set()
    with pytest.raises(ValueError, match="1 pixels to learn from"):
        train_members(head, PixelSet(pixels.maps, pixels.places[:1], pixels.labels[:1]))
    few = PixelSet(pixels.maps, pixels.places[:5], pixels.labels[:5])  # fewer than a batch: all of them
    assert train_members(head, few, DDPM_SEG.replace(max_epochs=3)).steps == [3, 3]
    broken = SampledMaps(SIZE)
    broken.add([torch.full((1, 24, 1, 1), float("inf"))])
    with pytest.raises(FloatingPointError, match="The loss of member 0 is nan in epoch 0"):
        train_members(head, PixelSet(broken, few.places * 0, few.labels))
    with pytest.raises(ValueError, match="leave standardize=False"):
        DDPM_SEG.replace(standardize=True)
    with pytest.raises(ValueError, match="no variance of one pixel"):
        PixelProtocol("mine", batch_size=1)
    assert DDPM_SEG.replace(patience=9).describe()["changed"] == ["patience"]
