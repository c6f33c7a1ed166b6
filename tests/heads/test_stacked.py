"""Linear heads trained side by side: each is what it would be alone."""

import pytest
import torch
from torch import nn

from diffusers_repr.heads import PROTOCOLS, fit_head
from diffusers_repr.heads.fitting.stacked import train_linear_heads

DDAE = PROTOCOLS["ddae"]


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 90, 8, generator=generator), torch.randint(0, 4, (90,), generator=generator)


@pytest.mark.parametrize(
    "protocol",
    [
        DDAE.replace(batch_size=32),
        PROTOCOLS["adam"].replace(epochs=4),
        DDAE.replace(optimizer="sgd", weight_decay=0.1, learning_rate=0.1, batch_size=40, drop_last=True),
    ],
    ids=["ddae", "adam", "sgd"],
)
def test_a_head_of_the_grid_is_the_head_alone(data, protocol):
    features, labels = data[0][:, 0] * 2 + 1, data[1]
    stack = train_linear_heads(features, labels, 4, protocol, seed=7)
    for at, cell in enumerate(features):
        alone = fit_head(cell, labels, 4, protocol=protocol, generator=torch.Generator().manual_seed(7))
        assert torch.allclose(stack.head(at)(cell), alone.head(cell), atol=2e-5)
        assert torch.allclose(stack.logits(features)[at], alone.head(cell), atol=2e-5)
        assert float(stack.losses[at]) == pytest.approx(alone.protocol["chosen"]["final_loss"], rel=1e-5)


def test_the_loop_of_the_paper(data):
    """`linear.py`: an optimizer and a cosine schedule a head, changed once an epoch; epochs take draws in turn."""
    features, labels = data
    protocol = DDAE.replace(batch_size=32, epochs=5, learning_rate=1e-2)
    stack = train_linear_heads(features, labels, 4, protocol, seed=3)
    for at in range(3):
        generator = torch.Generator().manual_seed(3)
        layer = nn.Linear(8, 4)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -(8**-0.5), 8**-0.5, generator=generator)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        for epoch in range(5):
            for rows in torch.randperm(90, generator=generator).split(32):
                loss = nn.functional.cross_entropy(layer(features[at, epoch % 2, rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        assert torch.allclose(stack.weight[at], layer.weight, atol=1e-5)
        assert torch.allclose(stack.bias[at], layer.bias, atol=1e-5)


def test_bad_input(data):
    features, labels = data
    for name in ("mae", "repa"):
        with pytest.raises(ValueError, match=f"Protocol '{name}' has batch_norm"):
            train_linear_heads(features, labels, 4, PROTOCOLS[name])
    with pytest.raises(ValueError, match=r"\(G, N, D\) or \(G, R, N, D\) with one label a row; got \(3, 2, 90, 8\)"):
        train_linear_heads(features, labels[:5], 4, DDAE)
    broken = features.clone()
    broken[1, 0, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="loss of head 1 is nan in epoch 0"):
        train_linear_heads(broken, labels, 4, DDAE)
