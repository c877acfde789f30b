"""Atomic files and folders: after any interruption they are complete or absent."""

import contextlib
import errno
import os
import stat
import subprocess
import sys

import pytest

from lmcli import storage
from lmcli.errors import ClosedPipe, UserError
from lmcli.storage import (
    atomic_folder,
    atomic_path,
    free_bytes,
    read_tensors,
    user_errors,
    write_tensors,
    write_text,
)


class TestFile:
    def test_it_appears_complete_and_leaves_no_temporary_file(self, tmp_path):
        target = tmp_path / "a.txt"
        with atomic_path(target) as part:
            part.write_text("new")
            assert not target.exists() and part.parent == tmp_path
        assert target.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UserError])
    def test_a_block_that_fails_leaves_the_old_content(self, tmp_path, error):
        target = tmp_path / "a.txt"
        target.write_text("old")
        with pytest.raises(error), atomic_path(target) as part:
            part.write_text("half")
            raise error("x")
        assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]

    def test_the_old_file_stays_until_the_block_ends(self, tmp_path):
        target = tmp_path / "a.txt"
        target.write_text("old")
        with atomic_path(target) as part:
            part.write_text("new")
            assert target.read_text() == "old"
        assert target.read_text() == "new"

    def test_a_link_is_replaced_not_followed(self, tmp_path):
        target = tmp_path / "real"
        target.write_text("real")
        (tmp_path / "link").symlink_to(target)
        write_text(tmp_path / "link", "new")
        assert target.read_text() == "real" and not (tmp_path / "link").is_symlink()
        assert (tmp_path / "link").read_text() == "new"

    def test_its_permissions_follow_the_umask(self, tmp_path):
        old = os.umask(0o022)
        try:
            with atomic_path(tmp_path / "a") as part:
                part.touch(0o600)
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644

    def test_text_is_utf8_with_its_newlines(self, tmp_path):
        write_text(tmp_path / "a", "字\n")
        assert (tmp_path / "a").read_bytes() == "字\n".encode()

    @pytest.mark.parametrize(
        "folder, message",
        [("missing", "cannot write: No such file"), ("file", "cannot write: Not a directory")],
    )
    def test_a_missing_parent_folder_raises_user_error(self, tmp_path, folder, message):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=message) as caught:
            write_text(tmp_path / folder / "a.txt", "x")
        assert folder in caught.value.where

    def test_a_full_disk_raises_user_error_and_keeps_the_old_file(self, tmp_path):
        """A limit on file size simulates a full disk; the write itself fails."""
        program = (
            "import resource, signal, sys, pathlib\n"
            "from lmcli.errors import UserError\n"
            "from lmcli.storage import write_text\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "try: write_text(pathlib.Path(sys.argv[1]), 'x' * 5000)\n"
            "except UserError as error: print(error)\n"
        )
        (tmp_path / "a.txt").write_text("old")
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "a.txt"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert "a.txt: cannot write: File too large" in done.stdout and done.stderr == ""
        assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]

    def test_the_error_of_a_read_only_disk_is_reported(self, tmp_path, monkeypatch):
        """Removing the temporary file fails as well there."""

        def refuse(*_, **__):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr("pathlib.Path.write_text", refuse)
        monkeypatch.setattr("pathlib.Path.unlink", refuse)
        with pytest.raises(UserError, match="cannot write: Read-only file system"):
            write_text(tmp_path / "a", "x")


class TestFolder:
    def test_it_replaces_the_old_folder_as_a_whole(self, tmp_path):
        target = tmp_path / "deep" / "state"
        for content in ("one", "two"):
            with atomic_folder(target) as part:
                (part / f"{content}.txt").write_text(content)
                assert not (target / f"{content}.txt").exists()
            assert os.listdir(target) == [f"{content}.txt"] and os.listdir(tmp_path / "deep") == [
                "state"
            ]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_a_block_that_fails_leaves_the_old_content(self, tmp_path, error):
        target = tmp_path / "state"
        target.mkdir()
        (target / "old").write_text("old")
        with pytest.raises(error), atomic_folder(target) as part:
            (part / "new").write_text("half")
            raise error
        assert os.listdir(tmp_path) == ["state"] and os.listdir(target) == ["old"]

    def test_a_link_is_replaced_not_followed(self, tmp_path):
        target = tmp_path / "real"
        target.mkdir()
        (target / "old").write_text("old")
        (tmp_path / "link").symlink_to(target)
        with atomic_folder(tmp_path / "link") as part:
            (part / "new").write_text("new")
        assert os.listdir(target) == ["old"] and os.listdir(tmp_path / "link") == ["new"]
        assert not (tmp_path / "link").is_symlink()

    def test_the_old_folder_is_restored_when_the_rename_is_interrupted(self, tmp_path, monkeypatch):
        target = tmp_path / "state"
        target.mkdir()
        (target / "old").write_text("old")

        def interrupted(source, destination):
            if str(source).endswith(".part"):
                raise KeyboardInterrupt
            real_rename(source, destination)

        real_rename = os.rename
        monkeypatch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt), atomic_folder(target) as part:
            (part / "new").write_text("new")
        assert os.listdir(tmp_path) == ["state"] and os.listdir(target) == ["old"]

    def test_the_old_folder_is_complete_until_the_rename(self, tmp_path, monkeypatch):
        """Killed at a rename, the old folder has all its files, under either name."""
        target = tmp_path / "state"
        target.mkdir()
        for name in ("a", "b"):
            (target / name).write_text(name)

        def killed(source, _):
            if not any(
                ".part" not in folder and {"a", "b"} <= set(os.listdir(tmp_path / folder))
                for folder in os.listdir(tmp_path)
            ):
                raise AssertionError("the old folder is damaged")
            return real_rename(source, _)

        real_rename = os.rename
        monkeypatch.setattr(os, "rename", killed)
        with atomic_folder(target) as part:
            (part / "c").write_text("c")
        assert os.listdir(target) == ["c"] and os.listdir(tmp_path) == ["state"]

    def test_a_path_that_cannot_be_written_raises_user_error(self, tmp_path):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(UserError, match="cannot write: "),
            atomic_folder(tmp_path / "file" / "x"),
        ):
            pass


