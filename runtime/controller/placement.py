"""Where actors go: one placement group per replica (a tensor-parallel group never spans nodes), one store and one front door per node.

Every function here returns at once; waiting is the controller's, with a deadline on each wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.controller.actors import EngineActor, FrontDoorActor, StoreActor, WorkerActor
from runtime.controller.spec import DeploymentSpec

if TYPE_CHECKING:
    from cache_store.config import StoreConfig
    from runtime.frontdoor.config import FrontDoorConfig

# A rank on the CPU shares the cores with everything else: it reserves next to nothing, so that more ranks than cores can be placed.
_CPU_SHARE = 0.001


def engine_name(replica_id: str) -> str:
    return f"engine-{replica_id}"


def worker_name(replica_id: str, rank: int) -> str:
    return f"worker-{replica_id}-{rank}"


def group_name(spec: DeploymentSpec, replica_id: str) -> str:
    return f"{spec.namespace}/{replica_id}"


def create_group(spec: DeploymentSpec, replica_id: str) -> Any:
    """The placement group of a replica: one bundle per rank, all on one node. The engine shares the first."""
    from ray.util import placement_group

    rank = {"CPU": _CPU_SHARE, "GPU": 1} if spec.use_gpu else {"CPU": _CPU_SHARE}
    bundles = [dict(rank) for _ in range(spec.settings.tensor_parallel_size)]
    bundles[0]["CPU"] = 2 * _CPU_SHARE
    return placement_group(bundles, strategy="STRICT_PACK", name=group_name(spec, replica_id), lifetime="detached")


def create_engine(spec: DeploymentSpec, replica_id: str, group: Any) -> Any:
    options = _in_group(spec, engine_name(replica_id), group, bundle=0, num_gpus=0)
    return _remote(EngineActor).options(**options).remote(replica_id, spec.settings.tensor_parallel_size, spec.secret)


def create_worker(spec: DeploymentSpec, replica_id: str, group: Any, rank: int) -> Any:
    options = _in_group(spec, worker_name(replica_id, rank), group, bundle=rank, num_gpus=1 if spec.use_gpu else 0)
    return _remote(WorkerActor).options(**options).remote(rank, spec.secret)


def create_store(spec: DeploymentSpec, node_id: str, config: StoreConfig) -> Any:
    return _remote(StoreActor).options(**_on_node(spec, f"store-{node_id[:12]}", node_id)).remote(config)


def create_front_door(spec: DeploymentSpec, node_id: str, config: FrontDoorConfig) -> Any:
    return _remote(FrontDoorActor).options(**_on_node(spec, f"frontdoor-{node_id[:12]}", node_id)).remote(config)


def live_nodes() -> list[str]:
    import ray

    return sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])


def _remote(cls: type) -> Any:
    import ray

    return ray.remote(cls)


def _common(spec: DeploymentSpec, name: str) -> dict[str, Any]:
    # get_if_exists: two controllers racing over one name (an old one that is about to die) end with one actor.
    return {
        "name": name,
        "namespace": spec.namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": 0,
        "max_concurrency": 4,  # probes are answered while something long runs
    }


def _in_group(spec: DeploymentSpec, name: str, group: Any, *, bundle: int, num_gpus: int) -> dict[str, Any]:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
    return {**_common(spec, name), "num_cpus": _CPU_SHARE, "num_gpus": num_gpus, "scheduling_strategy": strategy}


def _on_node(spec: DeploymentSpec, name: str, node_id: str) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {**_common(spec, name), "num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
