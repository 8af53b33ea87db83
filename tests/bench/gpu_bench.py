"""`make bench-gpu`: what serving on one GPU is judged by, for two model shapes, alone or beside a peer on the same weights.

usage: python -m tests.bench.gpu_bench [--shape llama8b --shape dsv2lite] [--peer vllm] [--only decode,prefill,...,restore]
           [--tensor-parallel-size N] [--checkpoints FOLDER] [--budget SECONDS] [--out FILE.json] [--chart FILE.png]
       python -m tests.bench.gpu_bench --draw FILE.json --chart FILE.png

Every system runs in processes of its own: one for the workloads of serving, one for those with a store. What is known is written to --out
after each workload. Beside a peer both load one checkpoint, as made-up weights differ between systems, and with them the experts chosen.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.chart import draw_chart, line_of
from tests.bench.gpu_report import LABELS, OURS
from tests.bench.gpu_run import SYSTEMS
from tests.bench.gpu_session import Session, figures_of
from tests.bench.gpu_shapes import SHAPES
from tests.bench.gpu_workloads import SERVING, STORING

ALL = (*SERVING, *STORING)


def parse() -> argparse.Namespace:
    """Options, with defaults that depend on others filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--peer", choices=sorted(set(SYSTEMS) - {OURS}), help="measure it beside ours")
    parser.add_argument("--system", action="append", choices=sorted(SYSTEMS), help="measure these; ours unless given")
    parser.add_argument("--only", default=",".join(ALL), help="workloads, separated by commas")
    parser.add_argument("--tensor-parallel-size", "--tp", type=int, default=1, metavar="N", help="devices of an engine, and of the peer's")
    parser.add_argument("--load", choices=("dummy", "checkpoint"), help="made-up weights (the default for ours alone), or files")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="of checkpoints by shape, written once; else a temporary one")
    parser.add_argument("--budget", type=float, default=1e9, metavar="SECONDS", help="workloads that would begin later are skipped")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="tokens per second against concurrent streams")
    parser.add_argument("--draw", type=Path, metavar="FILE.json", help="draw --chart from an earlier --out; measure nothing")
    arguments = parser.parse_args()
    if arguments.draw and not arguments.chart:
        parser.error("--draw needs --chart")
    arguments.only = arguments.only.split(",")
    if unknown := set(arguments.only) - set(ALL):
        parser.error(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(ALL)}")
    arguments.shape = arguments.shape or sorted(SHAPES)
    arguments.system = arguments.system or [OURS, *([arguments.peer] if arguments.peer else [])]
    arguments.load = arguments.load or ("checkpoint" if arguments.checkpoints or arguments.system != [OURS] else "dummy")
    return arguments


def draw(results: dict[str, Any], path: Path) -> None:
    lines = {
        f"{shape}, {LABELS[system]}": line
        for shape, entry in results["shapes"].items()
        for system, figures in figures_of(entry).items()
        if (line := line_of(figures, "stream"))
    }
    draw_chart(lines, path)


def main() -> None:
    arguments = parse()
    if arguments.draw:
        draw(json.loads(arguments.draw.read_text()), arguments.chart)
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # children are ended on the way out
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        session = Session(arguments, Path(scratch))
        session.run()
    session.save()
    if arguments.out is None:
        print(json.dumps(session.results, indent=1))
    if arguments.chart is not None:
        draw(session.results, arguments.chart)


if __name__ == "__main__":
    main()
