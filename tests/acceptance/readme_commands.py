"""The README's two set-up commands as they stand, each in a fresh clone; installs from the package index.

python tests/acceptance/readme_commands.py [first|tests]      prints the seconds of each, installation included
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    lines = re.findall(r"```sh\n(python3 -m venv .+?)\n```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(lines) == 2, lines
    for name, line in zip(("first", "tests"), lines, strict=True):
        if sys.argv[1:] not in ([], [name]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
            began = time.monotonic()
            code = subprocess.run(["bash", "-ec", line], cwd=folder).returncode
            print(f"{name}: exit code {code} after {time.monotonic() - began:.0f} s", flush=True)
            assert code == 0


if __name__ == "__main__":
    main()
