"""llama.cpp as a reference, through ``xllamacpp``, in a process of its own.

Destroying an xllamacpp server can deadlock, so servers live until the process that holds them is killed. One process
serves the whole test run; it is started on first use. Run as a script, this file is that process.
"""

from __future__ import annotations

import atexit
import functools
import json
import select
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

DEADLINE = 120.0
# Characters of what an ended process said.
_SHOWN = 4000


class LlamaCpp:
    """A model loaded by llama.cpp."""

    def __init__(self, path: Path, context: int = 256) -> None:
        self._number = _ask({"load": str(path), "context": context})

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of ``text``; ``special`` adds what the model wants at its ends."""
        ids: list[int] = _ask({"tokenize": text, "special": special, "server": self._number})
        return ids

    def log_probabilities(self, ids: Sequence[int], vocabulary: int) -> torch.Tensor:
        """``[vocabulary]``: log probabilities of the token after ``ids``."""
        entries = _ask({"ids": list(ids), "vocabulary": vocabulary, "server": self._number})
        out = torch.full((vocabulary,), -torch.inf)
        for index, value in entries:
            out[index] = value
        return out

    def continuation(self, ids: Sequence[int], count: int, vocabulary: int) -> tuple[list[int], torch.Tensor]:
        """The greedy continuation of ``ids``: ``count`` tokens and, before each, log probabilities.

        Token by token: a reply of several would end where half a character does.
        """
        tokens: list[int] = []
        steps = []
        for _ in range(count):
            steps.append(self.log_probabilities([*ids, *tokens], vocabulary))
            tokens.append(int(steps[-1].argmax()))
        return tokens, torch.stack(steps)


class _Worker:
    """The process, and what it says beside its answers: of an ended one all that tells why."""

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            bufsize=1,
        )
        atexit.register(self.process.kill)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
        except BrokenPipeError:
            raise self._ended() from None
        if not select.select([self.process.stdout], [], [], DEADLINE)[0]:
            raise TimeoutError(f"llama.cpp gave no answer in {DEADLINE:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _ended(self) -> RuntimeError:
        status = self.process.wait(DEADLINE)
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")[-_SHOWN:]
        return RuntimeError(f"llama.cpp's process ended with {status}; at the end it said:\n{said or 'nothing'}")


@functools.cache
def _worker() -> _Worker:
    return _Worker()


def _ask(request: dict[str, Any]) -> Any:
    if _worker().process.poll() is not None:  # it has ended since, and that was said: a new one
        _worker.cache_clear()
    reply = _worker().ask(request)
    if "error" in reply:
        raise RuntimeError(f"llama.cpp: {reply['error']}")
    return reply["answer"]


def _load(path: str, context: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = -1
    params.fit_params = False
    params.cpuparams.n_threads = params.n_threads_http = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def _tokenize(server: Any, text: str, special: bool) -> list[int]:
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize",
        data=json.dumps({"content": text, "add_special": special, "parse_special": True}).encode(),
        headers={"Content-Type": "application/json"},
    )
    # Straight to the loopback address, whatever proxy the environment names.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=DEADLINE) as reply:
        tokens: list[int] = json.load(reply)["tokens"]
    return tokens


def _log_probabilities(server: Any, ids: list[int], vocabulary: int) -> list[tuple[int, float]]:
    settings = {
        "n_predict": 1,
        "n_probs": vocabulary,
        "cache_prompt": False,
        # Half a character would be held back, with its probabilities; the bias acts after these are taken.
        "logit_bias": [["a", 100.0]],
    }
    reply = server.handle_completions({"prompt": ids, **settings})
    entries = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return [(entry["id"], entry["logprob"]) for entry in entries]


def _serve() -> None:
    servers: list[Any] = []
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        try:
            if "load" in request:
                servers.append(_load(request["load"], request["context"]))
                answer = len(servers) - 1
            elif "tokenize" in request:
                answer = _tokenize(servers[request["server"]], request["tokenize"], request["special"])
            else:
                answer = _log_probabilities(servers[request["server"]], request["ids"], request["vocabulary"])
            reply = {"answer": answer}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
