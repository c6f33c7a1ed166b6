import os
import subprocess
import sys

import pytest

from diffusers_repr.hub import atomic_folder, atomic_write, read_json, write_json
from diffusers_repr.hub import files as files_module


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestAtomicWrite:
    @pytest.mark.parametrize(("data", "stored"), [("größe\n", "größe\n".encode()), (b"\0\xff", b"\0\xff"), ("", b"")])
    def test_writes_and_replaces(self, tmp_path, data, stored):
        path = tmp_path / "new" / "file.txt"
        assert atomic_write(path, "old") == path
        atomic_write(str(path), data)
        assert path.read_bytes() == stored
        assert names(path.parent) == ["file.txt"]

    @pytest.mark.skipif(os.name != "posix", reason="file modes are of POSIX")
    def test_mode_is_that_of_an_ordinary_file(self, tmp_path):
        (tmp_path / "plain").write_text("")
        assert atomic_write(tmp_path / "atomic", "").stat().st_mode == (tmp_path / "plain").stat().st_mode

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_failure_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch, step):
        path = atomic_write(tmp_path / "file.txt", "old")

        def no_space(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files_module.os, step, no_space)
        with pytest.raises(OSError, match="No space left"):
            atomic_write(path, "new")
        assert path.read_text() == "old"
        assert names(tmp_path) == ["file.txt"]

    def test_wrong_type_leaves_nothing(self, tmp_path):
        with pytest.raises(TypeError):
            atomic_write(tmp_path / "file.txt", 3)
        assert names(tmp_path) == []

    def test_folder_in_the_way(self, tmp_path):
        with pytest.raises(IsADirectoryError, match="a folder has this name"):
            atomic_write(tmp_path, "text")


class TestAtomicFolder:
    def test_new_then_replaced_whole(self, tmp_path):
        target = tmp_path / "deep" / "probe"
        for content in ("a", "b"):
            with atomic_folder(target) as folder:
                assert folder.parent == target.parent
                (folder / content).mkdir()
                (folder / content / "file").write_text(content)
            assert names(target) == [content]
            assert names(target.parent) == ["probe"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_failure_keeps_the_old_folder(self, tmp_path, error):
        target = tmp_path / "probe"
        with atomic_folder(target) as folder:
            (folder / "old").touch()

        def fail():
            with atomic_folder(target) as folder:
                (folder / "new").touch()
                raise error

        with pytest.raises(error):
            fail()
        assert names(target) == ["old"]
        assert names(tmp_path) == ["probe"]

    def test_failed_exchange_puts_the_old_folder_back(self, tmp_path, monkeypatch):
        target = tmp_path / "probe"
        with atomic_folder(target) as folder:
            (folder / "old").touch()
        rename, calls = os.rename, []

        def second_fails(source, destination):
            calls.append(source)
            if len(calls) == 2:
                raise OSError("busy")
            rename(source, destination)

        monkeypatch.setattr(files_module.os, "rename", second_fails)
        with pytest.raises(OSError, match="busy"), atomic_folder(target) as folder:
            (folder / "new").touch()
        assert names(target) == ["old"]
        assert names(tmp_path) == ["probe"]

    def test_refuses_what_it_must_not_replace(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        with pytest.raises(NotADirectoryError, match="a file has this name"), atomic_folder(tmp_path / "file"):
            pass
        for path in (".", "..", tmp_path):
            with pytest.raises(ValueError, match="working directory"), atomic_folder(path):
                pass
        (tmp_path / "x").mkdir()
        with atomic_folder(tmp_path / "x", overwrite=False) as folder:
            (folder / "a").touch()
        with (
            pytest.raises(FileExistsError, match="Choose another name"),
            atomic_folder(tmp_path / "x", overwrite=False),
        ):
            pass
        assert names(tmp_path) == ["file", "work", "x"]

    def test_a_kill_leaves_the_old_folder(self, tmp_path):
        target = tmp_path / "probe"
        with atomic_folder(target) as folder:
            (folder / "old").touch()
        code = (
            "import os, sys\nfrom diffusers_repr.hub.files import atomic_folder\n"
            "with atomic_folder(sys.argv[1]) as folder:\n"
            "    (folder / 'new').touch()\n    os.kill(os.getpid(), 9)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, check=False)
        assert done.returncode != 0
        assert names(target) == ["old"]
        with atomic_folder(target) as folder:
            (folder / "new").touch()
        assert names(target) == ["new"]


class TestJson:
    def test_round_trip(self, tmp_path):
        data = {"z": 1, "a": [1.5, None, True, "größe"], "n": {}}
        path = write_json(tmp_path / "a.json", data)
        assert read_json(path) == data
        assert list(read_json(str(path))) == ["z", "a", "n"]
        assert path.read_bytes().endswith(b"}\n")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"a": 1,', r"is not valid JSON: .*line 1, column 9"),
            (b"", "is empty"),
            (b'{"a": "\xff"}', "is not UTF-8"),
        ],
    )
    def test_corrupt(self, tmp_path, content, message):
        path = tmp_path / "state.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as raised:
            read_json(path)
        assert "state.json" in str(raised.value)
        assert "make it again" in str(raised.value)

    def test_missing_names_what_is_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="has no JSON file"):
            read_json(tmp_path / "config.json")
        write_json(tmp_path / "model_index.json", {})
        with pytest.raises(FileNotFoundError, match="model_index.json"):
            read_json(tmp_path / "config.json")

    def test_what_json_cannot_hold_leaves_the_old_file(self, tmp_path):
        path = write_json(tmp_path / "a.json", {"old": 1})
        with pytest.raises(TypeError, match=r"a\.json.*tolist"):
            write_json(path, {"x": {1, 2}})
        with pytest.raises(ValueError, match=r"a\.json.*no NaN"):
            write_json(path, {"x": float("nan")})
        assert read_json(path) == {"old": 1}
        assert names(tmp_path) == ["a.json"]
