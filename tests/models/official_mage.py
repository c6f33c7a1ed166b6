"""MAGE in its authors' names, written out as formulas in float64; with RCG's vectors where there are such."""

import torch
import torch.nn.functional as F

CLASSES = 1000


class OfficialMAGE:
    """Random weights of the authors' module, and the scores that it gives."""

    def __init__(self, vocab=5, side=2, width=16, inner=8, depth=2, heads=(2, 2), vector=0, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.vocab, self.depth, self.heads = vocab, depth, heads
        rows, places = vocab + CLASSES + 1, side * side + 1
        self.weights = {
            "token_emb.word_embeddings.weight": self.draw(rows, width),
            "token_emb.position_embeddings.weight": self.draw(places, width),
            "decoder_pos_embed_learned": self.draw(1, places, inner),
            "mlm_layer.bias": self.draw(1, 1, rows),
            **self.norm("token_emb.LayerNorm", width), **self.norm("norm", width), **self.norm("decoder_norm", inner),
            **self.linear("decoder_embed", inner, width), **self.linear("mlm_layer.fc", width, inner),
            **self.norm("mlm_layer.ln", width),
        }  # fmt: skip
        for stack, size in (("blocks", width), ("decoder_blocks", inner)):
            for at in range(depth):
                block = f"{stack}.{at}."
                self.weights |= self.norm(block + "norm1", size) | self.norm(block + "norm2", size)
                self.weights |= self.linear(block + "attn.qkv", 3 * size, size)
                self.weights |= self.linear(block + "attn.proj", size, size)
                self.weights |= self.linear(block + "mlp.fc1", 2 * size, size)
                self.weights |= self.linear(block + "mlp.fc2", size, 2 * size)
        if vector:
            self.weights |= self.linear("latent_prior_proj", width, vector)
            self.weights["fake_latent"] = self.draw(1, vector)

    def draw(self, *shape):
        return 0.4 * torch.randn(shape, generator=self.generator)

    def linear(self, name, out, width):
        return {f"{name}.weight": self.draw(out, width), f"{name}.bias": self.draw(out)}

    def norm(self, name, width):
        return {f"{name}.weight": 1 + self.draw(width), f"{name}.bias": self.draw(width)}

    def checkpoint(self, tokenizer=None):
        """The file as the authors' script saves it, with what is in it and not used."""
        unused = {"cls_token": self.draw(1, 1, 16), "pos_embed": self.draw(1, 5, 16), "mask_token": self.draw(1, 1, 8),
                  "patch_embed.proj.weight": self.draw(16, 3, 2, 2), "decoder_pos_embed": self.draw(1, 5, 8),
                  "decoder_pred.weight": self.draw(12, 8),
                  "token_emb.position_ids": torch.arange(5)[None]}  # fmt: skip
        frozen = {} if tokenizer is None else {f"vqgan.{k}": v for k, v in tokenizer.weights.items()}
        return {"model": {**self.weights, **unused, **frozen}, "epoch": 1600}

    def __call__(self, ids, masked, dropped, vectors=None, null=None):
        """Scores of the tokenizer's ids, sample by sample, token by token; `dropped` ones the encoder does not see."""
        w = {name: value.double() for name, value in self.weights.items()}

        def linear(name, value):
            return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        def norm(name, value, eps=1e-6):
            spread = ((value - value.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
            value = (value - value.mean(-1, keepdim=True)) / (spread + eps).sqrt()
            return value * w[f"{name}.weight"] + w[f"{name}.bias"]

        def attend(name, value, heads):
            query, key, out = linear(f"{name}.qkv", value).chunk(3, -1)
            width = value.shape[-1] // heads
            parts = []
            for head in range(heads):
                at = slice(head * width, (head + 1) * width)
                weight = (query[:, at] @ key[:, at].T / width**0.5).softmax(-1)
                parts.append(weight @ out[:, at])
            return linear(f"{name}.proj", torch.cat(parts, -1))

        def blocks(stack, value, heads):
            for at in range(self.depth):
                value = value + attend(f"{stack}.{at}.attn", norm(f"{stack}.{at}.norm1", value), heads)
                inner = F.gelu(linear(f"{stack}.{at}.mlp.fc1", norm(f"{stack}.{at}.norm2", value)))
                value = value + linear(f"{stack}.{at}.mlp.fc2", inner)
            return value

        table, places = w["token_emb.word_embeddings.weight"], w["token_emb.position_embeddings.weight"]
        found = []
        for row in range(len(ids)):
            read = [int(i) if not m else len(table) - 1 for i, m in zip(ids[row], masked[row], strict=True)]
            sequence = table[[self.vocab + 76, *read]] + places
            sequence = norm("token_emb.LayerNorm", sequence)
            if vectors is not None:
                vector = w["fake_latent"][0] if null is not None and null[row] else vectors[row].double()
                sequence[0] = linear("latent_prior_proj", vector)
            seen = [0, *(1 + at for at in range(len(read)) if not dropped[row][at])]
            encoded = linear("decoder_embed", norm("norm", blocks("blocks", sequence[seen], self.heads[0])))
            full = encoded[:1].repeat(len(sequence), 1)
            for place, at in enumerate(seen):
                if at and not masked[row][at - 1]:
                    full[at] = encoded[place]
            hidden = blocks("decoder_blocks", full + w["decoder_pos_embed_learned"][0], self.heads[1])
            hidden = F.gelu(linear("mlm_layer.fc", norm("decoder_norm", hidden)))
            scores = norm("mlm_layer.ln", hidden, 1e-5) @ table.T + w["mlm_layer.bias"][0]
            found.append(scores[1:, : self.vocab])
        return torch.stack(found)


class OfficialVQGAN:
    """The tokenizer in the same file: widths 4 and 8, one block a level, images in [0, 1]."""

    WIDTHS, LATENT, GROUPS = (4, 8), 6, 4

    def __init__(self, codes=5, seed=3):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return 0.3 * torch.randn(shape, generator=generator)

        w = {"quantize.embedding.weight": draw(codes, self.LATENT)}

        def norm(name, width):
            w[f"{name}.weight"], w[f"{name}.bias"] = 1 + draw(width), draw(width)

        def block(name, first, last):
            norm(f"{name}.norm1", first)
            norm(f"{name}.norm2", last)
            w[f"{name}.conv1.weight"], w[f"{name}.conv2.weight"] = draw(last, first, 3, 3), draw(last, last, 3, 3)
            if first != last:
                w[f"{name}.nin_shortcut.weight"] = draw(last, last, 1, 1)

        for half in ("encoder", "decoder"):
            block(f"{half}.mid.block_1", 8, 8)
            block(f"{half}.mid.block_2", 8, 8)
        w["encoder.conv_in.weight"] = draw(4, 3, 3, 3)
        block("encoder.down.0.block.0", 4, 4)
        block("encoder.down.1.block.0", 4, 8)
        norm("encoder.norm_out", 8)
        w["encoder.conv_out.weight"], w["encoder.conv_out.bias"] = draw(6, 8, 1, 1), draw(6)
        w["decoder.conv_in.weight"], w["decoder.conv_in.bias"] = draw(8, 6, 3, 3), draw(8)
        block("decoder.up.1.block.0", 8, 8)
        w["decoder.up.1.upsample.conv.weight"], w["decoder.up.1.upsample.conv.bias"] = draw(8, 8, 3, 3), draw(8)
        block("decoder.up.0.block.0", 8, 4)
        norm("decoder.norm_out", 4)
        w["decoder.conv_out.weight"], w["decoder.conv_out.bias"] = draw(3, 4, 3, 3), draw(3)
        self.weights = w

    def _conv(self, name, x, padding=1):
        w = self.weights
        bias = w.get(f"{name}.bias")
        return F.conv2d(x, w[f"{name}.weight"].double(), None if bias is None else bias.double(), padding=padding)

    def _act(self, name, x):
        w = self.weights
        grouped = x.unflatten(1, (self.GROUPS, -1)).flatten(2)
        spread = grouped.var(-1, correction=0, keepdim=True)
        x = ((grouped - grouped.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt()).reshape(x.shape)
        x = x * w[f"{name}.weight"].double()[:, None, None] + w[f"{name}.bias"].double()[:, None, None]
        return x * torch.sigmoid(x)

    def _block(self, name, x):
        hidden = self._conv(f"{name}.conv1", self._act(f"{name}.norm1", x))
        hidden = self._conv(f"{name}.conv2", self._act(f"{name}.norm2", hidden))
        if f"{name}.nin_shortcut.weight" in self.weights:
            x = self._conv(f"{name}.nin_shortcut", hidden, 0)
        return x + hidden

    def encode(self, x):
        """Ids `(B, h, w)` of images in [0, 1]."""
        hidden = self._block("encoder.down.0.block.0", self._conv("encoder.conv_in", x.double()))
        hidden = (hidden[..., ::2, :] + hidden[..., 1::2, :]) / 2
        hidden = (hidden[..., ::2] + hidden[..., 1::2]) / 2
        hidden = self._block("encoder.down.1.block.0", hidden)
        for name in ("encoder.mid.block_1", "encoder.mid.block_2"):
            hidden = self._block(name, hidden)
        latents = self._conv("encoder.conv_out", self._act("encoder.norm_out", hidden), 0)
        codes = self.weights["quantize.embedding.weight"].double()
        return (latents[:, None] - codes[None, :, :, None, None]).square().sum(2).argmin(1)

    def decode(self, ids):
        """Images in [0, 1] of ids."""
        hidden = self.weights["quantize.embedding.weight"].double()[ids].permute(0, 3, 1, 2)
        hidden = self._conv("decoder.conv_in", hidden)
        for name in ("decoder.mid.block_1", "decoder.mid.block_2", "decoder.up.1.block.0"):
            hidden = self._block(name, hidden)
        hidden = hidden.repeat_interleave(2, -1).repeat_interleave(2, -2)
        hidden = self._conv("decoder.up.1.upsample.conv", hidden)
        hidden = self._block("decoder.up.0.block.0", hidden)
        return self._conv("decoder.conv_out", self._act("decoder.norm_out", hidden))
