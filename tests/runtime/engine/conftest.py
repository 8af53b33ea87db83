"""Puts the simulated border and this folder's helpers within reach."""

import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parents[1] / "simulation")]
