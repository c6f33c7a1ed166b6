"""`check_family` on our families, and on a toy whose family is wrong in one thing at a time."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from diffusers_repr import Denoiser, Family, GenericFamily
from diffusers_repr.denoiser import AttentionLayout
from diffusers_repr.denoiser.family_layers import FamilyLayers
from diffusers_repr.testing import check_family
from tests.testers.models import PIPELINES, SIZES, build
from tests.testers.models_text import FAMILIES
from tests.testers.models_video import VIDEOS  # noqa: F401  (registers them)
from tests.testers.pages import ROOT


class ToyAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, tokens):
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)


class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = ToyAttention(), nn.Linear(16, 16)

    def forward(self, tokens):
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)


class ToyNet(nn.Module):
    """Three tokens of a class before 2 x 2 patches, one stream."""

    def __init__(self):
        super().__init__()
        self.patchify, self.labels = nn.Conv2d(3, 16, 2, 2), nn.Embedding(6, 48)
        self.tower = nn.ModuleList(ToyBlock() for _ in range(3))
        self.pixels = nn.ConvTranspose2d(16, 3, 2, 2)

    def forward(self, x, t, label):
        h = self.patchify(x) + t.reshape(-1, 1, 1, 1) / 1000
        tokens = torch.cat([self.labels(label).unflatten(1, (3, 16)), h.flatten(2).mT], 1)
        for block in self.tower:
            tokens = block(tokens)
        return self.pixels(tokens[:, 3:].mT.unflatten(2, h.shape[2:]))


class ToyFamily(Family):
    conditioning, sample_name, timestep_name = "class", "x", "t"
    not_image, stacks = ("labels",), ("tower",)
    attentions = {"tower.*.attention": AttentionLayout("class and image", text="first")}

    def channels(self):
        return 3

    def size(self):
        return 8, 8

    def classes(self):
        return 5, 5

    def grid(self, tokens, size):
        h, w = size[0] // 2, size[1] // 2
        return ((h, w), tokens - h * w) if tokens - h * w in (0, 3) else None

    def image_tokens(self, layout, inputs, tokens):
        return slice(3, tokens)

    def from_class_labels(self, labels):
        return {"label": torch.tensor([5]) if labels is None else labels}

    def example(self, batch, device):
        return {"label": torch.zeros(batch, dtype=torch.long, device=device)}


def toy(family=None):
    torch.manual_seed(0)
    return Denoiser(ToyNet(), DDPMScheduler(), family=ToyFamily() if family is None else family)


def test_a_family_that_tells_all():
    denoiser = toy()
    denoiser.model.train()
    report = check_family(denoiser, image_size=(8, 12))
    assert {finding.state for finding in report.findings} == {"ok"}
    assert report["PAG"].text == "tower.1.attention"
    assert report["REPA"].text == "tower.0"
    assert str(report).startswith("ToyFamily of ToyNet\n  call           ok        ToyNet(x, t, label)")
    assert denoiser.model.training
    assert all(p.grad is None and p.requires_grad for p in denoiser.model.parameters())


def wrong_inputs(self, x_t, level, condition):
    return {"sample": x_t, "t": self.timestep(level, x_t), **condition}


def told_in_thousandths(self, level, x_t):
    return Family.timestep(self, level, x_t) / 1000


def mixed_output(self, raw, x_t):
    return raw - raw.mean(0)


def deaf(self, labels):
    return {"label": torch.full((1,), 5) if labels is None else torch.full_like(labels, 5)}


def image_first(self, tokens, size):
    return ((size[0] // 2, size[1] // 2), 0)


FAULTS = {
    "inputs of other names": ({"inputs": wrong_inputs}, "call", "wrong", "gives 'sample', and the forward takes x, t"),
    "no channels": ({"channels": Family.channels}, "call", "wrong", "needs 'in_channels' in the config"),
    "no size": ({"size": Family.size}, "call", "wrong", r"Write `def size\(self\)` in ToyFamily"),
    "output": ({"output": lambda self, raw, x_t: raw[:, :1]}, "call", "wrong", "Write `def output"),
    "rows": ({"output": mixed_output}, "rows", "wrong", "a sample alone is predicted otherwise"),
    "no grid": ({"grid": lambda self, tokens, size: None}, "REPA", "wrong", "'tower.0' gives no image.* or `grid`"),
    "grid": ({"grid": image_first}, "features", "wrong", "the 16 from 0 on; those from 3 on change most with x_t"),
    "no example": ({"example": Family.example}, "features", "wrong", r"`example\(batch, device\)`.* write it"),
    "timestep": ({"timestep": told_in_thousandths}, "guidance", "wrong", "Write it: the inverse of `timestep`"),
    "no attentions": ({"attentions": {}}, "PAG", "lacks", "perhaps 'tower.0.attention'.*write `attentions"),
    "no image_tokens": ({"image_tokens": Family.image_tokens}, "PAG", "wrong", "Write `def image_tokens"),
    "image_tokens": ({"image_tokens": lambda *_: slice(2, 19)}, "PAG", "wrong", "finds 17 tokens of the image"),
    "no null class": ({"classes": lambda self: (6, None)}, "CFG", "ok", ""),
    "a deaf network": ({"from_class_labels": deaf}, "CFG", "wrong", "the condition does not reach the network"),
    "no stacks": ({"stacks": ("blocks",)}, "REPA", "lacks", r"`stacks = \(path of the list"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault):
    change, part, state, text = FAULTS[fault]
    report = found(toy(type("ToyFamily", (ToyFamily,), change)()), parts=[part])
    line = next(line for line in report.splitlines() if line.startswith(f"  {part} "))
    words = line.split()
    assert words[1] == state, report
    assert re.search(text, line), report


def found(denoiser, parts=None):
    """The report, of an error too."""
    try:
        return str(check_family(denoiser, parts=parts))
    except AssertionError as error:
        return str(error)


def test_a_wrong_name_is_named_in_each_guidance():
    class Renamed(ToyFamily):
        sample_name = "sample"

        def inputs(self, x_t, level, condition):
            return {"x": x_t, "t": self.timestep(level, x_t), **condition}

    report = found(toy(Renamed()), ("guidance", "PAG", "CFG", "EnergyGuidance"))
    assert "Something is wrong in guidance, PAG, CFG, EnergyGuidance" in report
    assert "sample_name is 'sample', and `inputs` gives x, t, label. Write `sample_name = 'x'`." in report
    assert report.count("Renamed.sample_name is 'sample', and the network is called with x, t, label.") == 3


def test_any_module():
    with pytest.raises(ValueError, match="there are call, rows, features"):
        check_family(toy(), parts=["PAG", "SAG"])
    torch.manual_seed(0)
    family = GenericFamily("x", "t", 3, lambda level: level.timestep / 1000, lambda tokens, size: (4, 4))
    net = ToyNet()
    report = found(Denoiser(net, DDPMScheduler(), family=family))
    assert "call           wrong     size() tells none. Write `def size(self)` in GenericFamily" in report


SLOW = pytest.mark.slow
QUICK = ("dit",)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=SLOW) for n in PIPELINES if n not in QUICK)])
def test_our_families(name):
    report = check_family(Denoiser.from_pipe(build(name)), image_size=SIZES[name])
    states = {finding.part: finding.state for finding in report.findings}
    lacking = {part for part, state in states.items() if state == "lacks"}
    assert lacking <= ({"CFG", "REPA"} if "transformer" not in build(name).components else set()), report


@SLOW
@pytest.mark.parametrize("name", FAMILIES)
def test_further_families(name):
    case = FAMILIES[name]
    pipe = case.make()
    given = {} if set(case.call) == {"prompt"} else {"embeddings": case.call}
    report = check_family(Denoiser.from_pipe(pipe), image_size=case.size[-2:], **given)
    for part in ("call", "rows", "features", "guidance", "PAG", "CFG"):
        assert report[part].state == "ok", report


def test_the_page_has_every_name():
    """Whatever a subclass may override stands in one of the tables of `docs/adding_a_family.md`."""
    page = (ROOT / "docs" / "adding_a_family.md").read_text()
    told = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", "".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))))
    names = {name for cls in (Family, FamilyLayers) for name in vars(cls) if name[0] != "_"} - {"bound_to"}
    assert names - told == set()
