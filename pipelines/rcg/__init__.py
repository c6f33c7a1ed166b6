"""RCG."""

from diffusers_repr.pipelines.rcg.pipeline import RCGPipeline, RCGPipelineOutput

__all__ = ["RCGPipeline", "RCGPipelineOutput"]
