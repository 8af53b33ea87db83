"""How far a request has come at one replica, and the request with which another one goes on from there.

Its output so far goes along as output: limits, penalties and the stream of random numbers, which depends on a token's position, go on where
they were. Text and stop strings are kept by the front door, which sees no difference.
"""

from __future__ import annotations

import dataclasses
from array import array

from runtime.engine.frames import RequestOutput
from runtime.request import ValidRequest


class Continuation:
    """Of one request. `saw` what its replica has answered."""

    def __init__(self, request: ValidRequest) -> None:
        self._request = request
        self._output = array("I", request.output_token_ids)
        self._num_scored = 0  # prompt positions whose logprobs have come
        self.has_begun = False  # something has come back of what it asked for

    def saw(self, batch: list[RequestOutput]) -> None:
        for output in batch:
            self.has_begun |= bool(output.token_ids or output.prompt_logprobs)
            self._output.extend(output.token_ids)
            self._num_scored += len(output.prompt_logprobs) if isinstance(output.prompt_logprobs, list) else 0

    def request(self) -> ValidRequest:
        """What is still to be done; the request itself where nothing has come back."""
        if not self.has_begun:
            return self._request
        sampling = self._request.sampling
        if sampling.num_prompt_logprobs is not None and self._num_scored:
            first = max(1, sampling.prompt_logprobs_start) + self._num_scored
            is_scored = first >= len(self._request.prompt_token_ids)
            sampling = sampling._replace(num_prompt_logprobs=None) if is_scored else sampling._replace(prompt_logprobs_start=first)
        return dataclasses.replace(self._request, sampling=sampling, output_token_ids=self._output[:])
