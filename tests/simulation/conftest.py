"""Puts the simulated border (ranks, store, clock) within reach of the tests that run an engine against it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