class TestDurability:
    @pytest.fixture
    def calls(self, monkeypatch):
        """The calls of fsync, replace and rename, in order, each with its file's name."""
        calls = []
        for name, path_of in (
            ("fsync", lambda handle: os.readlink(f"/proc/self/fd/{handle}")),
            ("replace", lambda _, to: str(to)),
            ("rename", lambda _, to: str(to)),
        ):

            def record(*arguments, true=getattr(os, name), name=name, path_of=path_of):
                calls.append((name, os.path.basename(path_of(*arguments)).split(".")[-1]))
                return true(*arguments)

            monkeypatch.setattr(os, name, record)
        return calls

    @pytest.mark.skipif(
        not os.path.isdir("/proc/self/fd"), reason="needs /proc for the path of an open file"
    )
    def test_content_is_flushed_before_the_rename_and_the_folder_after_it(self, tmp_path, calls):
        (tmp_path / "in").mkdir()
        write_text(tmp_path / "in" / "a", "x")
        assert calls == [("fsync", "part"), ("replace", "a"), ("fsync", "in")]
        calls.clear()
        with atomic_folder(tmp_path / "in" / "b") as part:
            (part / "inner").write_text("x")
        assert calls == [("fsync", "inner"), ("fsync", "part"), ("rename", "b"), ("fsync", "in")]

    def test_a_disk_that_cannot_flush_folders_is_accepted(self, tmp_path, monkeypatch):
        for number, broken in ((errno.EINVAL, False), (errno.EIO, True)):

            def refuse(handle, number=number, true=os.fsync):
                if stat.S_ISDIR(os.fstat(handle).st_mode):
                    raise OSError(number, "refused")

            monkeypatch.setattr(os, "fsync", refuse)
            with pytest.raises(UserError, match="refused") if broken else contextlib.nullcontext():
                write_text(tmp_path / "a", "x")

    def test_a_copy_is_complete_and_checks_disk_space_first(self, tmp_path, monkeypatch):
        (tmp_path / "a").write_bytes(b"x" * 1000)
        storage.copy_file(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == b"x" * 1000
        monkeypatch.setattr(storage, "free_bytes", lambda path: (1 << 20) + 999)
        with pytest.raises(UserError, match="the disk is full"):
            storage.copy_file(tmp_path / "a", tmp_path / "c")
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]


class TestErrors:
    def test_the_file_of_the_error_is_named(self, tmp_path):
        with (
            pytest.raises(
                UserError, match=r"inner: cannot read: No such file or directory"
            ) as caught,
            user_errors("outer", "read"),
        ):
            open(tmp_path / "inner")
        assert caught.value.exit_code == 1

    def test_an_error_without_file_name_gets_the_path(self):
        with (
            pytest.raises(UserError, match="outer: cannot read: odd"),
            user_errors("outer", "read"),
        ):
            raise OSError("odd")

    def test_a_broken_pipe_becomes_closed_pipe(self):
        with pytest.raises(ClosedPipe), user_errors("out", "write"):
            raise BrokenPipeError(32, "Broken pipe")

    def test_other_errors_pass_through(self):
        with pytest.raises(KeyError), user_errors("out", "write"):
            raise KeyError


class TestTensors:
    @pytest.fixture
    def tensors(self):
        torch = pytest.importorskip("torch")
        return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}

    def test_round_trip(self, tmp_path, tensors):
        file = tmp_path / "m.safetensors"
        write_tensors(file, tensors, {"step": "3"})
        read = read_tensors(file)
        assert read.keys() == tensors.keys() and os.listdir(tmp_path) == ["m.safetensors"]
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and read[name].equal(tensor)
        safetensors = pytest.importorskip("safetensors")
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "step": "3"}

    def test_disk_space_is_checked_before_anything_is_written(self, tmp_path, tensors, monkeypatch):
        monkeypatch.setattr(storage, "free_bytes", lambda path: (1 << 20) + 27)  # 28 are needed
        with pytest.raises(UserError, match=r"m\.safetensors: the disk is full"):
            write_tensors(tmp_path / "m.safetensors", tensors)
        assert os.listdir(tmp_path) == []
        monkeypatch.setattr(storage, "free_bytes", lambda path: (1 << 20) + 28)
        write_tensors(tmp_path / "m.safetensors", tensors)

    @pytest.mark.parametrize("cut", [0, 4, 40, -1])
    def test_a_damaged_file_is_named(self, tmp_path, tensors, cut):
        file = tmp_path / "m.safetensors"
        write_tensors(file, tensors)
        file.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(UserError, match=r"m\.safetensors: is damaged or no safetensors file"):
            read_tensors(file)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot read: No such file"):
            read_tensors(tmp_path / "none.safetensors")

    def test_free_bytes_of_a_path_that_does_not_exist_yet(self, tmp_path):
        assert free_bytes(tmp_path / "a" / "b") > 0
