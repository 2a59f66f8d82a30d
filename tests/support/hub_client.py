"""The real Hub client in a process of its own, where the environment that it reads when imported can be chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.hub_server import EXPIRED_TOKEN, READ_TOKEN, WRITE_TOKEN

_CODE = """
import json, os, sys, time, traceback
from pathlib import Path
from llmconvert import hub
from llmconvert.errors import LlmconvertError

naps, real_sleep = [], time.sleep
def sleep(seconds):  # waits are recorded and cut short
    naps.append(seconds)
    real_sleep(min(seconds, 0.01))
time.sleep = sleep

class Log:
    lines = []
    def log(self, message):
        self.lines.append(message)
    def task(self, description, total):
        from contextlib import contextmanager
        log = self
        class Task:
            def advance(self, amount=1, note=""):
                log.advanced += amount
        @contextmanager
        def opened():
            log.advanced, log.total = 0, total
            yield Task()
            log.lines.append(f"{description}: {log.advanced} of {total}")
        return opened()

def call(name, args, kwargs):
    log = Log()
    log.lines = []
    if name == "chdir":
        os.chdir(args[0])
        return {"log": []}
    if name == "cli":
        from click.testing import CliRunner
        from llmconvert.cli import main
        done = CliRunner().invoke(main, args)
        crash = done.exception if not isinstance(done.exception, SystemExit) else None
        if crash is not None:
            traceback.print_exception(crash)
        said = (done.stderr.strip().splitlines() or [""])[-1]
        return {"error": "bug" if crash else "", "text": said, "code": done.exit_code, "out": done.stdout, "log": []}
    if name == "push_folder":
        args = [Path(args[0]), args[1], hub.PushOptions(**kwargs)]
        kwargs = {"progress": log}
    elif name.startswith("fetch"):
        kwargs = {**kwargs, **({"progress": log} if name == "fetch" else {})}
        if "cache_dir" in kwargs:
            kwargs["cache_dir"] = Path(kwargs["cache_dir"])
    elif name == "check_push":
        args, kwargs = [args[0], hub.PushOptions(**kwargs)], {}
    try:
        result = getattr(hub, name)(*args, **kwargs)
        answer = {"result": str(getattr(result, "directory", result)), "commit": getattr(result, "commit_hash", "")}
    except LlmconvertError as error:
        answer = {"error": type(error).__name__, "text": str(error), "code": error.exit_code}
    except BaseException:
        answer = {"error": "bug", "text": traceback.format_exc()}
    return {**answer, "log": log.lines}

for line in sys.stdin:
    name, args, kwargs, token = json.loads(line)
    os.environ["HF_TOKEN"] = token
    naps.clear()
    print(json.dumps({**call(name, args, kwargs), "naps": list(naps)}), flush=True)
"""


class Client:
    """Calls functions of ``llmconvert.hub`` in a process that lives until :meth:`close`.

    Every answer is checked for tokens. ``environment`` is set before the Hub's client is imported.
    """

    def __init__(self, url: str, home: Path, **environment: str) -> None:
        self._home = home
        self._errors = home.with_name(f"{home.name}.stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            env={
                **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
                "HF_ENDPOINT": url,
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_XET": "1",
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def send(self, name: str, *args: Any, token: str = WRITE_TOKEN, **kwargs: Any) -> None:
        """Start a call without waiting for it."""
        assert self.process.stdin is not None
        kwargs = {key: str(value) if isinstance(value, Path) else value for key, value in kwargs.items()}
        self.process.stdin.write(json.dumps([name, [str(arg) for arg in args], kwargs, token]) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The answer to the last call."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors()
        for token in (WRITE_TOKEN, READ_TOKEN, EXPIRED_TOKEN):
            assert token not in line + self.errors()
        answer: dict[str, Any] = json.loads(line)
        assert answer.get("error") != "bug", answer["text"]
        assert "\n" not in answer.get("text", "")
        return answer

    def __call__(self, name: str, *args: Any, token: str = WRITE_TOKEN, **kwargs: Any) -> dict[str, Any]:
        self.send(name, *args, token=token, **kwargs)
        return self.receive()

    def errors(self) -> str:
        """What it wrote to standard error so far."""
        return Path(self._errors.name).read_text()

    def kill(self) -> None:
        """End the process as SIGKILL does, at once."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
