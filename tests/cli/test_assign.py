"""`diffusers-repr assign`: every method, gone on with after a kill, on two processes, and read by training."""

import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from diffusers_repr.assign import ClassifierAssigner, IdentityAssigner, KMeansAssigner, RetrievalIndex
from diffusers_repr.assign import images as assigning
from diffusers_repr.cli import main
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.encoders import Encoder
from diffusers_repr.store import AssignmentStore
from diffusers_repr.store.vector_store import VectorTable
from tests.cli.test_cache import ROWS, make_inputs
from tests.data.data_cases import rows

LABELS = np.arange(ROWS) % 3


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def words(inputs, out, *flags):
    fixed = ("--out", out, "--resolution", 16, "--quiet", "--batch_size", 4, "--shard_size", 4)
    return [str(word) for word in ("assign", inputs / "dino", inputs / "images.parquet", *fixed, *flags)]


def assign(inputs, out, *flags):
    assert main(words(inputs, out, *flags)) == 0
    return AssignmentStore.open(out / "assignments")


def job(inputs, folder):
    """In each of two processes."""
    codes = [main(words(inputs, folder / "kmeans", "--k", 3, "--backend", "sklearn"))]
    return [*codes, main(words(inputs, folder / "near", "--method", "neighbours", "--k", 4))]


def features(inputs):
    """What the encoder gives the images, by another way."""
    data = load_train_data(DataConfig(str(inputs / "images.parquet"), center_crop="fit"), 3, 16)
    pixels = torch.stack([data[row]["pixel_values"] for row in range(ROWS)]).float() / 127.5 - 1
    return Encoder.from_pretrained(inputs / "dino").encode_pixels(pixels).global_features


def training_data(inputs, folder, **settings):
    config = DataConfig(str(inputs / "images.parquet"), assignments_dir=str(folder), **settings)
    return load_train_data(config, 3, 8)


def test_kmeans(inputs, tmp_path, capsys):
    store = assign(inputs, tmp_path, "--k", 3, "--backend", "sklearn")
    told = capsys.readouterr().out
    assert "11 images: class_id" in told
    assert "purity" in told
    ids = store.array("class_id")
    fitted = KMeansAssigner.from_pretrained(tmp_path / "assigner")
    assert ids.tolist() == fitted.assign(features(inputs)).tolist()
    again = KMeansAssigner(8, 3, backend="sklearn").fit(features(inputs), torch.Generator().manual_seed(0))
    torch.testing.assert_close(fitted.centers, again.centers)
    assert (store.layout.num_classes, len(set(ids.tolist()))) == (3, 3)
    data = training_data(inputs, tmp_path, cache_images=True)
    assert [int(data[row]["class_labels"]) for row in range(ROWS)] == ids.tolist()
    assert data.batch([3, 1])["class_labels"].tolist() == ids[[3, 1]].tolist()
    assert data.class_names == ["0", "1", "2"]


