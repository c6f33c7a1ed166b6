"""`RepFusionObjective`: a student regresses what a denoiser shows of an image at a level that a policy chooses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.config.recipe import setting
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.objectives.artifacts import Artifact
from diffusers_repr.objectives.base import Batch, Objective, weighted_sum
from diffusers_repr.objectives.distillation.distances import (
    attention_error,
    contrastive,
    relational_angle,
    relational_distance,
    resized,
)
from diffusers_repr.objectives.distillation.levels import (
    FixedLevel,
    LevelChoice,
    LevelSelector,
    PolicyLevel,
    PolicyNetwork,
    UniformLevel,
    mutual_information,
    policy_loss,
    spread_timesteps,
)
from diffusers_repr.objectives.distillation.student import Student
from diffusers_repr.objectives.distillation.teacher import DenoiserTeacher, middle_layer
from diffusers_repr.objectives.frozen_base import FrozenBaseConfig

_KEEP = 0.98  # a step, of what the policy has done of late
_NOTHING = 0.01  # nats between image and level that count as none


@dataclasses.dataclass(frozen=True)
class RepFusionConfig(FrozenBaseConfig):
    """The teacher, the level it is read at, and the distance; the fields are keys of a recipe.

    Raises:
        ValueError: If a number is out of range, or a setting is of another level or distance.
    """

    layers: list[str] | None = setting(None, "full module paths of the teacher; default: of a U-Net its middle")
    student_stages: list[int] | None = setting(None, "stage of the student for each of them; default: the last")
    level: Literal["policy", "uniform", "bounded", "fixed"] = setting("policy", "how the teacher's level is chosen")
    noise: Literal["match_t", "none"] = setting(
        "none", "match_t: noise of that level; none: the clean image, as coded"
    )
    timestep: float | None = setting(None, "of level: fixed")
    max_timestep: float | None = setting(None, "of level: uniform and bounded: below it is drawn; default: all")
    final_max_timestep: float | None = setting(None, "of level: bounded: what max_timestep falls to")
    bound_steps: int = setting(0, "of level: bounded: optimizer steps in which it falls")
    policy_levels: int = setting(20, "of level: policy: timesteps to choose among, in equal steps")
    policy_timesteps: list[float] | None = setting(None, "of level: policy: these timesteps instead")
    policy_baseline: Literal["batch_mean", "none"] = setting(
        "batch_mean", "what is taken off the reward; none: as coded"
    )
    entropy_weight: float = setting(0.1, "of level: policy: bonus for the policy's entropy at first")
    entropy_steps: int = setting(0, "of level: policy: optimizer steps in which the bonus falls to 0; 0: it stays")
    distance: Literal["hint", "attention", "relational", "contrastive"] = setting(
        "hint", "between teacher and student"
    )
    dense: bool = setting(False, "of distance: hint: compare every place, not the means over places")
    feature_weight: float | None = setting(None, "of the distance; default: 1, of attention 1000")
    relational_distance_weight: float = setting(25.0, "of distance: relational: of pairwise distances")
    relational_angle_weight: float = setting(50.0, "of distance: relational: of angles")
    contrastive_temperature: float = setting(0.1, "of distance: contrastive")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.timestep is not None) != (self.level == "fixed"):
            raise ValueError("`timestep` goes with `level: fixed`, and with no other.")
        falls = self.final_max_timestep is not None and self.bound_steps > 0
        if falls != (self.level == "bounded") or (self.bound_steps > 0) != falls:
            raise ValueError("`final_max_timestep` and `bound_steps` go with `level: bounded`, and with no other.")
        if self.max_timestep is not None and self.level not in ("uniform", "bounded"):
            raise ValueError("`max_timestep` goes with `level: uniform` or `bounded`.")
        if self.dense and self.distance != "hint":
            raise ValueError(f"`dense` goes with `distance: hint`; got {self.distance!r}.")
        if self.policy_levels < 2:
            raise ValueError(f"A policy chooses among 2 or more levels; got policy_levels={self.policy_levels}.")
        if self.entropy_weight < 0 or self.entropy_steps < 0 or not self.contrastive_temperature > 0:
            raise ValueError(
                "`entropy_weight` and `entropy_steps` are 0 or more, `contrastive_temperature` is positive; got "
                f"{self.entropy_weight}, {self.entropy_steps} and {self.contrastive_temperature}."
            )

    @property
    def weight(self) -> float:
        """Of the distance."""
        if self.feature_weight is not None:
            return self.feature_weight
        return 1000.0 if self.distance == "attention" else 1.0

    def selector(self, denoiser: Denoiser) -> LevelSelector:
        """What chooses levels of this denoiser.

        Raises:
            ValueError: For levels that its noise process does not have.
        """
        schedule = denoiser.schedule
        if self.timestep is not None:
            return FixedLevel(schedule, self.timestep)
        if self.level in ("uniform", "bounded"):
            return UniformLevel(schedule, self.max_timestep, self.final_max_timestep, self.bound_steps)
        timesteps = self.policy_timesteps or spread_timesteps(schedule, self.policy_levels)
        return PolicyLevel(schedule, PolicyNetwork(denoiser.image_channels, len(timesteps)), timesteps)


class RepFusionObjective(Objective):
    """RepFusion (arXiv 2308.10916), stage 1: `mean_l distance(P_l(student_l), teacher_l(x, t)) + policy`.

    The teacher is a frozen denoiser that is stopped at its last layer read. Of `level: policy` a small network draws
    t for each image; its reward is minus the cross-entropy of a head on the teacher's pooled features, by REINFORCE,
    and labels are needed for it. `FinetuneStudentObjective` is stage 2.

    Logs `feature`, the distance; with a policy `task` (the head's cross-entropy), `policy`, `entropy`, `reward`, and
    `mutual_information` between image and level in nats; `timestep`, the mean.

    Args:
        denoiser: The teacher.
        student: The backbone.
        config: Settings.
        num_classes: Of the labels, which a policy needs.

    Raises:
        ValueError: For layers, stages and levels that do not exist, and a policy without classes.

    Attributes:
        student: The backbone, as a submodule.
        selector: What chooses levels.
    """

    discarded = ("projectors", "selector", "task_head")
    seen: Tensor
    information: Tensor

    def __init__(self, denoiser: Denoiser, student: Student, config: RepFusionConfig, num_classes: int = 0) -> None:
        super().__init__()
        layers = config.layers or [middle_layer(denoiser)]
        wanted = config.student_stages or [-1] * len(layers)
        count = len(student.stages)
        if len(wanted) != len(layers) or not all(-count <= at < count for at in wanted):
            raise ValueError(
                f"`student_stages` names a stage of the student, {-count} to {count - 1}, for each of the "
                f"{len(layers)} teacher layers; got {wanted}."
            )
        self.config, self.backbone = config, student
        self.freeze_base(denoiser)
        self.teacher = DenoiserTeacher(denoiser, layers, config.noise)
        stages = [student.stages[at] for at in wanted]
        student.use(stages)
        self.student = student.module
        self.projectors = nn.ModuleList(
            nn.Conv2d(stage.channels, layer.channels, 1)
            for stage, layer in zip(stages, self.teacher.layers, strict=True)
        )
        self.selector = config.selector(denoiser)
        self.entropy_weight = config.entropy_weight
        self.num_classes = num_classes
        if isinstance(self.selector, PolicyLevel):
            if num_classes < 2:
                raise ValueError(
                    "A policy is rewarded for levels at which classes are told apart, so it needs labels of two or "
                    "more classes. Without labels: `level: uniform`, `bounded` or `fixed`."
                )
            width = sum(layer.channels for layer in self.teacher.layers)
            self.task_head = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes)
            )
            self.register_buffer("seen", torch.zeros(len(self.selector.timesteps)))
            self.register_buffer("information", torch.zeros(2))  # its sum and how many steps are in it, both fading

    @property
    def card(self) -> dict[str, Any]:  # type: ignore[override]
        """What the card says, with what the policy came to."""
        text = f"A student of `{type(self.teacher.denoiser.model).__name__}` by RepFusion (arXiv 2308.10916): "
        text += '`Encoder.from_pretrained("{folder}")` of diffusers-repr gives its features.'
        base = self.config.public_base
        return {
            "kind": f"`{type(self.backbone.module).__name__}`", "library_name": "transformers",
            "pipeline_tag": "image-feature-extraction", "tags": ["vision", "distillation", "repfusion"],
            "text": f"{text} {self.advice() or ''}".strip(), **({"base_model": base} if base else {}),
        }  # fmt: skip

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss; `time` (B,), in timesteps, and `noise` of a batch are taken, not drawn."""
        pixels, generator = batch["pixel_values"].float(), batch.get("generator")
        choice = self.selector.choose(pixels, generator, batch.get("time"))
        targets = self.teacher.read(pixels, choice.level, generator, batch.get("noise"))
        maps = [project(value) for project, value in zip(self.projectors, self.backbone.maps(pixels), strict=True)]
        distances = [self.distance(ours, theirs) for ours, theirs in zip(maps, targets, strict=True)]
        terms = {"feature": torch.stack(distances).mean()}
        logged = {"timestep": torch.as_tensor(choice.level.timestep, device=pixels.device).float().mean()}
        if choice.log_probabilities is not None:
            rewarded, more = self.policy_terms(choice, targets, batch["class_labels"])
            terms, logged = {**terms, **rewarded}, {**logged, **more}
        out = weighted_sum(terms, {"feature": self.config.weight, "entropy": -self.entropy_weight})
        return {**out, **logged}

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of one pair of layers, unweighted.

        Args:
            student: `(B, C, h, w)`, projected to the teacher's channels.
            teacher: `(B, C, h', w')`.
        """
        config, teacher = self.config, teacher.float()
        if config.distance == "attention":
            return attention_error(student, teacher)
        if config.dense:
            return F.mse_loss(resized(student.float(), teacher), teacher)
        ours, theirs = student.float().mean((2, 3)), teacher.mean((2, 3))
        if config.distance == "hint":
            return F.mse_loss(ours, theirs)
        if config.distance == "contrastive":
            return contrastive(ours, theirs, config.contrastive_temperature)
        pairs = config.relational_distance_weight * relational_distance(ours, theirs)
        return pairs + config.relational_angle_weight * relational_angle(ours, theirs)

    def policy_terms(
        self, choice: LevelChoice, targets: list[Tensor], labels: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What trains head and policy, and what is logged of them.

        Args:
            choice: Of the policy.
            targets: The teacher's maps.
            labels: Class ids `(B,)`.
        """
        assert choice.log_probabilities is not None
        pooled = torch.cat([value.float().mean((2, 3)) for value in targets], dim=1)
        errors = F.cross_entropy(self.task_head(pooled).float(), labels, reduction="none")
        reward = -errors.detach()
        terms = {
            "task": errors.mean(),
            "policy": policy_loss(choice.log_probability, reward, self.config.policy_baseline == "batch_mean"),
            "entropy": choice.entropy.mean(),
        }
        information = mutual_information(choice.log_probabilities.detach()).float()
        if self.training:
            with torch.no_grad():
                mean = choice.log_probabilities.exp().mean(0)
                self.seen.mul_(_KEEP).add_(mean, alpha=1 - _KEEP)
                self.information.mul_(_KEEP).add_(torch.stack([information, torch.ones_like(information)]))
        return terms, {"reward": reward.mean(), "mutual_information": information}

    def reading_level(self) -> NoiseLevel:
        """One level at which the teacher stands beside its student: the fixed one, or what the policy takes most.

        Of random levels, the middle of their range.
        """
        selector, schedule = self.selector, self.teacher.denoiser.schedule
        if isinstance(selector, FixedLevel):
            return selector.level
        if isinstance(selector, UniformLevel):
            middle = (schedule.timestep_range[0] + selector.bound) / 2
            return schedule.resolve(math.floor(middle) if schedule.kind == "vp" else middle)
        found = self._policy()
        assert isinstance(selector, PolicyLevel)
        timesteps = selector.timesteps.tolist()
        return schedule.resolve(timesteps[len(timesteps) // 2] if found is None else found[1])

    def on_step_end(self, step: int, ema: Any) -> None:
        """Lower the entropy's weight, to exactly 0 from `entropy_steps` on, and the selector's bound."""
        if self.config.entropy_steps:
            self.entropy_weight = self.config.entropy_weight * max(0.0, 1 - step / self.config.entropy_steps)
        self.selector.on_step_end(step)

    # What the policy came to

    def metrics(self) -> dict[str, float]:
        """`mutual_information` between image and level of late, in nats, and the share of the level taken most."""
        found = self._policy()
        return {} if found is None else {"mutual_information": found[0], "level_share": found[2]}

    def advice(self) -> str | None:
        """What to do where the policy tells no image from another; None without a policy, before its first step."""
        found = self._policy()
        if found is None:
            return None
        information, timestep, share = found
        told = f"Mutual information between image and level: {information:.3f} nats."
        if information >= _NOTHING:
            return told
        if share < 0.5:
            return f"{told} The policy draws levels alike for every image; `level: uniform` does that without labels."
        return (
            f"{told} The policy takes timestep {timestep:g} for nearly every image ({share:.0%}); `level: fixed` with "
            f"`timestep: {timestep:g}` would do, without policy and labels."
        )

    def _policy(self) -> tuple[float, float, float] | None:
        """Mutual information, timestep taken most, and its share, of late."""
        if not isinstance(self.selector, PolicyLevel) or not float(self.information[1]):
            return None
        total, count = self.information.tolist()
        shares = (self.seen / self.seen.sum()).tolist()
        best = max(range(len(shares)), key=shares.__getitem__)
        return total / count, float(self.selector.timesteps[best]), shares[best]

    # The contract

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """A policy needs labels of the classes there are.

        Raises:
            ValueError: If they are not there.
        """
        if not isinstance(self.selector, PolicyLevel):
            return
        labels = batch.get("class_labels")
        if labels is None:
            raise ValueError("A policy needs class labels; name a column of them by --label_column, or another level.")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"Labels run from {low} to {high}; class ids run from 0 to {self.num_classes - 1}.")

    def identity(self) -> dict[str, Any]:
        """With the teacher's layers and the student's stages."""
        return {"layers": [layer.path for layer in self.teacher.layers], **self.backbone.describe()}

    def artifacts(self) -> list[Artifact]:
        """The student, with its preprocessing."""
        return self.backbone.artifacts("student")


__all__ = ["RepFusionConfig", "RepFusionObjective"]
