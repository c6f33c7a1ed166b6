"""`train`: the one loop of all methods."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from huggingface_hub import get_token
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from diffusers_repr.hub import HubError
from diffusers_repr.objectives import Objective
from diffusers_repr.training.checkpoints import drop_partial, find_checkpoint
from diffusers_repr.training.config import TrainingConfig, recipe_of
from diffusers_repr.training.dry_run import describe_run
from diffusers_repr.training.evaluation import Evaluate, Evaluations, look
from diffusers_repr.training.logs import Log
from diffusers_repr.training.lora import add_lora
from diffusers_repr.training.order import batch_indices
from diffusers_repr.training.result import save_result
from diffusers_repr.training.run import Run
from diffusers_repr.training.sharding import check_sharding


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        output_dir: The pipeline folder.
        step: Optimizer steps done.
        log: Lines of `loss.jsonl`.
        evaluations: Lines of `evaluation.jsonl`.
        skipped: Steps that were not finite.
    """

    output_dir: Path
    step: int
    log: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    skipped: int


def train(
    objective: Objective,
    data: Any,
    config: TrainingConfig,
    *,
    recipe: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    evaluate: Evaluate | None = None,
) -> TrainResult:
    """Train an objective and save its pipeline, projectors and heads.

    The same call again goes on from the newest whole checkpoint, bit for bit on a CPU: sample n of the run is
    `permutation(seed, epoch)[n mod N]`, all randomness of a step is one of (seed, step, rank), and checkpoints lie
    between optimizer steps. Steps whose loss or gradient is not finite are skipped and counted.

    Args:
        objective: What is trained, on the CPU.
        data: A `TrainData` (map-style), or a `StreamData`.
        config: Settings of the loop.
        recipe: All settings of the run, for the card and for telling one run from another; those of `config` if None.
        accelerator: Of accelerate; made from `config` if None, and the process group is ended with the run then.
        evaluate: `(pipeline, step) -> {name: number}`, called on the main process with the averaged weights every
            `validation_steps` and at the end; its numbers go to `evaluation.jsonl`, the trackers and the card.

    Returns:
        A `TrainResult`; the folder `config.output_dir` holds the pipeline, `heads/`, `loss.jsonl`, `samples.png`,
        `recipe.yaml` and a card. A dry run prints and writes nothing.

    Raises:
        ValueError: For data that do not fit the objective, or a checkpoint of another run.
        CheckpointError: If no checkpoint is whole.
        FloatingPointError: If losses stay infinite or NaN.
        OSError: If a checkpoint or the result cannot be written; earlier checkpoints are untouched.
        RuntimeError: If FSDP was asked for and is not to be had.
        HubError: If the result is to be pushed and there is no token.
    """
    if config.push_to_hub and get_token() is None:
        raise HubError("`push_to_hub` needs a token: log in with `hf auth login`, or set HF_TOKEN.")
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(config.seed)
    given, accelerator = accelerator, accelerator or make_accelerator(config, len(objective.phases) > 1)
    check_sharding(accelerator)
    check_accumulation(accelerator)
    objective.check_data(data)
    if config.lora_rank:
        add_lora(objective, config.lora_rank)
    if config.dry_run:
        accelerator.print(describe_run(objective, data, config, recipe or recipe_of(config)))
        return TrainResult(Path(config.output_dir), 0, [], [], 0)
    for module in objective.networks().values():
        if config.gradient_checkpointing:
            enable_checkpointing(module)
        if config.torch_compile:
            module.compile()

    identity = identity_of(objective, data, config, recipe, accelerator)
    run = Run(objective, config, accelerator, identity)
    checkpoint = find_checkpoint(config.output_dir, config.resume_from_checkpoint, identity)
    state = run.load(checkpoint) if checkpoint else {}
    if run.progress.step > config.max_train_steps:
        raise ValueError(f"{checkpoint} is past --max_train_steps {config.max_train_steps}. Raise that.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        drop_partial(config.output_dir)

    batches = make_batches(data, config, accelerator, run.progress.step, state.get("streams"), objective)
    images_per_step = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    of = f" of {len(data)}" if hasattr(data, "__len__") else ""
    accelerator.print(
        f"{accelerator.num_processes} processes, {images_per_step}{of} images a step, "
        f"steps {run.progress.step} to {config.max_train_steps} in {config.output_dir}"
    )
    log = Log(config, run.progress.step, accelerator, recipe)
    evaluations = Evaluations(config, run.progress.step, accelerator, evaluate)
    bar = tqdm(
        total=config.max_train_steps,
        initial=run.progress.step,
        disable=not accelerator.is_local_main_process,
        mininterval=1,
    )
    since = time.perf_counter(), run.progress.step
    cheap = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    while run.progress.step < config.max_train_steps:
        run.step([next(batches) for _ in range(config.gradient_accumulation_steps)], data.on_device)
        step, last = run.progress.step, run.progress.step == config.max_train_steps
        if cheap:
            run.settle()
        if step % config.logging_steps == 0 or last:
            means = run.take_averages()
            speed = (step - since[1]) * images_per_step / max(time.perf_counter() - since[0], 1e-9)
            since = time.perf_counter(), step
            log.write(run, means, speed)
            bar.set_postfix_str(log.summary(), refresh=False)
        bar.update()
        if step % config.checkpointing_steps == 0 or last:
            run.save(gather_streams(data, accelerator))
        if config.validation_steps and step % config.validation_steps == 0 and not last:
            look(run, evaluations, f"samples/step-{step:08d}.png")
            since = time.perf_counter(), step
    bar.close()
    look(run, evaluations, "samples.png")
    save_result(run, data, log.lines, recipe or dataclasses.asdict(config), evaluations.last)
    log.close()
    if given is None:
        accelerator.end_training()
    return TrainResult(Path(config.output_dir), run.progress.step, log.lines, evaluations.lines, run.progress.skipped)


def make_accelerator(config: TrainingConfig, several_phases: bool = False) -> Accelerator:
    """An accelerator for `train`; `accelerate launch` and its config decide processes and devices."""
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=several_phases)
    trackers = None if config.report_to == "none" else config.report_to
    return Accelerator(
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[kwargs],
        log_with=trackers,
        project_dir=config.output_dir if trackers else None,
    )


