"""What two gloo processes do for test_distributed.py and test_fsdp.py; `tests/testers/two_processes.py` runs it."""

import math
from contextlib import contextmanager

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import nn

from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import DiffusionObjective
from diffusers_repr.training import train
from diffusers_repr.training.update import Update
from tests.data.data_cases import rows
from tests.testers.hosts import average_over_gloo
from tests.testers.two_processes import everywhere
from tests.training.loop_cases import Numbers, forget_accelerate, run_here, settings, tiny_sit_objective

# Adam's quotient smooth enough for sums in another order to stay sums
SMOOTH = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "lr_scheduler": "constant", "lr_warmup_steps": 0,
          "checkpointing_steps": 1, "logging_steps": 2, "max_train_steps": 3, "ema_warmup": False}  # fmt: skip
PLAIN = {"train_batch_size": 4}
CASES = ("plain", "parts", "partly")


class Partly(DiffusionObjective):
    """A head that is trained beside a network of which some weights are not."""

    discarded = ("head",)

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        torch.manual_seed(1)
        self.head = nn.Linear(3, 1)
        self.network.patch_embed.requires_grad_(False)
        self.freeze("teacher", nn.Linear(3, 3))

    def forward(self, batch, phase="main"):
        out = super().forward(batch)
        with torch.no_grad():
            features = self.frozen["teacher"](torch.ones(3))
        return {"loss": out["loss"] + 0.1 * self.head(features).square().sum(), "denoising": out["loss"].detach()}


def case(name, batch_size, **changes):
    """`(objective, data, settings)` of a run of so many images a step and process."""
    objective = tiny_sit_objective(Partly if name == "partly" else DiffusionObjective)
    parts = 2 if name == "parts" else 1
    sizes = {"train_batch_size": batch_size // parts, "gradient_accumulation_steps": parts}
    return objective, Numbers(drawn=True, times=1000), {**SMOOTH, **sizes, **changes}


@contextmanager
def first_gradients():
    """A dict that takes the gradients of the first update inside, by place."""
    kept, original = {}, Update.step

    def step(update, lr, loss, ema):
        if not kept:
            kept.update({str(n): p.grad.detach().clone() for n, p in enumerate(update.params)})
        return original(update, lr, loss, ema)

    Update.step = step
    try:
        yield kept
    finally:
        Update.step = original


def ddp(folder):
    told, rank = {}, torch.distributed.get_rank()
    for name in CASES:
        objective, data, changes = case(name, 2)
        with first_gradients() as gradients:
            run_here(folder / name, objective, data, **changes)
        told[f"{name}_alike"] = same(everywhere([p.detach() for p in objective.parameters()]))
        if rank == 0:
            save_file(gradients, folder / name / "gradients.safetensors")
    told["seen"] = draws(folder / "drawn")
    for name, ends in (("whole", (3,)), ("resumed", (1, 3))):
        for steps in ends:
            run_here(folder / name, tiny_sit_objective(), Numbers(), **{**SMOOTH, "max_train_steps": steps})
            config = DataConfig(label_column="none", streaming=True, shuffle_buffer=3)
            dataset = rows(11).to_iterable_dataset(num_shards=4)
            data = load_train_data(config, 1, 8, dataset, rank=rank, world_size=2)
            place = folder / f"stream_{name}"
            run_here(place, tiny_sit_objective(), data, **{**SMOOTH, "max_train_steps": steps})
    told["bad"] = one_bad_process(folder / "bad", rank)
    return told


def draws(folder):
    """First number that each process draws for each step."""
    data, seen = Numbers(), []
    on_device = data.on_device
    data.on_device = lambda batch: (
        seen.append((torch.get_rng_state().sum().item(), batch["index"].tolist())) or (on_device(batch))
    )
    run_here(folder, tiny_sit_objective(), data, **SMOOTH, train_batch_size=2)
    return everywhere(seen)


def one_bad_process(folder, rank):
    """NaN in one process only: all skip, and after too many all stop."""

    class Bad(DiffusionObjective):
        calls = 0

        def forward(self, batch, phase="main"):
            self.calls += 1
            out = super().forward(batch)
            return {"loss": out["loss"] * (math.nan if rank == 1 and self.calls > 2 else 1)}

    import diffusers_repr.training.run as module

    module.MAX_SKIPPED_IN_A_ROW = 3
    objective = tiny_sit_objective(Bad)
    try:
        run_here(folder, objective, Numbers(), **{**SMOOTH, "checkpointing_steps": 2, "max_train_steps": 20})
    except FloatingPointError as error:
        return everywhere([str(error), objective.calls])
    return None


def same(values):
    return all(torch.equal(a, b) for others in values[1:] for a, b in zip(values[0], others, strict=True))


def sharding(mixed_precision="no"):
    """accelerate's own FSDP2, which it leaves out on a CPU unless its state is told."""
    forget_accelerate()
    accelerator = Accelerator(mixed_precision=mixed_precision)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
    )
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    return accelerator


def fsdp(folder):
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    average_over_gloo()
    told = {}
    for name in CASES:
        objective, data, changes = case(name, 2)
        train(objective, data, settings(folder / name, **changes), accelerator=sharding())
        told[name] = {
            "units": [n for n, module in objective.named_modules() if isinstance(module, FSDPModule)],
            "sharded": all(isinstance(p, DTensor) for p in objective.parameters()),
            "share": sum(p.to_local().numel() for p in objective.parameters()),
            "size": sum(p.numel() for p in objective.parameters()),
        }
    for name, ends in (("whole", (3,)), ("resumed", (1, 3))):
        for steps in ends:
            config = settings(folder / name, **{**SMOOTH, "max_train_steps": steps})
            train(tiny_sit_objective(), Numbers(), config, accelerator=sharding())
    objective, data, changes = case("lora", 2, lora_rank=2, eval_batch_size=8, validation_steps=2)
    train(objective, data, settings(folder / "lora", **changes), accelerator=sharding())
    objective, data, changes = case("bf16", 2, mixed_precision="bf16")
    train(objective, data, settings(folder / "bf16", **changes), accelerator=sharding("bf16"))
    return told
