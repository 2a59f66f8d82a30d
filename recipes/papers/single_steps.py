"""Card, report and page of an artifact that single steps made: what a step did, and what was measured afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmconvert.errors import OutputError, UsageError
from llmconvert.hub.card import CARD
from llmconvert.memory import PeakMemory
from llmconvert.recipes.stages.artifact import RECIPE_FILE, REPORT_FILE, names_in, render_for, write_up
from llmconvert.report.report import Report, Step
from llmconvert.report.steps import StepDetails
from llmconvert.storage.writer import write_file
from llmconvert.validate.render.card import Address, inherited_metadata, is_untouched

__all__ = ["Papers", "tell_steps", "told_step"]

#: Where the card says that the artifact is loaded from, until it is published somewhere.
_HERE = Address(".")


@dataclass(frozen=True, slots=True)
class Papers:
    """What an artifact that was made here says of itself.

    Attributes:
        artifact: its directory.
        report: what is known of it.
        recipe: as YAML.
        card: its text.
    """

    artifact: Path
    report: Report
    recipe: str
    card: str

    @classmethod
    def of(cls, artifact: Path) -> Papers:
        """Read them, before anything is measured that shall be added.

        Raises:
            UsageError: it is no directory, or was not made here, so that nobody knows what a card should say.
            OutputError: somebody edited its card, which would be replaced.
            SourceError: its report can't be read.
        """
        if not artifact.is_dir():
            raise UsageError(
                f"{artifact}: is a file, which has no card beside it; a recipe (quantize.format: gguf) makes a "
                "directory with file, card and report, or take the report alone (--json FILE)"
            )
        missing = [name for name in (RECIPE_FILE, REPORT_FILE, CARD) if not (artifact / name).is_file()]
        if missing:
            raise UsageError(
                f"{artifact}: has no {' and no '.join(missing)}, so nothing tells how it was made and a card could not "
                "say it; leave out --card, and take the report alone (--json FILE)"
            )
        card = (artifact / CARD).read_text(encoding="utf-8", errors="replace")
        if not is_untouched(card):
            raise OutputError(
                f"{artifact / CARD}: was edited since it was written, and --card would replace it; move it away and "
                f"put an unedited one there, or take the report alone (--json {artifact / REPORT_FILE})"
            )
        recipe = (artifact / RECIPE_FILE).read_text(encoding="utf-8", errors="replace")
        return cls(artifact, Report.read(artifact / REPORT_FILE), recipe, card)

    def write(self, measured: Report) -> None:
        """Put what was measured in place of what was there: report, page, plots and card.

        Raises:
            MachineError: the disk fails or is full.
        """
        told = self.report.model_copy(update={"checks": measured.checks, "environment": measured.environment})
        write_up(self.artifact, told, self.recipe, inherited_metadata(self.card), _HERE)


def told_step(name: str, details: StepDetails, seconds: float, memory: PeakMemory) -> Step:
    """What a report says of a step that was just done."""
    return Step(
        name=name,
        seconds=round(seconds, 3),
        peak_rss_bytes=memory.nbytes,
        peak_rss_method=memory.method,
        sections=details.sections,
        details=details.model_copy(update={"sections": ()}),
    )


def tell_steps(artifact: Path, steps: Sequence[Step]) -> None:
    """Add what was done to the report and the card that it left; of a file, which has none, nothing is told."""
    if not artifact.is_dir() or not (artifact / RECIPE_FILE).is_file():
        return
    papers = Papers.of(artifact)
    report = papers.report.model_copy(update={"steps": tuple(steps)})
    report.write(artifact / REPORT_FILE)
    card = render_for(report, papers.recipe, inherited_metadata(papers.card), _HERE, names_in(artifact))
    write_file(artifact / CARD, card.encode())
