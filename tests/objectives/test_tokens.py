"""Tokenizer, MAGE and ADDP: masks and losses by hand, frozen parts, contracts, bad input."""

import copy
import math

import pytest
import torch

from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.data.tokens import TokenData
from diffusers_repr.models.vq_tokens import decode_embeddings, encode_tokens
from diffusers_repr.objectives import (
    ADDPConfig,
    ADDPObjective,
    MAGEConfig,
    MAGEObjective,
    TokenizerConfig,
    TokenizerObjective,
)
from diffusers_repr.objectives.token_masks import masked_cross_entropy, ratio_ladder, truncated_normal
from diffusers_repr.objectives.vq import new_tokenizer
from diffusers_repr.testing import check_objective
from tests.objectives.cases import backward, shake
from tests.objectives.token_cases import VQ, images, masked_model, pixel_model, tokenizer


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def mage(width: int = 0, **settings) -> MAGEObjective:
    return MAGEObjective(masked_model(condition_dim=width, dropout=0.0), tokenizer(), MAGEConfig(**settings))


def addp(dropout: float = 0.0, **settings) -> ADDPObjective:
    return ADDPObjective(pixel_model(dropout=0.0), tokenizer(), masked_model(dropout=dropout), ADDPConfig(**settings))


# Shares of masks


def test_truncated_normal_by_its_density():
    found = truncated_normal(torch.rand(5000, generator=seed()), 0.5, 1.0, 0.75, 0.25)
    assert 0.5 <= float(found.min()) < float(found.max()) <= 1
    at = torch.linspace(0.5, 1, 401, dtype=torch.float64)
    density = (-(((at - 0.75) / 0.25) ** 2) / 2).exp()
    share = torch.cumulative_trapezoid(density, at) / torch.trapezoid(density, at)
    far = (found[:, None] <= at[1:]).double().mean(0) - share
    assert far.abs().max() < 1.63 / math.sqrt(5000)  # Kolmogorov's bound at 1 %


def test_the_ladder_of_shares():
    """The second of the checks: 66 shares in [0.5, 1), rising, with the density of the distribution."""
    shares, chances = ratio_ladder(0.5, 1.0, 0.55, 0.25)
    assert len(shares) == 66
    assert shares == sorted(shares)
    assert shares[0] >= 0.5
    assert shares[-1] < 1
    want = [math.exp(-(((share - 0.55) / 0.25) ** 2) / 2) for share in shares]
    torch.testing.assert_close(chances, torch.tensor(want, dtype=torch.float64) / sum(want))
    with pytest.raises(ValueError, match="No share of a ladder of 1 steps"):
        ratio_ladder(0.5, 1.0, 0.55, 0.25, steps=1)


# The loss


def test_cross_entropy_by_a_loop():
    logits = torch.randn(3, 4, 5, generator=seed(), dtype=torch.float64, requires_grad=True)
    q = torch.randn(3, 4, 5, generator=seed(1), dtype=torch.float64).softmax(-1)
    mask = torch.tensor([[True, False, False, False], [True, True, True, True], [False, True, True, False]])
    want = []
    for b in range(3):
        each = [
            -sum((0.9 * q[b, n, v] + 0.1 / 5) * (logits[b, n, v] - logits[b, n].logsumexp(0)) for v in range(5))
            for n in range(4)
            if mask[b, n]
        ]
        want.append(sum(each) / len(each))
    found = masked_cross_entropy(logits, q, mask, 0.1)
    torch.testing.assert_close(found, sum(want) / 3)
    hard = torch.randint(5, (3, 4), generator=seed(2))
    one_hot = torch.nn.functional.one_hot(hard, 5).double()
    torch.testing.assert_close(
        masked_cross_entropy(logits, hard, mask, 0.1), masked_cross_entropy(logits, one_hot, mask, 0.1)
    )


def test_what_is_not_masked_is_not_in_the_loss():
    """The third of the checks."""
    logits = torch.randn(2, 6, 5, generator=seed(), requires_grad=True)
    q, mask = torch.randn(2, 6, 5, generator=seed(1)).softmax(-1), torch.rand(2, 6, generator=seed(2)) < 0.5
    mask[:, 0] = True
    (first,) = torch.autograd.grad(masked_cross_entropy(logits, q, mask, 0.1), logits)
    other = torch.where(mask[..., None], q, torch.nan)
    again = masked_cross_entropy(logits, other, mask, 0.1)
    (second,) = torch.autograd.grad(again, logits)
    assert float(again) == float(masked_cross_entropy(logits, q, mask, 0.1))
    assert torch.equal(first[mask], second[mask])
    assert first[~mask].abs().max() == 0


