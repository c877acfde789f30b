"""Building the kernels: once per machine, safe with several processes, with a clear error."""

import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lmcli import ownership
from lmcli.kernels import build, calls
from lmcli.ownership import ForeignFile
from lmcli.terminal import progress

ROOT = Path(__file__).resolve().parents[2]
BUILT = (build.library, build.problem, build._loaded)
COMPILER = build._compiler()
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not COMPILER, reason="no C compiler, or not Linux"
)


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """An empty cache folder and nothing loaded; returns a function that unloads again."""

    def unload() -> None:
        for function in BUILT:
            function.cache_clear()

    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    for name in ("LM_KERNELS", "CC"):
        monkeypatch.delenv(name, raising=False)
    unload()
    yield unload
    unload()


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The library that the compiler has built for the tests of all folders."""
    assert build.problem() == ""
    return build._library_file()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(output, version) makes CC a program that copies the file `output` as its result.

    Returns the log of its compilations. Without an output it fails as a compiler does.
    """

    def make(output: Path | None, version: str = "1") -> Path:
        program, log = tmp_path / "compiler", tmp_path / "log"
        log.touch()
        build = (
            f'cp {output} "$2"'
            if output
            else 'echo "kernels.c:1: error: too old" >&2; echo stopped >&2; exit 1'
        )
        program.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\n'
            f'echo compiled >> {log}\nwhile [ "$1" != -o ]; do shift; done\n{build}\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("CC", str(program))
        return log

    return make


@needs_compiler
def test_the_wait_for_the_compiler_is_named(unloaded, compiled, compiler, monkeypatch):
    class Silent:
        def told(self) -> None:
            pass

        def hidden(self, text):
            return nullcontext()

    compiler(compiled)
    true, shown = build._compile_once, []
    monkeypatch.setattr(
        build, "_compile_once", lambda file: (shown.append(progress.current().label), true(file))
    )
    progress.watch(Silent())
    try:
        for _ in range(2):
            assert build.problem() == ""
            unloaded()
        assert shown == ["compiling kernels, once"] and progress.current().label == ""
    finally:
        progress.watch(None)


def compilations(log: Path) -> int:
    return log.read_text().count("compiled")


def cached_files() -> list[Path]:
    """All files in the cache folder."""
    return sorted((Path(os.environ["LM_CACHE"]) / "kernels").iterdir())


def works() -> bool:
    """True if a kernel computes correctly: 3 and 4 have a root mean square of √12.5."""
    y = torch.empty(2)
    calls.run("rms_norm", torch.float32, torch.tensor([3.0, 4]), torch.ones(2), y, 1, 2, 0.0)
    return y.tolist() == pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5])


def unusable(reason: str) -> bool:
    return build.problem() == reason and build.library() is None and not calls.usable(torch.ones(1))


linux = pytest.mark.skipif(sys.platform != "linux", reason="kernels are built on Linux alone")


@linux
def test_no_compiler(unloaded, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert unusable("no C compiler (cc, gcc, clang) was found")


@linux
def test_a_missing_cc_is_not_replaced(unloaded, monkeypatch):
    monkeypatch.setenv("CC", "/nonexistent -O1")
    assert unusable("CC=/nonexistent -O1 was not found")


@linux
def test_a_failing_compiler_is_quoted(unloaded, compiler, monkeypatch):
    log = compiler(None)
    assert unusable(f"{log.with_name('compiler')} fails: kernels.c:1: error: too old")
    assert cached_files() == []
    unloaded()
    monkeypatch.setenv("CC", "false")
    assert unusable(f"{shutil.which('false')} fails: exit code 1")


@linux
def test_a_compiler_that_cannot_run(unloaded, monkeypatch, tmp_path):
    program = tmp_path / "cc"
    program.write_bytes(b"\x7fELF and no more")
    program.chmod(0o755)
    monkeypatch.setenv("CC", str(program))
    assert unusable(f"{program}: cannot run: Exec format error")


def test_kernels_can_be_switched_off(unloaded, monkeypatch):
    monkeypatch.setenv("LM_KERNELS", "0")
    assert unusable("LM_KERNELS=0")


@needs_compiler
def test_a_cache_folder_that_cannot_be_written(unloaded, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "file"))  # permissions would not stop root
    assert unusable(f"{tmp_path / 'file'}: cannot write: Not a directory")


@needs_compiler
def test_kernels_are_compiled_once_per_compiler(unloaded, compiler, compiled):
    log = compiler(compiled)
    for _ in range(2):
        assert build.problem() == "" and works()
        assert len(cached_files()) == compilations(log) == 1
        unloaded()
    compiler(compiled, version="2")
    assert build.problem() == "" and works()
    assert len(cached_files()) == compilations(log) == 2


