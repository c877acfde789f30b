"""`lm info` without a name: the list on a terminal, in a pipe, as JSON."""

import json

from drawn_screen import printable


def test_the_runs_here_are_listed(inside, trained, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "small").symlink_to(trained[0])
    (tmp_path / "runs" / "x\ty\x1b").mkdir()
    (tmp_path / "runs" / "x\ty\x1b" / "config.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    result = json.loads(inside("info", trained[0], "--json").stdout)
    rows = [json.loads(line) for line in inside("info", "--json").stdout.splitlines()]
    (row,) = (row for row in rows if row["name"] == "runs/small")
    assert row["parameters"] == result["parameters"]["total"] and row["state"] == "done"
    assert row["best"] == result["run"]["val_bits_per_byte"] and row["steps"] == 40
    lines = [line.split("\t") for line in inside("info").stdout.decode().splitlines()]
    assert lines[0][:2] == ["name", "kind"] and all(len(line) == 9 for line in lines)
    assert len(lines) == 1 + len(rows) == 3
    assert not any("\x1b" in line[0] for line in lines)


def test_on_a_terminal(screen, tmp_path):
    shown = screen("info", folder=tmp_path, variables={"HF_HUB_CACHE": str(tmp_path)})
    assert shown.code == 0 and printable(shown.lines)
    assert shown.lines == ["no runs or models here; lm train TEXT makes one"]


def test_in_an_empty_folder_there_is_a_message(inside, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    done = inside("info")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr == b"lm: no runs or models here; lm train TEXT makes one\n"
