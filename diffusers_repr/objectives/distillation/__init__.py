"""Students of denoisers: RepFusion, DreamTeacher, and what both share."""

from diffusers_repr.objectives.distillation.dreamteacher import DreamTeacherConfig, DreamTeacherObjective
from diffusers_repr.objectives.distillation.finetune import FinetuneStudentConfig, FinetuneStudentObjective
from diffusers_repr.objectives.distillation.interpreter import InterpreterConfig, InterpreterObjective
from diffusers_repr.objectives.distillation.repfusion import RepFusionConfig, RepFusionObjective
from diffusers_repr.objectives.distillation.student import Student, StudentConfig

__all__ = [
    "DreamTeacherConfig",
    "DreamTeacherObjective",
    "FinetuneStudentConfig",
    "FinetuneStudentObjective",
    "InterpreterConfig",
    "InterpreterObjective",
    "RepFusionConfig",
    "RepFusionObjective",
    "Student",
    "StudentConfig",
]
