"""Kernels of a search, built ahead by several processes, into Triton's cache."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources

NUM_BUILDERS = 14
Job = TypeVar("Job")


def runnable(run: Callable[[Job], object], jobs: list[Job]) -> list[Job]:
    """Runs each job once, in some process; returns those that the card can run."""
    shares = [jobs[start::NUM_BUILDERS] for start in range(NUM_BUILDERS)]
    with ProcessPoolExecutor(min(NUM_BUILDERS, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as executor:
        return list(itertools.chain.from_iterable(executor.map(partial(_run_all, run), shares)))


def _run_all(run: Callable[[Job], object], jobs: list[Job]) -> list[Job]:
    done = []
    for job in jobs:
        with contextlib.suppress(OutOfResources):
            run(job)
            done.append(job)
    torch.cuda.synchronize()
    return done
