"""Objectives that make representations, each with a batch that brings its own random numbers: for two processes."""

import torch
from diffusers import DDPMPipeline
from diffusers_repr.schedulers_ext.scheduling_patch_mask import PatchMaskScheduler
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from diffusers_repr import Denoiser
from diffusers_repr.objectives import (
    ADDPObjective,
    LDAEConfig,
    LDAEObjective,
    MAGEObjective,
    MDMObjective,
    TokenizerConfig,
    TokenizerObjective,
)
from tests.objectives import autoencoder_cases as autoencoders
from tests.objectives import distillation_cases as distillation
from tests.objectives import token_cases as tokens
from tests.objectives.cases import shake
from tests.testers.models import unet2d
from tests.training.loop_cases import Numbers, run_here

COUNT = 4


def ldae():
    model = {"sample_size": 8, "in_channels": 1, "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    config = LDAEConfig(model=model, num_directions=3)
    return LDAEObjective(shake(config.build()), config.fit([tokens.images(20)]), config)


def mdm():
    torch.manual_seed(0)
    unet = shake(unet2d(1, sample_size=8), std=0.05)
    return MDMObjective(Denoiser.from_pipe(DDPMPipeline(unet, PatchMaskScheduler(patch_size=2))))


def dreamteacher():
    """With batch norms that normalise by their running statistics: those of a batch are each process's own."""
    made = distillation.dreamteacher()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module
            module.training = False
    return made


def draws(*shape):
    return torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(9))


TIMES = torch.tensor([20, 300, 640, 980])
GREY = {"pixel_values": tokens.images(COUNT), "noise": draws(1, 8, 8), "time": TIMES}
MASKS = {"pixel_values": tokens.images(COUNT), "mask_noise": draws(16).sigmoid()}
CASES = {  # name -> objective, batch
    "RepFusion": (
        lambda: distillation.repfusion(level="uniform"),
        {**distillation.batch(COUNT), "time": TIMES},
    ),
    "DreamTeacher": (dreamteacher, distillation.batch(COUNT)),
    "DiffAE": (lambda: autoencoders.acting(autoencoders.objective("diffae")), GREY),
    "InfoDiffusion": (
        lambda: autoencoders.acting(autoencoders.objective("infodiffusion", standardize_features=True)),
        {**GREY, "prior": draws(autoencoders.D)},
    ),
    "PDAE": (lambda: autoencoders.acting(autoencoders.objective("pdae")), GREY),
    "l-DAE": (ldae, {**GREY, "noise": draws(16, 3)}),
    "MDM": (mdm, GREY),
    # as many masked tokens in each half: the loss is a mean over them
    "MAGE": (
        lambda: MAGEObjective(tokens.masked_model(dropout=0.0), tokens.tokenizer()),
        {**MASKS, "mask_ratio": torch.full((COUNT,), 0.6)},
    ),
    "ADDP": (
        lambda: ADDPObjective(tokens.pixel_model(dropout=0.0), tokens.tokenizer(), tokens.masked_model()),
        MASKS,
    ),
    "tokenizer": (lambda: TokenizerObjective(tokens.tokenizer(), TokenizerConfig()), GREY),
}
ONE_FOR_ALL = {"ADDP": {"mask_counts": (9, 5)}}  # no column of a batch


def gradients(name: str, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """Gradients of this process's part of the batch, averaged over all by DDP where there are several.

    A parameter that a step leaves without a gradient raises under DDP; the tokenizer has two phases, as GANs have.
    """
    make, batch = CASES[name]
    objective = make().train()
    part = {key: value.chunk(world)[rank] for key, value in batch.items()}
    several = len(objective.phases) > 1
    module = DistributedDataParallel(objective, find_unused_parameters=several) if world > 1 else objective
    torch.manual_seed(0)
    found = {}
    for phase in objective.phases:
        objective.zero_grad()
        module({**part, **ONE_FOR_ALL.get(name, {}), "micro": 0}, phase=phase)["loss"].backward()
        found |= {f"{phase}.{key}": p.grad.clone() for key, p in objective.named_parameters() if p.grad is not None}
    return found


class Rows(Numbers):
    """The batch of MDM's case as data, twice over, each row with its noise and timestep."""

    def __init__(self):
        super().__init__(2 * COUNT, drawn=True)
        self.columns = {key: torch.cat([column, column.flip(0)]) for key, column in GREY.items()}


LOOP = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "lr_scheduler": "constant", "lr_warmup_steps": 0,
        "checkpointing_steps": 2, "logging_steps": 1, "max_train_steps": 2, "ema_warmup": False}  # fmt: skip


def job(folder):
    """One of two processes: gradients of all, written by the first; the loop; whether both processes have the same."""
    rank, told = torch.distributed.get_rank(), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        found = gradients(name, rank, 2)
        if rank == 0:
            save_file(found, folder / f"{name}.safetensors")
        told[name] = sorted(found)
    run_here(folder / "loop", mdm(), Rows(), **LOOP, train_batch_size=COUNT // 2)
    return told
