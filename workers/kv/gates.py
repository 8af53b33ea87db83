"""Where a forward pass waits for pages that are still being loaded: on the device, and in front of those layers only that need them.

    copy threads    copy a run of layers after the other, and record an event behind each        `workers.kv.movers`
    main thread     `close_behind` these events, then launches the pass, which waits at the gates
    forward pass    `wait` in front of each layer's attention; graphs of captured prompts have it in them

A step that waits for nothing passes gates that opened long ago: it does not wait for what is loaded for others meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class LayerGates:
    """CUDA events in front of the first layers of runs. One thread calls."""

    def __init__(self, first_layers: Sequence[int], device: torch.device) -> None:
        self._events = {layer: torch.cuda.Event(external=True) for layer in first_layers}  # each replay waits for the last `close_behind`
        self._stream = torch.cuda.Stream(device)
        self.close_behind([[] for _ in first_layers])  # a wait for an event that was never recorded would not be captured

    def close_behind(self, arrivals: Sequence[Sequence[Any]]) -> None:
        """`arrivals`: of each run the events after which its layers are in their pages, recorded already."""
        for gate, events in zip(self._events.values(), arrivals, strict=True):
            for event in events:
                self._stream.wait_event(event)
            gate.record(self._stream)

    def wait(self, layer: int) -> None:
        """Has the current stream wait for the pages of `layer`, and of those before."""
        gate = self._events.get(layer)
        if gate is not None:
            torch.cuda.current_stream().wait_event(gate)
