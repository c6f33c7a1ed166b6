"""Distil a denoiser into an ordinary backbone by RepFusion: its middle features, at levels that a policy chooses.

    accelerate launch examples/train_repfusion.py --config examples/configs/repfusion_digits.yaml
    accelerate launch examples/train_repfusion.py --config my_recipe.yaml --level fixed --timestep 100

The student is a ResNet, ConvNeXt or Swin of transformers, new (`student`) or trained (`student_name_or_path`); the
folder is its own, which `AutoModel.from_pretrained(folder)` and `Encoder.from_pretrained(folder)` load. A policy needs
labels, the other levels do not. The teacher's forward ends at its last layer read. With `eval_split` 5-shot and linear
probes are measured beside the untrained student, the teacher and raw pixels: `evaluation.jsonl`, the card. At its end
the run tells how much the policy's levels depend on the image, and whether one level would do. Stage 2, tuning on
labels: train_student.py. What it is: docs/representations.md. The loop and its settings: docs/training.md.
"""

from distil import distil

from diffusers_repr.cli.guard import run_script
from diffusers_repr.objectives import RepFusionConfig, RepFusionObjective


def build(denoiser, student, settings, data) -> RepFusionObjective:
    return RepFusionObjective(denoiser, student, settings, len(data.class_names or ()))


def main(argv: list[str]) -> None:
    objective = distil(argv, __doc__.split("\n")[0], RepFusionConfig, build)
    if advice := objective.advice():
        print(advice)


if __name__ == "__main__":
    run_script(main)
