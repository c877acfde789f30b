"""Names on the hub, without a network: Hugging Face's cache is read as it lies, and fetching is a stand-in's work."""

import shutil
import sys
from pathlib import Path

import pytest

import lmcli
from lmcli.checkpoints import hub
from lmcli.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, offline, seen from an empty folder."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


@pytest.fixture
def put(cache, reference):
    """put(name, change): a snapshot as huggingface_hub lays it down, its files links to blobs; returns its folder."""
    def make(name="owner/model", change=lambda folder: None, cache=cache):
        blobs = cache / f"models--{name.replace('/', '--')}"
        snapshot, whole = blobs / "snapshots" / COMMIT, blobs / "blobs"
        snapshot.mkdir(parents=True)
        reference(whole)
        change(whole)
        for file in whole.iterdir():
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        (blobs / "refs").mkdir()
        (blobs / "refs" / "main").write_text(COMMIT)
        return snapshot
    return make


@pytest.mark.parametrize("name", ["owner/model", "model", "bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2",
                                  "meta-llama/Llama-3.2-1B"])
def test_a_cached_model_loads_by_its_name(put, name):
    snapshot = put(name)
    assert hub.find(name) == snapshot
    assert lmcli.load(name, device="cpu").logits([[1, 2]]).shape == (1, 2, 409)


def test_a_folder_of_that_name_comes_first(put, tmp_path):
    put("owner/model")
    Path("owner/model").mkdir(parents=True)
    assert hub.find("owner/model") == "owner/model"


@pytest.mark.parametrize("name", ["/owner/model", "./model", "../model", "runs/a/b", "~/model", "owner/", "owner//model",
                                  "tokenizer.json", "model.safetensors", "a model", "owner--model", "", "x" * 300,
                                  Path("owner/model")])
def test_what_looks_like_a_path_is_none(cache, name):
    assert hub.find(name) == name


@pytest.mark.parametrize("variables, place", [
    ({"HF_HUB_CACHE": "a"}, "a"), ({"HUGGINGFACE_HUB_CACHE": "b"}, "b"), ({"HF_HOME": "c"}, "c/hub"),
    ({"XDG_CACHE_HOME": "d"}, "d/huggingface/hub"), ({"HOME": "e"}, "e/.cache/huggingface/hub")])
def test_the_cache_lies_where_the_environment_says(cache, monkeypatch, put, variables, place):
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, str(cache.parent / value))
    assert hub.cache_folder() == cache.parent / place
    put(cache=cache.parent / place)
    assert hub.find("owner/model").is_dir()


def refusal(name="owner/model") -> UserError:
    with pytest.raises(UserError) as caught:
        lmcli.load(name, device="cpu")
    return caught.value


def test_offline_nothing_is_fetched(cache):
    error = refusal()
    assert (error.where, error.exit_code) == ("owner/model", 1)
    assert "no such model folder" in error.what and str(cache) in error.what and "HF_HUB_OFFLINE" in error.hint


def test_without_the_extra_the_line_that_installs_it_is_told(cache, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'lmcli[hub]'" in refusal().hint


def test_a_typing_error_in_a_folder_asks_no_hub(cache, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    Path("runs").mkdir()
    assert refusal("runs/nots").what == "no such model in the folder runs"


def test_a_snapshot_with_a_pickle_is_refused_as_a_folder_is(put, tmp_path):
    def pickled(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    snapshot = put(change=pickled)
    folder = shutil.copytree(snapshot, tmp_path / "copy")
    by_name, by_folder = refusal(), refusal(str(folder))
    assert (by_name.what, by_name.hint) == (by_folder.what, by_folder.hint.replace(str(folder), str(snapshot)))
    assert (by_name.where, by_folder.where) == (str(snapshot), str(folder))


def test_a_tokenizer_alone_will_do_where_no_weights_are_needed(put):
    snapshot = put(change=lambda folder: (folder / "model.safetensors").unlink())
    assert hub.find("owner/model", weights=False) == snapshot


class TestFetching:
    @pytest.fixture
    def fetched(self, cache, monkeypatch):
        """What was asked of huggingface_hub; `answer` is called in its place."""
        huggingface_hub = pytest.importorskip("huggingface_hub")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        asked = []

        def snapshot_download(name, **options):
            asked.append((name, options))
            return asked.answer()
        asked = type("Asked", (list,), {"answer": staticmethod(lambda: None)})()
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    def test_what_is_not_cached_is_fetched_but_no_pickle(self, fetched, put, cache):
        fetched.answer = lambda: str(put())
        assert hub.find("owner/model").is_dir()
        ((name, options),) = fetched
        assert (name, options["cache_dir"]) == ("owner/model", cache)
        assert "config.json" in options["allow_patterns"] and not [
            pattern for pattern in options["allow_patterns"] if "bin" in pattern.split(".") or pattern.startswith("*")]

    def test_what_is_cached_is_not_asked_for(self, fetched, put):
        put()
        hub.find("owner/model")
        assert fetched == []

    def test_a_snapshot_without_weights_is_completed(self, fetched, put):
        snapshot = put(change=lambda folder: (folder / "model.safetensors").unlink())
        fetched.answer = lambda: str(snapshot)
        assert hub.find("owner/model") == snapshot and len(fetched) == 1

    @pytest.mark.parametrize("kind, told", [
        ("RepositoryNotFoundError", "no such model on the hub"), ("GatedRepoError", "granted"),
        (ConnectionError, "could not be asked"), (ValueError, "could not be asked")])
    def test_a_refusal_is_told(self, fetched, kind, told):
        from huggingface_hub import errors

        def refuse():
            if not isinstance(kind, str):
                raise kind("\n the line is cut\nmore")
            error = getattr(errors, kind)
            raise error.__new__(error)  # to make one in full needs an answer of the HTTP library of the day
        fetched.answer = refuse
        error = refusal()
        assert told in error.what and error.where == "owner/model" and "\n" not in error.hint
        if not isinstance(kind, str):
            assert error.hint == "the line is cut"
