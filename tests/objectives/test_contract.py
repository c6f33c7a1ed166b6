"""Every method and auxiliary loss by the contract testers of the package; and that these find what is wrong."""

import types

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_repr.schedulers_ext.scheduling_patch_mask import PatchMaskScheduler
from torch import nn

from diffusers_repr import Denoiser
from diffusers_repr.denoiser import LabelConditioner
from diffusers_repr.denoiser.vae import vae_stride
from diffusers_repr.heads import JointHead
from diffusers_repr.models import JointViTModel
from diffusers_repr.objectives import (
    AlignmentLoss,
    AttentionAlignmentLoss,
    AuxiliaryLoss,
    ClassifierBase,
    ClassifierObjective,
    DiffusionObjective,
    DispersiveLoss,
    HyperfeaturesConfig,
    HyperfeaturesObjective,
    LDAEConfig,
    LDAEObjective,
    MDMObjective,
    ModelArtifact,
    Objective,
    PipelineArtifact,
    ReadoutConfig,
    ReadoutObjective,
    REGObjective,
    REPAEObjective,
    REPAObjective,
    SelfAlignmentLoss,
    SelfSupervisedConfig,
    SpatialAlignmentLoss,
)
from diffusers_repr.objectives.joint import HybViTObjective, JDMObjective
from diffusers_repr.testing import check_auxiliary_loss, check_objective
from diffusers_repr.training import TrainingConfig, train
from tests.objectives.cases import SMALL, attention_teacher, batch, shake, sit, teacher
from tests.objectives.test_reg import class_teacher
from tests.testers.models import autoencoder, build, unet2d

VIT = {"image_size": 8, "patch_size": 2, "num_channels": 3, "hidden_size": 16, "num_hidden_layers": 1,
       "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
WIDTHS = {"width": 8, "bottleneck": 4, "output_widths": [8, 4], "time_width": 16}


def piped(vae=None):
    return Denoiser.from_pipe(SiTPipeline(sit().model, FlowMatchODEScheduler(), vae))


def jdm():
    unet = unet2d(3, sample_size=8)
    head = JointHead.for_unet(unet, 5)
    return JDMObjective(Denoiser.from_pipe(JointDiffusionPipeline(unet, DDPMScheduler(), head)), head)


def hybvit():
    vit = shake(JointViTModel(sample_size=8, in_channels=3, num_layers=2, hidden_size=16, num_attention_heads=2,
                              patch_size=2, num_classes=5))  # fmt: skip
    losses = [DispersiveLoss("blocks.0")]
    return HybViTObjective(Denoiser.from_pipe(JointDiffusionPipeline(vit, DDPMScheduler())), losses=losses)


def classifier():
    pipe = build("ddim")
    denoiser = Denoiser.from_pipe(pipe)
    base = ClassifierBase("ddim", None, denoiser.schedule, 3, 3, (8, 8), 1, None)
    tiny = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8}
    return ClassifierObjective(base, list("abcde"), tiny)


def readout():
    config = ReadoutConfig("base", kind="depth", head={"hidden": [8], "time_width": 8}, layers=["mid_block"],
                           weak_layers=["down_blocks.0"])  # fmt: skip
    return ReadoutObjective(Denoiser.from_pipe(build("ddim")), (16, 16), config)


def hyperfeatures():
    config = HyperfeaturesConfig("base", steps=4, reads=[0, 2], head={"width": 8, "bottleneck": 4})
    return HyperfeaturesObjective(Denoiser.from_pipe(build("ddim")), (16, 16), config)


def ldae():
    config = LDAEConfig(model={"sample_size": 8, "in_channels": 3, "num_layers": 2, "hidden_size": 16,
                               "num_attention_heads": 2, "modulation_size": 4}, num_directions=4)  # fmt: skip
    return LDAEObjective(shake(config.build()), config.fit([batch(40)["pixel_values"]]), config)


def mdm():
    unet = unet2d(3, sample_size=8)
    return MDMObjective(Denoiser.from_pipe(DDPMPipeline(unet, PatchMaskScheduler(patch_size=2))))


