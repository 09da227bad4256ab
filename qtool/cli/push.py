"""``qtool push``, and ``--push-to-hub`` of the commands that write a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli.arguments import Folder, Json, Quiet
from qtool.cli.output import print_either
from qtool.cli.session import running, starting
from qtool.system import distributed, progress
from qtool.system.errors import InputError, QtoolError

if TYPE_CHECKING:
    from qtool.pipelines.push import Destination

Repo = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="REPO",
        help="Push the finished folder to owner/name on the Hugging Face hub, with the token of hf auth login or "
        "HF_TOKEN.",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository on the hub private.")]


def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the hub: owner/name, or a name.")],
    private: Private = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Push a folder that qtool wrote to the Hugging Face hub."""
    with starting(quiet):
        from qtool.pipelines import push as pipeline
    with running(quiet, None):
        address = pipeline.push(folder, pipeline.check(repo, private))
    print_either({"path": str(folder), "pushed": address}, address, as_json)


def destination(repo: str | None, private: bool) -> "Destination | None":
    """Return where to push to, after all checks that need no folder; ``None`` if nothing is to be pushed.

    Raises:
        InputError: it cannot be pushed to, or ``private`` is given without a repository.
    """
    if repo is None:
        if private:
            raise InputError("--private needs --push-to-hub REPO")
        return None
    if not distributed.is_first():
        return None
    from qtool.pipelines import push as pipeline

    return pipeline.check(repo, private)


def pushed(folder: Path, to: "Destination | None") -> tuple[str | None, QtoolError | None]:
    """Push ``folder``; return the address and the error, for a caller that prints its result before it fails."""
    if to is None:
        return None, None
    from qtool.pipelines import push as pipeline

    try:
        address = pipeline.push(folder, to)
    except QtoolError as error:
        return None, error
    progress.say(f"{folder} was pushed to {address}")
    return address, None
