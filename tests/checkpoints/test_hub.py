"""Names on the Hub, without a network: a real cache is read, downloads are mocked."""

import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import lmcli
from lmcli.checkpoints import hub
from lmcli.errors import UserError
from lmcli.terminal import progress

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, offline; the working directory is an empty folder."""
    for name in (
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HOME",
        "XDG_CACHE_HOME",
        "TRANSFORMERS_OFFLINE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


@pytest.fixture
def add_snapshot(cache, reference):
    """add_snapshot(name, change): writes a snapshot as huggingface_hub does, as links to blobs.

    Returns its folder.
    """

    def make(name="owner/model", change=lambda folder: None, cache=cache):
        blobs = cache / f"models--{name.replace('/', '--')}"
        snapshot, files = blobs / "snapshots" / COMMIT, blobs / "blobs"
        snapshot.mkdir(parents=True)
        reference(files)
        change(files)
        for file in files.iterdir():
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        (blobs / "refs").mkdir()
        (blobs / "refs" / "main").write_text(COMMIT)
        return snapshot

    return make


@pytest.mark.parametrize(
    "name",
    [
        "owner/model",
        "model",
        "bert-base-uncased",
        "sentence-transformers/all-MiniLM-L6-v2",
        "meta-llama/Llama-3.2-1B",
    ],
)
def test_a_cached_model_loads_by_its_name(add_snapshot, name):
    snapshot = add_snapshot(name)
    assert hub.find(name) == snapshot
    assert lmcli.load(name, device="cpu").logits([[1, 2]]).shape == (1, 2, 409)


def test_a_folder_with_the_name_comes_first(add_snapshot, tmp_path):
    add_snapshot("owner/model")
    Path("owner/model").mkdir(parents=True)
    assert hub.find("owner/model") == "owner/model"


@pytest.mark.parametrize(
    "name",
    [
        "/owner/model",
        "./model",
        "../model",
        "runs/a/b",
        "~/model",
        "owner/",
        "owner//model",
        "tokenizer.json",
        "model.safetensors",
        "a model",
        "owner--model",
        "",
        "x" * 300,
        Path("owner/model"),
    ],
)
def test_a_path_is_returned_unchanged(cache, name):
    assert hub.find(name) == name


@pytest.mark.parametrize(
    "variables, path",
    [
        ({"HF_HUB_CACHE": "a"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "b"}, "b"),
        ({"HF_HOME": "c"}, "c/hub"),
        ({"XDG_CACHE_HOME": "d"}, "d/huggingface/hub"),
        ({"HOME": "e"}, "e/.cache/huggingface/hub"),
    ],
)
def test_the_environment_sets_the_folder_of_the_cache(
    cache, monkeypatch, add_snapshot, variables, path
):
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, str(cache.parent / value))
    assert hub.cache_folder() == cache.parent / path
    add_snapshot(cache=cache.parent / path)
    assert hub.find("owner/model").is_dir()


def load_error(name="owner/model") -> UserError:
    with pytest.raises(UserError) as caught:
        lmcli.load(name, device="cpu")
    return caught.value


def test_without_a_home_folder_it_is_in_our_cache(cache, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "lm"))
    # ~ stays as it is for a user that the system does not know
    monkeypatch.setattr("os.path.expanduser", str)
    assert hub.cache_folder() == tmp_path / "lm" / "hub"
    monkeypatch.setattr("os.path.expanduser", lambda path: str(path).replace("~", str(tmp_path)))
    assert hub.cache_folder() == tmp_path / ".cache" / "huggingface" / "hub"


def test_offline_nothing_is_downloaded(cache):
    error = load_error()
    assert (error.where, error.exit_code) == ("owner/model", 1)
    assert (
        "no such model folder" in error.what
        and str(cache) in error.what
        and "HF_HUB_OFFLINE" in error.hint
    )


def test_without_the_extra_the_hint_says_how_to_install_it(cache, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'lmcli[hub]'" in load_error().hint


def test_a_typo_in_a_local_path_does_not_query_the_hub(cache, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    Path("runs").mkdir()
    assert load_error("runs/nots").what == "no such model in the folder runs"


def test_a_snapshot_with_a_pickle_is_the_same_error_as_a_folder(add_snapshot, tmp_path):
    def pickled(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    snapshot = add_snapshot(change=pickled)
    folder = shutil.copytree(snapshot, tmp_path / "copy")
    by_name, by_folder = load_error(), load_error(str(folder))
    assert (by_name.what, by_name.hint) == (
        by_folder.what,
        by_folder.hint.replace(str(folder), str(snapshot)),
    )
    assert (by_name.where, by_folder.where) == (str(snapshot), str(folder))


def test_a_snapshot_with_a_tokenizer_only_suffices_without_weights(add_snapshot):
    snapshot = add_snapshot(change=lambda folder: (folder / "model.safetensors").unlink())
    assert hub.find("owner/model", weights=False) == snapshot


class TestDownloading:
    @pytest.fixture
    def downloads(self, cache, monkeypatch):
        """The calls of huggingface_hub; `answer` is called instead of it."""
        huggingface_hub = pytest.importorskip("huggingface_hub")
        monkeypatch.delenv("HF_HUB_OFFLINE")

        def snapshot_download(name, **options):
            calls.append((name, options))
            return calls.answer()

        calls = type("Calls", (list,), {"answer": staticmethod(lambda: None)})()
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    def test_a_model_outside_the_cache_is_downloaded_without_pickles(
        self, downloads, add_snapshot, cache
    ):
        downloads.answer = lambda: str(add_snapshot())
        assert hub.find("owner/model").is_dir()
        ((name, options),) = downloads
        assert (name, options["cache_dir"]) == ("owner/model", cache)
        assert "config.json" in options["allow_patterns"] and not [
            pattern
            for pattern in options["allow_patterns"]
            if "bin" in pattern.split(".") or pattern.startswith("*")
        ]

    def test_progress_counts_the_bytes_of_all_files_once(self, downloads, add_snapshot):
        def answer():
            bar = downloads[0][1]["tqdm_class"]
            # as snapshot_download: files, bytes that are done, bytes that arrive
            files, done, arrived = bar(total=2), bar(total=0, unit="B"), bar(total=0, unit="B")
            for size in (30, 70):
                done.total, arrived.total = done.total + size, arrived.total + size
            arrived.update(50), done.update(30), files.update(1)
            shown.append(progress.shown())
            return str(add_snapshot())

        class Watcher:
            told = staticmethod(lambda: None)
            hidden = staticmethod(lambda text: nullcontext())

        shown, downloads.answer = [], answer
        progress.watch(Watcher())
        try:
            hub.find("owner/model")
        finally:
            progress.watch(None)
        ((stage, done, share),) = shown
        assert (stage.label, done, share) == ("downloading owner/model", 50, 0.5)

    def test_a_cached_model_is_not_downloaded(self, downloads, add_snapshot):
        add_snapshot()
        hub.find("owner/model")
        assert downloads == []

    def test_a_snapshot_without_weights_is_completed(self, downloads, add_snapshot):
        snapshot = add_snapshot(change=lambda folder: (folder / "model.safetensors").unlink())
        downloads.answer = lambda: str(snapshot)
        assert hub.find("owner/model") == snapshot and len(downloads) == 1

    @pytest.mark.parametrize(
        "kind, message",
        [
            ("RepositoryNotFoundError", "no such model on the Hub"),
            ("GatedRepoError", "gated"),
            (ConnectionError, "could not be reached"),
            (ValueError, "could not be reached"),
        ],
    )
    def test_a_failed_download_is_reported(self, downloads, kind, message):
        from huggingface_hub import errors

        def refuse():
            if not isinstance(kind, str):
                raise kind("\n the first line\nmore")
            error = getattr(errors, kind)
            # the constructor needs a response of the HTTP library in use
            raise error.__new__(error)

        downloads.answer = refuse
        error = load_error()
        assert message in error.what and error.where == "owner/model" and "\n" not in error.hint
        if not isinstance(kind, str):
            assert error.hint == "the first line"


def test_what_is_downloaded_has_the_chat_template(cache):
    from fnmatch import fnmatch

    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert any(fnmatch(name, pattern) for pattern in hub.DOWNLOADED_FILES)
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in hub.DOWNLOADED_FILES)


def test_the_base_of_an_adapter_is_not_downloaded_unless_it_is_named(cache, tmp_path, monkeypatch):
    """A file of others must not decide what is fetched."""
    from lmcli.checkpoints import adapter_base

    monkeypatch.setattr(hub, "_download", lambda name: pytest.fail(f"{name} was asked for"))
    (tmp_path / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "someone/anything", "peft_type": "LORA"}'
    )
    with pytest.raises(UserError) as caught:
        adapter_base.find_base(tmp_path)
    assert "someone/anything is not on this machine" in caught.value.what
    assert caught.value.hint == "to download it: lm info someone/anything"
