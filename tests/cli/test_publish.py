"""What the command `publish` finds, with and without a clone, and how it tells of it; see also tests/hub."""

import json

import pytest

from diffusers_repr.cli import publish, read_settings
from diffusers_repr.tasks.files import push_saved


def command(*words):
    return publish.run(read_settings("publish", ["--namespace", "user", "--dry_run", *words]))


@pytest.fixture
def no_clone(monkeypatch):
    monkeypatch.setattr(publish, "_examples", lambda: None)


def folder(root, name, config="config.json", content=None, card="---\nlicense: mit\n---\n"):
    (root / name).mkdir(parents=True)
    (root / name / config).write_text(json.dumps(content or {}))
    if card:
        (root / name / "README.md").write_text(card)
    return str(root / name)


def found(*words):
    args = read_settings("publish", ["--namespace", "user", *words])
    return {item.name: item.kind for item in publish.find_publications(args.only, args.folder)}


def test_a_clone():
    everything = found()
    assert everything["sit"] == "pipelines"
    assert everything["scheduling_flow_match_sde"] == "schedulers"
    assert everything["digits-class-ddim"] == everything["digits-classifier"] == "models"
    assert everything["cars-edges"] == everything["cars-depth-standin"] == "heads"
    order = list(everything.values())
    assert order == sorted(order, key=publish.PUBLICATION_KINDS.index)
    for kind in publish.PUBLICATION_KINDS:
        assert found("--only", kind) == {name: its for name, its in everything.items() if its == kind}


def test_an_installed_package(no_clone, capsys, tmp_path):
    assert command() == 0
    out = capsys.readouterr().out
    assert "examples/models is part of a clone" in out
    assert "user/sit" in out
    with pytest.raises(FileNotFoundError, match="Give --folder, or run in a clone"):
        command("--only", "models")
    given = folder(tmp_path, "mine", "model_index.json")
    assert found("--only", "models", "--folder", given) == {"mine": "models"}


def test_folders(no_clone, tmp_path):
    folder(tmp_path / "many", "a-model", content={"_class_name": "UNet2DModel"})
    folder(tmp_path / "many", "a-head", content={"_class_name": "LinearHead"})
    folder(tmp_path / "many", "a-probe", "probe.json")
    (tmp_path / "many" / "notes").mkdir()
    one = folder(tmp_path, "one", "model_index.json")
    folder(tmp_path / "one", "unet")  # a part of it
    items = publish.find_publications(["models", "heads"], [str(tmp_path / "many"), one])
    assert {item.name: item.kind for item in items} == {
        "a-model": "models",
        "one": "models",
        "a-head": "heads",
        "a-probe": "heads",
    }
    assert [item.name for item in items if item.push is push_saved] == ["a-probe"]
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        found("--folder", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="holds no such folder"):
        found("--folder", str(tmp_path / "many" / "notes"))
    with pytest.raises(ValueError, match="--only pipelines leaves them out"):
        found("--only", "pipelines", "--folder", one)


def test_failures_are_told_at_the_end(no_clone, tmp_path, capsys):
    bare = folder(tmp_path, "bare", card=None)
    broken = folder(tmp_path, "broken", card="---\na: [1\n---\n")
    good = folder(tmp_path, "good")
    empty = folder(tmp_path, "none", card="Hello.")
    assert command("--only", "models", "--folder", bare, broken, good, empty) == 1
    out, err = capsys.readouterr()
    assert [line.split()[:3] for line in out.splitlines()[:-1] if line[0] != " "] == [
        ["models", "failed", "user/bare"],
        ["models", "failed", "user/broken"],
        ["models", "planned", "user/good"],
        ["models", "failed", "user/none"],
    ]
    assert out.splitlines()[-1] == "4 repositories: 1 planned, 3 failed; nothing was sent"
    told = err.splitlines()
    assert told[0].startswith("diffusers-repr publish: user/bare failed: ")
    for text, line in zip(("has no README.md", "cannot be read", "has no metadata"), told, strict=True):
        assert text in line
