"""Heads that classify an image by maps: against the paper's formulas in float64, and against what must not matter."""

import pytest
import torch
from torch import nn

from diffusers_repr.heads import AttentionHead, ConvolutionHead, FeedbackHead, LinearHead
from diffusers_repr.models.weights import build_on_meta

ADM = {"mid_block": (1024, 8), "up_blocks.1.attentions.1": (1024, 16), "up_blocks.3.resnets.1": (512, 16)}


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(head):
    """Away from the ones and zeros that norms and the class token start at."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return head


def plain_difformer(head, maps, levels, pool):
    """Section 4 of the paper with loops over levels, layers, heads and tokens, from the state dict alone."""
    w, config = {k: v.double() for k, v in head.state_dict().items()}, head.config
    per_level = []
    for level in range(levels):
        tokens = [w["class_token"].expand(maps["a"].shape[1], -1, -1)]
        for at, layer in enumerate(config["layers"]):
            x = pool(maps[layer][level], config["sizes"][at])
            mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), unbiased=False, keepdim=True)
            x = (x - mean) / (variance + 1e-5).sqrt() * w[f"norms.{at}.weight"] + w[f"norms.{at}.bias"]
            y = torch.einsum("oc,bchw->bohw", w[f"projections.{at}.weight"][:, :, 0, 0], x)
            tokens.append((y + w[f"projections.{at}.bias"][:, None, None]).flatten(2).transpose(1, 2))
        x = torch.cat(tokens, 1)
        for block in range(config["num_layers"]):
            p = {k.removeprefix(f"blocks.{block}."): v for k, v in w.items() if k.startswith(f"blocks.{block}.")}

            def norm(x, name, p=p):
                centred = x - x.mean(-1, keepdim=True)
                return (
                    centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]
                    + p[f"{name}.bias"]
                )

            n, width = norm(x, "norm1"), x.shape[-1]
            q, kv = n @ p["to_q.weight"].T, n @ p["to_kv.weight"].T
            each, out = width // config["num_attention_heads"], torch.zeros_like(x)
            for h in range(config["num_attention_heads"]):
                part = slice(h * each, (h + 1) * each)
                scores = q[..., part] @ kv[..., :width][..., part].transpose(1, 2) / each**0.5
                out[..., part] = scores.softmax(-1) @ kv[..., width:][..., part]
            x = x + out @ p["to_out.weight"].T + p["to_out.bias"]
            hidden = norm(x, "norm2") @ p["fc1.weight"].T + p["fc1.bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            x = x + hidden @ p["fc2.weight"].T + p["fc2.bias"]
        per_level.append(x[:, 0])
    return torch.cat(per_level, 1) @ w["linear.weight"].T + w["linear.bias"]


def cells(x, size):
    """Means over equal cells."""
    rows, columns = x.shape[2] // size[0], x.shape[3] // size[1]
    return x.unflatten(2, (size[0], rows)).unflatten(4, (size[1], columns)).mean((3, 5))


@pytest.mark.parametrize(("levels", "layers"), [(3, ["a", "b", "c"]), (1, ["a"])])
def test_difformer_is_the_papers_formula(levels, layers):
    """Three layers at three levels; of one layer at one level it is GDC's attention head, by the same formula."""
    shapes = {"a": (6, [2, 2], (4, 4)), "b": (4, [3, 2], (3, 2)), "c": (5, [2, 3], (4, 6))}
    channels, sizes = [shapes[k][0] for k in layers], [shapes[k][1] for k in layers]
    head = moved(AttentionHead(layers, channels, sizes, 4, levels, width=12, num_attention_heads=3).double().eval())
    maps = {k: drawn(at, levels, 2, shapes[k][0], *shapes[k][2]) for at, k in enumerate(layers)}
    with torch.no_grad():
        found = head(maps)
    torch.testing.assert_close(found, plain_difformer(head, maps, levels, cells), rtol=1e-12, atol=1e-12)
    if levels == 1:
        assert torch.equal(head({"a": maps["a"][0]}), found)


def test_layers_are_told_by_name():
    """Whatever order they are asked for in, and whatever lies beside them."""
    torch.manual_seed(0)
    head = moved(
        AttentionHead(["x", "y"], [4, 4], [[2, 2], [2, 2]], 3, width=8, num_attention_heads=2).double().eval()
    )
    maps = {"x": drawn(0, 2, 4, 2, 2), "y": drawn(1, 2, 4, 2, 2)}
    wanted = head(maps)
    assert torch.equal(head({"z": drawn(2, 2, 9, 1, 1), "y": maps["y"], "x": maps["x"]}), wanted)
    assert not torch.allclose(head({"x": maps["y"], "y": maps["x"]}), wanted)
    other = AttentionHead(["y", "x"], [4, 4], [[2, 2], [2, 2]], 3, width=8, num_attention_heads=2).double().eval()
    state = head.state_dict()
    for name in ("norms", "projections"):
        for part in ("weight", "bias"):
            state[f"{name}.0.{part}"], state[f"{name}.1.{part}"] = (
                state[f"{name}.1.{part}"],
                state[f"{name}.0.{part}"],
            )
    other.load_state_dict(state)
    torch.testing.assert_close(other(maps), wanted)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_levels_in_the_batch_are_a_loop_over_levels(norm):
    """In training too, where batch norm has statistics of each level on its own."""
    torch.manual_seed(0)
    head = moved(AttentionHead(["a"], [5], [[2, 2]], 3, 2, width=8, num_attention_heads=2, norm=norm).double())
    single = AttentionHead(["a"], [5], [[2, 2]], 3, 1, width=8, num_attention_heads=2, norm=norm).double()
    maps = drawn(0, 2, 6, 5, 4, 4)
    for mode in (True, False):
        state = {**head.state_dict(), "linear.weight": torch.eye(8).double(), "linear.bias": torch.zeros(8).double()}
        single.linear = nn.Linear(8, 8).double()
        single.load_state_dict(state)
        single.train(mode)
        tokens = torch.cat([single({"a": level}) for level in maps], 1)
        torch.testing.assert_close(head.train(mode)({"a": maps}), head.linear(tokens), rtol=1e-12, atol=1e-12)
        for a, b in zip(head.norms.buffers(), single.norms.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_a_new_head_does_not_see_where_things_lie():
    torch.manual_seed(0)
    head = AttentionHead(["a"], [6], [[4, 4]], 5, width=16, num_attention_heads=4).eval()
    x = drawn(0, 2, 6, 4, 4).float()
    shuffled = x.flatten(2)[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(1))].view_as(x)
    torch.testing.assert_close(head({"a": shuffled}), head({"a": x}), rtol=1e-5, atol=1e-5)
    conv = ConvolutionHead(["a"], [6], [[4, 4]], 5, hidden_features=[8, 8], norm_num_groups=4).eval()
    assert not torch.allclose(conv({"a": shuffled}), conv({"a": x}), atol=1e-4)


