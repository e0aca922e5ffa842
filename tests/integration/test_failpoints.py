"""A failpoint at which a process stands still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def test_a_thread_does_not_leave_a_failpoint_at_which_the_process_stands_still() -> None:
    program = """
import threading
from outboxkit import _failpoints as failpoints

def count():
    for number in (1, 2, 3):
        failpoints.failpoint("recv")
        print(number, flush=True)

failpoints.enable("recv=stop:2")
thread = threading.Thread(target=count)
thread.start()
thread.join()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        try:
            _, status = os.waitpid(child.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            assert child.stdout is not None
            assert os.read(child.stdout.fileno(), 99) == b"1\n"  # the second hit has not returned
            child.send_signal(signal.SIGCONT)
            assert child.stdout.read() == b"2\n3\n"
            assert child.wait() == 0
        finally:
            child.kill()
