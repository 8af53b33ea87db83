"""`mobula cache`: eviction policies on a trace of requests, against LRU, an infinite cache and Belady; and the commands for pins."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, Optional

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cache_store.eviction import EVICTION
from cache_store.replay import Trace, belady_hit_rate, infinite_hit_rate, read_trace, replay
from runtime.commands.options import Address, ApiKey, CacheSalt, Deployment, Messages, PromptFile, PromptText, TokenIds
from runtime.commands.state_file import find_endpoint
from runtime.errors import UsageError

REFERENCE = "lru"

app = typer.Typer(name="cache", help="What the prefix cache does.", no_args_is_help=True, rich_markup_mode=None)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON line.")]


@app.command("replay")
def _replay(
    trace: Annotated[Path, typer.Argument(help="JSON lines, each with hash_ids: the blocks of one request's prompt.")],
    blocks: Annotated[list[int], typer.Option("--blocks", help="Size of the cache; may be repeated.")],
    policy: Annotated[Optional[list[str]], typer.Option("--policy", help="Eviction policy; may be repeated. All unless given.")] = None,  # noqa: UP045
    chart: Annotated[Optional[Path], typer.Option("--chart", help="PNG to draw.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Plays a trace against eviction policies: block hits beside those of LRU, an infinite cache and Belady."""
    replay_command(trace, blocks, policy or list(EVICTION), chart, as_json=as_json, console=Console(stderr=as_json))


@app.command("pin")
def _pin(
    ttl_s: Annotated[float, typer.Option("--ttl", metavar="SECONDS", help="How long it is kept.")],
    prompt: PromptText = None,
    prompt_file: PromptFile = None,
    token_ids: TokenIds = None,
    messages: Messages = None,
    cache_salt: CacheSalt = "",
    address: Address = None,
    api_key: ApiKey = "",
    deployment: Deployment = None,
    as_json: Json = False,
) -> None:
    """Has the full blocks of a prompt kept in a store: computed if need be, and evicted last."""
    from runtime.commands.pins import pin_command
    from runtime.commands.prompt import Prompt

    chosen = Prompt(prompt, token_ids, messages, prompt_file)
    pin_command(find_endpoint(address, deployment), api_key, chosen, ttl_s, cache_salt, as_json=as_json, console=Console())


@app.command("list")
def _list(address: Address = None, api_key: ApiKey = "", deployment: Deployment = None, as_json: Json = False) -> None:
    """Shows the pins of the caller's tenant, in every store."""
    from runtime.commands.pins import list_command

    list_command(find_endpoint(address, deployment), api_key, as_json=as_json, console=Console())


@app.command("unpin")
def _unpin(
    pin_ids: Annotated[Optional[list[str]], typer.Argument(metavar="PIN...", help="As `mobula cache list` shows them.")] = None,  # noqa: UP045
    everything: Annotated[bool, typer.Option("--all", help="All of the caller's tenant.")] = False,
    address: Address = None,
    api_key: ApiKey = "",
    deployment: Deployment = None,
) -> None:
    """Gives pins up: their blocks may be evicted like others."""
    from runtime.commands.pins import unpin_command

    unpin_command(find_endpoint(address, deployment), api_key, pin_ids or [], everything=everything, console=Console())


class Replayed(NamedTuple):
    """`rates`: block hit rates by policy, each with one value per size; "infinite" and "belady" among them."""

    sizes: list[int]
    rates: dict[str, list[float]]
    accesses_per_s: dict[str, float]  # by policy, over all sizes


def replay_command(
    path: Path, sizes: Sequence[int], policies: Sequence[str], chart: Path | None, *, as_json: bool, console: Console
) -> None:
    """UsageError names what is wrong with the trace, a size, a policy or the chart."""
    unknown = [name for name in policies if name not in EVICTION]
    if unknown:
        raise UsageError(f"--policy: {unknown[0]!r} is none of {', '.join(EVICTION)}")
    if min(sizes) < 1:
        raise UsageError(f"--blocks: must be at least 1, not {min(sizes)}")
    draw = _drawing(chart) if chart else None
    try:
        trace = read_trace(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"TRACE: {error}") from error
    replayed = replay_all(trace, list(sizes), list(dict.fromkeys([REFERENCE, *policies])), console)
    if draw:
        draw(replayed)
    if as_json:
        print(json.dumps({"sizes": replayed.sizes, "rates": replayed.rates, "accesses_per_s": replayed.accesses_per_s}))
    else:
        console.print(_table(replayed))


def replay_all(trace: Trace, sizes: list[int], policies: list[str], console: Console) -> Replayed:
    """Every policy at every size, with a progress bar when the console is a terminal."""
    rates: dict[str, list[float]] = {"infinite": [infinite_hit_rate(trace)] * len(sizes), "belady": []}
    accesses_per_s = {}
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("replay", total=len(sizes) * (len(policies) + 1))
        step = 1 / len(trace.requests)

        def advance() -> None:
            progress.advance(bar, step)

        for size in sizes:
            progress.update(bar, description=f"belady, {size} blocks")
            rates["belady"].append(belady_hit_rate(trace, size, advance))
        for name in policies:
            began_s = time.perf_counter()
            rates[name] = []
            for size in sizes:
                progress.update(bar, description=f"{name}, {size} blocks")
                rates[name].append(replay(trace, size, EVICTION[name](), advance))
            accesses_per_s[name] = len(sizes) * trace.num_blocks / (time.perf_counter() - began_s)
    return Replayed(sizes, rates, accesses_per_s)


def _table(replayed: Replayed) -> Table:
    table = Table(title="block hits, % (difference from LRU)")
    table.add_column("policy")
    for size in replayed.sizes:
        table.add_column(f"{size} blocks", justify="right")
    table.add_column("accesses/s", justify="right")
    for name, rates in replayed.rates.items():
        cells = [f"{100 * rate:.1f} ({100 * (rate - lru):+.1f})" for rate, lru in zip(rates, replayed.rates[REFERENCE], strict=True)]
        speed = replayed.accesses_per_s.get(name)
        table.add_row(name, *cells, f"{speed:,.0f}" if speed else "")
    return table


def _drawing(path: Path) -> Callable[[Replayed], None]:
    """What draws the chart; found before the replay, which takes a while. UsageError when that cannot work."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--chart {path}: there is no such folder")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--chart: needs matplotlib: pip install 'mobula[charts]'") from error

    def draw(replayed: Replayed) -> None:
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name, rates in replayed.rates.items():
            bound = name in ("infinite", "belady")
            axes.plot(
                replayed.sizes,
                [100 * rate for rate in rates],
                label=name,
                color={"infinite": "0.7", "belady": "0.3", "lru": "black"}.get(name),
                linestyle="--" if bound else "-",
                linewidth=2.5 if name in (REFERENCE, next(iter(EVICTION))) else 1.2,
                marker=None if bound else "o",
                markersize=3,
            )
        axes.set_xscale("log")
        axes.set_xticks(replayed.sizes, [f"{size:,}" for size in replayed.sizes])
        axes.minorticks_off()
        axes.set_xlabel("blocks in the cache")
        axes.set_ylabel("block hits, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=2)
        try:
            figure.savefig(path, dpi=100)
        except (OSError, ValueError) as error:
            raise UsageError(f"--chart {path}: {error}") from error

    return draw
