"""Lets the tests here import the builders that tests/acceptance shares with them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
