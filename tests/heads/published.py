"""Checkpoints of Readout Guidance and Diffusion Hyperfeatures under their published names, and what they compute."""

import torch
from torch.nn import functional

from diffusers_repr.heads import readout_layers

WIDTH, INNER, GROUPS = 128, 32, 32
IDXS = (8, 11)  # of the residual branches, so that tests take little time
SETTINGS = {
    "spatial": {"control_type": "depth", "control_range": (-1.0, 1.0)},
    "appearance": {"sdedit_root": "pseudo_labels/sdedit"},
    "correspondence": {"points_root": "pseudo_labels/cotracker"},
}


def checkpoint(denoiser, kind="spatial", idxs=IDXS, sequential=False, seed=0):
    """As its training writes it: `{"aggregation_network", "config", "step"}`."""
    layers = [readout_layers(denoiser.model)[at] for at in idxs]
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return (
            torch.randn(*shape, generator=generator) / max(1, shape[-1] * (shape[1] if len(shape) > 1 else 1)) ** 0.5
        )

    state = {"mixing_weights": weight(len(layers))}
    for at, layer in enumerate(layers):
        channels = denoiser.model.get_submodule(layer).out_channels
        place = f"bottleneck_layers.{at}." + ("0." if sequential else "")
        sizes = {"shortcut": (WIDTH, channels, 1, 1), "conv1": (INNER, channels, 1, 1)}
        sizes |= {"conv2": (INNER, INNER, 3, 3), "conv3": (WIDTH, INNER, 1, 1)}
        for name, shape in sizes.items():
            state[f"{place}{name}.weight"] = weight(*shape)
            state[f"{place}{name}.norm.weight"] = 1 + 0.1 * weight(shape[0])
            state[f"{place}{name}.norm.bias"] = 0.1 * weight(shape[0])
        width = denoiser.model.time_embedding.linear_2.out_features
        state[f"{place}emb_layers.weight"] = weight(INNER, width)
        state[f"{place}emb_layers.bias"] = weight(INNER)
    if kind == "spatial":
        for at, (out, size, kernel) in {0: (16, WIDTH, 3), 2: (8, 16, 3), 4: (3, 8, 1)}.items():
            state[f"output_head.{at}.weight"] = weight(out, size, kernel, kernel)
            state[f"output_head.{at}.bias"] = weight(out)
    settings = {
        "model_id": "tiny/model",
        "idxs": None if idxs is None else str(list(idxs)),
        "aggregation_kwargs": {"use_output_head": kind == "spatial", "bottleneck_sequential": sequential},
        "dataset_args": dict(SETTINGS[kind]),
    }
    return {"step": 7, "config": settings, "aggregation_network": state}


def hyperfeatures(denoiser, saved=(3, 2, 0), steps=4, seed=0):
    """As the training of Diffusion Hyperfeatures writes it: no time embedding, a weight a step and layer."""
    held = checkpoint(denoiser, "appearance", range(12), sequential=True, seed=seed)
    state = {name: value for name, value in held["aggregation_network"].items() if ".emb_layers." not in name}
    state["mixing_weights"] = torch.randn(len(saved) * 12, generator=torch.Generator().manual_seed(seed))
    settings = {"model_id": "tiny/model", "save_timestep": list(saved), "num_timesteps": steps,
                "diffusion_mode": "inversion", "guidance_scale": -1, "prompt": ""}  # fmt: skip
    return {"step": 7, "config": settings, "aggregation_network": state}


def forward(state, maps, embedding=None):
    """The published network on maps of one size, concatenated nowhere: `(B, C, H, W)` each, embedding `(B, E)`."""
    state = {name: value.to(maps[0].dtype) for name, value in state.items()}
    shares, total = torch.softmax(state["mixing_weights"], 0), 0
    layers = sum(name.endswith(".conv2.weight") for name in state)
    for number, x in enumerate(maps):
        at = number % layers  # levels share the bottlenecks

        def convolved(x, name, padding=0, at=at):
            place = f"bottleneck_layers.{at}.{name}"
            y = functional.conv2d(x, state[f"{place}.weight"], padding=padding)
            return functional.group_norm(y, GROUPS, state[f"{place}.norm.weight"], state[f"{place}.norm.bias"])

        y = functional.relu(convolved(x, "conv1"))
        if embedding is not None:
            place = f"bottleneck_layers.{at}.emb_layers"
            told = functional.linear(embedding, state[f"{place}.weight"], state[f"{place}.bias"])
            y = y + functional.relu(told)[:, :, None, None]
        y = convolved(functional.relu(convolved(y, "conv2", 1)), "conv3")
        total = total + shares[number] * functional.relu(y + convolved(x, "shortcut"))
    if "output_head.0.weight" not in state:
        return total
    for at in (0, 2, 4):
        total = functional.conv2d(
            total, state[f"output_head.{at}.weight"], state[f"output_head.{at}.bias"], padding=at < 4 and 1 or 0
        )
        total = functional.silu(total) if at < 4 else torch.tanh(total)
    return total


def embedded(unet, timestep, rows=1):
    """The time embedding of a U-Net, by its own modules."""
    given = torch.full((rows,), timestep)
    return unet.time_embedding(unet.time_proj(given).to(unet.dtype))
