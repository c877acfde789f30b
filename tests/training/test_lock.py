"""One process at a time trains in a folder; a dead one's lock stands for nothing."""

import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from lmcli.errors import UsageError, UserError
from lmcli.training import lock, run_folder
from lmcli.training.lock import Lock

HOLDING = "import sys\nfrom pathlib import Path\nfrom lmcli.training.lock import Lock\nheld = Lock(Path(sys.argv[1]))\n" \
          "print('held', flush=True)\nsys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path until it is ended."""
    command = [sys.executable, "-c", HOLDING, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_is_there_in_one_line(tmp_path, holder):
    with pytest.raises(UserError) as caught:
        Lock(tmp_path)
    assert str(caught.value) == (f"{tmp_path}: process {holder.pid} on {socket.gethostname()} is training in this folder: "
                                 "wait for it, or end it first")
    assert (tmp_path / lock.NAME).is_file()


def test_the_lock_of_a_process_that_was_killed_stands_for_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / lock.NAME).is_file()
    held = Lock(tmp_path)
    assert (tmp_path / lock.NAME).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    held.release()
    held.release()
    assert os.listdir(tmp_path) == []


def test_a_file_that_was_removed_while_it_was_locked_is_no_lock(tmp_path, monkeypatch):
    """Its holder removed it between our opening and our locking: then somebody else may hold a new one."""
    true, held = lock.fcntl.flock, []

    def removed(handle, how):
        true(handle, how)
        if not held:
            held.append(1)
            (tmp_path / lock.NAME).unlink()
    monkeypatch.setattr(lock.fcntl, "flock", removed)
    made = Lock(tmp_path)
    assert (tmp_path / lock.NAME).is_file()
    made.release()


@pytest.mark.parametrize("without", ["module", "support"])
def test_where_there_are_no_locks_that_is_said(tmp_path, monkeypatch, without):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    if without == "module":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", refuse)
    held = Lock(tmp_path)
    assert "no file locks here" in held.missing and os.listdir(tmp_path) == []
    held.release()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot write: No such file"):
        Lock(tmp_path / "missing")


class TestRunFolders:
    def test_neither_a_new_run_nor_a_resumed_one_gets_a_folder_in_use(self, tmp_path, holder):
        with pytest.raises(UserError, match=f"process {holder.pid} on "):
            run_folder.claim(str(tmp_path), "", overwrite=False)
        (tmp_path / "recipe.yaml").write_text("{}")
        for ask in (lambda: run_folder.claim(str(tmp_path), "", overwrite=True), lambda: run_folder.take(tmp_path)):
            with pytest.raises(UserError, match=f"process {holder.pid} on "):
                ask()
        run_folder.reopen(tmp_path)  # to read it is free

    def test_the_lock_is_there_while_it_is_held_only(self, tmp_path):
        claimed = run_folder.claim(str(tmp_path / "run"), "", overwrite=False)
        assert os.listdir(claimed.path) == [lock.NAME]
        claimed.release()
        assert os.listdir(claimed.path) == []

    def test_a_folder_left_half_made_is_taken_over(self, tmp_path):
        for name in (lock.NAME, "config.json", ".model.safetensors.12.part"):
            (tmp_path / name).write_text("old")
        (tmp_path / "state").mkdir()
        claimed = run_folder.claim(str(tmp_path), "", overwrite=False)
        assert os.listdir(tmp_path) == [lock.NAME]
        claimed.release()

    @pytest.mark.parametrize("names", [("config.json",), (lock.NAME, "config.json", "thesis.txt")])
    def test_what_may_be_of_somebody_else_is_not(self, tmp_path, names):
        for name in names:
            (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match="is not empty and holds no run"):
            run_folder.claim(str(tmp_path), "", overwrite=True)
        assert sorted(os.listdir(tmp_path)) == sorted(names)

    def test_two_runs_without_a_name_get_two_folders(self, tmp_path, monkeypatch):
        """Both found runs/book free; the other one was faster."""
        monkeypatch.chdir(tmp_path)
        true = run_folder._free

        def taken(path):
            found = true(path)
            monkeypatch.setattr(run_folder, "_free", true)
            found.mkdir(parents=True)
            return found
        monkeypatch.setattr(run_folder, "_free", taken)
        assert str(run_folder.claim(None, "book", False).path) == "runs/book-2"

    def test_what_killed_processes_left_half_written_is_cleared_when_the_run_is_taken_up(self, tmp_path):
        (tmp_path / "recipe.yaml").write_text("{}")
        (tmp_path / ".model.safetensors.77.part").write_text("half")
        (tmp_path / ".tmp82wHhp").write_text("half")  # as safetensors names what it has not written whole
        (tmp_path / ".tmpfolder").mkdir()  # a user's own
        for name in (".step-000000003.77.part", ".step-000000002.77.old", ".step-000000001.77.old", "step-000000001"):
            (tmp_path / "state" / name).mkdir(parents=True)
        (tmp_path / "state" / ".step-000000003.77.part" / "weights.safetensors").write_text("half")
        taken, _, _ = run_folder.take(tmp_path)
        taken.release()
        assert sorted(os.listdir(tmp_path)) == [".tmpfolder", "recipe.yaml", "state"]
        assert sorted(os.listdir(tmp_path / "state")) == ["step-000000001", "step-000000002"]  # put aside, not replaced