METHODS = {
    "plain": lambda: DiffusionObjective(piped()),
    "plain with losses": lambda: DiffusionObjective(
        piped(), losses=[AlignmentLoss("blocks.1", **SMALL), SelfAlignmentLoss(projector_dim=8)], encoders=[teacher()]
    ),
    "repa": lambda: REPAObjective(piped(), [teacher()], "blocks.1", **SMALL),
    "reg": lambda: REGObjective(piped(), [class_teacher()], "blocks.1", **SMALL),
    "repa-e": lambda: REPAEObjective(
        piped(autoencoder((8,), latent_channels=3, scaling_factor=0.7, sample_size=8)),
        [teacher()],
        "blocks.1",
        **SMALL,
    ),
    "jdm": jdm,
    "hybvit with a loss": hybvit,
    "classifier": classifier,
    "readout": readout,
    "hyperfeatures": hyperfeatures,
    "ldae": ldae,
    "mdm": mdm,
    **{
        name: lambda name=name: SelfSupervisedConfig(VIT, name, projection_dim=4).build([0.5] * 3, [0.5] * 3)
        for name in ("simclr", "simsiam", "byol", "barlow_twins")
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    torch.manual_seed(0)
    data = batch()
    if name == "readout":
        data = {"images": torch.rand(1, 2, 3, 16, 16), "label": torch.rand(2, 1, 16, 16)}
    if name == "hyperfeatures":
        points = 15 * torch.rand(2, 2, 4, 2)
        data = {"images": torch.rand(2, 2, 3, 16, 16), "points": points, "valid": torch.ones(2, 4, dtype=torch.bool)}
    if name in ("simclr", "simsiam", "byol", "barlow_twins"):
        data = {"views": torch.rand(2, 3, 3, 8, 8)}
    check_objective(METHODS[name](), data)


@pytest.mark.parametrize(
    ("loss", "encoders"),
    [
        (AlignmentLoss("blocks.2", **SMALL), [teacher()]),
        (SpatialAlignmentLoss("blocks.1"), [teacher(), teacher(dim=4, name="other")]),
        (AttentionAlignmentLoss(None, ["blocks.0.attn"], (0,)), [attention_teacher()]),
        (DispersiveLoss(), []),
        (SelfAlignmentLoss(projector_dim=8), []),
    ],
    ids=lambda part: type(part).__name__,
)
def test_losses(loss, encoders):
    check_auxiliary_loss(loss, encoders=encoders)


# What is wrong is found


class Regression(Objective):
    """Right by itself; each of the tests below spoils one thing."""

    def __init__(self):
        super().__init__()
        self.head = JointHead(4, 2)
        self.teacher = None
        self.freeze("teacher", nn.Linear(3, 2))

    def forward(self, batch, phase="main"):
        return {"loss": sum(p.square().sum() for p in self.head.parameters())}

    def artifacts(self):
        return [ModelArtifact(self.head, "head")]


class Named(DiffusionObjective):
    """Names the class of its pipeline, which it builds from parts."""

    def artifacts(self):
        parts = {"transformer": ModelArtifact(self.network, "network"), "scheduler": FlowMatchODEScheduler()}
        return [PipelineArtifact("SiTPipeline", parts)]


def test_a_pipeline_by_name(tmp_path):
    objective = Named(sit())
    check_objective(objective, batch())
    objective.save_pretrained(tmp_path, objective.state_dict(), torch.float32)
    assert SiTPipeline.from_pretrained(tmp_path)(class_labels=[1], num_inference_steps=1).images[0].size == (8, 8)
    objective.artifacts = lambda: [PipelineArtifact("SitPipeline", {})]
    with pytest.raises(ValueError, match=r"No pipeline 'SitPipeline' .*Closest: \['SiTPipeline'"):
        objective.result({})


def test_what_is_saved_is_checked_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="set eval_batch_size to 0"):
        train(Regression(), None, TrainingConfig(str(tmp_path / "out")))
    with pytest.raises(TypeError, match="build it by Denoiser.from_pipe"):
        train(DiffusionObjective(sit()), None, TrainingConfig(str(tmp_path / "out")))
    bare = Regression()
    bare.head, bare.artifacts = nn.Linear(3, 1), lambda: [ModelArtifact(bare.head, "head")]
    with pytest.raises(TypeError, match="ModelArtifact of 'head' has a Linear, which has no config"):
        train(bare, None, TrainingConfig(str(tmp_path / "out"), eval_batch_size=0))
    twice = Regression()
    pipe = PipelineArtifact("SiTPipeline", {"transformer": None})

    def head(folder):
        return ModelArtifact(twice.head, "head", folder=folder)

    for saved, told in (
        ([head("heads/a"), head("heads/a")], "heads/a"),
        ([head(""), head("")], "the folder itself"),
        ([pipe, head("transformer")], "transformer"),
    ):
        twice.artifacts = lambda saved=saved: saved
        with pytest.raises(ValueError, match=f"saves two things in {told}, and one would"):
            train(twice, None, TrainingConfig(str(tmp_path / "out")))
        with pytest.raises(AssertionError, match=f"saves two things in {told}, and one would"):
            check_objective(twice, {})
    assert not (tmp_path / "out").exists()


NO_DATA = types.SimpleNamespace(on_device=None, fingerprint=None)  # never read


class Headed(DiffusionObjective):
    """With a head of its own beside the network, which nothing saves."""

    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.head, self.gain = nn.Linear(3, 2), nn.Parameter(torch.ones(4))


def test_what_is_trained_and_not_saved_is_told(tmp_path):
    settings = TrainingConfig(str(tmp_path / "out"), dry_run=True, eval_batch_size=0)
    told = r"Headed trains gain \(4 parameters\), head \(8 parameters\), which none of its artifacts holds"
    with pytest.warns(UserWarning, match=told):
        train(Headed(piped()), NO_DATA, settings)
    named = Headed(piped())
    named.discarded = ("head", "gain")
    assert named.unsaved() == {}
    assert Headed(piped()).unsaved() == {"gain": 4, "head": 8}
    aligned = REPAObjective(piped(), [teacher()], "blocks.1", projector_dim=8)
    assert aligned.unsaved() == {}  # the projector lies in heads/


def test_the_model_is_named_that_the_unsaved_weights_lie_in(tmp_path):
    objective = Headed(piped())
    objective.head, objective.discarded = sit().model, ("gain",)
    with pytest.warns(UserWarning, match=r"add ModelArtifact\(self\.head, 'head', folder='heads/head'\)"):
        train(objective, NO_DATA, TrainingConfig(str(tmp_path / "out"), dry_run=True, eval_batch_size=0))


def test_an_auxiliary_loss_is_tried_with_the_vae_and_the_conditioner_of_its_denoiser():
    class Latent(AuxiliaryLoss):
        def forward(self, seen):
            sizes.append(tuple(seen.noisy.x0.shape[1:]))
            drawn.append(seen.noisy.condition)
            return seen.prediction.square().mean()

    class Shifted(LabelConditioner):
        def from_batch(self, batch, count):
            return super().from_batch(batch, count) + 1

    sizes, drawn = [], []
    denoiser = sit(in_channels=4)
    denoiser = Denoiser(denoiser.model, schedule=denoiser.schedule, vae=autoencoder(), conditioner=Shifted())
    side = 8 * vae_stride(denoiser.vae)
    images = {"pixel_values": torch.rand(2, 3, side, side) * 2 - 1, "class_labels": torch.tensor([0, 2])}
    check_auxiliary_loss(Latent("latent", 0.5), denoiser=denoiser, batch=images)
    assert set(sizes) == {(4, 8, 8)}
    assert drawn[0]["class_labels"].tolist() == [1, 3]


def logged_with_its_graph(objective):
    loss = objective.forward
    objective.forward = lambda *given, **named: (out := loss(*given, **named)) | {"same": out["loss"] * 1}
    return "detach it"


def unreached(objective):
    objective.forward = lambda *a, **k: {"loss": next(objective.head.parameters()).square().sum()}
    return "which it trains"


def teacher_as_submodule(objective):
    objective.teacher = objective.frozen["teacher"]
    return "are parameters of the objective|which it trains|in training mode"


def not_json(objective):
    objective.identity = lambda: {"net": objective.head}
    return "identity is no JSON"


def another_path(objective):
    objective.artifacts = lambda: [ModelArtifact(objective.head, "teacher")]
    return "ema_modules names 'teacher', and another module lies there"


@pytest.mark.parametrize("spoil", [logged_with_its_graph, unreached, teacher_as_submodule, not_json, another_path])
def test_broken_methods(spoil):
    objective = Regression()
    check_objective(Regression(), {})
    message = spoil(objective)
    with pytest.raises(AssertionError, match=message):
        check_objective(objective, {})


def test_a_loss_that_changes_the_prediction_is_found():
    class Meddling(AuxiliaryLoss):
        def attach(self, host):
            self.layers = ("blocks.1",)
            host.network.register_forward_pre_hook(lambda module, args: None)
            host.network.proj_out.register_forward_hook(lambda module, args, out: 2 * out)

        def forward(self, seen):
            return seen.layers["blocks.1"].values.square().mean()

    with pytest.raises(AssertionError, match="changes what the network returns"):
        check_auxiliary_loss(Meddling("meddling", 1.0))
