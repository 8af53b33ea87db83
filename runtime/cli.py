"""The command line. Each command parses its options, then hands over to `runtime.commands`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from runtime.commands import cache
from runtime.commands.options import Address, ApiKey, CacheSalt, Deployment, Messages, PromptFile, PromptText, TokenIds
from runtime.config import DEFAULT_DEPLOYMENT, ServeSettings, resolve_settings
from runtime.errors import MobulaError, UsageError

app = typer.Typer(
    name="mobula",
    help="A distributed multi-GPU inference runtime on Ray, with one prefix cache for the whole cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(cache.app)

Config = Annotated[Optional[Path], typer.Option("--config", help="TOML file with settings named as the flags.")]  # noqa: UP045 - typer reads it
MaybeStr = Optional[str]  # noqa: UP045
MaybeInt = Optional[int]  # noqa: UP045
MaybeFloat = Optional[float]  # noqa: UP045


def _console() -> Console:
    return Console(stderr=True)


Replicas = Annotated[MaybeInt, typer.Option("--replicas", help="Replicas to run.")]
TensorParallel = Annotated[MaybeInt, typer.Option("--tensor-parallel-size", "--tp", help="Ranks per replica.")]
Policy = Annotated[MaybeStr, typer.Option("--policy", help="round_robin, least_loaded or prefix_affinity.")]
KvMemory = Annotated[MaybeStr, typer.Option("--kv-memory", help="Pages per rank, e.g. 1GiB.")]
StoreMemory = Annotated[MaybeStr, typer.Option("--store-memory", help="Cache store per node, e.g. 4GiB; 0: none.")]
DiskMemory = Annotated[MaybeStr, typer.Option("--disk-memory", help="The store's tier on disk, per node, e.g. 100GiB; 0: none.")]
DiskDirectory = Annotated[MaybeStr, typer.Option("--disk-directory", help="Where that lies; ~/.cache/mobula/store unless given.")]
Dtype = Annotated[MaybeStr, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
LoadFormat = Annotated[MaybeStr, typer.Option("--load-format", help="auto, safetensors or dummy (made-up weights).")]
Device = Annotated[MaybeStr, typer.Option("--device", help="auto, cpu or cuda.")]
AttentionBackend = Annotated[MaybeStr, typer.Option("--attention-backend", help="auto, flashinfer, torch_paged or reference.")]
BlockSize = Annotated[MaybeInt, typer.Option("--block-size", help="Tokens per block: 16 for GQA, 64 for MLA unless given.")]
MaxModelLen = Annotated[MaybeInt, typer.Option("--max-model-len", help="Longest prompt plus output.")]
MaxNumSeqs = Annotated[MaybeInt, typer.Option("--max-num-seqs", help="Most requests in one batch.")]
MaxNumBatchedTokens = Annotated[
    MaybeInt, typer.Option("--max-num-batched-tokens", help="Most tokens in one step: 8192 on CUDA, 2048 on the CPU unless given.")
]
Seed = Annotated[MaybeInt, typer.Option("--weights-seed", help="Seed of dummy weights.")]


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder with config.json and safetensors.")],
    replicas: Replicas = None,
    tensor_parallel_size: TensorParallel = None,
    policy: Policy = None,
    host: Annotated[MaybeStr, typer.Option("--host", help="Address to listen on.")] = None,
    port: Annotated[MaybeInt, typer.Option("--port", help="Port to listen on; 0 picks one.")] = None,
    served_model_name: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--served-model-name", help="Name that requests use; several with commas or by repeating it."),
    ] = None,
    metrics_port: Annotated[MaybeInt, typer.Option("--metrics-port", help="Prometheus endpoint on --host; 0 picks a port.")] = None,
    store_metrics_port: Annotated[MaybeInt, typer.Option("--store-metrics-port", help="Prometheus endpoint of every node's store.")] = None,
    api_keys: Annotated[MaybeStr, typer.Option("--api-keys", help='TOML file with a line tenant = "key" for each tenant.')] = None,
    kv_memory: KvMemory = None,
    store_memory: StoreMemory = None,
    disk_memory: DiskMemory = None,
    disk_directory: DiskDirectory = None,
    dtype: Dtype = None,
    load_format: LoadFormat = None,
    device: Device = None,
    attention_backend: AttentionBackend = None,
    block_size: BlockSize = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    max_prompt_tokens_beside_outputs: Annotated[
        MaybeInt,
        typer.Option("--max-prompt-tokens-beside-outputs", help="Most prompt tokens in a step that gives running requests a token."),
    ] = None,
    max_queued_requests: Annotated[MaybeInt, typer.Option("--max-queued-requests", help="Most requests that wait for a replica.")] = None,
    max_queued_tokens: Annotated[MaybeInt, typer.Option("--max-queued-tokens", help="Most prompt tokens that wait for a replica.")] = None,
    max_message_size: Annotated[MaybeStr, typer.Option("--max-message-size", help="Largest gRPC message, e.g. 16MiB.")] = None,
    weights_seed: Seed = None,
    config: Config = None,
    deployment: Deployment = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it running; end it with mobula shutdown.")] = False,
) -> None:
    """Serves a model over gRPC. Ctrl-C drains and removes the deployment. The last line on stdout is: ready HOST:PORT."""
    from runtime.commands.serve import serve as run
    from runtime.commands.serve import serve_detached

    settings = _settings(context, config)
    if detach:
        serve_detached(settings, _console(), sys.argv[1:])
    else:
        run(settings, _console())


@app.command()
def generate(
    context: typer.Context,
    model: Annotated[MaybeStr, typer.Option("--model", help="Folder of a model to run offline; the embedded one unless given.")] = None,
    address: Address = None,
    api_key: ApiKey = "",
    prompt: PromptText = None,
    prompt_file: PromptFile = None,
    token_ids: TokenIds = None,
    messages: Messages = None,
    max_tokens: Annotated[MaybeInt, typer.Option("--max-tokens")] = None,
    temperature: Annotated[MaybeFloat, typer.Option("--temperature", help="0 is greedy.")] = None,
    top_k: Annotated[MaybeInt, typer.Option("--top-k")] = None,
    top_p: Annotated[MaybeFloat, typer.Option("--top-p")] = None,
    min_p: Annotated[MaybeFloat, typer.Option("--min-p")] = None,
    repetition_penalty: Annotated[MaybeFloat, typer.Option("--repetition-penalty")] = None,
    presence_penalty: Annotated[MaybeFloat, typer.Option("--presence-penalty")] = None,
    frequency_penalty: Annotated[MaybeFloat, typer.Option("--frequency-penalty")] = None,
    sampling_seed: Annotated[MaybeInt, typer.Option("--seed", help="Seed of the draws.")] = None,
    stop: Annotated[Optional[list[str]], typer.Option("--stop", help="Stop string; may be repeated.")] = None,  # noqa: UP045
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos")] = False,
    cache_salt: CacheSalt = "",
    pin_ttl_s: Annotated[MaybeFloat, typer.Option("--pin-ttl", metavar="SECONDS", help="Keep the prompt in the store so long.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line at the end.")] = False,
    tensor_parallel_size: TensorParallel = None,
    kv_memory: KvMemory = None,
    store_memory: StoreMemory = None,
    dtype: Dtype = None,
    load_format: LoadFormat = None,
    device: Device = None,
    attention_backend: AttentionBackend = None,
    block_size: BlockSize = None,
    max_model_len: MaxModelLen = None,
    weights_seed: Seed = None,
    config: Config = None,
    deployment: Deployment = None,
) -> None:
    """Runs one request: against --address, or offline on a model of its own."""
    from protos import inference_pb2 as pb
    from runtime.commands.generate import generate_offline, generate_remote
    from runtime.commands.prompt import Prompt

    request = pb.GenerateRequest(cache_salt=cache_salt)
    Prompt(prompt, token_ids, messages, prompt_file).put_into(request)
    if pin_ttl_s is not None:
        if address is None:
            raise typer.BadParameter("--pin-ttl needs --address: an offline store ends with the command")
        request.pin_ttl_s = pin_ttl_s
    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": sampling_seed,
        "ignore_eos": ignore_eos or None,
    }
    try:
        for name, value in given.items():
            if value is not None:
                setattr(request.sampling, name, value)
        request.sampling.stop.extend(stop or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if address is not None:
        if model is not None:
            raise typer.BadParameter("--model and --address exclude each other")
        generate_remote(address, request, as_json=as_json, api_key=api_key)
    else:
        generate_offline(_settings(context, config, deployment_suffix=f"-{os.getpid()}"), request, as_json=as_json, console=_console())


@app.command()
def status(
    address: Address = None,
    api_key: ApiKey = "",
    deployment: Deployment = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    watch_s: Annotated[MaybeFloat, typer.Option("--watch", min=0.1, help="Show it again every so many seconds, until Ctrl-C.")] = None,
) -> None:
    """Shows every replica and store."""
    from runtime.commands.state_file import find_endpoint
    from runtime.commands.status import print_json, show, watch

    if as_json and watch_s is not None:
        raise typer.BadParameter("--json and --watch exclude each other")
    endpoint = find_endpoint(address, deployment)
    if as_json:
        print_json(endpoint, api_key)
    elif watch_s is not None:
        watch(endpoint, api_key, Console(), every_s=watch_s)
    else:
        show(endpoint, api_key, Console())


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Lists the model families that can be served, and what of their settings is refused."""
    from runtime.commands.models import models as run

    run(as_json=as_json, console=Console())


