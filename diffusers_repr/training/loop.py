"""`train`: the one loop of all methods."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs

from diffusers_repr.objectives import Objective
from diffusers_repr.store.progress import progress_bar
from diffusers_repr.training.batches import gather_streams, make_batches
from diffusers_repr.training.checkpoints import drop_partial, find_checkpoint
from diffusers_repr.training.checks import (
    check_accumulation,
    check_place,
    check_result,
    check_services,
    check_train_data,
    warn_of_skipped,
)
from diffusers_repr.training.config import TrainingConfig, recipe_of
from diffusers_repr.training.dry_run import describe_run
from diffusers_repr.training.evaluation import Evaluate, Evaluations, validate
from diffusers_repr.training.logs import Log
from diffusers_repr.training.lora import add_lora, not_apart
from diffusers_repr.training.result import save_result, write_card
from diffusers_repr.training.run import Run, end_processes
from diffusers_repr.training.sharding import check_sharding

# Where things lie; what they are stands in fingerprints.
_PLACES = ("cache_images", "latents_dir", "features_dir", "feature_cache", "encoder", "dataset_name")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        output_dir: The folder of the result.
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
    """Train an objective and save its artifacts: a pipeline, a network, heads.

    The same call again goes on from the newest whole checkpoint, bit for bit on a CPU: sample n of the run is
    `permutation(seed, epoch)[n mod N]`, all randomness of a step is one of (seed, step, rank), and checkpoints lie
    between optimizer steps. Steps whose loss or gradient is not finite are skipped and counted.

    Args:
        objective: What is trained, on the CPU.
        data: A `TrainData` (map-style), or a `StreamData`.
        config: Settings of the loop.
        recipe: All settings of the run, for the card and for telling one run from another; those of `config` if None.
        accelerator: Of accelerate; made from `config` if None, and the process group is ended with the run then.
        evaluate: `(result, step) -> {name: number}`, `result` being `objective.result`, mostly a pipeline; called on
            the main process with the averaged weights every `validation_steps` and at the end; its numbers go to
            `evaluation.jsonl`, the trackers and the card.

    Returns:
        A `TrainResult`; the folder `config.output_dir` holds the artifacts, `loss.jsonl`, `samples.png`, `recipe.yaml`
        and a card. A dry run prints and writes nothing.

    Raises:
        ValueError: For data that do not fit the objective, a checkpoint of another run, or samples asked of a method
            that makes none.
        TypeError: For what is no objective or no training data, or if the result cannot be saved.
        CheckpointError: If no checkpoint is whole.
        FloatingPointError: If losses stay infinite or NaN.
        ImportError: For a tracker that is not installed.
        NotADirectoryError: If the output folder is a file.
        OSError: If a checkpoint or the result cannot be written; earlier checkpoints are untouched.
        RuntimeError: If FSDP was asked for and is not to be had.
        HubError: If the result is to be pushed and there is no token.
        ImportError: For a tracker that is not installed.
    """
    check_services(config)
    check_result(objective, config)
    check_train_data(data)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(config.seed)
    asked = dataclasses.replace(config, mixed_precision="no") if config.dry_run else config  # fp16 needs a GPU
    given, accelerator = accelerator, accelerator or make_accelerator(asked, len(objective.phases) > 1)
    check_sharding(accelerator)
    check_accumulation(accelerator)
    objective.check_data(data)
    if config.lora_rank:
        add_lora(objective, config.lora_rank)
    if config.dry_run:
        accelerator.print(describe_run(objective, data, config, recipe or recipe_of(config)))
        return TrainResult(Path(config.output_dir), 0, [], [], 0)
    if config.lora_rank and (told := not_apart(objective)):
        accelerator.print(told)
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
    check_place(accelerator, run.progress.step, config.output_dir)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        drop_partial(config.output_dir)
    log = Log(config, run.progress.step, accelerator, recipe)
    evaluations = Evaluations(config, run.progress.step, accelerator, evaluate)
    train_loop(run, data, state.get("streams"), log, evaluations)

    settings = recipe or dataclasses.asdict(config)
    save_result(run, settings)
    validate(run, evaluations, "samples.png", getattr(data, "class_names", None))
    write_card(run, data, log.lines, settings, evaluations.last)
    progress = run.progress
    warn_of_skipped(progress)
    log.close()
    del run
    if given is None:
        end_processes(accelerator)
    return TrainResult(Path(config.output_dir), progress.step, log.lines, evaluations.lines, progress.skipped)


def train_loop(run: Run, data: Any, streams: Any, log: Log, evaluations: Evaluations) -> None:
    """Step to the end, with lines of the log, checkpoints and validation on the way."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    batches = make_batches(data, config, accelerator, progress.step, streams, run.objective)
    images_per_step = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    of = f" of {len(data)}" if hasattr(data, "__len__") else ""
    count = accelerator.num_processes
    accelerator.print(
        f"{count} process{'es' if count > 1 else ''}, {images_per_step}{of} images a step, "
        f"steps {progress.step} to {config.max_train_steps} in {config.output_dir}"
    )
    shown = accelerator.is_local_main_process
    bar = progress_bar(config.max_train_steps, "training", "step", start=progress.step, shown=shown)
    since = time.perf_counter(), progress.step
    cheap = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    while progress.step < config.max_train_steps:
        run.step([next(batches) for _ in range(config.gradient_accumulation_steps)], data.on_device)
        step, last = progress.step, progress.step == config.max_train_steps
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
            validate(run, evaluations, f"samples/step-{step:08d}.png", getattr(data, "class_names", None))
            since = time.perf_counter(), step
    bar.close()


def make_accelerator(config: TrainingConfig, several_phases: bool = False) -> Accelerator:
    """An accelerator for `train`; `accelerate launch` and its config decide processes and devices.

    Raises:
        ImportError: For a tracker that is not installed, which accelerate would leave out without a word.
    """
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=several_phases)
    trackers = None if config.report_to == "none" else config.report_to
    installed = [str(tracker) for tracker in get_available_trackers()]
    if trackers in LOGGER_TYPE_TO_CLASS and trackers not in installed or trackers == "all" and not installed:
        raise ImportError(
            f"--report_to {trackers}: it is not installed (installed: {', '.join(installed) or 'no tracker'}). "
            'tensorboard is part of pip install "diffusers-repr[train]".'
        )
    return Accelerator(
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[kwargs],
        log_with=trackers,
        project_dir=config.output_dir if trackers else None,
    )


def enable_checkpointing(module: Any) -> None:
    """Recompute activations in the backward pass.

    Raises:
        ValueError: If the network cannot.
    """
    # A class attribute of diffusers' models, private and the only mark: without it no network could checkpoint.
    if not getattr(module, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{type(module).__name__} has no gradient checkpointing; drop --gradient_checkpointing.")
    module.enable_gradient_checkpointing()


def identity_of(
    objective: Objective, data: Any, config: TrainingConfig, recipe: Mapping[str, Any] | None, accelerator: Accelerator
) -> dict[str, Any]:
    """What decides the weights of a run: a checkpoint of another is refused."""
    mine = config.identity()
    theirs = {k: v for k, v in (recipe or {}).items() if k not in dataclasses.asdict(config)}
    for name in _PLACES:
        theirs.pop(name, None)
    # A cache gives the same numbers as what it was made from, or is refused when it is opened.
    rows = {k: v for k, v in data.fingerprint().items() if k not in ("latents", "features")}
    return {
        **mine,
        **theirs,
        "objective": type(objective).__name__,
        **objective.identity(),
        "data": rows,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