def test_parameters_are_those_of_the_papers_code():
    """With 1000 classes, from the code of the papers: 4.10, 27.8 and 31.8 millions, and 2.8 of the feedback."""

    def count(cls, **config):
        return sum(p.numel() for p in build_on_meta(cls, config).parameters())

    def of(*names):
        channels, sizes = zip(*(ADM[name] for name in names), strict=True)
        return {"layers": names, "channels": channels, "sizes": [[s, s] for s in sizes], "num_classes": 1000}

    assert count(LinearHead, in_features=4096, num_classes=1000) == 4_097_000
    assert count(AttentionHead, **of("up_blocks.1.attentions.1")) == 27_786_216
    assert count(AttentionHead, **of(*ADM), levels=3) == 31_802_344
    feedback = {
        "sources": list("abcdef"),
        "source_channels": [1024, 1024, 512, 512, 256, 256],
        "targets": list("uvwxyz"),
    }
    feedback["target_channels"] = feedback["source_channels"]
    assert count(FeedbackHead, **of("up_blocks.1.attentions.1"), **feedback) == 27_786_216 + 2_759_680


def test_convolutions_are_those_of_torch():
    torch.manual_seed(0)
    head = moved(
        ConvolutionHead(["a", "b"], [3, 5], [[4, 4], [2, 2]], 4, 2, hidden_features=[8, 4], norm_num_groups=2)
    ).double()
    maps = {"a": drawn(0, 2, 3, 3, 8, 8), "b": drawn(1, 2, 3, 5, 2, 2)}
    w, parts = head.state_dict(), []
    for level in range(2):
        for at, (name, size) in enumerate([("a", 4), ("b", 2)]):
            x = nn.functional.conv2d(cells(maps[name][level], (size, size)), w[f"towers.{at}.entry.weight"],
                                     w[f"towers.{at}.entry.bias"])  # fmt: skip
            for depth in range(2):
                if depth:
                    x = nn.functional.conv2d(x, w[f"towers.{at}.convs.0.weight"], w[f"towers.{at}.convs.0.bias"], 2, 1)
                scale = (w[f"towers.{at}.norms.{depth}.{part}"] for part in ("weight", "bias"))
                x = nn.functional.group_norm(x, 2, *scale).clamp(min=0)
            parts.append((level, at, x.mean((2, 3))))
    in_order = torch.cat([part for *_, part in sorted(parts, key=lambda p: (p[1], p[0]))], 1)
    wanted = in_order @ w["linear.weight"].T + w["linear.bias"]
    torch.testing.assert_close(head(maps), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 1}, "num_classes must be a whole number from 2"),
        ({"channels": [4, 4]}, "must go together"),
        ({"sizes": [4]}, r"must be \(H, W\)"),
        ({"levels": 0}, "levels must be"),
        ({"width": 10}, "divided among 4 heads"),
        ({"norm": "group"}, "expected one of layer, batch"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    settings = {
        "layers": ["a"],
        "channels": [4],
        "sizes": [[2, 2]],
        "num_classes": 3,
        "width": 8,
        "num_attention_heads": 4,
    }
    with pytest.raises(ValueError, match=message):
        AttentionHead(**{**settings, **changes})


def test_maps_that_do_not_fit():
    head = AttentionHead(["a"], [4], [[4, 4]], 3, width=8, num_attention_heads=2)
    for maps, message in [
        ({"b": torch.ones(1, 4, 4, 4)}, "reads layer 'a', which is not among"),
        ({"a": torch.ones(1, 4, 2, 4)}, r"of at least 4 x 4 cells; got \(1, 4, 2, 4\)"),
        ({"a": torch.ones(1, 5, 4, 4)}, r"takes 'a' as \(B, 4, h, w\)"),
        ({"a": torch.ones(2, 1, 4, 4, 4)}, "takes 'a' as"),
    ]:
        with pytest.raises(ValueError, match=message):
            head(maps)
    with pytest.raises(ValueError, match="Pool by 'map:P'"):
        AttentionHead.for_maps({"a": torch.ones(2, 4)}, 3)
