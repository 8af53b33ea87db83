"""Several ranks of one model as processes, each running the same scenario; what they did comes back for comparison."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TIMEOUT_S = 120.0


class Outcome(NamedTuple):
    """Of one rank and one model."""

    known: dict[int, list[int]]  # tokens by row
    scores: np.ndarray | None  # [positions, vocabulary] of row 1; rank 0 only
    pages: dict[int, np.ndarray]  # by block of row 1: the page's bytes
    layout: Any  # PageLayout


def run_scenario(folder: Path, comm: Any) -> Outcome:
    """Two rows, prompts in chunks, then a few greedy and a few random tokens."""
    import torch
    from checkpoints import random_tokens
    from model_driver import Driver, make_runner

    from workers.step import ALL_LOGPROBS, SamplingSettings

    torch.set_num_threads(1)
    run = Driver(make_runner(folder, comm))
    run.add(1, random_tokens(40, 1), SamplingSettings(temperature=0.0, num_logprobs=ALL_LOGPROBS, num_prompt_logprobs=ALL_LOGPROBS))
    run.add(2, random_tokens(9, 2), SamplingSettings(temperature=0.8, top_p=0.9, seed=11, frequency_penalty=0.3))
    run.prefill([1, 2], 23)
    run.decode([1, 2], 4)
    pages = {block: run.runner.pool.page_bytes(page).numpy().copy() for block, page in enumerate(run.pages[1])}
    return Outcome(run.known, run.scores(1) if comm.rank == 0 else None, pages, run.runner.layout)


def _rank_main(rank: int, world_size: int, folders: list[Path], pipe: Connection) -> None:
    from workers.parallel import Communicator

    for folder in folders:  # one group after the other in the same process
        host = Communicator.host(world_size) if rank == 0 else None
        if host is not None:
            pipe.send(host.port)
        port = pipe.recv() if host is None else host.port
        comm = Communicator.connect(rank, world_size, "127.0.0.1", port, "cpu", host, timeout_s=TIMEOUT_S)
        pipe.send(run_scenario(folder, comm))
        comm.close()
        if host is not None:
            host.close()


def run_groups(world_size: int, folders: list[Path]) -> list[list[Outcome]]:
    """The outcomes of every folder's model, one per rank."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(world_size):
        mine, theirs = context.Pipe()
        process = context.Process(target=_rank_main, args=(rank, world_size, folders, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        outcomes = []
        for _ in folders:
            port = _receive(pipes[0])
            for pipe in pipes[1:]:
                pipe.send(port)
            outcomes.append([_receive(pipe) for pipe in pipes])
        return outcomes
    finally:
        for process in processes:
            process.join(10)
            process.terminate()
            process.join()


def _receive(pipe: Connection) -> Any:
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError("a rank does not answer")
    return pipe.recv()
