"""The committed classifier of the digits: what its folder tells, and its gradient against the exact posterior."""

import json
from pathlib import Path

import pytest
import torch
from classifier_args import parse_args
from classifier_base import Base, load_images
from image_batches import augment
from torch.utils.data import DataLoader
from train_classifier import evaluate

from diffusers_repr import Denoiser
from diffusers_repr.models import NoisyClassifier
from diffusers_repr.noise import add_noise

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS_RECIPE = EXAMPLES / "configs" / "classifier_digits.yaml"
DIGITS_MODEL = EXAMPLES / "models" / "digits-ddpm"
DIGITS_CLASSIFIER = EXAMPLES / "models" / "digits-classifier"


def test_the_model_of_the_digits():
    model, base = NoisyClassifier.from_pretrained(DIGITS_CLASSIFIER), Denoiser.from_pretrained(DIGITS_MODEL)
    model.check_base(base.schedule, 1)
    args = parse_args(["--config", str(DIGITS_RECIPE), "--pretrained_model_name_or_path", str(DIGITS_MODEL)])
    base = Base.load(args)
    scores = evaluate(model, base, load_images(args, "test", base), args)
    told = json.loads((DIGITS_CLASSIFIER / "evaluation.json").read_text())
    assert scores["accuracy_by_bin"] == pytest.approx(told["accuracy_by_bin"], abs=0.01)
    assert told["accuracy_by_bin"][0] > 0.97


@pytest.mark.parametrize("timestep", [700, 850])
def test_its_gradient_is_near_that_of_the_exact_classifier(timestep):
    """The posterior of a mixture with a centre at each training image, augmented: p(c | x_t) in closed form."""
    args = parse_args(["--config", str(DIGITS_RECIPE), "--pretrained_model_name_or_path", str(DIGITS_MODEL)])
    base, model = Base.load(args), NoisyClassifier.from_pretrained(DIGITS_CLASSIFIER)
    (train, train_labels), (held_out, _) = (
        next(iter(DataLoader(load_images(args, split, base), batch_size=1000))) for split in ("train", "validation")
    )
    torch.manual_seed(0)
    copies = [augment(train / 127.5 - 1, False, 10.0, 0.0875, 0.1) for _ in range(4)]
    centres, centre_labels = torch.cat(copies).flatten(1), train_labels.repeat(4)
    level = base.schedule.resolve(timestep)
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
