"""CLIP's loss against a loop in float64, its tokenizer, and the contract of its objective."""

import math

import numpy as np
import pytest
import torch

from diffusers_repr.objectives import ContrastiveConfig, ContrastiveObjective
from diffusers_repr.objectives.contrastive import caption_tokenizer, clip_loss, clip_model
from diffusers_repr.tasks.retrieval import retrieval
from diffusers_repr.testing import check_objective

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TEXT, "image_size": 8, "patch_size": 4}
CAPTIONS = ["a red two", "two blue rings", "a red two", "a green one and a red two"]


def objective() -> ContrastiveObjective:
    torch.manual_seed(0)
    tokenizer = caption_tokenizer(CAPTIONS, 400, 12)
    model = clip_model(ContrastiveConfig(TEXT, VISION, embedding_dim=8), tokenizer)
    return ContrastiveObjective(model, tokenizer, [0.5] * 3, [0.5] * 3)


def batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1, "caption": CAPTIONS}


def by_hand(images, texts, scale, same) -> float:
    """Mean over pairs and both ways of -log softmax, equal captions left out."""
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts))
    total, count = 0.0, len(x)
    for one, other in ((x, y), (y, x)):
        for i in range(count):
            terms = [math.exp(scale * one[i] @ other[j]) for j in range(count) if j == i or not same(i, j)]
            total -= math.log(math.exp(scale * one[i] @ other[i]) / sum(terms))
    return total / (2 * count)


def test_the_loss_equals_a_float64_loop():
    images, texts = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    captions = torch.tensor([[1, 2], [3, 4], [1, 2], [1, 4], [3, 4]])
    rows = [part.double().numpy() for part in (images, texts)]
    plain = by_hand(*rows, 3.0, lambda i, j: False)
    assert float(clip_loss(images, texts, 3.0)) == pytest.approx(plain, rel=1e-5)
    apart = by_hand(*rows, 3.0, lambda i, j: captions[i].equal(captions[j]))
    assert float(clip_loss(images, texts, 3.0, captions)) == pytest.approx(apart, rel=1e-5)
    assert apart < plain
    with torch.autocast("cpu", torch.bfloat16):
        assert float(clip_loss(5 * images, texts, torch.tensor(3.0), captions)) == pytest.approx(apart, rel=1e-5)


def test_one_process_of_a_group_gives_the_same(process_group):
    images, texts = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    captions = torch.tensor([[1], [2], [1], [3]])
    expected = by_hand(images.double().numpy(), texts.double().numpy(), 2.0, lambda i, j: {i, j} == {0, 2})
    assert float(clip_loss(images, texts, 2.0, captions)) == pytest.approx(expected, rel=1e-5)


def test_the_contract_and_what_clip_itself_gives():
    made = objective()
    check_objective(made, batch())
    made.model.logit_scale.data.fill_(9.0)
    out = made.eval()(batch())
    assert float(out["scale"]) == pytest.approx(100)
    ids = made.token_ids(CAPTIONS)
    whole = made.model(input_ids=ids, pixel_values=batch()["pixel_values"])  # mean and std of 0.5 undo [-1, 1]
    cosines = whole.text_embeds @ whole.image_embeds.T
    for rows, embedded in ((made.embed_texts(made.model, ids), whole.text_embeds),
                           (made.embed_images(made.model, batch()["pixel_values"]), whole.image_embeds)):  # fmt: skip
        torch.testing.assert_close(rows / rows.norm(dim=-1, keepdim=True), embedded, atol=1e-5, rtol=1e-4)
    wrong = torch.full((4, 4), 0.0).index_put((torch.tensor([0, 2]), torch.tensor([2, 0])), torch.tensor(-torch.inf))
    logits = 100 * cosines + wrong
    expected = (torch.eye(4) * -(logits.log_softmax(0) + logits.log_softmax(1)).nan_to_num(neginf=0)).sum() / 8
    assert float(out["loss"]) == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="caption_column"):
        made.check_batch({"pixel_values": batch()["pixel_values"]})


def test_the_tokenizer_knows_its_words_and_takes_any():
    tokenizer = caption_tokenizer(CAPTIONS, 400, 12)
    assert tokenizer.tokenize("a red two") == ["a</w>", "red</w>", "two</w>"]
    assert tokenizer.unk_token not in tokenizer.tokenize("an owl flew by 7 quizzes")
    ids = tokenizer("two red rings", padding="max_length").input_ids
    assert len(ids) == 12
    assert ids[0] == tokenizer.bos_token_id
    assert ids[4:] == [tokenizer.eos_token_id] * 8


def test_retrieval_by_hand():
    images = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0.1]])
    texts = torch.tensor([[2.0, 0], [0, 3], [0.1, 1], [1, 0]])
    found = retrieval(images, texts, ["x", "y", "z", "x"])
    # images find texts 0, 1, 2, 0 or 3: x, y, z, x; texts find images 0, 1, 1, 0: x, y, y, x
    assert found == {"image_to_text": 1.0, "text_to_image": 0.75, "chance": (2 + 1 + 1 + 2) / 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {}}, "needs image_size, patch_size"),
        ({"vision": VISION | {"patch_size": 3}}, "no multiple of its patch_size"),
        ({"text": TEXT | {"hiden_size": 3}}, "Unknown key 'hiden_size'.*hidden_size"),
        ({"text": TEXT | {"vocab_size": 3}}, "vocab_size come from the tokenizer"),
        ({"embedding_dim": 0}, "must be positive"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveConfig(**{"text": TEXT, "vision": VISION} | changes)


def half(rank: int, meet: str, inputs: tuple, results) -> None:
    """The loss of one half of the pairs, and its gradient, in one of two processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    rows = slice(3 * rank, 3 * rank + 3)
    images, texts, captions = (part[rows].clone() for part in inputs)
    images.requires_grad_()
    loss = clip_loss(images, texts, 2.0, captions)
    loss.backward()
    results[rank] = (loss.item(), images.grad.tolist())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_see_all_pairs(tmp_path):
    """The mean of two halves' losses is the loss of the whole, and so is the gradient that DDP would average."""
    images, texts = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    captions = torch.tensor([[1], [2], [3], [1], [4], [3]])
    whole = images.clone().requires_grad_()
    expected = clip_loss(whole, texts, 2.0, captions)
    expected.backward()
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        inputs = (str(tmp_path / "meet"), (images, texts, captions), results)
        torch.multiprocessing.spawn(half, inputs, nprocs=2)
        losses, gradients = zip(*(results[rank] for rank in (0, 1)), strict=True)
    assert sum(losses) / 2 == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.tensor([*gradients[0], *gradients[1]]) / 2, whole.grad, atol=1e-6, rtol=1e-4)
