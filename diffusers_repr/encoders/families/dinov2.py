"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193), with and without registers (Darcet et al. 2023, arXiv 2309.16588)."""

from __future__ import annotations

from typing import Any

from diffusers_repr.encoders.family import EncoderFamily, register_encoder_family


@register_encoder_family("dinov2")
class Dinov2Family(EncoderFamily):
    """Patch tokens after the final norm; global: the class token after it. Always resamples its positions."""

    model_class = "Dinov2Model"
    positions = "embeddings"
    blocks = "encoder.layer"
    interpolates = False


@register_encoder_family("dinov2_with_registers")
class Dinov2WithRegistersFamily(Dinov2Family):
    """As DINOv2; the registers between class token and patches are dropped."""

    model_class = "Dinov2WithRegistersModel"

    def prefix(self, config: Any) -> int:
        """Class token and registers."""
        return 1 + int(config.num_register_tokens)
