"""The checks of what is read from outside: every value of JSON, against every check."""

import math

import pytest

from diffusers_repr.hub.files import read_json
from diffusers_repr.hub.schema import (
    anything,
    boolean,
    digest,
    either,
    file_name,
    inside,
    integer,
    listing,
    mapping,
    number,
    one_of,
    optional,
    printable,
    record,
    shown,
    text,
)

STRANGE = [None, True, -1, 3, 1e18, 10**4000, 0.5, math.nan, math.inf, "", "a", "..", [], [1], [[1]], {}, {"a": 1}]
CHECKS = {
    "integer": (integer(0, 8), [3]),
    "number": (number(0, 1e18), [3, 1e18, 0.5]),
    "any number": (number(finite=False), [-1, 3, 1e18, 0.5, math.inf]),
    "boolean": (boolean(), [True]),
    "text": (text(1), ["", "a"]),
    "pattern": (text(pattern="a+"), ["a"]),
    "one_of": (one_of("a", 1), ["a"]),
    "optional": (optional(integer(-1, 3)), [None, -1, 3]),
    "either": (either(integer(-1, 3), text(5)), [-1, 3, "", "a", ".."]),
    "listing": (listing(integer(0)), [[], [1]]),
    "mapping": (mapping(integer(0)), [{}, {"a": 1}]),
    "record": (record({"a": integer(0)}), [{"a": 1}]),
    "file_name": (file_name(), ["a"]),
    "digest": (digest(), []),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_takes_what_it_names_and_nothing_else(name):
    check, allowed = CHECKS[name]
    for value in STRANGE:
        if any(type(value) is type(one) and value == one for one in allowed):
            assert check(value, "f.json: x") == value
        else:
            with pytest.raises(ValueError, match=r"^f\.json: x") as caught:
                check(value, "f.json: x")
            assert len(str(caught.value)) < 400, "a message is short, whatever came"


@pytest.mark.parametrize(
    "name",
    [
        "../a",
        "/a",
        "a/../../b",
        "a\\b",
        "C:a",
        "C:/a",
        "a//b",
        "./a",
        "a/",
        ".",
        "a\x00b",
        "a\nb",
        "\u202ea",
        "b" * 1001,
    ],
)
def test_a_file_name_that_leaves_its_folder(name):
    with pytest.raises(ValueError, match="relative path inside the folder"):
        file_name()(name, "f.json: file")


def test_links_out_of_a_folder(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "own/link").symlink_to(tmp_path / "secret")
    (tmp_path / "own/folder").symlink_to(tmp_path)
    (tmp_path / "own/good").write_text("y")
    (tmp_path / "own/to_good").symlink_to("good")
    assert inside(tmp_path / "own", "to_good").read_text() == "y"
    for name in ("link", "folder/secret"):
        with pytest.raises(ValueError, match="leads out of the folder"):
            inside(tmp_path / "own", name)


def test_links_of_the_hubs_cache(tmp_path):
    blobs, snapshot = tmp_path / "repo/blobs", tmp_path / "repo/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("y")
    (tmp_path / "repo/token").write_text("x")
    (snapshot / "a.json").symlink_to("../../blobs/1")
    (snapshot / "b.json").symlink_to("../../token")
    assert inside(snapshot, "a.json").read_text() == "y"
    with pytest.raises(ValueError, match="leads out"):
        inside(snapshot, "b.json")
    (snapshot / "unet").mkdir()  # of a component: sharded weights of a pipeline
    (snapshot / "unet/a.json").symlink_to("../../../blobs/1")
    (snapshot / "unet/b.json").symlink_to("../../../token")
    assert inside(snapshot / "unet", "a.json").read_text() == "y"
    with pytest.raises(ValueError, match="leads out"):
        inside(snapshot / "unet", "b.json")


def test_a_record_names_the_field_and_its_place():
    check = record({"base": record({"features": mapping(integer(1))})}, {"seed": integer()})
    assert check({"base": {"features": {"mid_block": 3}}}, "p.json") == {"base": {"features": {"mid_block": 3}}}
    for value, told in (
        ({}, "p.json has no 'base'."),
        ({"base": {"features": None}}, r"p.json: base.features is null; allowed is an object"),
        ({"base": {"features": {"a": 0}}}, r"p.json: base.features.a is 0"),
        ({"base": {"features": {}}, "sed": 1}, r"p.json has 'sed', which this version does not know; .* seed"),
    ):
        with pytest.raises(ValueError, match=told):
            check(value, "p.json")


def test_depth_and_size_are_bounded(tmp_path):
    deep = 1
    for _ in range(30):
        deep = [deep]
    for value in (deep, list(range(30))):
        with pytest.raises(ValueError, match="nested deeper than"):
            anything(20, 20)(value, "f.json")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "long.json").write_text("1" * 5000)
    for name in ("deep", "long"):
        with pytest.raises(ValueError, match=f"{name}.json"):
            read_json(tmp_path / f"{name}.json")


def test_what_others_wrote_cannot_steer_the_terminal():
    evil = "cat\x1b[2J\r\n\u202egpj\u2028\x7f"
    assert printable(evil) == "cat\\x1b[2J\\r\\n\\u{202e}gpj\\u{2028}\\x7f"
    for kept in ("a b", "Käse 猫", "\u200d"):
        assert printable(kept) == kept
    assert "\x1b" not in shown({"a": 1}) + shown(evil)
    assert len(shown("x" * 10**6)) <= 60
