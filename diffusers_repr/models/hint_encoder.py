"""`HintEncoder`: the scribbled classes of pixels as the hint of a ControlNet, and the learned hint for none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.outputs import SampleOutput, packed


class HintEncoder(ReprModelMixin, ModelMixin, ConfigMixin):
    """Class ids of pixels to what a ControlNet is given as its image, in [0, 1]: a channel a class, or colours.

    One channel a class, and a last one for pixels of no class; or with `colours` red, green and blue. The null hint
    stands for no hint at all, in the samples whose hint is dropped in training and in the null branch of hint
    guidance; it is one learned value a channel, so that it fits images of every size.

    Args:
        class_names: Name of each class.
        colours: `(red, green, blue)` of each class, 0 to 255; None: a channel a class.
        ignored_colour: Of pixels of no class, with `colours`.
        ignore_index: Id of pixels of no class.

    Raises:
        ValueError: Without classes, for another number of colours, and a colour that stands twice.

    Example:
        >>> encoder = HintEncoder(["ground", "coin"])
        >>> encoder(torch.tensor([[[0, 1, 255]]]))[0, :, 0].T.tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    _no_split_modules: list[str] = []

    table: Tensor

    @register_to_config
    def __init__(
        self,
        class_names: Sequence[str],
        colours: Sequence[Sequence[int]] | None = None,
        ignored_colour: Sequence[int] = (128, 128, 128),
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        count = len(class_names)
        if not count or len(set(class_names)) < count:
            raise ValueError(f"A hint has classes of different names; got {list(class_names)}.")
        if 0 <= ignore_index < count:
            raise ValueError(f"ignore_index={ignore_index} is the class {class_names[ignore_index]!r}.")
        if colours is None:
            table = torch.eye(count + 1)
        else:
            known = [tuple(one) for one in (*colours, ignored_colour)]
            if len(colours) != count:
                raise ValueError(f"{count} classes and {len(colours)} colours; give one a class.")
            if len(set(known)) < len(known) or any(
                len(one) != 3 or not all(0 <= value <= 255 for value in one) for one in known
            ):
                raise ValueError(
                    "Colours are red, green and blue from 0 to 255, another for each class and for pixels of none; "
                    f"got {known}."
                )
            table = torch.tensor(known, dtype=torch.float32) / 255
        self.register_buffer("table", table, persistent=False)
        self.null = nn.Parameter(torch.full((table.shape[1],), 0.5))

    @property
    def channels(self) -> int:
        """Of a hint."""
        return self.table.shape[1]

    def forward(
        self, masks: Tensor, drop_mask: Tensor | None = None, return_dict: bool | None = None
    ) -> Tensor | SampleOutput | tuple[Tensor]:
        """Hints `(B, C, H, W)`, those of dropped samples the null one.

        Args:
            masks: `(B, H, W)` whole class ids.
            drop_mask: `(B,)`, boolean; None: no sample.
            return_dict: None for the tensor itself, True for an output with `sample`, False for a tuple.

        Raises:
            ValueError: For another shape, or ids that are no classes.
        """
        self.check(masks)
        count, ignored = len(self.config["class_names"]), self.config["ignore_index"]
        hints = self.table[torch.where(masks == ignored, count, masks.long())].movedim(-1, 1)
        if drop_mask is None:
            drop_mask = torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
        # Always a choice, so that the null has a gradient in every step, as DDP wants.
        chosen = torch.where(drop_mask.view(-1, 1, 1, 1), self.null.view(1, -1, 1, 1), hints)
        return packed(chosen, SampleOutput, return_dict)

    def check(self, masks: Tensor) -> None:
        """Refuse what are no masks of these classes.

        Raises:
            ValueError: See `forward`.
        """
        if masks.ndim != 3 or masks.is_floating_point():
            raise ValueError(f"Masks are (B, H, W) whole numbers; got {tuple(masks.shape)}, {masks.dtype}.")
        count, ignored = len(self.config["class_names"]), self.config["ignore_index"]
        wrong = masks[((masks < 0) | (masks >= count)) & (masks != ignored)]
        if wrong.numel():
            raise ValueError(
                f"A mask has the class {int(wrong[0])}; classes are 0 to {count - 1}, and {ignored} where there is "
                "none."
            )


__all__ = ["HintEncoder"]
