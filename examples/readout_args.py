"""What a readout head reads and from which base: keys of a recipe, flags of `train_readout.py`."""

import dataclasses
import inspect
from typing import Literal

from diffusers_repr.config.recipe import check_keys, mapping, setting
from diffusers_repr.heads import DepthHead, MapHead, ReadoutHead

HEADS: dict[str, type[MapHead]] = {
    "spatial": ReadoutHead,
    "depth": DepthHead,
    "appearance": ReadoutHead,
    "correspondence": ReadoutHead,
}
# Arguments of a head that base and data decide.
GIVEN = ("layers", "channels", "kind", "target", "level_range", "label_range", "timestep_range", "base_model",
         "base_class", "base_config", "base_fingerprint", "noise_kind", "noise_fingerprint")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ReadoutConfig:
    """The frozen base, the head and its levels."""

    pretrained_model_name_or_path: str | None = setting(None, "pipeline folder or Hub id of the frozen base")
    revision: str | None = setting(None, "branch, tag or commit of the base on the Hub")
    base_dtype: Literal["float32", "float16", "bfloat16"] = setting("float32", "of the frozen base")
    class_label: int | None = setting(None, "null class of a base whose config tells none")
    kind: Literal["spatial", "depth", "appearance", "correspondence"] = setting("spatial", "what is read")
    target: str = setting("edges", "edges (computed from the images), or what --label_column shows")
    head: dict | str | None = setting(
        None, "widths: arguments of ReadoutHead or DepthHead, a mapping (JSON in a flag)"
    )
    layers: list[str] | None = setting(None, "full module paths; default: the paper's")
    weak_layers: list[str] | None = setting(None, "of the weak depth head, which is trained beside it")
    label_range: list[float] | None = setting(None, "black and white of the label column, as numbers; default: -1 1")
    level_range: list[float] | None = setting(None, "timesteps to train at; default: all, of depth the lower 80 %%")
    eval_split: str | None = setting(None, "split to measure spatial and depth heads on; none: no measurement")

    def __post_init__(self) -> None:
        if self.pretrained_model_name_or_path is None:
            raise ValueError("No base; pass --pretrained_model_name_or_path, a pipeline folder or a Hub id.")
        arguments = mapping("head", self.head)
        allowed = [name for name in inspect.signature(HEADS[self.kind].__init__).parameters if name not in GIVEN]
        check_keys("`head`", arguments, allowed)
        object.__setattr__(self, "head", arguments)
        if self.label_range is None:
            object.__setattr__(self, "label_range", [-1.0, 1.0])
        for name in ("label_range", "level_range"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or not value[0] < value[1]):
                raise ValueError(f"`{name}` must be low and high with low < high, got {value}.")
        if self.weak_layers is not None and self.kind != "depth":
            raise ValueError(f"`weak_layers` is for kind: depth, got kind: {self.kind}.")
        if self.eval_split is not None and not self.reads_labels:
            raise ValueError(f"`eval_split` compares with labels, and kind: {self.kind} has none; drop it.")

    @property
    def reads_labels(self) -> bool:
        """Whether the head reads a map that an image can be labelled with."""
        return self.kind in ("spatial", "depth")
