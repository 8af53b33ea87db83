"""The collector of cyclic garbage, in a process that serves. Reference counts free nearly everything; what is left is seldom and little."""

from __future__ import annotations

import gc

THRESHOLDS = (10_000, 20, 20)


def settle() -> None:
    """To be called once by whoever owns the process, when it has what it keeps. What is there now is not looked at again: walking over it
    held a front door up for 45 ms at a time, every second under load. What comes is looked at less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
