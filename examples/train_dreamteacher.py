"""Distil a denoiser's decoder into an ordinary backbone by DreamTeacher: its features at several scales.

    accelerate launch examples/train_dreamteacher.py --config examples/configs/dreamteacher_digits.yaml
    accelerate launch examples/train_dreamteacher.py --config my_recipe.yaml --timestep 250

The student is a ResNet, ConvNeXt or Swin of transformers, new (`student`) or trained (`student_name_or_path`), with a
stage of the stride of each teacher layer that is read; the folder is its own, which `AutoModel.from_pretrained` and
`Encoder.from_pretrained(folder)` load. No labels are used. With `interpreter`, a folder of train_interpreter.py,
its classes of pixels are learned too. With `eval_split` 5-shot and linear probes are measured beside the untrained
student, the teacher and raw pixels: `evaluation.jsonl`, the card. Tuning the student on labels: train_student.py. What
it is: docs/representations.md. The loop and its settings: docs/training.md.
"""

from distil import distil

from diffusers_repr.cli.guard import run_script
from diffusers_repr.objectives import DreamTeacherConfig, DreamTeacherObjective


def build(denoiser, student, settings, data) -> DreamTeacherObjective:
    return DreamTeacherObjective(denoiser, student, settings)


def main(argv: list[str]) -> None:
    distil(argv, __doc__.split("\n")[0], DreamTeacherConfig, build)


if __name__ == "__main__":
    run_script(main)