def test_own_scores_as_targets_give_their_entropy():
    """The fourth of the checks: no gradient where the target is what is told already."""
    logits = torch.randn(2, 3, 5, generator=seed(), dtype=torch.float64, requires_grad=True)
    q = logits.detach().softmax(-1)
    loss = masked_cross_entropy(logits, q, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(loss, -(q * q.log()).sum(-1).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-15


# MAGE


@pytest.mark.parametrize("width", [0, 3])
def test_mage_keeps_the_contract(width):
    more = {"condition": torch.randn(4, width, generator=seed())} if width else {}
    check_objective(mage(width), {"pixel_values": images(), **more})


def test_masks_of_mage():
    objective = mage(mask_ratio_mean=0.75)
    batch = {"generator": seed()}
    counts = []
    for _ in range(50):
        mask, kept = objective.masks(batch, 8, torch.device("cpu"))
        assert kept.shape == (8, 8)  # half of the tokens
        assert (~mask).sum(1).le(8).all()
        hidden = torch.ones(8, 16, dtype=torch.bool).scatter(1, kept, False)
        assert (mask | ~hidden).all()  # what the encoder does not see is masked
        counts += mask.sum(1).tolist()
    assert min(counts) >= 8
    assert len(set(counts)) > 6  # each sample has a share of its own
    assert abs(sum(counts) / len(counts) / 16 - 0.78) < 0.03  # 0.75 is the middle; rounded up to a token
    given = {"mask_noise": torch.arange(16.0).expand(2, 16), "mask_ratio": torch.tensor([0.5, 0.7])}
    mask, kept = objective.masks(given, 2, torch.device("cpu"))
    assert mask.sum(1).tolist() == [8, 12]
    assert mask[1, :12].all()
    assert kept[0].tolist() == list(range(8, 16))


def test_the_loss_of_mage():
    objective = mage(label_smoothing=0.2)
    ids = encode_tokens(objective.tokenizer, images()).flatten(1)
    given = {"mask_noise": torch.rand(4, 16, generator=seed()), "mask_ratio": torch.tensor([0.5, 0.6, 0.9, 1.0])}
    out = objective({"pixel_values": images(), **given})
    mask = torch.stack([
        torch.zeros(16, dtype=torch.bool).index_fill(0, given["mask_noise"][b].argsort()[:count], True)
        for b, count in enumerate([8, 10, 15, 16])
    ])  # fmt: skip
    losses = []
    for b in range(4):
        kept = (~torch.zeros(16, dtype=torch.bool).index_fill(0, given["mask_noise"][b].argsort()[:8], True)).nonzero()
        masked = torch.where(mask[b], objective.network.mask_token_id, ids[b])[None]
        logs = objective.network(masked, kept=kept.T).sample[0].log_softmax(-1)
        each = -(0.8 * logs.gather(1, ids[b][:, None])[:, 0] + 0.2 * logs.mean(1))
        losses.append(each[mask[b]].mean())
    torch.testing.assert_close(out["loss"], torch.stack(losses).mean())
    assert torch.equal(objective({"tokens": ids, **given})["loss"], out["loss"])  # tokens that were encoded before


def test_vectors_of_mage():
    objective = mage(3, condition_dropout=1.0)
    given = {"tokens": torch.randint(7, (4, 16), generator=seed()), "mask_ratio": torch.full((4,), 0.7),
             "mask_noise": torch.rand(4, 16, generator=seed(1))}  # fmt: skip
    one = objective({**given, "condition": torch.randn(4, 3, generator=seed(2))})["loss"]
    two = objective({**given, "condition": torch.randn(4, 3, generator=seed(3))})["loss"]
    assert torch.equal(one, two)  # all are the null vector
    kept = mage(3, condition_dropout=0.0)
    losses = [float(kept({**given, "condition": torch.randn(4, 3, generator=seed(at))})["loss"]) for at in (2, 3)]
    assert losses[0] != losses[1]
    before = objective.network.condition_embed.null.detach().clone()
    backward(objective, {**given, "condition": torch.zeros(4, 3)})
    torch.optim.SGD(objective.param_groups(), 0.1).step()
    assert not torch.equal(objective.network.condition_embed.null, before)  # it is learned


# ADDP


def test_addp_keeps_the_contract():
    check_objective(addp(), {"pixel_values": images()})


def test_masks_of_addp_are_nested():
    """The second of the checks: that of the target lies in that of the canvas."""
    objective = addp()
    shares, _ = ratio_ladder(0.5, 1.0, 0.55, 0.25)
    known = {math.ceil(16 * share) for share in shares}
    drawn = [objective.counts({"generator": seed(at)}) for at in range(60)]
    assert {count for pair in drawn for count in pair} <= known
    assert all(target <= canvas for target, canvas in drawn)
    assert any(target < canvas for target, canvas in drawn)
    assert objective.counts({"mask_counts": (9, 11)}) == (9, 11)


def test_the_loss_of_addp_step_by_step():
    objective = addp(label_smoothing=0.1)
    vqvae, predictor = objective.frozen["tokenizer"], objective.frozen["predictor"]
    noise = torch.rand(4, 16, generator=seed(3))
    out = objective({"pixel_values": images(), "mask_noise": noise, "mask_counts": (9, 12)})
    ids = encode_tokens(vqvae, images()).flatten(1)
    order = noise.argsort(1)
    inner, outer = (torch.zeros(4, 16, dtype=torch.bool).scatter(1, order[:, :count], True) for count in (9, 12))
    with torch.no_grad():
        guess = predictor(ids.masked_fill(outer, 8)).sample.softmax(-1)
        q = predictor(ids.masked_fill(inner, 8)).sample.softmax(-1)
        codes = vqvae.quantize.embedding.weight
        canvas = torch.where(inner[..., None], torch.einsum("bnv,vd->bnd", guess, codes), codes[ids])
        pixels = decode_embeddings(vqvae, canvas, (4, 4)).clamp(-1, 1)
        logs = objective.network(pixels, ids, inner).sample.log_softmax(-1)
    want = -((0.9 * q + 0.1 / 7) * logs).sum(-1)[inner].mean()
    torch.testing.assert_close(out["loss"], want, rtol=1e-5, atol=1e-6)
    target, both = objective.predictions(ids, inner, outer)
    torch.testing.assert_close(target, q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both, guess, rtol=1e-5, atol=1e-6)
    assert predictor.mask_token_id == 8


def test_frozen_parts_stay_in_eval():
    """The sixth of the checks: the predictor has dropout, and tells the same twice."""
    objective = addp(dropout=0.5).train()
    assert objective.network.training
    assert not any(module.training for part in objective.frozen.values() for module in part.modules())
    ids = torch.randint(7, (2, 16), generator=seed())
    masks = (torch.rand(2, 16, generator=seed(1)) < share for share in (0.5, 0.8))
    masks = list(masks)
    first, second = (torch.cat(objective.predictions(ids, *masks)) for _ in range(2))
    assert torch.equal(first, second)
    assert not any(name.startswith(("tokenizer", "predictor")) for name in objective.state_dict())


# The tokenizer


def test_the_tokenizer_keeps_the_contract_and_its_loss():
    vqvae = new_tokenizer(TokenizerConfig(VQ))
    shake(vqvae.quantize, std=1.0)
    config = TokenizerConfig(VQ, commitment_weight=0.5, entropy_weight=0.2, entropy_temperature=0.7)
    objective = TokenizerObjective(copy.deepcopy(vqvae), config)
    check_objective(objective, {"pixel_values": images()})
    objective = TokenizerObjective(vqvae, config)
    out, gradients = backward(objective, {"pixel_values": images()})
    with torch.no_grad():
        z = vqvae.encode(images()).latents.double().permute(0, 2, 3, 1).flatten(0, 2)
        codes = vqvae.quantize.embedding.weight.double()
        far = torch.tensor([[float(((a - e) ** 2).sum()) for e in codes] for a in z], dtype=torch.float64)
        near = codes[far.argmin(1)]
        p = (-far / 0.7).softmax(1)
        entropy = -(p * p.log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()
        made = vqvae.decode(vqvae.encode(images()).latents).sample.double()
        counts = torch.bincount(far.argmin(1), minlength=7) / len(z)
    terms = {
        "codebook": ((near - z) ** 2).mean(),
        "entropy": entropy,
        "reconstruction": (made - images()).abs().mean(),
    }
    for name, value in terms.items():
        assert float(out[name]) == pytest.approx(float(value), rel=1e-4), name
    want = terms["reconstruction"] + 1.5 * terms["codebook"] + 0.2 * entropy
    assert float(out["loss"].detach()) == pytest.approx(float(want), rel=1e-4)
    used = counts[counts > 0]
    assert float(out["perplexity"]) == pytest.approx(math.exp(-float((used * used.log()).sum())), rel=1e-4)
    assert gradients["vqvae.encoder.conv_in.weight"].abs().max() > 0  # it passes the codes by


@pytest.mark.slow
def test_a_tokenizer_learns_the_digits_and_uses_its_codes():
    torch.manual_seed(0)
    config = TokenizerConfig({**VQ, "block_out_channels": [16, 32], "num_vq_embeddings": 32, "latent_channels": 8})
    objective = TokenizerObjective(new_tokenizer(config), config)
    pixels = load_train_data(DataConfig(cache_images=True), 1, 8, dataset=load_digits_splits()["train"])
    every = pixels.on_device(pixels.batch(range(len(pixels))))["pixel_values"]
    optimizer = torch.optim.AdamW(objective.parameters(), 2e-3)
    for _ in range(300):
        optimizer.zero_grad()
        out = objective({"pixel_values": every[torch.randint(len(every), (64,))]})
        out["loss"].backward()
        optimizer.step()
    assert float(out["perplexity"]) > 16
    mean = (every - every.mean(0)).abs().mean()
    assert float(out["reconstruction"]) < 0.6 * float(mean)


# Data and errors


def test_tokens_that_are_encoded_once():
    digits = load_digits_splits()["train"].select(range(20))
    data = load_train_data(DataConfig(cache_images=True), 1, 8, dataset=digits)
    vqvae = tokenizer()
    tokens = TokenData(data, vqvae, batch_size=8)
    pixels = data.on_device(data.batch([3, 17]))["pixel_values"]
    batch = tokens.on_device(tokens.batch([3, 17]))
    assert torch.equal(batch["tokens"], encode_tokens(vqvae, pixels).flatten(1))
    assert batch["class_labels"].tolist() == [digits[3]["label"], digits[17]["label"]]
    assert torch.equal(tokens[17]["tokens"], batch["tokens"][1])
    assert (
        tokens.fingerprint()["tokenizer"] != TokenData(data, tokenizer(num_vq_embeddings=5)).fingerprint()["tokenizer"]
    )
    moved = load_train_data(DataConfig(cache_images=True, random_shift=0.1), 1, 8, dataset=digits)
    with pytest.raises(ValueError, match="random_shift would do nothing"):
        TokenData(moved, vqvae)
    with pytest.raises(TypeError, match="map-style images; got list"):
        TokenData([], vqvae)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"tokens": torch.full((2, 16), 7)}, "0 to 6: they were made by a tokenizer of another vocabulary"),
        ({"tokens": torch.zeros(2, 9, dtype=torch.int64)}, "An image is 9 tokens of this tokenizer"),
        ({"pixel_values": torch.zeros(1, 1, 16, 16)}, "An image is 8 x 8 tokens"),
        ({"moments": torch.zeros(1)}, "neither tokens nor images"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    for objective in (mage(), addp()):
        with pytest.raises(ValueError, match=message):
            objective.check_batch(batch)


def test_vectors_that_do_not_fit():
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"vectors \(B, 3\); the batch's `condition` is none"):
        mage(3).check_batch({"tokens": tokens})
    with pytest.raises(ValueError, match=r"`condition` is \(2, 4\)"):
        mage(3).check_batch({"tokens": tokens, "condition": torch.zeros(2, 4)})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MAGEObjective(masked_model(9), tokenizer()), ValueError, "knows 9 tokens and the tokenizer gives 7"),
        (lambda: ADDPObjective(pixel_model(9), tokenizer(), masked_model()), ValueError, "The student knows 9"),
        (lambda: ADDPObjective(pixel_model(), tokenizer(), masked_model(9)), ValueError, "The predictor knows 9"),
        (lambda: ADDPObjective(pixel_model(), tokenizer(), pixel_model()), TypeError, "as MAGE trains it"),
        (
            lambda: ADDPObjective(pixel_model(), tokenizer(), masked_model(condition_dim=2)),
            ValueError,
            "without condition on 4 x 4 tokens; got one on 4 x 4 with condition_dim=2",
        ),
        (lambda: MAGEConfig({"vocab_size": 3}), ValueError, "takes vocab_size from the tokenizer"),
        (lambda: MAGEConfig(mask_ratio_min=0.0), ValueError, "`mask_ratio_min` lies above 0"),
        (lambda: MAGEConfig(label_smoothing=1.0), ValueError, "`label_smoothing` lies from 0"),
        (lambda: ADDPConfig({"patch_size": 3}), ValueError, "takes patch_size from the tokenizer"),
        (lambda: ADDPConfig(most_steps=0), ValueError, "`most_steps` and `ladder_steps` are 1 or more"),
        (lambda: TokenizerConfig({"lookup_from_codebook": True}), ValueError, "gives no gradient"),
        (lambda: TokenizerConfig(distance="ssim"), ValueError, "`distance` is l1 or mse"),
        (lambda: TokenizerConfig(entropy_temperature=0.0), ValueError, "`entropy_temperature` above 0"),
        (
            lambda: TokenizerObjective(tokenizer()).check_batch({"pixel_values": torch.zeros(1, 1, 7, 8)}),
            ValueError,
            "Images are 7 x 8; a token of this tokenizer is 2 pixels wide",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()