@app.command()
def warmup(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder with config.json.")],
    dtype: Dtype = None,
    attention_backend: AttentionBackend = None,
    block_size: BlockSize = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    config: Config = None,
) -> None:
    """Builds ahead the kernels that serving a model on this machine's GPU needs."""
    from runtime.commands.warmup import warmup as run

    run(_settings(context, config), _console())


@app.command()
def demo(
    context: typer.Context,
    replicas: Replicas = 2,
    tensor_parallel_size: TensorParallel = 2,
    kv_memory: KvMemory = "128MiB",
    store_memory: StoreMemory = "256MiB",
    device: Device = "cpu",
    config: Config = None,
) -> None:
    """Starts a small cluster on this machine and shows a prefix being computed once and used everywhere."""
    from runtime.commands.demo import demo as run

    run(_settings(context, config, deployment_suffix=f"-demo-{os.getpid()}"), Console())


@app.command()
def shutdown(deployment: Deployment = None) -> None:
    """Removes a deployment that was left running."""
    from runtime.commands.serve import shutdown as run

    run(deployment or DEFAULT_DEPLOYMENT, _console())


@app.command()
def store(
    memory: Annotated[str, typer.Option("--memory", help="Size of the arena.")] = "1GiB",
    address: Annotated[str, typer.Option("--address", help="unix:/PATH or HOST:PORT to listen on.")] = "",
    disk_memory: DiskMemory = None,
    disk_directory: DiskDirectory = None,
    peer_address: Annotated[str, typer.Option("--peer-address", help="HOST:PORT that other nodes' stores pull from.")] = "",
    peer: Annotated[Optional[list[str]], typer.Option("--peer", help="HOST:PORT of a store to pull from; may be repeated.")] = None,  # noqa: UP045
    metrics_address: Annotated[str, typer.Option("--metrics-address", help="HOST:PORT of an HTTP server with Prometheus metrics.")] = "",
) -> None:
    """Runs one node's cache store by hand (serve starts its own). The cluster's secret is read from MOBULA_SECRET."""
    from runtime.commands.store import store as run

    disk = {"disk_memory": disk_memory, "disk_directory": disk_directory}
    run(memory, address, disk, {"peer_address": peer_address, "peers": tuple(peer or ()), "metrics_address": metrics_address})


def _settings(context: typer.Context, config: Path | None, *, deployment_suffix: str = "") -> ServeSettings:
    """The options of this command that are settings, merged with file and environment."""
    names = set(ServeSettings.__dataclass_fields__)
    flags = {name: value for name, value in context.params.items() if name in names}
    settings = resolve_settings(flags, config, os.environ)
    if deployment_suffix and not flags.get("deployment"):
        settings = replace(settings, deployment=settings.deployment + deployment_suffix)
    return settings


def main() -> None:
    """Exit codes: 0 fine, 2 wrong usage, 1 anything else with one line of reason."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        sys.exit(app())
    except SystemExit as end:
        sys.exit(end.code if end.code in (0, 2, None) else 1)  # typer ends an interrupted command with 130
    except MobulaError as error:
        if debug:
            raise
        print(f"mobula: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print("mobula: interrupted", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        print(f"mobula: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
