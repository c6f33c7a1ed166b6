"""The data set card of a feature store."""

from __future__ import annotations

from typing import Any

from diffusers_repr.hub import dataset_card, is_repo_id
from diffusers_repr.hub.places import public_name


def store_card(manifest: dict[str, Any]) -> str:
    """README.md of a store, from its manifest: what each column is, how it was made, how to read it."""
    recipe, split = manifest["recipe"], manifest["recipe"]["data"]["split"]
    model, data, features = recipe["model"], recipe["data"], recipe["features"]
    rows = "\n".join(
        f"| `{c['name']}` | `{c['layer']}` | {c['timestep']:g} | {' x '.join(map(str, c['shape']))} |"
        for c in manifest["columns"]
    )
    settings = {
        "model": f"`{public_name(model['name'] or model['class'])}`"
        + (f" at `{model['revision']}`" if model["revision"] else ""),
        "data": f"`{public_name(data['name'])}`, split `{split}`, {data['rows']} rows",
        "noise": f"{features['noise']}, ensemble of {features['ensemble_size']}, seed {features['seed']}",
        "pooling": features["pooling"] or "none",
        "read": f"{features['where']} of each layer, images of {features['image_size'][0]} x "
        f"{features['image_size'][1]} (H x W)",
        "stored as": features["dtype"],
        "recipe": f"`{manifest['recipe_hash']}`",
    }
    if features["prompt"] is not None:
        settings["prompt"] = f'"{features["prompt"]}"'
    text = f"""Features of a diffusion model, extracted with diffusers-repr. Column `row` is the row in the source,
`image_hash` names the image as the network saw it{", `label` is the source's" if manifest["label"] else ""}.

| column | layer | timestep | shape |
|---|---|---|---|
{rows}

{chr(10).join(f"- {name}: {value}" for name, value in settings.items())}

`manifest.json` holds the whole recipe. Read it with `datasets.load_dataset`, or with
`diffusers_repr.store.feature_store.FeatureStore.open`."""
    source = data["name"] if is_repo_id(data["name"]) and "/" in data["name"] else None
    return dataset_card(
        title=f"Features of {str(data['name']).rstrip('/').rsplit('/', 1)[-1]}",
        text=text,
        tags=["features", "diffusion"],
        source_datasets=[source] if source else [],
        num_rows=manifest["rows"],
        data_files={split: f"data/{split}-*.parquet"},
    )
