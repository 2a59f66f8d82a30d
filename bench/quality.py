"""Size against quality: methods, schemes and peers on the same model and the same tokens.

    python bench/quality.py --model SmolLM2=DIR [--model dithered=DIR] --calibration FILE --evaluation FILE \\
        --work DIR [--entries ours] [--entry gptq:w4a16-g64 …] [--peer llm-compressor=A/bin/python …] \\
        [--artifact "NAME=DIR" …] [--markdown FILE] [--picture docs/quality.png]

An entry is ``TOOL:SCHEME`` or ``TOOL(key=value,…):SCHEME``. The tool is one of our methods, or a peer whose interpreter
``--peer`` gives: ``llm-compressor-gptq``, ``-rtn`` and ``-awq``, ``gptqmodel``, ``auto-round``, ``hqq-package``,
``mlx-lm-convert`` (``-gptq``, ``-awq``, ``-dwq``) or ``bitsandbytes``. A scheme is ``w4a16-g64`` and its like, ``nf4``,
``w4a16-g64-affine`` (in MLX's format), for our methods and llm-compressor also ``nvfp4``, ``mxfp4``, ``fp8-block`` and
their kin, or for our methods a mean such as ``4.25bpw`` (``4.25bpw-asym`` with zero
points). ``+*.down_proj=w4a16-g32`` behind a scheme gives the layers of that name, in ours, another.
``--entries ours`` and ``--entries peers`` stand for the lists below. ``--artifact`` adds a finished artifact; with
several models, ``MODEL/NAME=DIR``.

Environments of peers:

    pip install torch==2.13.0 llmcompressor==0.14.0                                 llm-compressor
    pip install torch==2.14.1 GPTQModel==7.7.0                                      gptqmodel
    pip install torch==2.13.0 auto-round                                            auto-round
    pip install torch==2.13.0 transformers accelerate einops termcolor tqdm; pip install --no-deps hqq     hqq
    pip install llmconvert[bnb]                                                     bitsandbytes
    pip install 'mlx[cpu]==0.32.4' mlx-lm==0.32.2                                   mlx-lm

Calibration is the first ``--samples`` windows of ``--length`` tokens, evaluation the first ``--windows`` of
``--window``, both tokenized once. Every artifact is dequantized to bfloat16 and scored by one evaluator
(``peers/score.py``): perplexity, mean KL divergence from the original in nats and share of equal predictions. Every
entry leaves a JSON file in ``--work``, and is not run again while that is there; the original's logits are kept there
too (3.2 GB for 16 windows of 2,048 tokens and a vocabulary of 49,152). Seconds are those of one run, on whatever else
the machine was doing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measured import markdown_table, run_measured

_RUNNERS = Path(__file__).parent / "peers"
_ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# What a peer of each name is run by, with which arguments of its own, and whose interpreter.
_PEERS: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "llm-compressor-gptq": ("llm_compressor.py", ("--method", "gptq"), "llm-compressor"),
    "llm-compressor-rtn": ("llm_compressor.py", ("--method", "rtn"), "llm-compressor"),
    "llm-compressor-awq": ("llm_compressor.py", ("--method", "awq"), "llm-compressor"),
    "gptqmodel": ("gptq_model.py", (), "gptqmodel"),
    "auto-round": ("autoround.py", (), "auto-round"),
    "hqq-package": ("hqq_package.py", (), "hqq"),
    "bitsandbytes": ("bits_and_bytes.py", (), "bitsandbytes"),
    **{f"mlx-lm-{way}": ("mlx_lm_quant.py", ("--method", way), "mlx-lm") for way in ("convert", "gptq", "awq", "dwq")},
}
_LISTS: Mapping[str, tuple[str, ...]] = {
    "ours": (
        "rtn:w8a16-g64",
        "gptq:w8a16-g64",
        "rtn:w8a8",
        "gptq:w8a8",
        "smoothquant:w8a8",
        "rtn:fp8",
        "rtn:w4a16-g64",
        "awq:w4a16-g64-asym",
        "hqq:w4a16-g64-asym",
        "hqq:w4a16-g64-asym+*.self_attn.*=w4a16-g32-asym+*.down_proj=w4a16-g32-asym",
        "hqq:4.49bpw-asym",
        "rtn:llm.int8",
        "rtn:nf4",
        "rtn:nf4-dq",
        "gptq:w4a16-g32",
        "gptq:w4a16-g64",
        "gptq:w4a16-g64-asym",
        "gptaq:w4a16-g64",
        "signround(steps=20):w4a16-g64",
        "gptq:4.25bpw",
        "signround(steps=20):4.25bpw",
        "gptq:3.5bpw",
        "gptq:3.25bpw",
        "gptq:w3a16-g64",
        "signround(steps=20):w3a16-g64",
        "gptq:w2a16-g32-asym",
    ),
    "peers": (
        "llm-compressor-gptq:w4a16-g64",
        "llm-compressor-gptq:w3a16-g64",
        "llm-compressor-awq:w4a16-g64-asym",
        "gptqmodel:w4a16-g64",
        "hqq-package:w4a16-g64-asym",
        "bitsandbytes:nf4",
        "bitsandbytes:nf4-dq",
        "bitsandbytes:w8a8",
        "auto-round(iters=50):w4a16-g64",
    ),
}
_ENTRY = re.compile(
    r"(?P<tool>[\w-]+)(?:\((?P<options>[^()]*)\))?:(?P<scheme>[\w.-]+)(?P<overrides>(?:\+[^+=\s]+=[\w.-]+)*)"
)
_WEIGHTS = re.compile(r"w(?P<bits>\d)a16-g(?P<group>\d+)(?:-(?P<symmetry>a?sym))?")
_INT8 = "w8a8"
# llm-compressor's own names of floats.
_PRESETS = {"fp8-static": "FP8"} | {
    name: name.upper().replace("-", "_")
    for name in ("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "mxfp8", "fp8-block", "fp8-dynamic", "w4afp8")
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One point: who quantizes, to what, with which settings; or an artifact that is there already."""

    tool: str
    scheme: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    artifact: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Entry:
        match = _ENTRY.fullmatch(text)
        if match is None:
            raise SystemExit(f"{text!r} is not TOOL:SCHEME or TOOL(key=value,…):SCHEME")
        pairs = [pair.partition("=") for pair in (match["options"] or "").split(",") if pair]
        settings = {key.strip(): _value(value) for key, _, value in pairs}
        return cls(match["tool"], match["scheme"], settings, tuple(match["overrides"].split("+")[1:]))

    @property
    def name(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.options.items())
        scheme = "+".join([self.scheme, *self.overrides])
        return f"{self.tool}{f'({settings})' if settings else ''}{f':{scheme}' if scheme else ''}"

    @property
    def peer(self) -> bool:
        return self.tool in _PEERS or self.artifact is not None


