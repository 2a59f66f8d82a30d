"""``llmconvert push``: an artifact to the Hub, in one commit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmconvert.cli.manners import Manners, manners
from llmconvert.cli.say import say

if TYPE_CHECKING:
    from llmconvert.hub import PushPlan


_LINK = re.compile(r"https?://[^/]+/([\w.-]+/[\w.-]+)")


def _repository(context: click.Context, parameter: click.Parameter, text: str) -> str:
    """A name on the Hub, and neither a directory nor a page; whether it is a valid one is told with other options."""
    if text.startswith("file:"):
        raise click.BadParameter(
            f"{text!r} is a directory, and push goes to the Hub; copy the artifact there, or name it in a recipe "
            "(publish.to)"
        )
    link = _LINK.match(text)
    if link is not None:
        raise click.BadParameter(f"{text!r} is a page; did you mean {link[1]}?")
    return text


@click.command(short_help="Push an artifact to the Hub.")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repository", metavar="USER/NAME", callback=_repository)
@click.option("--private/--public", default=None, help="What a new repository becomes; --private refuses a public one.")
@click.option("--revision", help="Branch to push to, made if need be. [default: main]")
@click.option("--folder", help="Folder of the repository to push to, for one of several variants.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing to the branch.")
@click.option("--tag", help="Tag the commit.")
@click.option("--message", help="Commit message.")
@click.option("--replace", is_flag=True, help="Remove files that are there and don't belong to the artifact.")
@click.option("--verify-download", is_flag=True, help="Fetch what was published again and compare it byte for byte.")
@click.option("--gated", type=click.Choice(["auto", "manual"]), help="Who wants a new repository's files has to ask.")
@click.option("--collection", help="Collection that shall list the repository, made if need be.")
@click.option("--unmeasured", is_flag=True, help="Push although no report tells how well the artifact predicts.")
@click.option("--force", is_flag=True, help="Push what is no model, has no card, or failed its checks.")
@click.option(
    "--dry-run",
    "--plan",
    "dry_run",
    is_flag=True,
    help="List files and card, and with a token ask the Hub; send nothing.",
)
@manners
def push(directory: Path, repository: str, dry_run: bool, manners: Manners, **options: Any) -> None:
    """Push an artifact DIRECTORY to the Hub, in one commit.

    The token comes from HF_TOKEN or from `hf auth login`.

    \b
    Example:
      llmconvert push out/demo user/SmolLM2-135M-Instruct-W4A16
    """
    if dry_run:
        _dry_run(directory, repository, manners, **options)
        return
    from llmconvert.api import push_model

    url = push_model(directory, repository, progress=manners.progress(), **options)
    manners.result({"url": url}, url)


def _dry_run(
    directory: Path, repository: str, manners: Manners, *, unmeasured: bool, force: bool, **settings: Any
) -> None:
    """Show the plan, then ask the Hub whether it would be let through, where there is a token to ask with."""
    from llmconvert.hub import PushOptions, check_card, check_push, reaches_hub
    from llmconvert.recipes.papers.gate import require_publishable
    from llmconvert.recipes.publishing import plan_push

    options = PushOptions(**settings)
    options.check(repository)
    plan = plan_push(directory, repository, revision=options.revision, folder=options.folder)
    files = {file.name: file.size for file in plan.files}
    manners.result({"repository": plan.repo_id, "files": files, "card": plan.card}, *_lines(plan))
    if not force:
        require_publishable(directory, unmeasured=unmeasured)
    if reaches_hub():
        check_push(repository, options)
        if plan.card is not None:
            check_card(repository, plan.card)
    else:
        say(f"whether it may be published to {repository} was not asked: no token, or offline", err=True)


def _lines(plan: PushPlan) -> Iterator[str]:
    """The plan as lines: one per file, the sum, and the card."""
    width = max(len(f"{plan.nbytes:,}"), 5)
    yield from (f"{file.size:>{width},}  {file.name}" for file in plan.files)
    yield f"{plan.nbytes:>{width},}  in {len(plan.files)} files, to {plan.repo_id} ({plan.revision})"
    yield f"\n{plan.card.rstrip()}" if plan.card is not None else "\nno model card (README.md)"
