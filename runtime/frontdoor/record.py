"""What is known of one Generate call, and the line that is logged when it has ended."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field

from runtime.request import TIERS, CachedTokens

log = logging.getLogger("mobula.request")


@dataclass(slots=True)
class RequestRecord:
    """Written by `service` (the first two fields) and `pipeline` (the others); read when the call has ended, however it ended."""

    request_id: str = ""
    tenant: str = ""
    arrived_s: float = field(default_factory=time.monotonic)
    replica_id: str = ""
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    cached: CachedTokens | None = None  # None before the first admission
    ttft_s: float | None = None  # None before the first token

    def log_end(self, status: str) -> None:
        """One line of JSON. `status`: stop, length, abort, cancelled, or an error's label."""
        if log.isEnabledFor(logging.INFO):
            log.info("%s", self.to_json(status, time.monotonic()))

    def to_json(self, status: str, ended_s: float) -> str:
        cached = self.cached or CachedTokens()
        return json.dumps(
            {
                "request_id": self.request_id,
                "tenant": self.tenant,
                "status": status,
                "replica": self.replica_id,
                "prompt_tokens": self.num_prompt_tokens,
                "cached_tokens_by_tier": dict(zip(TIERS, cached, strict=True)),
                "completion_tokens": self.num_completion_tokens,
                "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
                "total_s": round(ended_s - self.arrived_s, 6),
            }
        )
