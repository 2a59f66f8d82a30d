"""llama.cpp as a reference, through ``xllamacpp``, in a process of its own.

Destroying an xllamacpp server can deadlock, so servers live until the process that holds them is killed. One process
serves the whole test run; it is started on first use. Run as a script, this file is that process.
"""

from __future__ import annotations

import atexit
import base64
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
    """A model loaded by llama.cpp.

    Args:
        path: of its file.
        context: tokens that it has room for.
        projector: its ``mmproj`` file, of one that looks at images.
    """

    def __init__(self, path: Path, context: int = 256, projector: Path | None = None) -> None:
        self._number = _ask({"load": str(path), "context": context, "projector": str(projector or "")})

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of ``text``; ``special`` adds what the model wants at its ends."""
        ids: list[int] = _ask({"tokenize": text, "special": special, "server": self._number})
        return ids

    def log_probabilities(self, ids: Sequence[int], vocabulary: int) -> torch.Tensor:
        """``[vocabulary]``: log probabilities of the token after ``ids``."""
        entries = _ask({"ids": list(ids), "vocabulary": vocabulary, "server": self._number})
        return _spread(entries, vocabulary)

    def after_image(self, png: bytes, text: str, vocabulary: int) -> tuple[torch.Tensor, int]:
        """``[vocabulary]``: log probabilities of the token after an image and a text, and how many tokens both are."""
        image = base64.b64encode(png).decode()
        answer = _ask({"image": image, "text": text, "vocabulary": vocabulary, "server": self._number})
        return _spread(answer["entries"], vocabulary), answer["tokens"]

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


def _spread(entries: Sequence[tuple[int, float]], vocabulary: int) -> torch.Tensor:
    out = torch.full((vocabulary,), -torch.inf)
    for index, value in entries:
        out[index] = value
    return out


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


def _load(path: str, context: int, projector: str) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    if projector:
        params.mmproj.path = projector
        params.mmproj_use_gpu = False
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = -1
    params.fit_params = False
    params.cpuparams.n_threads = params.n_threads_http = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def _post(server: Any, place: str, values: dict[str, Any] | None = None) -> Any:
    """What the server answers; straight to the loopback address, whatever proxy the environment names."""
    data = None if values is None else json.dumps(values).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/{place}", data=data, headers=headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=DEADLINE) as reply:
        return json.load(reply)


def _tokenize(server: Any, text: str, special: bool) -> list[int]:
    asked = {"content": text, "add_special": special, "parse_special": True}
    tokens: list[int] = _post(server, "tokenize", asked)["tokens"]
    return tokens


def _after_image(server: Any, image: str, text: str, vocabulary: int) -> dict[str, Any]:
    prompt = {"prompt_string": _post(server, "props")["media_marker"] + text, "multimodal_data": [image]}
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "cache_prompt": False}
    # Half a character would be held back, as below.
    reply = _post(server, "completion", {**asked, "logit_bias": [["a", 100.0]]})
    entries = reply["completion_probabilities"][0]["top_logprobs"]
    return {
        "entries": [(entry["id"], entry["logprob"]) for entry in entries],
        "tokens": reply["tokens_evaluated"],
    }


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
                servers.append(_load(request["load"], request["context"], request["projector"]))
                answer = len(servers) - 1
            elif "image" in request:
                server = servers[request["server"]]
                answer = _after_image(server, request["image"], request["text"], request["vocabulary"])
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
