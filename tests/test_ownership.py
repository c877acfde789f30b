"""Files of others are refused by name; links that somebody planted are not written through."""

import os
import stat
import sys

import pytest

from lmcli import ownership, storage
from lmcli.errors import UserError
from lmcli.ownership import ForeignFile, create, make_private_folder, open_own, open_to_extend

posix = pytest.mark.skipif(os.name != "posix", reason="needs user ids and modes")
pytestmark = posix


def mode_of(path):
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def secret(tmp_path):
    """A private file that a planted link leads to."""
    file = tmp_path / "secret"
    file.write_text("secret")
    file.chmod(0o600)
    yield file
    assert file.read_text() == "secret" and mode_of(file) == 0o600


@pytest.fixture
def everything_allowed():
    """A umask that takes no permission away."""
    mask = os.umask(0)
    yield
    os.umask(mask)


@pytest.fixture
def other_user(monkeypatch):
    """We are another user: all files are somebody else's."""
    monkeypatch.setattr(ownership, "user_id", lambda: os.geteuid() + 1)


@pytest.fixture
def predictable(monkeypatch):
    """Temporary names end in 7, as if they had been guessed."""
    monkeypatch.setattr(ownership.secrets, "randbelow", lambda _: 7)


class TestFiles:
    def test_a_new_file_is_private(self, tmp_path, everything_allowed):
        with create(tmp_path / "a") as file:
            file.write(b"x")
        assert mode_of(tmp_path / "a") == 0o600 and (tmp_path / "a").read_bytes() == b"x"

    def test_what_is_there_is_not_opened(self, tmp_path, secret):
        (tmp_path / "link").symlink_to(secret)
        (tmp_path / "nowhere").symlink_to(tmp_path / "new")
        for name in ("secret", "link", "nowhere"):
            with pytest.raises(FileExistsError):
                create(tmp_path / name)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o777])
    def test_a_file_that_others_may_write_is_refused(self, tmp_path, mode):
        file = tmp_path / "a b"
        file.write_text("x")
        file.chmod(mode)
        with pytest.raises(ForeignFile) as caught:
            open_own(file)
        assert str(caught.value) == (
            f"{file}: others may write it (mode {mode:04o}): lm does not use it\n"
            f"  chmod -R go-w '{file}' if you trust it, else remove it"
        )
        assert caught.value.exit_code == 1

    def test_own_files_are_opened(self, tmp_path):
        for mode in (0o600, 0o644, 0o400):
            file = tmp_path / f"{mode}"
            file.write_text("x")
            file.chmod(mode)
            with open_own(file) as opened:
                assert opened.read() == b"x"
        with pytest.raises(FileNotFoundError):
            open_own(tmp_path / "none")

    @pytest.mark.parametrize("open_it", [open_own, open_to_extend])
    def test_another_users_file_is_refused(self, tmp_path, secret, other_user, open_it):
        with pytest.raises(ForeignFile, match=r"secret: belongs to another user \(id \d+\)"):
            open_it(secret)

    @pytest.mark.parametrize("open_it", [open_own, open_to_extend])
    def test_links_and_pipes_are_refused(self, tmp_path, secret, open_it):
        (tmp_path / "link").symlink_to(secret)
        os.mkfifo(tmp_path / "pipe")
        for name in ("link", "pipe"):
            with pytest.raises(ForeignFile, match=f"{name}: is a link or no file"):
                open_it(tmp_path / name)

    def test_a_file_with_two_names_is_not_extended(self, tmp_path, secret):
        os.link(secret, tmp_path / "part")
        with pytest.raises(ForeignFile, match="part: has a second name"):
            open_to_extend(tmp_path / "part")


