"""The pages of one rank: one tensor, allocated once. Who uses which page is the engine's business."""

from __future__ import annotations

import torch

from workers.kv.layout import PageLayout


class PagePool:
    """`tensor` is [num_pages, *layout.page_shape]; one page is contiguous. Page 0 is the null page."""

    def __init__(self, layout: PageLayout, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.tensor = torch.zeros((num_pages, *layout.page_shape), dtype=getattr(torch, layout.dtype), device=device)
        self._bytes = self.tensor.view(num_pages, -1).view(torch.uint8)

    def page_bytes(self, page: int) -> torch.Tensor:
        """The page as uint8 [layout.page_bytes], a view: writing to it writes the page."""
        return self._bytes[page]
