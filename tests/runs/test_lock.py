"""One process at a time trains in a folder; the lock of a dead one is void."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from lmcli.errors import UsageError, UserError
from lmcli.runs import run_folder
from lmcli.runs.run_folder import Lock

HOLDING = (
    "import sys\nfrom pathlib import Path\n"
    "from lmcli.runs.run_folder import Lock\nheld = Lock(Path(sys.argv[1]))\n"
    "print('held', flush=True)\nsys.stdin.read()"
)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path until it ends."""
    command = [sys.executable, "-c", HOLDING, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_the_error_names_the_process_that_holds_the_lock(tmp_path, holder):
    with pytest.raises(UserError) as caught:
        Lock(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: process {holder.pid} on {socket.gethostname()} is training in this folder: "
        "wait for it, or end it first"
    )
    assert (tmp_path / run_folder.LOCK_NAME).is_file()


def test_the_lock_of_a_killed_process_is_void(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / run_folder.LOCK_NAME).is_file()
    lock = Lock(tmp_path)
    assert (
        tmp_path / run_folder.LOCK_NAME
    ).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    lock.release()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_file_that_was_removed_while_it_was_locked_is_no_lock(tmp_path, monkeypatch):
    """If its holder removes the file before we lock it, another process may hold a new one."""
    original, lock = fcntl.flock, []

    def removed(handle, how):
        original(handle, how)
        if not lock:
            lock.append(1)
            (tmp_path / run_folder.LOCK_NAME).unlink()

    monkeypatch.setattr(fcntl, "flock", removed)
    own_lock = Lock(tmp_path)
    assert (tmp_path / run_folder.LOCK_NAME).is_file()
    own_lock.release()


def test_a_disk_without_locks_is_a_problem_not_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = Lock(tmp_path)
    assert "this disk has no file locks" in lock.problem and os.listdir(tmp_path) == []
    lock.release()


def test_a_planted_link_is_no_lock(tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / run_folder.LOCK_NAME).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"\.lock: cannot write: "):
        Lock(folder)
    assert (tmp_path / "secret").read_text() == "secret"


def test_the_error_names_a_folder_that_is_not_writable(tmp_path):
    with pytest.raises(UserError, match="cannot write: No such file"):
        Lock(tmp_path / "missing")


class TestRunFolders:
    def test_neither_a_new_run_nor_a_resumed_one_gets_a_folder_in_use(self, tmp_path, holder):
        with pytest.raises(UserError, match=f"process {holder.pid} on "):
            run_folder.claim(str(tmp_path), "", overwrite=False)
        (tmp_path / "recipe.yaml").write_text("{}")
        for ask in (
            lambda: run_folder.claim(str(tmp_path), "", overwrite=True),
            lambda: run_folder.take(tmp_path),
        ):
            with pytest.raises(UserError, match=f"process {holder.pid} on "):
                ask()
        run_folder.reopen(tmp_path)  # to read it is free

    def test_the_lock_file_exists_only_while_it_is_held(self, tmp_path):
        claimed = run_folder.claim(str(tmp_path / "run"), "", overwrite=False)
        assert os.listdir(claimed.path) == [run_folder.LOCK_NAME]
        claimed.release()
        assert os.listdir(claimed.path) == []

    def test_an_unfinished_start_is_taken_over(self, tmp_path):
        for name in (run_folder.LOCK_NAME, "config.json", ".model.safetensors.12.part"):
            (tmp_path / name).write_text("old")
        (tmp_path / "state").mkdir()
        claimed = run_folder.claim(str(tmp_path), "", overwrite=False)
        assert os.listdir(tmp_path) == [run_folder.LOCK_NAME]
        claimed.release()

    @pytest.mark.parametrize(
        "names", [("config.json",), (run_folder.LOCK_NAME, "config.json", "thesis.txt")]
    )
    def test_a_folder_with_foreign_files_is_not_taken_over(self, tmp_path, names):
        for name in names:
            (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match="is not empty and holds no run"):
            run_folder.claim(str(tmp_path), "", overwrite=True)
        assert sorted(os.listdir(tmp_path)) == sorted(names)

    def test_two_runs_without_a_name_get_two_folders(self, tmp_path, monkeypatch):
        """Both saw that runs/book is free; the other one was faster."""
        monkeypatch.chdir(tmp_path)
        original = run_folder._free

        def taken(path):
            found = original(path)
            monkeypatch.setattr(run_folder, "_free", original)
            found.mkdir(parents=True)
            return found

        monkeypatch.setattr(run_folder, "_free", taken)
        assert str(run_folder.claim(None, "book", False).path) == "runs/book-2"

    def test_leftovers_of_killed_processes_are_removed_on_resume(self, tmp_path):
        (tmp_path / "recipe.yaml").write_text("{}")
        (tmp_path / ".model.safetensors.77.part").write_text("half")
        (tmp_path / ".tmp82wHhp").write_text(
            "half"
        )  # as safetensors names what it has not written whole
        (tmp_path / ".tmpfolder").mkdir()  # a user's own
        for name in (
            ".step-000000003.77.part",
            ".step-000000002.77.old",
            ".step-000000001.77.old",
            "step-000000001",
        ):
            (tmp_path / "state" / name).mkdir(parents=True)
        (tmp_path / "state" / ".step-000000003.77.part" / "weights.safetensors").write_text("half")
        taken, _, _ = run_folder.take(tmp_path)
        taken.release()
        assert sorted(os.listdir(tmp_path)) == [".tmpfolder", "recipe.yaml", "state"]
        assert sorted(os.listdir(tmp_path / "state")) == [
            "step-000000001",
            "step-000000002",
        ]  # put aside, not replaced