class TestFolders:
    def test_missing_folders_are_private(self, tmp_path, everything_allowed):
        make_private_folder(tmp_path / "a" / "b")
        make_private_folder(tmp_path / "a" / "b")
        assert mode_of(tmp_path / "a") == mode_of(tmp_path / "a" / "b") == 0o700

    @pytest.mark.parametrize("mode, fine", [(0o755, 1), (0o700, 1), (0o775, 0), (0o1777, 0)])
    def test_a_folder_that_others_may_write_is_refused(self, tmp_path, mode, fine):
        (tmp_path / "a").mkdir()
        (tmp_path / "a").chmod(mode)
        if fine:
            return make_private_folder(tmp_path / "a")
        with pytest.raises(ForeignFile, match=rf"a: others may write it \(mode {mode:04o}\)"):
            make_private_folder(tmp_path / "a")

    def test_another_users_folder_is_refused(self, tmp_path, other_user):
        with pytest.raises(ForeignFile, match="belongs to another user"):
            make_private_folder(tmp_path)

    def test_an_own_link_to_a_folder_is_followed(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "cache").symlink_to(tmp_path / "disk")
        make_private_folder(tmp_path / "cache")


class TestPlantedLinks:
    """A link at a temporary name is neither written through nor removed."""

    def test_at_the_name_of_a_file(self, tmp_path, secret, predictable):
        (tmp_path / ".a.txt.7.part").symlink_to(secret)
        with pytest.raises(UserError, match="cannot write: File exists"):
            storage.write_text(tmp_path / "a.txt", "new")

    def test_at_a_name_with_the_number_of_the_process(self, tmp_path, secret):
        (tmp_path / f".a.txt.{os.getpid()}.part").symlink_to(secret)
        storage.write_text(tmp_path / "a.txt", "new")
        assert (tmp_path / "a.txt").read_text() == "new"

    def test_at_the_name_of_a_folder(self, tmp_path, secret, predictable):
        (tmp_path / "victim").mkdir()
        (tmp_path / ".a.7.part").symlink_to(tmp_path / "victim")
        with (
            pytest.raises(UserError, match="cannot write: File exists"),
            storage.atomic_folder(tmp_path / "a") as part,
        ):
            (part / "x").write_text("new")
        assert os.listdir(tmp_path / "victim") == []

    def test_put_there_while_the_file_is_written(self, tmp_path, secret):
        with (
            pytest.raises(UserError, match="cannot write: "),
            storage.atomic_path(tmp_path / "a") as part,
        ):
            part.unlink()
            part.symlink_to(secret)
        assert not (tmp_path / "a").exists()

    def test_others_cannot_write_what_is_not_finished(self, tmp_path, everything_allowed):
        with (
            storage.atomic_path(tmp_path / "a") as part,
            storage.atomic_folder(tmp_path / "b") as b,
        ):
            assert (mode_of(part), mode_of(b)) == (0o600, 0o700)
        assert (mode_of(tmp_path / "a"), mode_of(tmp_path / "b")) == (0o666, 0o777)

    def test_at_the_file_of_the_metrics(self, tmp_path, secret):
        from lmcli.runs.run_folder import RunFolder

        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").symlink_to(secret)
        folder = RunFolder(tmp_path / "run")
        folder.open_metrics(0)
        folder.log({"step": 1})
        folder.release()
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'


class TestCache:
    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    @pytest.fixture(params=["cached", "cached_resumable"])
    def cached(self, request):
        """cached(): the folder of an entry, which is written if need be."""

        def write(part):
            (part / "ids").write_text("1")
            (part / "facts.json").write_text("{}")

        return lambda: getattr(storage, request.param)("kind", "key", write)

    def test_all_of_it_is_private(self, cache, cached, everything_allowed):
        folder = cached()
        assert folder == cache / "kind" / "key" == cached()
        assert {mode_of(each) for each in (cache, *folder.parents[:2], folder)} == {0o700}
        assert {mode_of(file) for file in folder.iterdir()} == {0o600}
        assert os.listdir(cache / "kind") == ["key"]

    @pytest.mark.parametrize("path", ["", "kind", "kind/key", "kind/key/ids"])
    def test_what_others_may_write_is_refused(self, cache, cached, path):
        cached()
        (cache / path).chmod(0o722)
        with pytest.raises(ForeignFile, match=r"others may write it \(mode 0722\)") as caught:
            cached()
        assert caught.value.where == str(cache / path)

    def test_another_users_is_refused(self, cache, cached, other_user):
        cache.mkdir()
        with pytest.raises(ForeignFile, match="cache: belongs to another user"):
            cached()

    def test_an_entry_that_is_a_link_of_another_user_is_refused(self, cache, cached, monkeypatch):
        folder = cached()
        folder.rename(cache / "elsewhere")
        folder.symlink_to(cache / "elsewhere")
        assert cached() == folder
        monkeypatch.setattr(ownership, "user_id", lambda: os.geteuid() + 1)
        with pytest.raises(ForeignFile):
            ownership.require_own_folder(folder)