@dataclass(frozen=True, slots=True)
class Result:
    """What an entry came to; ``seconds`` is None where nothing was run."""

    name: str
    peer: bool
    nbytes: int
    perplexity: float
    low: float
    high: float
    kl_mean: float | None = None
    top1_agreement: float | None = None
    seconds: float | None = None
    version: str = ""


def main() -> None:
    options = parse_arguments()
    entries = [Entry.parse(text) for text in (*(_named(options.entries)), *options.entry)]
    pythons = {"bitsandbytes": sys.executable} | dict(_pairs(options.peer, "--peer"))
    tables: dict[str, list[Result]] = {}
    texts: list[str] = []
    for name, directory in _pairs(options.model, "--model"):
        bench = Bench(options, name, Path(directory), pythons)
        finished = [
            Entry(label.removeprefix(f"{name}/"), artifact=Path(path))
            for label, path in _pairs(options.artifact, "--artifact")
            if "/" not in label or label.startswith(f"{name}/")
        ]
        tables[name] = list(bench.run([*entries, *finished]))
        texts.append(f"**{name}**\n\n{table(tables[name])}")
        print(f"\n{texts[-1]}", flush=True)
    if options.markdown:
        options.markdown.write_text("\n\n".join(texts) + "\n")
    if options.picture:
        from quality_plot import draw_quality

        options.picture.write_bytes(draw_quality({name: list(map(asdict, found)) for name, found in tables.items()}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR", help="an unquantized model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", required=True, help="text to measure on")
    parser.add_argument("--work", type=Path, required=True, help="where results are kept")
    parser.add_argument("--entries", action="append", choices=[*_LISTS], default=[], help="a whole list of them")
    parser.add_argument("--entry", action="append", default=[], metavar="TOOL:SCHEME")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer's interpreter")
    parser.add_argument("--artifact", action="append", default=[], metavar="NAME=DIR", help="a finished artifact")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows (default 32)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default 512)")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows (default 16)")
    parser.add_argument("--window", type=int, default=2048, help="tokens of each (default 2048)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every run (default 2)")
    parser.add_argument("--keep", action="store_true", help="keep the artifacts")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--picture", type=Path, help="write the plot to this PNG")
    return parser.parse_args()


