"""Who of several processes still lives: each has a connection to the first one, and it ends when a process does.

A process that waits for another inside a collective notices its death there, with gloo; one that computes, or waits
inside NCCL, does not. So a thread looks after the connections. It tells the main thread of a failure, and ends the
process where that does not come back.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from llmconvert import errors
from llmconvert.compute.ranks.launch import Launch
from llmconvert.errors import LlmconvertError, MachineError

__all__ = ["Failure", "Watch", "invite"]

#: How long processes may take to connect.
_MEET_SECONDS = 120.0
# Of what strangers say, so many bytes are read.
_LONGEST = 100
# A collective that a death has broken says so at once; then the main thread is interrupted; then the process ends.
_NOTICE_SECONDS, _GRACE_SECONDS = 1.0, 5.0
# A machine that is gone answers nothing: so long until the first question, between questions, and how many.
_KEEPALIVE = (10, 5, 3)


@dataclass(frozen=True, slots=True)
class Failure:
    """How a process failed.

    Attributes:
        rank: of the process.
        kind: class of its error; empty of one that has died.
        code: what it ended with.
        text: its message.
    """

    rank: int
    kind: str = ""
    code: int = MachineError.exit_code
    text: str = ""

    def error(self, count: int) -> LlmconvertError:
        """As an error of the other processes, of ``count`` in all."""
        found = getattr(errors, self.kind, None)
        kind = found if isinstance(found, type) and issubclass(found, LlmconvertError) else MachineError
        if not self.kind:
            return MachineError(f"rank {self.rank} of {count} has died; run the same command to continue")
        return kind(f"rank {self.rank} of {count}: {self.text}")


class Watch:
    """The connections of one process, looked after.

    Args:
        rank: of this process.
        connections: by the rank at their other end: of rank 0 to all others, of others to rank 0.
        last_words: says what ended the process, where the main thread no longer can.
    """

    def __init__(self, rank: int, connections: Mapping[int, socket.socket], last_words: Callable[[Failure], None]):
        self._rank, self._connections, self._last_words = rank, dict(connections), last_words
        self._left: set[int] = set()  # processes that are done
        self._known, self._ending = threading.Event(), threading.Event()
        #: What ended another process; None while all is well.
        self.failure: Failure | None = None
        threading.Thread(target=self._look, name="ranks", daemon=True).start()

    def wait(self, seconds: float) -> Failure | None:
        """The failure of another process, if there is one within that time."""
        self._known.wait(seconds)
        return self.failure

    def ending(self) -> None:
        """From here on the main thread ends the process by itself."""
        self._ending.set()

    def tell(self, failure: Failure | None) -> None:
        """Say to the others that this process ends: what has failed, or that it is done."""
        self._send({} if failure is None else asdict(failure), self._connections)

    def _send(self, value: Mapping[str, Any], to: Mapping[int, socket.socket]) -> None:
        line = json.dumps(value).encode() + b"\n"
        for connection in to.values():
            with suppress(OSError):
                connection.sendall(line)

    def _look(self) -> None:
        heard = dict.fromkeys(self._connections, b"")
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while len(self._left) < len(self._connections):
                for key, _ in selector.select():
                    rank = key.data
                    found = self._hear(rank, heard)
                    if found is not None:
                        self._end(found)
                        return
                    if rank in self._left:
                        selector.unregister(self._connections[rank])

    def _hear(self, rank: int, heard: dict[int, bytes]) -> Failure | None:
        """What comes from one process: nothing yet, that it is done, or a failure, of it or of another."""
        try:
            data = self._connections[rank].recv(1 << 16)
        except OSError:
            data = b""
        heard[rank] += data
        line, end, _ = heard[rank].partition(b"\n")
        if not end:
            return None if data else Failure(rank)
        value = json.loads(line)
        if value:
            return Failure(**value)
        self._left.add(rank)
        return None

    def _end(self, failure: Failure) -> None:
        self.failure = failure
        self._known.set()
        if self._rank == 0:
            others = {rank: one for rank, one in self._connections.items() if rank not in (*self._left, failure.rank)}
            self._send(asdict(failure), others)
        if self._ending.wait(_NOTICE_SECONDS):
            return
        main = threading.main_thread().ident
        if main is not None:
            signal.pthread_kill(main, signal.SIGINT)
        if self._ending.wait(_GRACE_SECONDS):
            return
        self._last_words(failure)
        sys.stderr.flush()
        os._exit(failure.code)


def invite(
    launch: Launch, pass_on: Callable[[dict[str, Any]], dict[str, Any]], last_words: Callable[[Failure], None]
) -> Watch:
    """Connect all processes.

    Args:
        launch: of this process.
        pass_on: gives every process what the first one has.
        last_words: see :class:`Watch`.

    Raises:
        MachineError: one does not come.
    """
    if launch.rank:
        about = pass_on({})
        try:
            connection = socket.create_connection((launch.host, about["port"]), timeout=_MEET_SECONDS)
            connection.sendall(f"{about['token']} {launch.rank}\n".encode())
        except OSError as error:
            raise MachineError(f"{launch.host}:{about['port']}: rank 0 can't be reached: {error}") from error
        return Watch(launch.rank, {0: _lasting(connection)}, last_words)
    token = secrets.token_hex(16)
    with _listening(launch.host, launch.count) as server:
        pass_on({"port": server.getsockname()[1], "token": token})
        return Watch(0, _welcome(server, token, launch.count), last_words)


def _listening(host: str, count: int) -> socket.socket:
    """A socket for all others: at the address that they know, or at any where that is another machine's name for it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=count)
    except OSError:
        return socket.create_server(("", 0), backlog=count)


def _welcome(server: socket.socket, token: str, count: int) -> dict[int, socket.socket]:
    expected = {f"{token} {rank}\n".encode(): rank for rank in range(1, count)}
    found: dict[int, socket.socket] = {}
    end = time.monotonic() + _MEET_SECONDS
    while len(found) < len(expected):
        server.settimeout(max(0.1, end - time.monotonic()))
        try:
            connection, _ = server.accept()
            connection.settimeout(_MEET_SECONDS)
            said = _line(connection)
        except OSError as error:
            missing = sorted(set(expected.values()) - set(found))
            raise MachineError(f"ranks {missing} of {count} did not connect: {error}") from error
        rank = expected.get(said)
        if rank is None:  # a stranger
            connection.close()
        else:
            found[rank] = _lasting(connection)
    return found


def _line(connection: socket.socket) -> bytes:
    """The first line that comes, and nothing of what is behind it, which may be the first thing to be told."""
    found = b""
    while not found.endswith(b"\n") and len(found) < _LONGEST and (byte := connection.recv(1)):
        found += byte
    return found


def _lasting(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), _KEEPALIVE, strict=True):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
