"""What transformers of videos share: a third axis of the grid, and text by cross-attention alone."""

from __future__ import annotations

from diffusers_repr.denoiser.attention_layouts import PLAIN
from diffusers_repr.denoiser.family import Grid, PatchTransformerFamily

_OF_TEXT = ("to_k", "to_v", "add_k_proj", "add_v_proj")


class VideoFamily(PatchTransformerFamily):
    """Video tokens attend to each other in `attn1` and to the text in `attn2`; they lie frame by frame."""

    axes = 3
    conditioning = "text"
    attentions = {"blocks.*.attn1": PLAIN, "transformer_blocks.*.attn1": PLAIN}
    other_attentions = ("*.attn2",)
    not_image: tuple[str, ...] = (*PatchTransformerFamily.not_image, "rope", "norm_added_k")
    pipeline_arguments = {"guidance_scale": 1.0}

    def patch(self) -> tuple[int, int, int]:
        """Frames, height and width in x_0 of one token."""
        return 1, 1, 1

    def multiple(self) -> int:
        """The patch's height, which is its width."""
        return self.patch()[1]

    def grid(self, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """`(frames, h, w)` for the whole depth."""
        frames, h, w = (side // cell for side, cell in zip(size, self.patch(), strict=True))
        return ((frames, h, w), 0) if tokens == frames * h * w else None

    def is_image(self, path: str) -> bool:
        """Keys and values of cross-attention are the text's, though there may be as many."""
        *_, parent, name = ("", *path.split("."))
        return super().is_image(path) and not (parent == "attn2" and name in _OF_TEXT)
