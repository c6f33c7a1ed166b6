"""Evaluation of any (base, layers, level, source, head, task, data) by a recipe: numbers, pictures, card, table."""

from diffusers_repr.tasks.evaluation.recipe import EvaluationRecipe, read_evaluation
from diffusers_repr.tasks.evaluation.registry import list_tasks, register_task, task_kind, unregister_task
from diffusers_repr.tasks.evaluation.report import write_table
from diffusers_repr.tasks.evaluation.run import evaluate_recipe
from diffusers_repr.tasks.evaluation.sources import list_sources, register_source, unregister_source

__all__ = [
    "EvaluationRecipe",
    "evaluate_recipe",
    "list_sources",
    "list_tasks",
    "read_evaluation",
    "register_source",
    "register_task",
    "task_kind",
    "unregister_source",
    "unregister_task",
    "write_table",
]
