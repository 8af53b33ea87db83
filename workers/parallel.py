"""How the ranks of one tensor-parallel group meet: gloo on the CPU, NCCL on CUDA, over a store that rank 0 keeps open.

Each group is an explicit process group with its own store, never torch's default one: a process may serve several groups one after the
other, and closing one leaves nothing behind.
"""

from __future__ import annotations

import datetime
import socket

import torch
import torch.distributed as dist


class StoreHost:
    """The rendezvous of one group, opened by rank 0 on a free port of `host`. Keep it open until every rank has connected."""

    def __init__(self, world_size: int, host: str = "127.0.0.1", timeout_s: float = 60.0) -> None:
        with socket.create_server((host, 0)) as listener:
            self.port: int = listener.getsockname()[1]
            self.store = dist.TCPStore(
                host,
                self.port,
                world_size,
                is_master=True,
                timeout=datetime.timedelta(seconds=timeout_s),
                wait_for_workers=False,
                master_listen_fd=listener.detach(),  # bound to `host` only; by itself the store would listen on all addresses
            )

    def close(self) -> None:
        del self.store


class Communicator:
    """Collectives of one rank. With one rank they do nothing. Every rank must call the same ones in the same order."""

    def __init__(self, rank: int, world_size: int, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._group = group

    @classmethod
    def single(cls, device: torch.device | str) -> Communicator:
        return cls(0, 1, torch.device(device), None)

    @staticmethod
    def host(world_size: int, host: str = "127.0.0.1") -> StoreHost:
        return StoreHost(world_size, host)

    @classmethod
    def connect(
        cls,
        rank: int,
        world_size: int,
        host: str,
        port: int,
        device: torch.device | str,
        store: StoreHost | None = None,
        timeout_s: float = 60.0,
    ) -> Communicator:
        """Meets the other ranks at `host`:`port`; rank 0 passes its `store`. A collective that waits longer than `timeout_s` raises
        RuntimeError (torch's DistBackendError)."""
        device = torch.device(device)
        if world_size == 1:
            return cls(rank, 1, device, None)
        timeout = datetime.timedelta(seconds=timeout_s)
        if store is not None:
            shared: dist.Store = store.store
        else:
            shared = dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout, wait_for_workers=False)
        make = _nccl_group if device.type == "cuda" else _gloo_group
        return cls(rank, world_size, device, make(shared, rank, world_size, host, device, timeout))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over the ranks, in place, and returns it."""
        if self._group is not None:
            self._group.allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors (same shape on each) side by side along the last dimension, in the order of ranks."""
        if self._group is None:
            return tensor
        tensor = tensor.contiguous()
        pieces = tensor.new_empty((self.world_size, *tensor.shape))
        self._group.allgather([list(pieces.unbind(0))], [tensor]).wait()
        return pieces.movedim(0, -2).flatten(-2)

    def close(self) -> None:
        """Destroys the group. Collectives of other ranks that still wait for this one fail."""
        group, self._group = self._group, None
        if group is not None:
            group.abort() if self.device.type == "cuda" else group.shutdown()


def _gloo_group(
    store: dist.Store, rank: int, world_size: int, host: str, device: torch.device, timeout: datetime.timedelta
) -> dist.ProcessGroup:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_local_address(host))]
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _nccl_group(
    store: dist.Store, rank: int, world_size: int, host: str, device: torch.device, timeout: datetime.timedelta
) -> dist.ProcessGroup:
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


def _local_address(host: str) -> str:
    """This machine's address on the way to `host`, so that gloo listens where the group meets and nowhere else."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        return str(probe.getsockname()[0])
