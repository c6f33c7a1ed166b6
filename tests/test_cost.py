"""The record of what tests cost, and the check that `make quality` makes of it."""

import json

import pytest

from tests.testers import cost


@pytest.fixture
def checkout(tmp_path):
    """A folder with a fast and a slow file of tests, and a record in order."""
    tests = tmp_path / "tests"
    (tests / "rooms").mkdir(parents=True)
    (tests / "rooms" / "test_fast.py").write_text("def test_one(): pass\n")
    (tests / "test_matrix.py").write_text("import pytest\n\npytestmark = [pytest.mark.slow]\n\ndef test_one(): pass\n")
    record(tmp_path, {"tests/rooms/test_fast.py": 3.0, "diffusers_repr": 40.0, cost.WHOLE: 800.0})
    return tmp_path


def record(root, costs):
    (root / "tests" / "cpu_seconds.json").write_text(json.dumps(costs))


def test_a_record_in_order(checkout):
    assert cost.check(checkout) == []


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("tests/rooms/test_fast.py", 30.1), ("diffusers_repr", 60.1), (cost.WHOLE, cost.WHOLE_BUDGET + 0.1)],
)
def test_beyond_its_budget(checkout, name, seconds):
    costs = {"tests/rooms/test_fast.py": 3.0, "diffusers_repr": 40.0, cost.WHOLE: 800.0}
    record(checkout, {**costs, name: seconds})
    (told,) = cost.check(checkout)
    assert told.startswith(f"{name}: {seconds} CPU seconds of ")
    record(checkout, {**costs, name: seconds, cost.SLOWER: 1.25})
    assert cost.check(checkout) == []
    record(checkout, {**costs, name: seconds * 1.3, cost.SLOWER: 1.25})
    assert len(cost.check(checkout)) == 1


def test_a_listed_exception(checkout, monkeypatch):
    monkeypatch.setitem(cost.DEARER, "tests/rooms/test_fast.py", (45.0, "one launch of two processes"))
    record(checkout, {"tests/rooms/test_fast.py": 44.0})
    assert cost.check(checkout) == []
    record(checkout, {"tests/rooms/test_fast.py": 46.0})
    assert len(cost.check(checkout)) == 1


def test_stale_and_missing_records(checkout, monkeypatch, capsys):
    (checkout / "tests" / "test_new.py").write_text("def test_one(): pass\n")
    (checkout / "tests" / "rooms" / "test_fast.py").unlink()
    assert cost.check(checkout) == [
        "tests/test_new.py is not in the record: it is older than the file.",
        "tests/rooms/test_fast.py is in the record and no more here.",
    ]
    (checkout / "tests" / "cpu_seconds.json").unlink()
    monkeypatch.setattr(cost, "ROOT", checkout)
    assert cost.main() == 1
    told = capsys.readouterr().err
    assert "There is no tests/cpu_seconds.json." in told
    assert "`make test RECORD=1`" in told


def test_what_a_test_is_counted_under():
    assert cost.entry("tests/heads/test_fit.py::TestFit::test_one[a-tests/b]") == "tests/heads/test_fit.py"
    assert cost.entry("diffusers_repr/heads/fitting/lsmr.py::diffusers_repr.heads") == "diffusers_repr"


@pytest.mark.parametrize(
    ("source", "fast"),
    [
        ("def test_one(): pass", True),
        ("@pytest.mark.slow\ndef test_one(): pass", False),
        ("@pytest.mark.slow\ndef test_one(): pass\ndef test_two(): pass", True),
        ("@pytest.mark.slow\nclass TestAll(Base): pass\ndef helper(): pass", False),
        ("class TestAll(Contract):\n    settings = {}", True),
        ("class TestAll:\n    @pytest.mark.slow\n    def test_one(self): pass", False),
    ],
)
def test_files_with_fast_tests(source, fast):
    assert cost.has_fast_tests(source) == fast
