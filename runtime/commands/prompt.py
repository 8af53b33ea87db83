"""A prompt as the command line gives it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from protos import inference_pb2 as pb
from runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class Prompt:
    """Exactly one of them is given."""

    text: str | None = None
    token_ids: str | None = None  # "1,2,3"
    messages: Path | None = None  # a JSON list of {"role", "content"}
    text_file: Path | None = None

    def put_into(self, request: pb.GenerateRequest) -> None:
        """UsageError names the option that cannot be read."""
        if sum(part is not None for part in (self.text, self.text_file, self.token_ids, self.messages)) != 1:
            raise UsageError("give exactly one of --prompt, --prompt-file, --token-ids and --messages")
        if self.text is not None:
            request.text = self.text
        elif self.text_file is not None:
            try:
                request.text = self.text_file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"--prompt-file {self.text_file}: {type(error).__name__}: {error}") from error
        elif self.token_ids is not None:
            try:
                request.token_ids.ids.extend(int(part) for part in self.token_ids.split(",") if part.strip())
            except ValueError as error:
                raise UsageError(f"--token-ids: {error}") from error
        elif self.messages is not None:
            try:
                rows = json.loads(self.messages.read_text(encoding="utf-8"))
                request.messages.messages.extend(pb.ChatMessage(role=row["role"], content=row["content"]) for row in rows)
            except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
                raise UsageError(f"--messages {self.messages}: {type(error).__name__}: {error}") from error
