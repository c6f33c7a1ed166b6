"""Clip, AdamW and moving average together, as `train` does them, against their loops over parameters (SiT-S/2)."""

import copy

import torch
from accelerate import Accelerator
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from benchmarks.common import interleaved, median, report
from diffusers_repr import Denoiser, SiTTransformer2DModel
from diffusers_repr.objectives import DiffusionObjective
from diffusers_repr.training import TrainingConfig
from diffusers_repr.training.run import Run


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator()
    objective = DiffusionObjective(Denoiser(SiTTransformer2DModel.from_size("S/2"), FlowMatchODEScheduler()))
    network = copy.deepcopy(objective.network).to(accelerator.device)
    run = Run(objective, TrainingConfig(ema_max_decay=0.9999, ema_warmup=False), accelerator, {})
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0, foreach=False, fused=False)
    loss = torch.ones((), device=accelerator.device)
    grads = [torch.randn_like(p) for p in parameters]

    def looped() -> None:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(average, parameters, strict=True):
                mean.mul_(0.9999).add_(parameter.data, alpha=1 - 0.9999)
        wait()

    def fused() -> None:
        for parameter, grad in zip(objective.network.parameters(), grads, strict=True):
            parameter.grad = grad
        run.updates["main"].step(1e-4, loss, run.ema)
        wait()

    def wait() -> None:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    times = {name: median(values) for name, values in interleaved({"loops": looped, "ours": fused}, 9).items()}
    report(
        "optimizer_update",
        parameters=sum(p.numel() for p in parameters),
        device=accelerator.device.type,
        loops_seconds=times["loops"],
        seconds=times["ours"],
        ratio=times["loops"] / times["ours"],
        target=">= 3 on a CPU",
    )


if __name__ == "__main__":
    main()
