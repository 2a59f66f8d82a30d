"""``llmconvert push``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Push an artifact to the Hub.")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repository", metavar="USER/NAME")
@click.option("--private/--public", default=None, help="What a new repository becomes; --private refuses a public one.")
@click.option("--revision", help="Branch to push to. [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing to the branch.")
@click.option("--tag", help="Tag the commit.")
@click.option("--message", help="Commit message.")
def push(
    directory: Path,
    repository: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    tag: str | None,
    message: str | None,
) -> None:
    """Push an artifact DIRECTORY to the Hub.

    The token comes from HF_TOKEN or from `hf auth login`.

    \b
    Example:
      llmconvert push out/demo user/SmolLM2-135M-Instruct-W4A16
    """
    from llmconvert.hub import push_folder
    from llmconvert.interrupt import interruptible
    from llmconvert.progress import console_progress

    with interruptible("files already sent are not sent again; run the same command to continue"):
        result = push_folder(
            directory,
            repository,
            private=private,
            revision=revision,
            create_pr=create_pr,
            tag=tag,
            message=message,
            progress=console_progress(),
        )
    click.echo(result)
