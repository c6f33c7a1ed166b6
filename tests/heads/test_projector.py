import pytest
import torch
from torch import nn

from diffusers_repr.heads import Projector


def test_the_mlp():
    projector = Projector(4, 3, hidden_dim=8)
    kinds = [type(layer) for layer in projector.layers]
    assert kinds == [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]
    x = torch.randn(2, 6, 4)
    one, two, three = (projector.layers[i] for i in (0, 2, 4))
    wanted = three(nn.functional.silu(two(nn.functional.silu(one(x)))))
    assert torch.equal(projector(x, (2, 3)), wanted)
    assert all(bool((layer.bias == 0).all()) for layer in (one, two, three))


def test_the_size_of_the_paper():
    with torch.device("meta"):
        projector = Projector(1152, 768)
    assert sum(p.numel() for p in projector.parameters()) == 1152 * 2048 + 2048 + 2048 * 2049 + 2049 * 768


def test_a_convolution_of_side_1_equals_a_linear_layer():
    projector = Projector(4, 3, kind="conv", kernel_size=1)
    x = torch.randn(2, 6, 4)
    wanted = nn.functional.linear(x, projector.layers.weight[:, :, 0, 0], projector.layers.bias)
    assert torch.allclose(projector(x, (2, 3)), wanted, atol=1e-6)


def test_the_convolution_equals_the_loop():
    projector = Projector(2, 3, kind="conv").double()
    x = torch.randn(1, 12, 2, dtype=torch.float64)
    got, weight = projector(x, (3, 4)), projector.layers.weight
    for i in range(3):
        for j in range(4):
            wanted = projector.layers.bias.clone()
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < 3 and 0 <= j + dj < 4:
                        wanted = wanted + weight[:, :, di + 1, dj + 1] @ x[0, (i + di) * 4 + j + dj]
            assert torch.allclose(got[0, i * 4 + j], wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_dim": 0}, "in_dim must be a whole number from 1"),
        ({"out_dim": 2.0}, "out_dim must be a whole number from 1"),
        ({"kind": "attention"}, "expected one of mlp, conv"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Projector(**{"in_dim": 4, "out_dim": 3, **settings})


def test_bad_tokens():
    with pytest.raises(ValueError, match=r"takes \(B, 2 \* 3, 4\) for a grid of \(2, 3\); got \(1, 5, 4\)"):
        Projector(4, 3)(torch.ones(1, 5, 4), (2, 3))
