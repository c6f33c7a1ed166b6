"""`SelectedStep`: the step of a training is chosen by held-out training images; only then comes the test set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from diffusers_repr.data import TrainData
from diffusers_repr.hub.files import atomic_folder, read_json, write_json
from diffusers_repr.objectives import FinetuneStudentObjective
from diffusers_repr.objectives.artifacts import FixedArtifact
from diffusers_repr.tasks.held_out_students import TunedAccuracy

SELECTED, RECORD = "selected", "selection.json"


class SelectedStep:
    """Accuracy on held-out images at each measured step; that of the best is kept, and at the end tested.

    The published code of MA-ZSC (arXiv 2302.03298) takes the epoch that is best on the test set, and measures with
    batch norms in training mode; both make accuracies larger than they are.

    Args:
        objective: That trains the classifier.
        held_out: By which the step is chosen; of the earliest of equal ones.
        folder: Of the run: `selected/` in it is the classifier of that step.
        batch_size: Images of a forward.
        last_step: Of the run, when `test` is measured.
        test: Real images, on which the chosen classifier alone is measured; None: no test.
    """

    def __init__(
        self,
        objective: FinetuneStudentObjective,
        held_out: TrainData,
        folder: str | Path,
        batch_size: int,
        last_step: int,
        test: TrainData | None = None,
    ) -> None:
        self.objective, self.folder, self.last_step = objective, Path(folder), last_step
        self.held_out = TunedAccuracy(objective, held_out, batch_size)
        self.test = None if test is None else TunedAccuracy(objective, test, batch_size)

    def __call__(self, classifier: nn.Module, step: int) -> dict[str, float]:
        """`held_out_loss` and `held_out_accuracy`; at the last step also `selected_step` and what the test gave."""
        loss, accuracy = self.held_out.measured(classifier)
        found = {"held_out_loss": loss, "held_out_accuracy": accuracy}
        best = self._best()
        if best is None or accuracy > best["held_out_accuracy"] or step == best["step"]:
            self._keep(classifier)
            write_json(self.folder / RECORD, {"step": step, "held_out_accuracy": accuracy})
        if step == self.last_step:
            found |= self._tested(classifier)
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return found

    def _best(self) -> dict[str, Any] | None:
        """The record of an earlier measurement, of this run or of one that it goes on from."""
        path = self.folder / RECORD
        return read_json(path) if path.is_file() and (self.folder / SELECTED).is_dir() else None

    def _keep(self, classifier: Any) -> None:
        with atomic_folder(self.folder / SELECTED) as fresh:
            classifier.save_pretrained(fresh)
            for artifact in self.objective.artifacts():
                if isinstance(artifact, FixedArtifact):
                    artifact.thing.save_pretrained(fresh)

    def _tested(self, classifier: nn.Module) -> dict[str, float]:
        best = self._best()
        assert best is not None
        found = {"selected_step": float(best["step"])}
        if self.test is not None:
            device = next(classifier.parameters()).device
            kind: Any = type(classifier)
            chosen = kind.from_pretrained(self.folder / SELECTED).eval().to(device)
            found["test_loss"], found["test_accuracy"] = self.test.measured(chosen)
        return found


__all__ = ["RECORD", "SELECTED", "SelectedStep"]