@pytest.mark.parametrize("query", [False, True])
def test_neighbours(inputs, tmp_path, query):
    store = assign(inputs, tmp_path, "--method", "neighbours", "--k", 4)
    vectors, near = features(inputs), store.array("neighbours")
    index = RetrievalIndex.open(tmp_path / "index")
    torch.testing.assert_close(index.embeddings[torch.arange(ROWS)], vectors)
    unit = torch.nn.functional.normalize(index.embeddings[torch.arange(ROWS)].double(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    assert near.tolist() == cosines.argsort(dim=1, descending=True)[:, :4].tolist()
    np.testing.assert_allclose(1 - store.array("distances"), cosines.sort(1, True).values[:, :4], atol=1e-6)
    assert index.frequencies.tolist() == np.bincount(near.ravel(), minlength=ROWS).tolist()
    data = training_data(inputs, tmp_path, num_neighbours=2, include_query=query)
    sample = data[5]["condition"]
    wanted = index.embeddings[[5, *near[5, :2]] if query else near[5, :2]]
    assert torch.equal(sample, wanted)
    assert int(data[5]["class_labels"]) == LABELS[5]  # labels stay what they are
    batch = training_data(inputs, tmp_path, num_neighbours=2, include_query=query, cache_images=True).batch([5, 0])
    assert torch.equal(batch["condition"][0], wanted)


def test_neighbours_of_another_index(inputs, tmp_path, capsys):
    vectors = features(inputs)
    RetrievalIndex.build(vectors[:6] * 2, tmp_path / "index")
    store = assign(inputs, tmp_path / "near", "--method", "neighbours", "--k", 2, "--index", tmp_path / "index")
    assert store.array("neighbours")[:6, 0].tolist() == list(range(6))  # nothing is excluded of other images
    with pytest.raises(FileNotFoundError, match="no index"):
        training_data(inputs, tmp_path / "near")
    data = training_data(inputs, tmp_path / "near", index_dir=str(tmp_path / "index"), include_query=True)
    torch.testing.assert_close(data[8]["condition"][0], vectors[8])
    RetrievalIndex.open(tmp_path / "index").add(vectors[6:])  # growing changes nothing for those that are there
    assert torch.equal(
        training_data(inputs, tmp_path / "near", index_dir=str(tmp_path / "index"))[8]["condition"],
        data[8]["condition"][1:],
    )
    RetrievalIndex.build(vectors[:6], tmp_path / "other")
    with pytest.raises(ValueError, match="are of another index than .*other.*parts"):
        training_data(inputs, tmp_path / "near", index_dir=str(tmp_path / "other"))
    RetrievalIndex.build(torch.randn(6, 5), tmp_path / "narrow")
    RetrievalIndex.build(vectors[:6], tmp_path / "foreign", encoder={"weights": "another"})
    capsys.readouterr()
    for name, k, told in (
        ("narrow", 2, "vectors of 8 values, the index of 5"),
        ("index", 12, "--k 12 neighbours among 11 images"),
        ("foreign", 2, 'of another encoder (index -> queries): weights: "another"'),
    ):
        flags = ("--method", "neighbours", "--index", tmp_path / name, "--k", k)
        assert main(words(inputs, tmp_path / "wrong", *flags)) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "wrong/assignments").exists()


def test_identity_and_classifier(inputs, tmp_path):
    vectors = features(inputs)
    store = assign(inputs, tmp_path / "identity", "--method", "identity")
    fitted = IdentityAssigner.from_pretrained(tmp_path / "identity/assigner")
    np.testing.assert_allclose(store.array("vector"), fitted.assign(vectors), atol=1e-5)
    assert torch.equal(
        training_data(inputs, tmp_path / "identity")[4]["condition"], torch.from_numpy(store.array("vector")[4])
    )
    store = assign(inputs, tmp_path / "few", "--method", "classifier", "--labels_per_class", 2)
    few = ClassifierAssigner.from_pretrained(tmp_path / "few/assigner")
    assert store.array("class_id").tolist() == few.assign(vectors).tolist()
    assert store.layout.num_classes == 3


def test_goes_on_after_a_kill(inputs, tmp_path, monkeypatch):
    before = assign(inputs, tmp_path, "--k", 3, "--backend", "sklearn").array("class_id")
    (tmp_path / "vectors/data/vectors-00001-of-00003.safetensors").unlink()
    shutil.rmtree(tmp_path / "assignments")
    seen = []
    encode = assigning.vectors_of
    monkeypatch.setattr(assigning, "vectors_of", lambda *given: seen.append(len(given[1])) or encode(*given))
    monkeypatch.setattr(KMeansAssigner, "fit", lambda *given: pytest.fail("it is fitted already"))
    assert assign(inputs, tmp_path, "--k", 3, "--backend", "sklearn").array("class_id").tolist() == before.tolist()
    assert seen == [1, 4]  # the first for the width, then the shard that was gone


def test_two_processes_write_what_one_writes(together, inputs, tmp_path):
    folder, told = together
    assert told["assign"] == [[0, 0], [0, 0]]
    job(inputs, tmp_path)
    for name, column in (("kmeans", "class_id"), ("near", "neighbours")):
        one, two = (AssignmentStore.open(place / name / "assignments") for place in (tmp_path, folder / "assign"))
        assert one.array(column).tolist() == two.array(column).tolist()
        assert one.layout.recipe == two.layout.recipe
    one, two = (VectorTable.open(place / "near/index") for place in (tmp_path, folder / "assign"))
    assert all(torch.equal(a, b) for a, b in zip(one.blocks, two.blocks, strict=True))


def test_wrong_use(inputs, tmp_path, capsys):
    for flags, told in (
        (("--k", 12), "--k 12 clusters of 11 images"),
        (("--method", "neighbours", "--k", 11), "--k 11 neighbours among 10 images"),
        (("--method", "identity", "--k", 3), "--k would not act: it is of --method kmeans"),
        (("--method", "classifier", "--labels_per_class", 5), "but 4 images have the class 'cat'"),
        (("--method", "classifier", "--label_column", "none"), "label"),
        (("--k", 0), "--k must be at least 1"),
        (("--method", "neighbours", "--index", tmp_path, "--cells", 3), "are of an index that is made"),
    ):
        assert main(words(inputs, tmp_path / "out", *flags)) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out/assignments").exists()
    assign(inputs, tmp_path / "ok", "--k", 3, "--backend", "sklearn")
    for flags, told in (
        (("--k", 4), "config.num_clusters: 3 -> 4"), (("--k", 3, "--seed", 1), "seed: 0 -> 1"),
        (("--k", 3, "--resolution", 8), "data.size"),
    ):  # fmt: skip
        assert main(words(inputs, tmp_path / "ok", "--backend", "sklearn", *flags)) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "--overwrite deletes" in error
    assign(inputs, tmp_path / "ok", "--k", 4, "--overwrite")


def test_training_refuses_what_is_not_its_own(inputs, tmp_path):
    store = assign(inputs, tmp_path / "out", "--k", 3)
    for data, told in (
        (rows(ROWS - 1), "assigns 11 rows, and the run has 10"),
        (rows(ROWS, ((9, 9),)), "other images"),
    ):
        config = DataConfig(assignments_dir=str(tmp_path / "out"))
        with pytest.raises(ValueError, match=told):
            load_train_data(config, 3, 8, dataset=data)
    for settings, told in (
        ({"label_column": "label"}, "from label_column='label' or from assignments_dir"),
        ({"include_query": True}, "no neighbours, so include_query"),
    ):
        with pytest.raises(ValueError, match=told):
            training_data(inputs, tmp_path / "out", **settings)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        training_data(inputs, tmp_path)
    with pytest.raises(ValueError, match="no places in the data set to keep assignments_dir"):
        DataConfig("digits", assignments_dir="x", streaming=True)
    with pytest.raises(ValueError, match="`num_neighbours` is of neighbours, and no"):
        load_train_data(DataConfig("digits", num_neighbours=3), 1, 8)
    held = DataConfig("digits", assignments_dir="x", include_query=True, index_dir="y").held_out("test")
    assert (held.assignments_dir, held.index_dir, held.include_query) == (None, None, False)
    near = assign(inputs, tmp_path / "near", "--method", "neighbours", "--k", 3)
    with pytest.raises(ValueError, match="num_neighbours=4, and .* holds 3 an image"):
        training_data(inputs, tmp_path / "near", num_neighbours=4)
    direct = training_data(inputs, store.folder)  # a store by itself
    assert int(direct[0]["class_labels"]) == store.array("class_id")[0]
    assert direct.fingerprint() != training_data(inputs, tmp_path / "near").fingerprint()
    assert len(near) == ROWS
