"""Whether what lies in a directory may be published: a model, with a card, measured, that passed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from llmconvert.errors import SourceError, UsageError
from llmconvert.hub.card import CARD
from llmconvert.recipes.stages.artifact import RECIPE_FILE, REPORT_FILE, names_in
from llmconvert.report.report import Report
from llmconvert.storage.directory import is_weight_file

__all__ = ["require_publishable"]


def require_publishable(artifact: Path, *, unmeasured: bool = False) -> None:
    """Refuse to publish what is no model, has no card, failed its gate, or tells not how well it predicts.

    Args:
        unmeasured: it may be published although the last is so.

    Raises:
        UsageError: saying which, and what to do.
        SourceError: its report cannot be read.
    """
    if not artifact.is_dir():
        return  # whoever reads it says so
    force = "or publish it all the same (--force)"
    names = names_in(artifact)
    models = [name for name in names if is_weight_file(name)]
    if not models or not ({"config.json"} <= names or any(name.endswith(".gguf") for name in models)):
        what = "no weights" if not models else "no config.json beside its weights"
        raise UsageError(f"{artifact}: is no model, it has {what}; name the directory of an artifact, {force}")
    report = None
    with suppress(*(SourceError,) if unmeasured else ()):
        report = Report.read(artifact / REPORT_FILE) if REPORT_FILE in names else None
    if report is not None and report.failed:
        failed = ", ".join(check.name for check in report.failed)
        raise UsageError(
            f"{artifact}: did not pass what it was measured for ({failed}, in its {REPORT_FILE}); make a better one, "
            f"{force}"
        )
    measure = f"llmconvert validate {artifact} --reference MODEL --text FILE"
    made_here = RECIPE_FILE in names
    if not unmeasured and (report is None or report.outcome == "not measured"):
        found = f"has no {REPORT_FILE}: nothing" if report is None else f"nothing in its {REPORT_FILE}"
        write = "--card" if made_here else f"--json {artifact / REPORT_FILE}"
        raise UsageError(
            f"{artifact}: {found} tells how well it predicts; measure it ({measure} {write}), or say that it goes "
            "unmeasured (--unmeasured)"
        )
    if CARD not in names:
        write = f"have one written ({measure} --card)" if made_here else "write one"
        raise UsageError(f"{artifact}: has no model card ({CARD}); {write}, {force}")
