"""The study of generated data: single digits of scenes, the table, rows that are kept; a short run of all, slow."""

import json

import generated_data as study
import pytest
from PIL import Image

from diffusers_repr.data.image_data import load_images
from diffusers_repr.data.scenes import load_scenes


def test_real_scenes_of_one_digit(monkeypatch):
    found = study.single_digits("train", 2)
    assert found.features["label"].names == list(study.DIGIT_NAMES)
    scenes = [row for row in load_scenes("train", 40) if len(row["things"]) == 1]
    digits = [row for row in scenes if row["things"][0]["kind"] < 10]
    assert found["label"][:] == [row["things"][0]["kind"] for row in digits[:2]]
    assert [image.tobytes() for image in found["image"]] == [row["image"].tobytes() for row in digits[:2]]
    monkeypatch.setattr(study, "load_scenes", lambda *given: [])
    with pytest.raises(ValueError, match="fewer than the 1 asked for"):
        study.single_digits("test", 1)


def test_rows_are_kept_and_the_table_is_of_all_seeds(tmp_path, monkeypatch):
    asked = []

    def part(self, seed):
        def row(name):
            asked.append((name, seed))
            return {"accuracy": 0.5 + 0.1 * seed, "steps": 3}

        return {name: lambda name=name: row(name) for name in ("one", "two")}

    for name in ("zero", "few"):
        monkeypatch.setattr(study.Study, name, part)
    flags = ["--results", str(tmp_path), "--work", str(tmp_path / "work"), "--parts", "zero", "few", "--seeds"]
    study.main([*flags, "0"])
    study.main([*flags, "0", "1", "--rows", "one"])
    assert asked == [("one", 0), ("two", 0), ("one", 0), ("two", 0), ("one", 1), ("one", 1)]
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(line["part"], line["row"], line["seed"]) for line in lines] == [
        ("zero", "one", 0), ("zero", "two", 0), ("few", "one", 0), ("few", "two", 0), ("zero", "one", 1),
        ("few", "one", 1),
    ]  # fmt: skip
    told = (tmp_path / "table.md").read_text()
    assert "| one | 0.550 ± 0.071 | 3 | 2 |" in told
    assert "| two | 0.500 | 3 | 1 |" in told
    with pytest.raises(ValueError, match="name it by --class_model"):
        study.main([*flags, "0", "--dataset_name", "photographs"])
    with pytest.raises(ValueError, match="are of the digits"):
        study.main([*flags, "0", "--dataset_name", "photographs", "--parts", "tricks"])


def test_few_labels_are_mixed_with_as_many_variants(tmp_path, monkeypatch):
    args = ["--work", str(tmp_path), "--train_images", "30", "--test_images", "10", "--variants", "2",
            "--inference_steps", "2"]  # fmt: skip
    made = study.Study(study.parsed(args))
    runs = []
    monkeypatch.setattr(study, "run", lambda script, **given: runs.append((script, given)))
    monkeypatch.setattr(study, "last_line", lambda path: {"eval_accuracy": 0.25})
    assert made.few_labels(1, "strength 0.5", 0)["accuracy"] == 0.25
    (script, given) = runs[0]
    assert (script, given["eval_split"]) == ("train_student", "test")
    mixed, few = (
        load_images(str(given["dataset_name"]), "train"),
        load_images(str(tmp_path / "data/few-1-seed0"), "train"),
    )
    assert len(few) == 10
    assert sorted(few.labels()) == list(range(10))
    assert mixed.labels() == few.labels() * 2 + [label for label in few.labels() for _ in range(2)]
    images = mixed.read(range(len(mixed)))
    assert [image.tobytes() for image in images[:10]] == [image.tobytes() for image in few.read(range(10))]
    assert all(isinstance(image, Image.Image) and image.size == (8, 8) for image in images)
    assert len({image.tobytes() for image in images}) == 30  # no variant is its image
    assert len(load_images(str(given["dataset_name"]), "test")) == 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The logistic regression stopped", "ignore:.*steps were skipped")
def test_a_short_run_of_all(tmp_path):
    sizes = {"train_images": 60, "test_images": 30, "per_class": 6, "variants": 1, "steps": 4, "encoder_steps": 2,
             "inference_steps": 2, "source_steps": 2, "shots": 1, "strengths": 0.5, "methods": "simclr", "seeds": 0,
             "work": tmp_path / "work", "results": tmp_path / "results"}  # fmt: skip
    study.main([str(word) for name, value in sizes.items() for word in (f"--{name}", value)])
    lines = [json.loads(line) for line in (tmp_path / "results/rows.jsonl").read_text().splitlines()]
    rows = {
        part: [line["row"] for line in lines if line["part"] == part] for part in ("zero", "tricks", "few", "views")
    }
    assert rows["zero"] == [study.REAL, *study.SCALES]
    assert rows["tricks"] == [study.REAL, *study.TRICKS]
    assert rows["few"] == ["1 labels a class", "1 labels a class, strength 0.5"]
    assert [row.partition(", ")[2] for row in rows["views"]] == [
        "", "strength 0.5", "code", "representation", "longer by the making of strength 0.5"
    ]  # fmt: skip
    assert all(0 <= line["scores"].get("accuracy", line["scores"].get("class_token_knn", -1)) <= 1 for line in lines)