def check_accumulation(accelerator: Accelerator) -> None:
    """The loop accumulates by itself; accelerate must not divide the loss once more.

    Raises:
        ValueError: If accelerate was told to.
    """
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerate has gradient_accumulation_steps={accelerator.gradient_accumulation_steps}; leave it at 1 "
            "there, and set it in TrainingConfig or by the script's --gradient_accumulation_steps."
        )


def enable_checkpointing(module: Any) -> None:
    """Recompute activations in the backward pass.

    Raises:
        ValueError: If the network cannot.
    """
    if not getattr(module, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{type(module).__name__} has no gradient checkpointing; drop --gradient_checkpointing.")
    module.enable_gradient_checkpointing()


def identity_of(
    objective: Objective, data: Any, config: TrainingConfig, recipe: Mapping[str, Any] | None, accelerator: Accelerator
) -> dict[str, Any]:
    """What decides the weights of a run: a checkpoint of another is refused."""
    mine = config.identity()
    theirs = {k: v for k, v in (recipe or {}).items() if k not in dataclasses.asdict(config)}
    for name in ("cache_images", "latents_dir", "features_dir"):
        theirs.pop(name, None)  # where the same numbers come from
    return {
        **mine,
        **theirs,
        "objective": type(objective).__name__,
        **objective.identity(),
        "data": data.fingerprint(),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def make_batches(
    data: Any, config: TrainingConfig, accelerator: Accelerator, step: int, streams: Any, objective: Objective
) -> Iterator[dict[str, Any]]:
    """Micro-batches of this process from `step` on, on the device."""
    micro, everyone = config.train_batch_size, config.train_batch_size * accelerator.num_processes
    workers = config.dataloader_num_workers
    pinned = accelerator.device.type == "cuda"
    loader: Any
    if isinstance(data, IterableDataset):
        if streams:
            data.load_state_dict(streams[accelerator.process_index])  # type: ignore[attr-defined]
        loader = DataLoader(data, batch_size=micro, num_workers=0)
    else:
        first = step * everyone * config.gradient_accumulation_steps + accelerator.process_index * micro
        order = batch_indices(len(data), config.seed, first, micro, stride=everyone)
        if hasattr(data, "batch"):  # gives whole batches from memory
            loader = (data.batch(indices) for indices in order)
        else:
            loader = DataLoader(data, batch_sampler=order, num_workers=workers, pin_memory=pinned)
    for batch in loader:
        objective.check_batch(batch)
        yield {k: to_device(v, accelerator.device) for k, v in batch.items()}


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors, and mappings of them, on the device; the rest as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def gather_streams(data: Any, accelerator: Accelerator) -> list[Any] | None:
    """The place of each process in its stream; None for map-style data, whose place is the step."""
    if not isinstance(data, IterableDataset):
        return None
    mine = data.state_dict()  # type: ignore[attr-defined]
    if accelerator.num_processes == 1:
        return [mine]
    places: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(places, mine)
    return json.loads(json.dumps(places))
