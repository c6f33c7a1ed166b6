"""Joint diffusion models: one network that denoises and classifies."""

from diffusers_repr.pipelines.joint_diffusion.pipeline import JointClassificationOutput, JointDiffusionPipeline

__all__ = ["JointClassificationOutput", "JointDiffusionPipeline"]
