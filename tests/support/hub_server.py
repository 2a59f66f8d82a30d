"""A small Hub on the loopback interface, strict where the real one is: for driving the real client.

It checks tokens, paths, parent commits and the hash of every uploaded object, speaks LFS (in one part and in many) and
Xet (through the client's own local store), and can be told to fail.
"""

from __future__ import annotations

import re
import socket
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support.hub_server_routes import ROUTES, Routes
from support.hub_server_state import EXPIRED_TOKEN, READ_TOKEN, WRITE_TOKEN, Blob, Fault, HubState, RefusalError, Repo
from support.hub_server_xet import XetStore

__all__ = ["EXPIRED_TOKEN", "READ_TOKEN", "WRITE_TOKEN", "Blob", "Fault", "HubServer", "Repo"]

_CHUNK = 1 << 16


class HubServer(HubState):
    """The Hub: its state, its Xet store while it runs, and the server."""

    xet: XetStore

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        hub = self

        class Bound(Handler):
            state = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        with tempfile.TemporaryDirectory() as directory:
            self.xet = Bound.xet = XetStore(Path(directory))
            try:
                yield self
            finally:
                server.shutdown()
                server.server_close()


class Handler(Routes, BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        parsed = urllib.parse.urlsplit(self.path)
        line = f"{self.command} {urllib.parse.unquote(self.path)}"
        self.query = dict(urllib.parse.parse_qsl(parsed.query))
        self.authorization = self.headers.get("Authorization")
        self.byte_range = self.headers.get("Range") or ""
        try:
            line = f"{line} {self.byte_range}".rstrip()
            self.state.log.append(line)
            generation = self.state.generation
            self._faults = self.state.take_faults(line)
            for fault in self._faults:
                if fault.hook is not None:
                    fault.hook()
            self.body = self._read_body()
            self.state.received += len(self.body)
            for fault in self._faults:
                if fault.status:
                    raise RefusalError(fault.status, fault.message, retry_after=fault.retry_after)
            with self.state.lock:
                if generation != self.state.generation:
                    raise ConnectionResetError("the client is gone")
                self._route(parsed.path.removeprefix(self.state.prefix), line)
            if any(fault.late_status for fault in self._faults):
                raise RefusalError(max(fault.late_status for fault in self._faults), "Internal Error")
            self._send(*self.response)
        except RefusalError as refusal:
            self.answer_json({"error": refusal.message}, refusal.status, refusal.headers)
            self._send(*self.response)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, path: str, line: str) -> None:
        for old, new in self.state.renamed.items():
            if re.match(rf"/(api/models/)?{old}([/.]|$)", path):
                query = urllib.parse.urlsplit(self.path).query
                self.answer(b"", 307, {"Location": path.replace(old, new, 1) + (f"?{query}" if query else "")})
                return
        for method, pattern, operation in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                operation(self, *(urllib.parse.unquote(group or "") for group in match.groups()))
                return
        raise RefusalError(404, f"no such route: {line}")

    def _read_body(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        length = int(self.headers.get("Content-Length") or 0)
        while len(body) < length:
            piece = self.rfile.read(min(_CHUNK, length - len(body)))
            if not piece:
                raise ConnectionResetError("the client died while sending")
            body += piece
            self._disturb(len(body))
        return body

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        if any(fault.lose_response for fault in self._faults):
            self._hang_up()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.state.sent += len(content)
        drops = [fault.drop_after for fault in self._faults if fault.drop_after is not None]
        step = min([_CHUNK, *drops]) or 1
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            self._disturb(start + step)

    def _disturb(self, nbytes: int) -> None:
        """What the faults do when ``nbytes`` of a body have passed."""
        for fault in self._faults:
            if fault.drop_after is not None and nbytes >= fault.drop_after:
                self._hang_up()
            if fault.slow_seconds:
                time.sleep(fault.slow_seconds)

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError("told to drop the connection")
