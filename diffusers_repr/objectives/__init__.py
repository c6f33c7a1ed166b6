"""Training methods: each an `Objective`, one module with everything it trains, that `train` runs."""

from diffusers_repr.objectives.addp import ADDPConfig, ADDPObjective
from diffusers_repr.objectives.artifacts import Artifact, FixedArtifact, ModelArtifact, PipelineArtifact
from diffusers_repr.objectives.autoencoder import AutoencoderConfig, AutoencoderObjective
from diffusers_repr.objectives.auxiliary import (
    AlignmentLoss,
    AttentionAlignmentLoss,
    AuxiliaryLoss,
    DispersiveLoss,
    Observation,
    SelfAlignmentLoss,
    SpatialAlignmentLoss,
    alignment_loss,
)
from diffusers_repr.objectives.base import Batch, Objective, weighted_sum
from diffusers_repr.objectives.classifier import ClassifierBase, ClassifierObjective
from diffusers_repr.objectives.classifier_config import ClassifierConfig
from diffusers_repr.objectives.cleandift import CleanDIFTConfig, CleanDIFTObjective, noise_robustness, strata_timesteps
from diffusers_repr.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from diffusers_repr.objectives.controlnet import ControlNetConfig, ControlNetObjective
from diffusers_repr.objectives.diffusion import DiffusionObjective
from diffusers_repr.objectives.diffusion_autoencoder import (
    DiffusionAutoencoderConfig,
    DiffusionAutoencoderObjective,
    PenaltyConfig,
)
from diffusers_repr.objectives.distillation import (
    DreamTeacherConfig,
    DreamTeacherObjective,
    FinetuneStudentConfig,
    FinetuneStudentObjective,
    InterpreterConfig,
    InterpreterObjective,
    RepFusionConfig,
    RepFusionObjective,
    Student,
    StudentConfig,
)
from diffusers_repr.objectives.finetune import FinetuneConfig, FinetuneObjective
from diffusers_repr.objectives.hyperfeatures import HyperfeaturesConfig, HyperfeaturesObjective, keypoint_infonce
from diffusers_repr.objectives.ldae import LDAEConfig, LDAEObjective
from diffusers_repr.objectives.mage import MAGEConfig, MAGEObjective
from diffusers_repr.objectives.mdm import MDMConfig, MDMObjective
from diffusers_repr.objectives.noisy import NoisyBatch
from diffusers_repr.objectives.odise import OdiseConfig, OdiseObjective
from diffusers_repr.objectives.online import OnlineGuidanceObjective
from diffusers_repr.objectives.perceptual import PerceptualLoss, PerceptualObjective
from diffusers_repr.objectives.probe_config import ProbeConfig
from diffusers_repr.objectives.probe_heads import ProbeObjective
from diffusers_repr.objectives.readout import ReadoutConfig, ReadoutObjective
from diffusers_repr.objectives.readout_rows import ReadoutRows, RowsConfig
from diffusers_repr.objectives.repa import REGObjective, REPAConfig, REPAEObjective, REPAObjective, build_repa
from diffusers_repr.objectives.representation import RepresentationObjective
from diffusers_repr.objectives.saved_heads import load_heads
from diffusers_repr.objectives.scribble import ScribbleConfig, ScribbleObjective, SegmenterConfig
from diffusers_repr.objectives.self_supervised import (
    BarlowTwinsObjective,
    BYOLObjective,
    SelfSupervisedConfig,
    SelfSupervisedObjective,
    SimCLRObjective,
    SimSiamObjective,
)
from diffusers_repr.objectives.teachers import CachedFeatures
from diffusers_repr.objectives.times import TimeSampler
from diffusers_repr.objectives.vq import TokenizerConfig, TokenizerObjective

__all__ = [
    "ADDPConfig",
    "ADDPObjective",
    "AlignmentLoss",
    "Artifact",
    "AttentionAlignmentLoss",
    "AutoencoderConfig",
    "AutoencoderObjective",
    "AuxiliaryLoss",
    "BYOLObjective",
    "BarlowTwinsObjective",
    "Batch",
    "CachedFeatures",
    "ClassifierBase",
    "ClassifierConfig",
    "ClassifierObjective",
    "CleanDIFTConfig",
    "CleanDIFTObjective",
    "ContrastiveConfig",
    "ContrastiveObjective",
    "ControlNetConfig",
    "ControlNetObjective",
    "DiffusionAutoencoderConfig",
    "DiffusionAutoencoderObjective",
    "DiffusionObjective",
    "DispersiveLoss",
    "DreamTeacherConfig",
    "DreamTeacherObjective",
    "FinetuneConfig",
    "FinetuneObjective",
    "FinetuneStudentConfig",
    "FinetuneStudentObjective",
    "FixedArtifact",
    "HyperfeaturesConfig",
    "HyperfeaturesObjective",
    "InterpreterConfig",
    "InterpreterObjective",
    "LDAEConfig",
    "LDAEObjective",
    "MAGEConfig",
    "MAGEObjective",
    "MDMConfig",
    "MDMObjective",
    "ModelArtifact",
    "NoisyBatch",
    "Objective",
    "Observation",
    "OdiseConfig",
    "OdiseObjective",
    "OnlineGuidanceObjective",
    "PenaltyConfig",
    "PerceptualLoss",
    "PerceptualObjective",
    "PipelineArtifact",
    "ProbeConfig",
    "ProbeObjective",
    "REGObjective",
    "REPAConfig",
    "REPAEObjective",
    "REPAObjective",
    "ReadoutConfig",
    "ReadoutObjective",
    "ReadoutRows",
    "RepFusionConfig",
    "RepFusionObjective",
    "RepresentationObjective",
    "RowsConfig",
    "ScribbleConfig",
    "ScribbleObjective",
    "SegmenterConfig",
    "SelfAlignmentLoss",
    "SelfSupervisedConfig",
    "SelfSupervisedObjective",
    "SimCLRObjective",
    "SimSiamObjective",
    "SpatialAlignmentLoss",
    "Student",
    "StudentConfig",
    "TimeSampler",
    "TokenizerConfig",
    "TokenizerObjective",
    "alignment_loss",
    "build_repa",
    "keypoint_infonce",
    "load_heads",
    "noise_robustness",
    "strata_timesteps",
    "weighted_sum",
]
