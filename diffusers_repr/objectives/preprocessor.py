"""`Preprocessor`: what an encoder does with images before its first layer, as a file of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers_repr.hub.files import write_json


class Preprocessor:
    """The file in which transformers keeps an encoder's preprocessing."""

    def __init__(self, **own: Any) -> None:
        self.own = own

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json`."""
        fixed = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 3, "do_rescale": True,
                 "rescale_factor": 1 / 255, "do_normalize": True}  # fmt: skip
        write_json(Path(folder) / "preprocessor_config.json", {**fixed, **self.own})


__all__ = ["Preprocessor"]
