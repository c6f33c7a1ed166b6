"""A Gaussian mixture whose denoiser, in any form of prediction, and classifier are known exactly."""

import torch
from torch import nn

MEANS = torch.tensor([[1.5, 0.5], [-1.0, 1.0], [0.5, -1.5]], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
SPREADS = torch.tensor([0.4, 0.7, 0.5], dtype=torch.float64)  # standard deviation of each component
NULL = len(MEANS)


def log_joint(x, alpha, sigma):
    """`log p(x_t, c)` `(B, K)` for points `(B, 2)`, up to a constant."""
    variance = alpha**2 * SPREADS**2 + sigma**2
    distance = (x[:, None] - alpha * MEANS).square().sum(2)
    return SHARES.log() - distance / (2 * variance) - variance.log()


class Mixture(nn.Module):
    """Points `(B, 2, 1, 1)` with a label: a component, or the null label for the mixture.

    Args:
        level_of: From what the network is told to (alpha, sigma) and their derivatives.
        form: Of the prediction, as `NoiseSchedule.output`.
    """

    def __init__(self, level_of, form):
        super().__init__()
        self.level_of, self.form = level_of, form

    def forward(self, sample, timestep, class_labels, return_dict=True):
        alpha, sigma, alpha_dot, sigma_dot = self.level_of(timestep.reshape(-1)[0])
        x = sample[:, :, 0, 0]
        variance = alpha**2 * SPREADS**2 + sigma**2
        # The mean of x_0 given x_t, of each component; then of the mixture, or of the one chosen.
        means = MEANS + (alpha * SPREADS**2 / variance)[:, None] * (x[:, None] - alpha * MEANS)
        shares = log_joint(x, alpha, sigma).softmax(1)
        chosen = means[torch.arange(len(x)), class_labels.clamp(max=NULL - 1)]
        x0 = torch.where((class_labels == NULL)[:, None], (shares[..., None] * means).sum(1), chosen)
        eps = (x - alpha * x0) / sigma
        a, s = {
            "epsilon": (0.0, 1.0),
            "sample": (1.0, 0.0),
            "v_prediction": (-sigma, alpha),
            "velocity": (alpha_dot, sigma_dot),
        }[self.form]
        return ((a * x0 + s * eps)[:, :, None, None],)


class Classifier(nn.Module):
    """The exact `log p(c | x_t)` up to a constant."""

    def __init__(self, level_of):
        super().__init__()
        self.level_of = level_of

    def forward(self, x, timestep):
        alpha, sigma, _, _ = self.level_of(timestep.reshape(-1)[0])
        return log_joint(x[:, :, 0, 0], alpha, sigma)
