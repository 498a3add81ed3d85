"""psql on a terminal: Ctrl-C cancels what runs, ours too, \\c and \\password work, and tab completion asks the catalogs."""

import os
import pty
import select
import signal
import time

from common import DEADLINE_SECONDS, direct, expect


class Terminal:
    """A psql whose input and output are a terminal."""

    def __init__(self):
        pid, self.master = pty.fork()
        if pid == 0:
            os.environ.update(PAGER="cat", PSQL_PAGER="cat", TERM="dumb", PGAPPNAME="psql_terminal", INPUTRC="/dev/null")
            os.execvp("psql", ["psql", "-X", "-v", "PROMPT1=ready> ", "-v", "PROMPT2=more> ", "-v", "HISTFILE=/dev/null"])
        self.pid = pid
        self.read("ready> ")

    def type(self, text):
        os.write(self.master, text.encode())

    def read(self, *ends):
        """All that is written up to one of those texts, which has to come."""
        seen = b""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not any(end.encode() in seen for end in ends):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], f"{ends!r} did not come after {seen!r}"
            try:
                seen += os.read(self.master, 65536)
            except OSError as error:
                raise AssertionError(f"psql ended after {seen!r}") from error
        return seen.decode()

    def run(self, line):
        self.type(line + "\n")
        return self.read("\nready> ")

    def wait_until_active(self):
        running = ("select count(*) from pg_stat_activity where application_name = 'psql_terminal' and state = 'active' "
                   "and wait_event_type is not null and wait_event <> 'ClientRead'")
        deadline = time.monotonic() + DEADLINE_SECONDS
        while direct(running) != "1":
            assert time.monotonic() < deadline, "the statement did not begin"

    def close(self):
        self.type("\\q\n")
        deadline = time.monotonic() + DEADLINE_SECONDS
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError("psql did not end")
            time.sleep(0.01)


def interrupts(terminal):
    for statement in ("select pg_sleep(600);", "wait for mirror unfinished;", "begin; wait for mirror unfinished;"):
        terminal.type(statement + "\n")
        terminal.wait_until_active()
        began = time.monotonic()
        terminal.type("\x03")
        said = terminal.read("\nready> ")
        took = time.monotonic() - began
        assert "ERROR:  canceling statement due to user request" in said, said
        assert "Cancel request sent" in said, said
        assert took < 5, f"the cancel took {took} s"
        terminal.run("rollback;")
        assert "(1 row)" in terminal.run("select 1;")
    # A result that is being shown, a COPY out, and a COPY in that waits for its lines.
    terminal.run("\\set FETCH_COUNT 1000")
    for statement in ("select generate_series(1, 1000000000);",
                      "copy (select generate_series(1, 1000000000)) to stdout;"):
        terminal.type(statement + "\n")
        terminal.read("12345")
        terminal.type("\x03")
        # Between two FETCHes there is nothing that could fail: psql itself stops.
        assert "Cancel request sent" in terminal.read("\nready> ")
        assert "(1 row)" in terminal.run("select 1;")
    terminal.run("create temp table t (a int);")
    terminal.type("copy t from stdin;\n")
    terminal.read(">> ")
    terminal.type("1\n")
    terminal.read(">> ")
    # psql shows the prompt a moment before it lets Ctrl-C end the input; until then the key sends a cancel request, which the server
    # obeys with the next message only.
    terminal.type("\x03")
    said = terminal.read("\nready> ", "Cancel request sent")
    if "\nready> " not in said:
        terminal.type("\x03")
        said = terminal.read("\nready> ")
    assert "ERROR:  COPY from stdin failed: canceled by user" in said or "ERROR:  canceling statement due to user request" in said, said
    assert "(0 rows)" in terminal.run("table t;")


def commands(terminal):
    # The same place by another connection, whose process is another.
    terminal.run("select pg_backend_pid() as before \\gset")
    assert "You are now connected to database" in terminal.run("\\c -")
    assert "\r\nf" in terminal.run("select pg_backend_pid() = :before \\g (tuples_only format=unaligned)")
    said = terminal.run("\\conninfo")
    assert f'port "{os.environ["PGPORT"]}"' in said, said
    # A name is completed by a query that psql sends at the Tab key.
    terminal.type("select count(*) from peergate.mirror_run\t")
    terminal.read("mirror_runtime")
    terminal.type(";\n")
    assert "(1 row)" in terminal.read("\nready> ")
    terminal.run("create role terminal login;")
    terminal.type("\\password terminal\n")
    for prompt in ("password for user \"terminal\": ", "again: "):
        terminal.read(prompt)
        terminal.type("of terminal\n")
    terminal.read("\nready> ")
    expect(direct("select rolpassword like 'SCRAM-SHA-256$%' from pg_authid where rolname = 'terminal'"), "t")
    terminal.run("drop role terminal;")


def main():
    terminal = Terminal()
    interrupts(terminal)
    commands(terminal)
    terminal.close()


main()
