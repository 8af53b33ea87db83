"""The wait of `mobula serve` for its end."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# The signal lands in a thread that is not the main one, which therefore goes on waiting: as when it comes just before the wait begins.
SCRIPT = """
import signal, threading
from runtime.commands import serve

def to_myself():
    main_waits.wait(0.5)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

signal.signal(signal.SIGTERM, serve._interrupt)
main_waits = threading.Event()
threading.Thread(target=to_myself).start()
serve._wait_for_interrupt()
"""


def test_a_signal_that_does_not_wake_the_main_thread_is_heard() -> None:
    assert subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, timeout=30, check=False).returncode == 0
