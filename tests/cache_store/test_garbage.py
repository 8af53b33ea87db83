import gc
import subprocess
import sys
import weakref

from cache_store.garbage import THRESHOLDS, settle

PROGRAM = """
import gc
from cache_store.garbage import settle
kept = [[number] for number in range(50_000)]
seen = []
gc.callbacks.append(lambda phase, info: seen.append(info["generation"]) if phase == "stop" else None)
settle()
seen.clear()
for number in range(400_000):
    ring = [number]
    ring.append(ring)
print(len(gc.get_objects()), seen.count(2), len(seen))
"""


def test_what_is_kept_is_not_walked_over_again():
    """In a process of its own: rings that nobody holds are found, and those that are kept are not looked at."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    num_tracked, num_full, num_all = map(int, ran.stdout.split())
    assert num_tracked < 20_000
    assert 400_000 // THRESHOLDS[0] - 1 <= num_all <= 400_000 // THRESHOLDS[0] + 1
    assert num_full <= 1


def test_garbage_in_rings_is_still_found():
    class Node:
        pass

    before = gc.get_threshold()
    try:
        settle()
        node = Node()
        node.self = node  # type: ignore[attr-defined]
        gone = weakref.ref(node)
        del node
        gc.collect()
        assert gone() is None
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