class TestAnotherCache:
    @pytest.fixture(autouse=True)
    def fresh(self, tmp_path, monkeypatch):
        """No LM_CACHE, an empty temporary folder, nothing remembered."""
        for name in ("LM_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        functions = (storage._write_problem, storage._other_cache)
        for function in functions:
            function.cache_clear()
        yield
        for function in functions:
            function.cache_clear()

    @pytest.mark.parametrize(
        "home, reason",
        [
            ("/nonexistent", "there is no home folder"),
            ("{file}", "there is no home folder"),
            ("/proc", "No such file or directory"),
        ],
    )
    def test_it_is_taken_and_named_once(self, tmp_path, monkeypatch, capsys, home, reason):
        (tmp_path / "file").touch()
        home = home.format(file=tmp_path / "file")
        monkeypatch.setenv("HOME", home)
        other = tmp_path / "tmp" / f"lm-{os.geteuid()}"
        assert storage.cache_folder() == storage.cache_folder() == other
        assert storage.cache_folder("a", "b") == other / "a" / "b"
        assert capsys.readouterr().err == (
            f"lm: {home}/.cache/lm: cannot write: {reason}; the cache is {other}\n"
        )
        assert mode_of(other) == 0o700 and os.listdir(other) == ["a"]

    def test_control_characters_in_its_name_are_drawn(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("HOME", "/proc/\x1b[2J\x9b\u202e字")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        storage.cache_folder()
        printed = capsys.readouterr().err
        assert printed.startswith(r"lm: /proc/\x1b[2J\x9b\u202e字/.cache/lm: cannot write: ")

    def test_a_full_disk(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
        monkeypatch.setattr(
            storage, "free_bytes", lambda path: 1000 if path.parent.name == "full" else 1 << 40
        )
        assert storage.cache_folder().parent == tmp_path / "tmp"
        assert "full/lm: cannot write: the disk is full; the cache is " in capsys.readouterr().err

    def test_the_first_one_where_it_can_be_written(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert storage.cache_folder() == tmp_path / ".cache" / "lm"
        assert os.listdir(tmp_path / ".cache" / "lm") == [] and capsys.readouterr().err == ""

    def test_that_of_another_user_is_refused(self, tmp_path, monkeypatch, other_user):
        monkeypatch.setenv("HOME", "/nonexistent")
        (tmp_path / "tmp" / f"lm-{os.geteuid() + 1}").mkdir()
        with pytest.raises(ForeignFile, match="belongs to another user"):
            storage.cache_folder()

    def test_none_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", "/nonexistent")
        monkeypatch.setattr("tempfile.tempdir", "/proc")
        with pytest.raises(UserError, match=r"/\.cache/lm: cannot write: there is no home folder"):
            storage.cache_folder()

    def test_a_folder_that_the_user_names_is_not_replaced(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("LM_CACHE", str(tmp_path / "file"))
        with pytest.raises(UserError, match="file: cannot write the token cache: Not a directory"):
            storage.cache_folder()

    @pytest.mark.parametrize("quiet", [(), ("--quiet",)])
    def test_a_command_goes_on_and_quiet_says_nothing(self, tmp_path, monkeypatch, capsys, quiet):
        from lmcli.commands import run

        monkeypatch.setenv("HOME", "/nonexistent")
        (tmp_path / "a.txt").write_text("one two three\n" * 6)
        arguments = (str(tmp_path / "a.txt"), "--preset", "tiny", "--steps", "1")
        assert run(["train", *arguments, "-o", str(tmp_path / "run"), *quiet]) == 1
        error = capsys.readouterr().err
        assert "tokens to train on" in error  # which the ids in the cache tell
        assert ("; the cache is " in error) != bool(quiet)