@needs_compiler
@pytest.mark.parametrize("planted", ["writable", "link", "another user's", "folder"])
def test_a_planted_library_is_refused_by_name_and_not_run(
    planted, unloaded, compiler, compiled, monkeypatch, tmp_path
):
    compiler(compiled)
    file = build._library_file()
    file.write_bytes(compiled.read_bytes())
    if planted == "writable":
        file.chmod(0o666)
    elif planted == "link":
        file.rename(tmp_path / "elsewhere.so")
        file.symlink_to(tmp_path / "elsewhere.so")
    elif planted == "folder":
        file.parent.chmod(0o777)
    else:
        monkeypatch.setattr(ownership, "_require_owner", refuse_files)
    loaded = []
    monkeypatch.setattr(build.ctypes, "CDLL", loaded.append)
    with pytest.raises(ForeignFile) as caught:
        calls.usable(torch.ones(1))
    assert caught.value.where == str(file.parent if planted == "folder" else file)
    assert not loaded and "lm does not" in str(caught.value)


def refuse_files(path, status):
    """As if another user owned all files, and we all folders."""
    if path.suffix == ".so":
        raise ForeignFile("belongs to another user: lm does not use it", str(path))


@needs_compiler
def test_the_library_is_private_whatever_the_umask(unloaded, compiler, compiled):
    compiler(compiled)
    mask = os.umask(0)
    try:
        assert build.problem() == "" and works()
    finally:
        os.umask(mask)
    (file,) = cached_files()
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "text", "half", "one bit"])
def test_a_damaged_file_in_the_cache_is_built_again(damage, unloaded, compiler, compiled):
    log, whole = compiler(compiled), compiled.read_bytes()
    middle = len(whole) // 2
    file = build._library_file()
    file.write_bytes(
        {
            "empty": b"",
            "text": b"hello",
            "half": whole[:middle],
            "one bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        }[damage]
    )
    assert build.problem() == "" and works()
    assert cached_files() == [file] and compilations(log) == 1


@linux
def test_a_library_that_does_not_load(unloaded, compiler, tmp_path):
    (tmp_path / "text").write_text("hello")
    log = compiler(tmp_path / "text")
    assert "file too short" in build.problem() and build.library() is None
    assert compilations(log) == 2


@needs_compiler
def test_cc_may_have_options(unloaded, compiler, compiled, monkeypatch):
    log = compiler(compiled)
    monkeypatch.setenv("CC", f"env {os.environ['CC']}")
    assert build.problem() == "" and works() and compilations(log) == 1


@needs_compiler
def test_of_two_processes_at_once_one_builds(unloaded, compiler, compiled):
    log = compiler(compiled)
    script = (
        "import torch; from lmcli.kernels import build, calls; assert not build.problem()\n"
        "x, y = torch.ones(2), torch.empty(2)\n"
        "calls.run('rms_norm', torch.float32, x, x, y, 1, 2, 0.0); print(y.tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.communicate(timeout=120) == ("[1.0, 1.0]\n", "")
        assert process.returncode == 0
    assert [file.suffix for file in cached_files()] == [".so"] and compilations(log) == 1


@needs_compiler
def test_the_source_has_no_warnings():
    done = subprocess.run(
        [*COMPILER, "-fopenmp", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(build.SOURCE)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "system, machine, there, missing",
    [
        ("linux", "x86_64", ("-fopenmp", "-march=native"), ()),
        ("darwin", "x86_64", ("-march=native",), ("-fopenmp",)),
        ("darwin", "arm64", ("-mcpu=native",), ("-fopenmp", "-march=native")),
    ],
)
def test_the_flags_of_a_system(monkeypatch, system, machine, there, missing):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    flags = runpy.run_path(build.__file__)["FLAGS"]
    assert {*there} <= {*flags} and not {*missing} & {*flags}


@needs_compiler
def test_without_openmp_all_work_goes_through_dispatch(tmp_path):
    """As on macOS. Compiled where there is clang; gcc has no blocks and only expands the macros."""
    (tmp_path / "dispatch").mkdir()
    (tmp_path / "dispatch" / "dispatch.h").write_text(
        "#define QOS_CLASS_USER_INITIATED 0\nvoid *dispatch_get_global_queue(long, long);\n"
        "void dispatch_apply(unsigned long, void *, void (^)(unsigned long));\n"
    )
    clang = shutil.which("clang")
    compiler = [clang, "-fblocks"] if clang else [*COMPILER, "-E", "-P"]
    check = ["-Wall", "-Werror", "-fsyntax-only"] if clang else []
    done = subprocess.run(
        [*compiler, *check, "-I", tmp_path, build.SOURCE], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    kernels = build.SOURCE.read_text(encoding="utf-8").count("    FOR_CHUNKS ")
    if not clang:
        assert done.stdout.count("dispatch_apply((size_t)threads") == 3 * kernels > 0
        assert done.stdout.count("});") == 3 * kernels


def test_the_source_is_in_the_wheel(tmp_path):
    assert build.SOURCE.parent == Path(build.__file__).parent
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]
    assert (
        wheel["packages"] == ["lmcli"] and not {"only-include", "include", "exclude"} & wheel.keys()
    )
    if git := shutil.which("git"):  # hatch leaves out what git ignores
        ignored = subprocess.run(
            [git, "check-ignore", "-q", str(build.SOURCE)], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        assert ignored.returncode
