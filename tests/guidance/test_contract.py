"""Every guidance keeps what `check_guidance` asks, and each broken promise is named."""

import copy
from dataclasses import dataclass, field

import pytest
import torch

from diffusers_repr import PAG, SAG, AutoGuidance, ClassifierGuidance, DepthGuidance, EnergyGuidance, ReadoutGuidance
from diffusers_repr.capture.lanes import Lane
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance import CFG, Guidance, GuidanceTerm
from diffusers_repr.testing import check_guidance
from tests.guidance.readout_cases import depth, readout
from tests.testers.models import build

LAYERS = ["up_blocks.0.resnets.0", "up_blocks.1.resnets.0"]


def logits(x, timestep):
    return x.mean((2, 3)).repeat(1, 4) * torch.arange(1.0, 13.0)


def power(features, x0, condition):
    return x0.square().mean((1, 2, 3))


def weaker(pipe):
    made = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        made.conv_out.weight.mul_(0.5)
    return made


def depth_heads(pipe):
    denoiser = Denoiser.from_pipe(pipe)
    return DepthGuidance(depth(denoiser, LAYERS), depth(denoiser, LAYERS[:1]), scale=20.0)


def target(pipe):
    return ReadoutGuidance(readout(Denoiser.from_pipe(pipe)), torch.zeros(16, 16), update="eps", scale=5.0)


def reference(pipe):
    head, x0 = readout(Denoiser.from_pipe(pipe), "appearance"), torch.zeros(3, 16, 16)
    return ReadoutGuidance(head, reference=x0 + torch.linspace(-1, 1, 16))


GUIDANCES = {
    "PAG": lambda pipe: PAG(2.0),
    "SAG": lambda pipe: SAG(0.5),
    "AutoGuidance": lambda pipe: AutoGuidance(weaker(pipe)),
    "ClassifierGuidance": lambda pipe: ClassifierGuidance(logits, [3], scale=2.0),
    "DepthGuidance": depth_heads,
    "EnergyGuidance": lambda pipe: EnergyGuidance(power, scale=20.0, interval=(0, 700)),
    "ReadoutGuidance": target,
    "ReadoutGuidance, moved": reference,
}


@pytest.mark.parametrize("name", GUIDANCES)
def test_guidances_keep_their_promises(name):
    pipe = build("ddim")
    check_guidance(pipe, GUIDANCES[name](pipe), num_inference_steps=2)


@dataclass(frozen=True)
class Own(Guidance):
    """Away from the network without its middle block, or as `kind` says."""

    kind: str = field(default="right", kw_only=True)

    def bind(self, denoiser):
        return OwnTerm(self, denoiser)


class OwnTerm(GuidanceTerm):
    def __init__(self, config, denoiser):
        super().__init__(config, denoiser)
        self.lane = Lane(self.key, {"mid_block": lambda module, args, kwargs, call: args[0]})
        self.seen = 0
        if config.kind == "a hook stays":
            denoiser.model.conv_in.register_forward_hook(lambda module, args, output: None)
        if config.kind == "frozen":
            denoiser.model.requires_grad_(False)

    def weight(self, level):
        return self.config.scale if self.config.kind == "everywhere" else super().weight(level)

    def correction(self, step):
        self.seen += 1
        away = step.cond - step.lanes[self.key]
        return {
            "not linear": lambda: self.config.scale * away,
            "nothing": lambda: 0 * away,
            "forgetful": lambda: self.seen * away,
            "random": lambda: away + torch.randn(away.shape),
            "infinite": lambda: away / 0,
        }.get(self.config.kind, lambda: away)()


class Unchecked(Own):
    def __post_init__(self):
        pass


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (Own(scale=2.0, kind="not linear"), "Twice the scale is not twice the correction"),
        (Own(kind="nothing"), "it changed nothing"),
        (Own(kind="forgetful"), "A second run gives other samples"),
        (Own(kind="random"), "random state has moved"),
        (Own(kind="infinite"), "hold NaN or infinity"),
        (Own(kind="everywhere"), "acts outside of its interval"),
        (Own(kind="a hook stays"), "Hooks: not as before, after sampling"),
        (Own(kind="frozen"), "Requires_grad: not as before"),
        (Unchecked(), "A scale of NaN is accepted"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
@pytest.mark.filterwarnings("ignore:.*(NaN or infinity|changed nothing|invalid value)")
def test_broken_promises_are_named(guidance, message):
    with pytest.raises(AssertionError, match=message):
        check_guidance(build("ddim"), guidance, num_inference_steps=2)


def test_one_of_ones_own_keeps_them_and_others_are_refused():
    check_guidance(build("ddim"), Own(scale=1.5), num_inference_steps=2)
    with pytest.raises(ValueError, match="scale 0 is off"):
        check_guidance(build("ddim"), Own(scale=0.0))
    with pytest.raises(TypeError, match="other than CFG; got CFG"):
        check_guidance(build("ddim"), CFG(3.0))
