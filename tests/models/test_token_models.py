"""Networks of visual tokens: MAGE's against its formula and its authors' files, ADDP's against a loop; tokenizers."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers_repr.pipelines.token_generation import TokenGenerationPipeline

from diffusers_repr.cli import main
from diffusers_repr.encoders import load_encoder
from diffusers_repr.models import MaskedTokenModel, PixelTokenModel
from diffusers_repr.models.convert_mage import convert_mage
from diffusers_repr.models.token_blocks import places
from diffusers_repr.models.vq_tokens import (
    check_vocabulary,
    decode_embeddings,
    encode_tokens,
    mixed_embeddings,
    token_embeddings,
)
from tests.models.official_mage import OfficialMAGE, OfficialVQGAN
from tests.objectives.cases import shake
from tests.objectives.token_cases import images, masked_model, pixel_model, tokenizer

IDS = torch.tensor([[0, 4, 2, 1], [3, 3, 0, 4]])
MASKED = torch.tensor([[True, False, True, False], [True, True, True, False]])
DROPPED = torch.tensor([[True, False, False, False], [False, True, False, False]])


@pytest.mark.parametrize("vector", [0, 3])
def test_mage_is_its_authors_network(vector, tmp_path, capsys):
    official = OfficialMAGE(vector=vector)
    torch.save(official.checkpoint(), tmp_path / "mage.pth")
    heads = '{"num_attention_heads": 2, "decoder_num_attention_heads": 2}'
    command = ["convert", str(tmp_path / "mage.pth"), "--out", str(tmp_path / "out"), "--model_config", heads]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "5 tokens in 2 x 2 places" in printed
    assert "the file holds no tokenizer" in printed
    model = MaskedTokenModel.from_pretrained(tmp_path / "out")
    vectors = torch.randn(2, vector, generator=torch.Generator().manual_seed(1)) if vector else None
    null = torch.tensor([True, False]) if vector else None
    masked = IDS.masked_fill(MASKED, model.mask_token_id)
    nothing = torch.zeros_like(MASKED)
    with torch.no_grad():
        whole = model(masked, vectors, null).sample
        part = model(masked, vectors, null, places(~DROPPED)).sample
    torch.testing.assert_close(whole.double(), official(IDS, MASKED, nothing, vectors, null), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part.double(), official(IDS, MASKED, DROPPED, vectors, null), rtol=1e-4, atol=1e-4)
    if vector:
        with torch.no_grad():
            free = model(masked).sample
        torch.testing.assert_close(free[0], whole[0])  # without a vector it is given the null one
        assert (free[1] - whole[1]).abs().max() > 1e-3


def test_the_authors_tokenizer_comes_with_it(tmp_path, capsys):
    official, own = OfficialMAGE(), OfficialVQGAN()
    torch.save(official.checkpoint(own), tmp_path / "mage.pth")
    heads = '{"num_attention_heads": 2, "decoder_num_attention_heads": 2}'
    command = ["convert", str(tmp_path / "mage.pth"), "--out", str(tmp_path / "out"), "--model_config", heads]
    assert main(command) == 0
    assert "TokenGenerationPipeline.from_pretrained" in capsys.readouterr().out
    pipe = TokenGenerationPipeline.from_pretrained(tmp_path / "out")
    assert pipe.vqvae.config.sample_size == 4
    pixels = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ids = encode_tokens(pipe.vqvae, 2 * pixels - 1)
    assert torch.equal(ids, own.encode(pixels))
    with torch.no_grad():
        made = pipe.decode(token_embeddings(pipe.vqvae, ids.flatten(1))) / 2 + 0.5
        again = pipe.vqvae(2 * pixels - 1).sample / 2 + 0.5
    torch.testing.assert_close(made.double(), own.decode(ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, made, rtol=1e-4, atol=1e-4)
    encoder = load_encoder(tmp_path / "out").encode_pixels(2 * pixels - 1)
    with torch.no_grad():
        want = pipe.transformer.encode(ids)[:, 1:]
    torch.testing.assert_close(encoder["tokens"], want)
    state = official.checkpoint(own)["model"]
    sizes = {"num_attention_heads": 2, "decoder_num_attention_heads": 2}
    with pytest.raises(ValueError, match=r"lacks encoder.conv_out.weight"):
        convert_mage({k: v for k, v in state.items() if k != "vqgan.encoder.conv_out.weight"}, sizes)
    with pytest.raises(ValueError, match="has 4 codes, and the network knows 5"):
        convert_mage({**state, "vqgan.quantize.embedding.weight": torch.ones(4, 6)}, sizes)
    torch.save({"model": {**state, "vqgan.more": torch.ones(1)}}, tmp_path / "more.pth")
    assert main([*command[:1], str(tmp_path / "more.pth"), *command[2:], "--overwrite"]) != 0
    assert "is not quite MaskGIT's: ['more']" in capsys.readouterr().err


def test_checkpoints_that_are_none():
    state = OfficialMAGE().checkpoint()["model"]
    heads = {"num_attention_heads": 2, "decoder_num_attention_heads": 2}
    with pytest.raises(ValueError, match=r"it lacks blocks.1.attn.proj.bias"):
        convert_mage({k: v for k, v in state.items() if k != "blocks.1.attn.proj.bias"}, heads)
    with pytest.raises(ValueError, match=r"it has blocks.0.more, which are unknown"):
        convert_mage({**state, "blocks.0.more": torch.ones(1)}, heads)
    with pytest.raises(ValueError, match="conditioned on classes"):
        convert_mage({**state, "class_emb.weight": torch.ones(2, 2)}, heads)
    with pytest.raises(ValueError, match="heads of a network of width 16"):
        convert_mage(state)


def test_the_student_by_a_loop():
    """Each sample by itself, its sequence put together token by token."""
    model = pixel_model().double()
    pixels, ids = images(2).double(), torch.randint(7, (2, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(4)).argsort(1) < 10
    with torch.no_grad():
        found = model(pixels, ids, mask).sample
        for row in range(2):
            cut = [pixels[row, :, 2 * (at // 4) :][:, :2, 2 * (at % 4) :][:, :, :2].flatten() for at in range(16)]
            patches = torch.stack(cut) @ model.patch_embed.weight.flatten(1).T + model.patch_embed.bias
            sequence = model.norm_in(torch.cat([model.class_token[0], patches]) + model.positions[0])[None]
            for block in model.blocks:
                sequence = block(sequence)
            seen = model.decoder_embed(model.norm(sequence)[0])
            blank = model.mask_token[0, 0]
            line = [blank + model.decoder_positions[0, 0]]
            for at in range(16):
                if mask[row, at]:
                    line.append(blank + model.masked_positions[0, at])
                else:
                    line.append(seen[1 + at] + model.decoder_positions[0, 1 + at])
            shown = [at for at in range(16) if not mask[row, at]]
            line += [model.token_embed.weight[ids[row, at]] + model.token_positions[0, at] for at in shown]
            hidden = torch.stack(line)[None]
            for block in model.decoder_blocks:
                hidden = block(hidden)
            hidden = F.gelu(model.head.proj(model.decoder_norm(hidden[0, 1:17])))
            want = model.head.norm(hidden) @ model.token_embed.weight.T + model.logit_bias
            torch.testing.assert_close(found[row], want)
        known = places(~mask)
        assert torch.equal(model(pixels, ids, mask, known).sample, found)
        everything = torch.ones_like(mask)
        blind = [model(given, ids, everything).sample for given in (pixels, torch.zeros_like(pixels))]
    assert torch.equal(*blind)  # with all masked, no pixel is read


def test_the_head_does_not_train_the_embeddings():
    model = masked_model(dropout=0.0)
    model(torch.full((1, 16), model.mask_token_id)).sample.square().sum().backward()
    read = model.token_embed.weight.grad.abs().sum(1)
    assert read[:7].max() == 0
    assert read[7:].min() > 0
    model.zero_grad()
    model(torch.zeros(1, 16, dtype=torch.int64)).sample.square().sum().backward()
    assert model.token_embed.weight.grad.abs().sum(1)[0] > 0


def test_dropout_is_of_training_alone():
    model, ids = masked_model(dropout=0.5), torch.zeros(1, 16, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(model(ids).sample, model(ids).sample)
        model.train()
        assert not torch.equal(model(ids).sample, model(ids).sample)
        for module in model.modules():  # that of the probabilities alone
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert not torch.equal(model(ids).sample, model(ids).sample)


@pytest.mark.parametrize("lookup", [False, True])
def test_tokens_of_a_tokenizer(lookup):
    """The first of the checks of ADDP at tiny scale: an empty mask decodes as the tokenizer itself does."""
    vqvae = tokenizer(lookup_from_codebook=lookup)
    ids = encode_tokens(vqvae, images(3))
    assert ids.shape == (3, 4, 4)
    latents = vqvae.encode(images(3)).latents
    far = (latents.flatten(2).transpose(1, 2)[:, :, None] - vqvae.quantize.embedding.weight).square().sum(-1)
    assert torch.equal(ids.flatten(1), far.argmin(-1))
    flat, nothing = ids.flatten(1), torch.zeros(3, 16, dtype=torch.bool)
    guess = torch.rand(3, 16, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    with torch.no_grad():
        canvas = mixed_embeddings(vqvae, flat, nothing, guess)
        torch.testing.assert_close(decode_embeddings(vqvae, canvas, (4, 4)), vqvae.decode(latents).sample, atol=5e-6,
                                   rtol=0)  # fmt: skip
        certain = mixed_embeddings(vqvae, flat * 0, ~nothing, F.one_hot(flat, 7).float())
        assert torch.equal(certain, token_embeddings(vqvae, flat))
        half = torch.arange(16).expand(3, 16) < 8
        mixed = mixed_embeddings(vqvae, flat, half, guess)
    assert torch.equal(mixed[:, 8:], token_embeddings(vqvae, flat)[:, 8:])
    torch.testing.assert_close(mixed[1, 3], guess[1, 3] @ vqvae.quantize.embedding.weight)


def test_a_tokenizer_of_another_vocabulary():
    with pytest.raises(ValueError, match="knows 9 tokens and the tokenizer gives 7"):
        check_vocabulary(masked_model(vocab_size=9), tokenizer())
    with pytest.raises(ValueError, match="patches of 4 pixels and 1 channels; a token of the tokenizer is one of 2"):
        check_vocabulary(pixel_model(patch_size=4), tokenizer())
    with pytest.raises(TypeError, match="VQModel or a MaskGITVQModel; got Linear"):
        check_vocabulary(masked_model(), torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked_model(num_attention_heads=3), "hidden_size 16 must be a multiple of its heads, 3"),
        (lambda: masked_model(condition_dim=-1), "condition_dim is 0 or more"),
        (lambda: masked_model(sample_size=(0, 4)), "sample_size is one side"),
        (lambda: pixel_model(sample_size=7), "sample_size 7 x 7 must be multiples of patch_size 2"),
        (
            lambda: masked_model()(torch.zeros(1, 9, dtype=torch.int64)),
            r"ids of 4 x 4 tokens, whole numbers \(B, 16\)",
        ),
        (lambda: masked_model()(torch.zeros(1, 16)), "got .*float32"),
        (
            lambda: masked_model()(torch.zeros(1, 16, dtype=torch.int64), torch.ones(1, 3)),
            "takes no vectors",
        ),
        (lambda: pixel_model().encode(torch.zeros(1, 1, 4, 8)), r"takes images \(B, 1, 8, 8\)"),
        (
            lambda: pixel_model()(images(2), torch.zeros(2, 16, dtype=torch.int64), torch.ones(2, 16).tril().bool()),
            "equally many tokens of a kind",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_two_grids():
    """A grid of other sides than a square's."""
    model = shake(MaskedTokenModel(7, (2, 3), hidden_size=16, num_layers=1, num_attention_heads=2,
                                   decoder_num_layers=1, decoder_num_attention_heads=2))  # fmt: skip
    assert model(torch.zeros(2, 2, 3, dtype=torch.int64)).sample.shape == (2, 6, 7)
    student = PixelTokenModel(7, (4, 6), 2, 1, 16, 1, 2, 1, 2)
    known = torch.zeros(1, 6, dtype=torch.bool)
    assert student(torch.zeros(1, 1, 4, 6), torch.zeros(1, 6, dtype=torch.int64), known).sample.shape == (1, 6, 7)
    assert isinstance(tokenizer(), VQModel)
