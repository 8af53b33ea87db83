"""Options that several groups of commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Address = Annotated[Optional[str], typer.Option("--address", help="HOST:PORT of a running front door.")]  # noqa: UP045 - typer reads it
ApiKey = Annotated[str, typer.Option("--api-key", envvar="MOBULA_API_KEY", help="Key of --address, where it asks for one.")]
Deployment = Annotated[Optional[str], typer.Option("--deployment", help="Name of the deployment, where several run.")]  # noqa: UP045
PromptText = Annotated[Optional[str], typer.Option("--prompt", help="Prompt text.")]  # noqa: UP045
PromptFile = Annotated[Optional[Path], typer.Option("--prompt-file", help="UTF-8 file with the prompt text.")]  # noqa: UP045
TokenIds = Annotated[Optional[str], typer.Option("--token-ids", help="Prompt as token ids: 1,2,3.")]  # noqa: UP045
Messages = Annotated[Optional[Path], typer.Option("--messages", help="JSON file with a list of role and content.")]  # noqa: UP045
CacheSalt = Annotated[str, typer.Option("--cache-salt", help="Share cached prefixes only with requests of the same salt.")]
