"""The page of the documentation that the census writes: counts, what works by name, and of the rest what is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from census_cases import CLASSES, METHODS, SCHEME, Finding

__all__ = ["markdown_page"]

# What some classes need besides.
_BESIDE = ("timm", "torchvision", "scipy")
_TITLES = {"causal": "Causal language models", "image-text": "Image-text-to-text"}
_VERDICTS = ("works", "not in transformers", "as advised", "refused", "wrong", "crash", "not built")
_PAGE = """# Families of models

Which of transformers' classes can be quantized, read back and trusted. Written by `bench/census.py` on {date}, with
transformers {transformers}, compressed-tensors {compressed_tensors} and torch {torch}{beside}.

Every class of transformers' automatic mappings gets a tiny random checkpoint with the structure of the real one: layers
of every kind, experts, tied weights as the class has them by default. It is quantized to {scheme} by rtn and by gptq,
and the artifact is read by the class that its config names. It **works** if by both methods no tensor is missing,
unknown or other than it was, and logits are those of the artifact's own weights written out dense. **as advised**: that
is refused, and the same holds with the override that the refusal names, which leaves the experts dense and quantizes
the other linears. **not in transformers**: the same, and with `runtime: vllm`, which the refusal names as well, experts
too are quantized, one by one, under names that vLLM and llm-compressor have for them and transformers has not. That is
proven otherwise: compressed-tensors' own decompression gives each weight bit for bit as it is read here, and the engine
computes from the artifact the logits that transformers computes from its weights written out dense. **refused** is said
before any work, with the reason in the table. **not built**: transformers cannot build, save or run such a model on
text alone with the settings that it has by default.

{codes}

All of this is in float32, where nothing hides a difference. In bfloat16 transformers computes two things otherwise than
a model's own forward. Experts go through a grouped product by default, which adds up in another order; with
`experts_implementation="eager"` logits are the engine's to the bit (measured on MiMo-V2-Flash and Mixtral). And in a
quantized Jamba or Falcon Mamba it adds a bias and takes it away again, each time rounded, to have the linear called
(`dt_proj`): a quantized Jamba differs by that from the same weights written out dense, which give the engine's logits
to the bit.

`llmconvert inspect MODEL` says the same of any checkpoint, from its headers: whether `quantize` takes it, what stays
dense, or why not and what to do instead.

{counts}

{parts}
"""


def markdown_page(findings: Mapping[str, Finding], today: str) -> str:
    """The page of the documentation: counts, what works by name, and of the rest what is said.

    Args:
        findings: by key.
        today: the date that they are of.
    """
    return _PAGE.format(
        date=today,
        transformers=version("transformers"),
        compressed_tensors=version("compressed-tensors"),
        torch=version("torch"),
        beside="".join(f", {name} {found}" for name in _BESIDE if (found := _version(name))),
        scheme=SCHEME,
        codes=_codes(findings),
        counts=_counts(findings),
        parts="\n\n".join(_part(kind, title, findings) for kind, title in _TITLES.items()),
    )


def _codes(findings: Mapping[str, Finding]) -> str:
    """Which code the readings are of, and what of them is missing."""
    codes = Counter(finding.code or "an unknown one" for finding in findings.values())
    if len(codes) == 1:
        said = f"All {len(findings)} readings are of one code, {next(iter(codes))}."
    else:
        parts = ", ".join(f"{count} of {code}" for code, count in codes.most_common())
        said = f"The {len(findings)} readings are not of one code: {parts}."
    missing = sum(case.key not in findings for case in CLASSES)
    return f"{said} Not read: {missing} classes." if missing else said


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _counts(findings: Mapping[str, Finding]) -> str:
    shares = ("works, of those that transformers runs", "works, in transformers or elsewhere", "works or as advised")
    rows = [["", *_VERDICTS, *shares]]
    for kind, title in _TITLES.items():
        found = Counter(finding.verdict for key, finding in findings.items() if key.startswith(f"{kind}/"))
        ran = sum(found.values()) - found["not built"]
        all_linears = found["works"] + found["not in transformers"]
        counts = (found["works"], all_linears, all_linears + found["as advised"])
        of_ran = (f"{number} of {ran}" for number in counts)
        rows.append([title, *(str(found[verdict]) for verdict in _VERDICTS), *of_ran])
    return markdown_table(rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Of a header and rows of text, all columns to the left."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _part(kind: str, title: str, findings: Mapping[str, Finding]) -> str:
    cases = sorted(case for case in CLASSES if case.kind == kind and case.key in findings)
    works = ", ".join(f"`{case.model_type}`" for case in cases if findings[case.key].verdict == "works")
    rows = [["model type", "class", "verdict", "what is said"]]
    for verdict in _VERDICTS[1:]:
        for case in cases:
            finding = findings[case.key]
            if finding.verdict == verdict:
                by = f" ({finding.method})" if finding.method and finding.method != METHODS[0] else ""
                said = finding.detail.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
                rows.append([f"`{case.model_type}`", f"`{case.class_name}`", verdict + by, said])
    return f"## {title}\n\nWork: {works or 'none'}.\n\n{markdown_table(rows)}"
