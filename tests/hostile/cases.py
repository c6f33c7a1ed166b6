"""One good artefact, copied and spoilt in one way a case."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def copied(source, target, *edits):
    """A copy of a folder with edits done, each called with the folder."""
    shutil.copytree(source, target)
    for edit in edits:
        edit(Path(target))
    return Path(target)


def changed(name, *path, to=None, drop=False):
    """An edit: one value of a JSON file, by its keys; without keys the whole content."""

    def edit(folder):
        file = folder / name
        data = json.loads(file.read_text())
        if not path:
            data = to
        place = data
        for key in path[:-1]:
            place = place[key]
        if path and drop:
            del place[path[-1]]
        elif path:
            place[path[-1]] = to
        file.write_text(json.dumps(data))

    return edit


def written(name, content):
    """An edit: a file with this text, bytes or JSON."""

    def edit(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return edit


def weights(change, name="diffusion_pytorch_model.safetensors"):
    """An edit: the tensors of a file, as `change` of the dict gives them."""

    def edit(folder):
        held = {key: value.clone() for key, value in load_file(folder / name).items()}
        save_file(change(held), folder / name)

    return edit