class Bench:
    """One model with its texts; results and logits under ``--work``."""

    def __init__(self, options: argparse.Namespace, name: str, model: Path, pythons: Mapping[str, str]) -> None:
        self._options = options
        self._name = name
        self._model = model
        self._pythons = pythons
        self._work = options.work / name
        self._work.mkdir(parents=True, exist_ok=True)

    def run(self, entries: Sequence[Entry]) -> Iterator[Result]:
        """The original, then every entry that isn't measured yet or has been before."""
        commands = [self._command(entry) for entry in entries]
        options = self._options
        self._calibration = self._windows("calibration", options.calibration, options.samples, options.length)
        self._evaluation = self._windows("evaluation", options.evaluation, options.windows, options.window)
        self._texts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (self._calibration, self._evaluation)]
        self._logits = self._work / "original.logits"
        original = Entry("unquantized", artifact=self._model)
        yield self._measured(original, [], "--keep", str(self._logits))
        for entry, command in zip(entries, commands, strict=True):
            result = self._measured(entry, command, "--reference", str(self._logits))
            print(f"{self._name}, {result.name}: perplexity {result.perplexity:.2f}", file=sys.stderr, flush=True)
            yield result

    def _measured(self, entry: Entry, command: Sequence[str], *how: str) -> Result:
        settings: dict[str, Any] = {
            "entry": entry.name,
            "artifact": str(entry.artifact),
            "model": str(self._model.resolve()),
        }
        settings |= {"texts": self._texts, "command": [str(part) for part in command[2:]]}
        path = self._work / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', entry.name)}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("settings") == settings and (how[0] != "--keep" or self._logits.exists()):
            return Result(**known["result"])
        artifact, found = entry.artifact, {}
        if artifact is None:
            artifact = self._work / "artifacts" / path.stem
            found = self._quantize(command, artifact)
        scored = self._work / "score.json"
        self._start([sys.executable, _RUNNERS / "score.py", "--model", artifact, *how], self._evaluation, scored)
        nbytes = found.get("nbytes") or sum(file.stat().st_size for file in artifact.glob("*.safetensors"))
        scores = json.loads(scored.read_text())
        more = {key: scores.get(key) for key in ("kl_mean", "top1_agreement")}
        result = Result(
            name=entry.name,
            peer=entry.peer,
            nbytes=nbytes,
            perplexity=scores["perplexity"],
            low=scores["low"] or scores["perplexity"],
            high=scores["high"] or scores["perplexity"],
            seconds=found.get("seconds"),
            version=found.get("version", ""),
            **more,
        )
        path.write_text(json.dumps({"settings": settings, "result": asdict(result)}, indent=2))
        if entry.artifact is None and not self._options.keep:
            shutil.rmtree(artifact)
        return result

    def _quantize(self, command: Sequence[str], output: Path) -> dict[str, Any]:
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(exist_ok=True)
        report = output.with_name(f"{output.name}.report.json")
        self._start([*command, "--model", self._model, "--output", output], self._calibration, report)
        found: dict[str, Any] = json.loads(report.read_text())
        return found

    def _start(self, command: Sequence[str | Path], ids: Path, report: Path) -> None:
        threads = self._options.threads
        whole = [*command, "--ids", ids, "--report", report, "--threads", str(threads)]
        run_measured(whole, threads=threads, log=report.with_suffix(".log"), extra=_ENVIRONMENT)

    def _windows(self, name: str, text: str, samples: int, length: int) -> Path:
        ids = self._work / f"{name}-{samples}x{length}.npy"
        if not ids.exists():
            command = [sys.executable, _RUNNERS / "windows.py", "--model", self._model, "--text", text, "--ids", ids]
            command += ["--samples", str(samples), "--length", str(length)]
            run_measured(command, threads=1, log=ids.with_suffix(".log"), extra=_ENVIRONMENT)
        return ids

    def _command(self, entry: Entry) -> list[str]:
        """What quantizes the entry, without model, tokens and output."""
        if entry.artifact is not None:
            return []
        if entry.tool not in _PEERS:
            return self._ours(entry)
        if entry.overrides:
            raise SystemExit(f"{entry.name}: peers take one scheme for all layers")
        runner, own, environment = _PEERS[entry.tool]
        python = self._pythons.get(environment)
        if python is None:
            raise SystemExit(f"{entry.name} needs --peer {environment}=PYTHON, an interpreter that has it")
        command = [python, str(_RUNNERS / runner), *own]
        for key, value in entry.options.items():
            command += [f"--{key}", str(value)]
        if entry.tool == "bitsandbytes":
            return [*command, "--kind", "int8" if entry.scheme == _INT8 else entry.scheme]
        if environment == "llm-compressor" and entry.scheme in _PRESETS:
            # It would store these codes of 4 bits one to a byte.
            stored = ["--stored", "pack-quantized"] if entry.scheme == "w4afp8" else []
            return [*command, "--preset", _PRESETS[entry.scheme], *stored]
        match = _WEIGHTS.fullmatch(entry.scheme)
        if match is None:
            raise SystemExit(f"{entry.name}: peers take schemes such as w4a16-g64 and w4a16-g64-asym")
        command += ["--bits", match["bits"], "--group-size", match["group"]]
        return [*command, "--asymmetric"] if match["symmetry"] == "asym" else command

    def _ours(self, entry: Entry) -> list[str]:
        command = [sys.executable, str(_RUNNERS / "ours.py"), "--method", entry.tool]
        if entry.options:
            command += ["--options", json.dumps(dict(entry.options))]
        for override in entry.overrides:
            command += ["--override", override]
        if entry.scheme.endswith("-affine"):
            command += ["--format", "mlx"]
        mean, budget, symmetry = entry.scheme.partition("bpw")
        if budget:
            return [*command, "--bits-per-weight", mean, "--scheme", f"w4a16-g64{symmetry}"]
        if entry.scheme.startswith(("nf4", "llm.int8")):
            command += ["--format", "bitsandbytes"]
        return [*command, "--scheme", entry.scheme]


