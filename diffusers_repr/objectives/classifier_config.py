"""`ClassifierConfig`: the settings of a noisy classifier's training; the fields are keys of a recipe."""

from __future__ import annotations

import dataclasses
import inspect

from diffusers_repr.config.measured import take_back
from diffusers_repr.config.recipe import check_keys, json_mapping, setting
from diffusers_repr.models import NoisyClassifier

# Arguments of NoisyClassifier that base and data decide.
GIVEN = ("in_channels", "num_classes", "sample_size", "num_train_timesteps", "noise_schedule", "base_model",
         "latent_scale", "id2label")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """The network, the pipeline whose noise it reads, and how it is measured.

    Raises:
        ValueError: If there is no pipeline, or an argument of the network is unknown or not free.
    """

    pretrained_model_name_or_path: str | None = setting(None, "pipeline folder or Hub id: its noise process, its VAE")
    revision: str | None = setting(None, "branch, tag or commit of the pipeline on the Hub")
    model: dict | str | None = setting(None, "arguments of NoisyClassifier, a mapping (JSON in a flag)")
    eval_split: str | None = setting(None, "split to measure on; default, or none: no measurement")
    noise_bins: int = setting(5, "equal parts of the range of noise levels that log and evaluation tell apart")

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise ValueError("`pretrained_model_name_or_path` is missing: the pipeline that is to be guided.")
        arguments = json_mapping("model", self.model)
        if taken := [name for name in GIVEN if name in arguments]:
            raise ValueError(f"`model` sets {taken}, which the pipeline and the data set decide; leave them out.")
        known = inspect.signature(NoisyClassifier.__init__).parameters
        check_keys("`model`", arguments, [name for name in known if name not in GIVEN])
        if self.noise_bins < 1:
            raise ValueError(f"`noise_bins` must be 1 or more, got {self.noise_bins}.")
        object.__setattr__(self, "model", arguments)
        take_back(self, "eval_split")
