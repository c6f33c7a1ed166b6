"""Votes and uncertainty of ensembles: closed forms, sorting and `torch.mode`."""

import math

import numpy as np
import pytest
import torch

from diffusers_repr.metrics import EnsembleSums, certain_rows, image_scores, jensen_shannon


def logits(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sums_of(members):
    sums = EnsembleSums(members.shape[2])
    for member in members:
        sums.add(member)
    return sums


def test_equal_members_agree():
    one = logits(2, 3, 4, 5)
    sums = sums_of(one.expand(7, -1, -1, -1, -1))
    assert float(sums.uncertainty().abs().max()) < 1e-6
    assert torch.equal(sums.labels(), one.argmax(1))
    torch.testing.assert_close(sums.probabilities(), one.softmax(1))


def test_two_members_that_exclude_each_other():
    sure = torch.tensor([[1000.0, 0.0, 0.0], [0.0, 1000.0, 0.0]])
    sums = sums_of(sure.view(2, 1, 3, 1, 1))
    assert float(sums.uncertainty()) == pytest.approx(math.log(2), abs=1e-6)
    assert int(sums.labels()) == 0  # one vote each: the smaller id
    assert float(jensen_shannon(sure.softmax(-1))) == pytest.approx(math.log(2), abs=1e-6)


def test_sums_are_those_of_all_members_at_once():
    members = 2 * logits(6, 2, 4, 8, 9)
    sums = sums_of(members)
    torch.testing.assert_close(sums.uncertainty(), jensen_shannon(members.softmax(2).movedim(2, -1)))
    votes = members.argmax(2).permute(1, 2, 3, 0)
    assert torch.equal(sums.labels(), votes.mode(-1).values)
    tied = (votes[..., None] == torch.arange(4)).sum(3).sort(-1).values
    assert bool((tied[..., -1] == tied[..., -2]).any())  # there are ties, and the smallest id has won
    entropy = torch.distributions.Categorical(logits=members.movedim(2, -1)).entropy().mean(0)
    mean = torch.distributions.Categorical(probs=members.softmax(2).mean(0).movedim(1, -1)).entropy()
    torch.testing.assert_close(sums.uncertainty(), mean - entropy)


@pytest.mark.parametrize("shape", [(16, 16), (5, 7), (2, 3)])
def test_the_score_of_an_image_is_of_its_most_uncertain_tenth(shape):
    uncertainty = logits(3, *shape).abs()
    for score, one in zip(image_scores(uncertainty), uncertainty, strict=True):
        ordered = sorted(one.flatten().tolist())
        assert float(score) == pytest.approx(float(np.mean(ordered[-max(1, len(ordered) // 10) :])))


@pytest.mark.parametrize("rows", [9, 310, 311, 400, 1000])
def test_the_paper_cuts_at_both_ends(rows):
    scores = logits(rows).abs()
    dropped, order = int(0.1 * rows), np.argsort(scores.numpy(), kind="stable")
    if dropped <= 30:
        with pytest.raises(ValueError, match="empty unless more than 30"):
            certain_rows(scores, 0.1, "paper")
    else:
        assert certain_rows(scores, 0.1, "paper") == order[30 : -dropped + 30].tolist()
        assert len(certain_rows(scores, 0.1, "paper")) == rows - dropped
    assert certain_rows(scores, 0.1) == order[: rows - dropped].tolist()


def test_what_cannot_be_cut():
    assert certain_rows([0.2, 0.1], drop=0.4) == [1, 0]
    with pytest.raises(ValueError, match="a number from 0 and below 1"):
        certain_rows([0.1], drop=1.0)
    with pytest.raises(ValueError, match="expected one of certain, paper"):
        certain_rows([0.1], cut="all")
    with pytest.raises(ValueError, match="not finite"):
        certain_rows([math.nan, 0.1])