def table(results: Sequence[Result]) -> str:
    """A Markdown table: the original, then ours and peers together, by size and perplexity."""
    header = ["", "weights", "perplexity", "95 %", "KL, mean", "top-1", "seconds"]
    first, *rest = results
    ordered = sorted(rest, key=lambda result: (-round(result.nbytes / 1e6), result.perplexity))
    return markdown_table(header, [_row(result) for result in (first, *ordered)])


def _row(result: Result) -> list[str]:
    return [
        f"{result.name}{f' ({result.version})' if result.peer and result.version else ''}",
        f"{result.nbytes / 1e6:,.1f} MB",
        f"{result.perplexity:.2f}",
        f"{result.low:.2f}–{result.high:.2f}",
        "" if result.kl_mean is None else f"{result.kl_mean:.4f}",
        "" if result.top1_agreement is None else f"{result.top1_agreement:.1%}",
        "" if result.seconds is None else f"{result.seconds:,.0f}",
    ]


def _named(lists: Sequence[str]) -> Iterator[str]:
    for name in lists:
        yield from _LISTS[name]


def _pairs(texts: Sequence[str], option: str) -> list[tuple[str, str]]:
    pairs = [text.partition("=") for text in texts]
    if not all(separator and name and value for name, separator, value in pairs):
        raise SystemExit(f"{option} takes NAME=VALUE")
    return [(name, value) for name, _, value in pairs]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
