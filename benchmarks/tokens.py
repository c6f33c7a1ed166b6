"""ADDP's two passes of its predictor one after the other, against one; tokens encoded in every step, against once.

    python -m benchmarks.tokens [--batch 16] [--side 64] [--width 192]

Both are reported, with how far the two ways differ. The second is the whole step of MAGE, its backward pass too.
"""

import argparse
import time

import torch
from diffusers import VQModel

from benchmarks.common import interleaved, median, report
from diffusers_repr.models import MaskedTokenModel, PixelTokenModel
from diffusers_repr.models.vq_tokens import encode_tokens
from diffusers_repr.objectives import ADDPObjective, MAGEObjective

CODES = 256


def tokenizer(levels: int) -> VQModel:
    return VQModel(
        block_out_channels=[32, 64, 128, 128][:levels], down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, latent_channels=32, num_vq_embeddings=CODES,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    vqvae, grid = tokenizer(4), args.side // 8
    sizes = {"hidden_size": args.width, "num_layers": 6, "num_attention_heads": 3, "decoder_num_layers": 4,
             "decoder_num_attention_heads": 3}  # fmt: skip
    predictor = MaskedTokenModel(CODES, grid, **sizes)
    images = torch.rand(args.batch, 3, args.side, args.side) * 2 - 1
    ids = encode_tokens(vqvae, images).flatten(1)
    order = torch.rand(ids.shape).argsort(1).argsort(1)
    masks = [order < len(order[0]) * share // 100 for share in (60, 70)]

    student = PixelTokenModel(CODES, args.side, 8, 3, **sizes)
    addp = ADDPObjective(student, vqvae, predictor)

    @torch.no_grad()
    def one_after_the_other():
        passes = [predictor(ids.masked_fill(mask, predictor.mask_token_id)).sample.softmax(-1) for mask in masks]
        return tuple(passes)

    pairs = zip(addp.predictions(ids, *masks), one_after_the_other(), strict=True)
    differ = max(float((one - other).abs().max()) for one, other in pairs)
    runs = {"together": lambda: addp.predictions(ids, *masks), "apart": one_after_the_other}
    times = interleaved(runs, args.repeats, time.process_time)
    settings = {"batch": args.batch, "side": args.side, "width": args.width}
    together, apart = median(times["together"]), median(times["apart"])
    report("tokens_predictor", ratio=apart / together, together=together, apart=apart, differ=differ, **settings)

    mage = MAGEObjective(MaskedTokenModel(CODES, grid, **sizes), vqvae)

    def step(batch):
        mage.zero_grad()
        torch.manual_seed(1)
        loss = mage(batch)["loss"]
        loss.backward()
        return float(loss.detach())

    differ = abs(step({"tokens": ids}) - step({"pixel_values": images}))
    runs = {"cached": lambda: step({"tokens": ids}), "encoded": lambda: step({"pixel_values": images})}
    times = interleaved(runs, args.repeats, time.process_time)
    cached, encoded = median(times["cached"]), median(times["encoded"])
    report("tokens_cached", ratio=encoded / cached, cached=cached, encoded=encoded, differ=differ, **settings)


if __name__ == "__main__":
    main()
