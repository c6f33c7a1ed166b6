"""SiT."""

from diffusers_repr.pipelines.sit.pipeline import SiTPipeline, SiTPipelineOutput

__all__ = ["SiTPipeline", "SiTPipelineOutput"]
