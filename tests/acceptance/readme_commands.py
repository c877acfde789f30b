"""Runs the README's two set-up commands unchanged, each in a fresh clone.

python tests/acceptance/readme_commands.py [first|tests]

Installs from the package index. Prints the seconds of each command, installation included; fails
if one fails.
"""

import argparse
import re
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("first", "tests")


def main() -> None:
    """Runs the commands that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=NAMES, help="only this one")
    only = parser.parse_args().command
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"```sh\n(python3 -m venv .+?)\n```", readme, re.S)
    assert len(commands) == 2, commands
    for name, command in zip(NAMES, commands, strict=True):
        if only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
            started = time.monotonic()
            code = subprocess.run(["bash", "-ec", command], cwd=folder).returncode
            print(f"{name}: exit code {code} after {time.monotonic() - started:.0f} s", flush=True)
            assert code == 0


if __name__ == "__main__":
    main()
