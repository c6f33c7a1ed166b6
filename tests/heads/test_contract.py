"""Heads as diffusers' loaders, casts and offloads want them."""

import functools

import pytest
import torch

from diffusers_repr.heads import (
    AttentionHead,
    ConvolutionHead,
    DepthHead,
    FeedbackHead,
    HyperfeaturesHead,
    JointHead,
    KNNHead,
    LinearHead,
    MLPHead,
    PixelEnsembleHead,
    Projector,
    ReadoutHead,
)
from diffusers_repr.heads.fitting.pixels import draw_members
from diffusers_repr.testing import check_head
from tests.testers.model_contract import CONCERNS, ModelCase, check

LAYERS, CHANNELS = ["a", "b"], [8, 4]


def pooled(make, **changes) -> ModelCase:
    def head():
        made = make(6, 3, **changes)
        made.set_statistics(torch.randn(6), torch.rand(6) + 0.5)
        if isinstance(made, KNNHead):
            made.set_bank(torch.randn(12, 6), torch.arange(12) % 3)
        return made

    return ModelCase(head, lambda: {"features": torch.randn(4, 6)}, {"logits": (4, 3)}, plain=True, wide=True)


def on_maps(make, channels: int = 1, **changes) -> ModelCase:
    def inputs() -> dict:
        maps = {"a": torch.randn(2, 8, 3, 2), "b": torch.randn(2, 4, 6, 4)}
        return {"features": maps, "timestep": torch.tensor([3, 700])}

    head = functools.partial(make, LAYERS, CHANNELS, time_width=8, **changes)
    return ModelCase(head, inputs, {"sample": (2, channels, 6, 4)}, plain=True, wide=True)


def hyperfeatures() -> ModelCase:
    def inputs() -> dict:
        return {"features": {"a": torch.randn(2, 3, 8, 3, 2), "b": torch.randn(2, 3, 4, 6, 4)}}

    make = functools.partial(HyperfeaturesHead, LAYERS, CHANNELS, 10, [0, 4], width=8, bottleneck=4)
    return ModelCase(make, inputs, {"sample": (3, 8, 6, 4)}, plain=True, wide=True)


def projector(kind: str) -> ModelCase:
    def inputs() -> dict:
        return {"tokens": torch.randn(2, 6, 8), "grid": (2, 3)}

    make = functools.partial(Projector, 8, 5, hidden_dim=16, kind=kind)
    return ModelCase(make, inputs, {"sample": (2, 6, 5)}, plain=True)


def joint(norm: str) -> ModelCase:
    def inputs() -> dict:
        skips = [torch.randn(3, 4, 8, 8)]
        return {"hidden": torch.randn(3, 2, 4, 4), "skips": skips, "timestep": torch.tensor([1, 50, 999])}

    make = functools.partial(JointHead, 6, 3, norm=norm, dropout=0.3, id2label=["x", "y", "z"])
    return ModelCase(make, inputs, {"logits": (3, 3)}, plain=True, wide=True)


def pixels(levels: int) -> ModelCase:
    def inputs() -> dict:
        lead = (levels, 2) if levels > 1 else (2,)
        return {"features": {"a": torch.randn(*lead, 8, 3, 2), "b": torch.randn(*lead, 4, 6, 4)}}

    make = functools.partial(PixelEnsembleHead, LAYERS, CHANNELS, 3, levels, members=4, hidden_features=(8, 6))

    def head():
        made = make()
        draw_members(made, 0, 0.3)
        return made

    return ModelCase(head, inputs, {"logits": (2, 4, 3, 6, 4)}, plain=True, wide=True)


def classifier(make, levels: int = 1, **changes) -> ModelCase:
    def inputs() -> dict:
        lead = (levels, 2) if levels > 1 else (2,)
        return {"features": {"a": torch.randn(*lead, 8, 3, 2), "b": torch.randn(*lead, 4, 6, 4)}}

    sizes = [[3, 2], [2, 2]]
    return ModelCase(functools.partial(make, LAYERS, CHANNELS, sizes, 3, levels, **changes), inputs,
                     {"logits": (2, 3)}, plain=True, wide=True)  # fmt: skip


class SecondPass:
    """Stands for the network: fed back maps join the maps that are read."""

    def __init__(self, maps):
        self.maps = maps

    def __call__(self, fed):
        a = self.maps["a"] + fed["c"].mean((2, 3), keepdim=True)
        return {"a": a, "b": self.maps["b"] + fed["d"].mean((2, 3), keepdim=True)}


def feedback() -> ModelCase:
    def inputs() -> dict:
        maps = {"a": torch.randn(2, 8, 3, 2), "b": torch.randn(2, 4, 6, 4)}
        return {"features": maps, "second_pass": SecondPass({name: one.clone() for name, one in maps.items()})}

    pairs = {"sources": LAYERS, "source_channels": CHANNELS, "targets": ["c", "d"], "target_channels": [8, 4]}
    make = functools.partial(FeedbackHead, LAYERS, CHANNELS, [[3, 2], [2, 2]], 3, **pairs, depthwise=True, **TINY)
    return ModelCase(make, inputs, {"logits": (2, 3)}, plain=True, wide=True)


TINY = {"width": 8, "num_attention_heads": 2}
SMALL = {"width": 8, "bottleneck": 4, "output_widths": (8, 4)}
CASES = {
    "LinearHead": pooled(LinearHead),
    "MLPHead": pooled(MLPHead, hidden_features=(8, 5), activation="relu"),
    "KNNHead": pooled(KNNHead, bank_size=12, k=5, temperature=0.5),
    "Projector": projector("mlp"),
    "Projector, conv": projector("conv"),
    "ReadoutHead": on_maps(ReadoutHead, **SMALL),
    "ReadoutHead, correspondence": on_maps(ReadoutHead, 8, kind="correspondence", **SMALL),
    "DepthHead": on_maps(DepthHead, hidden=(8, 6)),
    "PixelEnsembleHead": pixels(1),
    "PixelEnsembleHead, levels": pixels(2),
    "HyperfeaturesHead": hyperfeatures(),
    "ConvolutionHead": classifier(ConvolutionHead, hidden_features=[8, 4], norm_num_groups=2),
    "FeedbackHead": feedback(),
    "JointHead": joint("layer"),
    "JointHead, batch": joint("batch"),
}


ALONE = {"AttentionHead, levels": classifier(AttentionHead, 2, norm="batch", **TINY)}  # the rest: as FeedbackHead


@pytest.mark.parametrize("name", [*CASES, *ALONE])
def test_keeps_our_own_contract(name):
    """Registered, in all forms of output, saved, trained, and pooled ones fitted: the tester for heads of others."""
    case = {**CASES, **ALONE}[name]
    check_head(case.model(), case.given())


@pytest.mark.parametrize("concern", CONCERNS)
@pytest.mark.parametrize("name", CASES)
def test_keeps_the_contract(name, concern, tmp_path):
    check(CASES[name], concern, tmp_path)
