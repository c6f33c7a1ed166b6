"""The committed classifier of the digits: what its folder tells, and its gradient against the exact posterior."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_repr import Denoiser
from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.transforms import augment
from diffusers_repr.models import NoisyClassifier
from diffusers_repr.noise import add_noise
from diffusers_repr.objectives import ClassifierBase, ClassifierConfig, ClassifierObjective
from diffusers_repr.tasks import ClassifierAccuracy
from diffusers_repr.training import TrainingConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS_RECIPE = EXAMPLES / "configs" / "classifier_digits.yaml"
DIGITS_MODEL = EXAMPLES / "models" / "digits-ddpm"
DIGITS_CLASSIFIER = EXAMPLES / "models" / "digits-classifier"


def digits(split: str):
    return load_train_data(DataConfig(dataset_name="digits", dataset_split=split, cache_images=True), 1, 8)


def test_the_model_of_the_digits():
    model, base = NoisyClassifier.from_pretrained(DIGITS_CLASSIFIER), Denoiser.from_pretrained(DIGITS_MODEL)
    model.check_base(base.schedule, 1)
    flags = ["--config", str(DIGITS_RECIPE), "--pretrained_model_name_or_path", str(DIGITS_MODEL)]
    config, _, settings = parse_recipe((TrainingConfig, DataConfig, ClassifierConfig), flags)
    objective = ClassifierObjective(
        ClassifierBase.load(str(DIGITS_MODEL)), model.labels, settings.model, noise_bins=settings.noise_bins
    )
    measure = ClassifierAccuracy(objective, digits("test"), config.train_batch_size, config.seed)
    scores = measure(model, config.max_train_steps)
    told = json.loads((DIGITS_CLASSIFIER / "evaluation.json").read_text())
    scores = [scores[f"eval_accuracy_{part}"] for part in range(5)]
    assert scores == pytest.approx(told["accuracy_by_bin"], abs=0.01)
    assert told["accuracy_by_bin"][0] > 0.97


@pytest.mark.parametrize("timestep", [700, 850])
def test_its_gradient_is_near_that_of_the_exact_classifier(timestep):
    """The posterior of a mixture with a centre at each training image, augmented: p(c | x_t) in closed form."""
    schedule, model = (
        Denoiser.from_pretrained(DIGITS_MODEL).schedule,
        NoisyClassifier.from_pretrained(DIGITS_CLASSIFIER),
    )
    train, held_out = (next(iter(DataLoader(digits(split), batch_size=1000))) for split in ("train", "validation"))
    train, train_labels, held_out = train["pixel_values"], train["class_labels"], held_out["pixel_values"]
    torch.manual_seed(0)
    copies = [augment(train / 127.5 - 1, False, 10.0, 0.0875, 0.1) for _ in range(4)]
    centres, centre_labels = torch.cat(copies).flatten(1), train_labels.repeat(4)
    level = schedule.resolve(timestep)
    x_t = add_noise(held_out / 127.5 - 1, level, torch.randn(len(held_out), 1, 8, 8)).requires_grad_()
    wanted = torch.randint(10, (len(x_t), 1))

    def exact(x):
        log_p = -torch.cdist(x.flatten(1), level.alpha * centres).square() / (2 * level.sigma**2)
        return torch.stack([log_p[:, centre_labels == label].logsumexp(1) for label in range(10)], dim=1)

    gradients = [
        torch.autograd.grad(logits.log_softmax(1).gather(1, wanted).sum(), x_t)[0].flatten(1)
        for logits in (model(x_t, timestep), exact(x_t))
    ]
    assert torch.cosine_similarity(*gradients).mean() > 0.85
    ours, best = (gradient.norm(dim=1).mean() for gradient in gradients)
    assert ours == pytest.approx(best.item(), rel=0.2)
