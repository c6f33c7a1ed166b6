"""Students of denoisers: RepFusion, DreamTeacher, and what both share."""

from diffusers_repr.objectives.distillation.repfusion import RepFusionConfig, RepFusionObjective
from diffusers_repr.objectives.distillation.student import Student, StudentConfig

__all__ = ["RepFusionConfig", "RepFusionObjective", "Student", "StudentConfig"]
