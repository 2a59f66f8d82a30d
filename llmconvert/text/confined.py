"""The child of :mod:`llmconvert.text.confinement`: renders chat templates and tries tokenizers, one request a line.

It is started as a file and imports nothing of this package: what it needs is jinja2, transformers' template code and
tokenizers. Limits are the system's own, so a loop inside compiled code ends as well.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TEMPLATE_FILES = ("<template>", "<unknown>")
_TEXT = "Hello, world! 你好 12345 \n\tΩ\u0301 🙂 <s></s>"


def _limit_memory(nbytes: int) -> None:
    """Let this process take ``nbytes`` more than it has."""
    status = Path("/proc/self/status")
    if status.exists():
        taken = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (taken * 1024 + nbytes, resource.RLIM_INFINITY))


def _limit_time(seconds: int) -> None:
    """End this process when it has computed for ``seconds`` more than it has."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    taken = int(usage.ru_utime + usage.ru_stime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (taken + seconds, resource.RLIM_INFINITY))


def _line(error: BaseException) -> int | None:
    """The line of the template that an error comes from."""
    found: int | None = getattr(error, "lineno", None)
    trace = error.__traceback__
    while found is None and trace is not None:
        following = trace.tb_next
        if trace.tb_frame.f_code.co_filename in _TEMPLATE_FILES:
            inner = following
            while inner is not None and inner.tb_frame.f_code.co_filename not in _TEMPLATE_FILES:
                inner = inner.tb_next
            if inner is None:
                return trace.tb_lineno
        trace = following
    return found


def _render(template: str, messages: list[dict[str, Any]], tokens: dict[str, Any], prompt: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=prompt, **tokens
    )
    rendered[0].encode()  # half a surrogate pair is no text
    return str(rendered[0])


def _try_tokenizer(path: str) -> int:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    ids = tokenizer.encode(_TEXT).ids
    tokenizer.decode(ids)
    return len(ids)


def main() -> None:
    """Answer requests from standard input until it ends."""
    limits = json.loads(sys.stdin.readline())
    answers, sys.stdout = sys.stdout, sys.stderr
    do: dict[str, Callable[..., Any]] = {"render": _render, "try_tokenizer": _try_tokenizer}
    if limits["do"] == "render":
        from transformers.utils.chat_template_utils import render_jinja_template  # noqa: F401
    else:
        import tokenizers  # noqa: F401
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(limits["nbytes"])
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        _limit_time(limits["seconds"])
        answer: dict[str, Any]
        try:
            answer = {"result": do[limits["do"]](**json.loads(line))}
            text = json.dumps(answer)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of compiled code is no Exception
            memory = isinstance(error, MemoryError)
            reason = " ".join(str(error).split())[:300]
            text = json.dumps({"error": type(error).__name__, "reason": reason, "line": _line(error), "memory": memory})
        answers.write(text + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
