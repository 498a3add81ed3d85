"""What the clients written in Python share: expectations, and a look at the server past the gateway."""

import os
import subprocess
import time

LARGE_ROWS = 200_000
LARGE_SUM = LARGE_ROWS * (LARGE_ROWS + 1) // 2
LARGE_TEXT = LARGE_ROWS * 96

# How long anything may take that is waited for.
DEADLINE_SECONDS = 60


def expect(found, expected):
    assert found == expected, f"found {found!r}, expected {expected!r}"


def direct(query):
    """What psql prints of a query, on the server itself."""
    arguments = ["psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-p", os.environ["DIRECT_PORT"], "-c", query]
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=DEADLINE_SECONDS).stdout.strip()


class Backend:
    """The backend of one session on the server."""

    def __init__(self, pid):
        self.pid = pid

    def wait_until_active(self):
        """Waits until it runs something that will not end by itself."""
        running = (f"select count(*) from pg_stat_activity where pid = {self.pid} and state = 'active' "
                   "and wait_event_type is not null and wait_event <> 'ClientRead'")
        deadline = time.monotonic() + DEADLINE_SECONDS
        while direct(running) != "1":
            assert time.monotonic() < deadline, "the statement did not begin"

