"""``qtool push`` and ``--push-to-hub``: the finished folder of a checkpoint or an export as one commit on the hub.

Everything that can be known before a long run is checked before it: that the hub may be used and answers, that there is
a token and whom it belongs to, that the name is one, and that what has the name may be replaced. The token is the one
that ``hf auth login`` keeps or the environment has; it is never an option, and is taken out of every message.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is not in their __all__

from qtool.checkpoints.output_folder import MARKS, is_marked
from qtool.models.folders import belongs
from qtool.models.quiet import without_progress_bars
from qtool.pipelines.verify import verify
from qtool.system import progress
from qtool.system.errors import InputError, QtoolError, RunError, first_line
from qtool.system.printable import HIDDEN
from qtool.system.version import __version__

OWN = (".gitattributes", "README.md")  # files that the hub makes of a new repository
WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf")  # ends of names of files that a push replaces or removes
STATUS = {  # what a refusal of the hub means
    401: "the hub refused the token; log in again with hf auth login, or correct HF_TOKEN",
    403: "the token may not do this; make one with write access at {endpoint}/settings/tokens",
    429: "the hub asks to wait, since there were too many requests",
}


class Destination(NamedTuple):
    """A repository on the hub that may be written, and whether it is to be private."""

    repo: str  # owner/name
    private: bool

    def command(self, folder: Path) -> str:
        """Return the command that pushes ``folder`` here."""
        return f"qtool push {shlex.quote(str(folder))} {self.repo}{' --private' if self.private else ''}"


def check(repo: str, private: bool) -> Destination:
    """Check everything about a push that can be known before there is anything to push; nothing is written.

    Raises:
        InputError: the hub may not be used or does not answer, there is no token or one that may not write, ``repo`` is
            no name, belongs to others, holds files that qtool did not write, or is public where ``private`` is asked.
    """
    _check_name(repo)
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{repo} cannot be pushed: HF_HUB_OFFLINE is set; unset it, or push later with qtool push")
    token = get_token()
    if token is None:
        raise InputError(
            f"{repo} cannot be pushed: there is no token of the hub; log in with hf auth login, or set HF_TOKEN"
        )
    with _explained(InputError, f"{repo} cannot be pushed"):
        user = HfApi(token=token).whoami()
        found = Destination(_full_name(repo, user), private)
        _check_scope(found.repo, user)
        _check_there(HfApi(token=token), found)
    return found


@without_progress_bars()
def push(folder: Path, to: Destination) -> str:
    """Push the files of a finished ``folder`` as one commit; return the address of the repository.

    Weight files of an earlier push that the folder does not have are removed by the same commit.

    Raises:
        InputError: ``folder`` was not written by qtool, or has a link that leads out of it.
        RunError: the hub or the network failed, or a file has changed; the folder is as it was, and the message has the
            command that pushes it again.
    """
    files = _files(folder)
    verify(folder)
    with (
        progress.stage(f"pushing {folder} to {to.repo}"),
        _explained(RunError, f"{folder} is complete, and was not pushed to {to.repo}", f"; then: {to.command(folder)}"),
    ):
        api = HfApi(token=get_token())
        api.create_repo(to.repo, private=to.private or None, exist_ok=True)
        there = _check_there(api, to)
        operations: list[Any] = [CommitOperationAdd(name, file) for name, file in files.items()]
        old = [name for name in there if name.endswith(WEIGHTS) and name not in files]
        operations += [CommitOperationDelete(name, is_folder=False) for name in old]
        api.create_commit(to.repo, operations, commit_message=f"Checkpoint of qtool {__version__}")
        return f"{api.endpoint}/{to.repo}"


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise InputError(
            f"{repo!r} is no name of a repository: give owner/name, or a name of letters, digits, '-', '_' and '.' "
            "for one of your own"
        ) from None


def _full_name(repo: str, user: dict[str, Any]) -> str:
    """Return ``owner/name``; a name alone is of the user."""
    owner, slash, name = repo.rpartition("/")
    roles = {user["name"]: "admin", **{each["name"]: each.get("roleInOrg") for each in user.get("orgs", [])}}
    if not slash:
        return f"{user['name']}/{name}"
    if owner not in roles:
        raise InputError(
            f"{repo} cannot be pushed: the token belongs to {user['name']}, who is not {owner} and no member of it; "
            f"write to one of {', '.join(roles)}"
        )
    if roles[owner] == "read":
        raise InputError(
            f"{repo} cannot be pushed: {user['name']} may only read in {owner}; ask there for write access"
        )
    return repo


def _check_scope(repo: str, user: dict[str, Any]) -> None:
    """Refuse a token that may only read, or a fine-grained one that may write nowhere at the owner of ``repo``."""
    token = user.get("auth", {}).get("accessToken", {})
    role, scopes = token.get("role"), token.get("fineGrained", {}).get("scoped", [])
    names = {repo, repo.partition("/")[0]}
    writes = [each.get("entity", {}).get("name") for each in scopes if "repo.write" in each.get("permissions", ())]
    if role == "read" or (role == "fineGrained" and not names.intersection(writes)):
        raise InputError(
            f"{repo} cannot be pushed: the token {token.get('displayName', '')} may not write there; make one with "
            f"write access at {constants.ENDPOINT}/settings/tokens"
        )


def _check_there(api: HfApi, to: Destination) -> list[str]:
    """Return the names of the files in a repository, none if it does not exist.

    Raises:
        InputError: it holds files and no manifest of qtool, or is public where a private one is asked for.
    """
    try:
        info = api.model_info(to.repo)
    except RepositoryNotFoundError:
        return []
    if to.private and info.private is False:
        raise InputError(
            f"{to.repo} exists and is public, and --private was given; make it private in its settings on the hub, or "
            "choose another name"
        )
    names = [each.rfilename for each in info.siblings or ()]
    if set(names) - set(OWN) and not set(names) & set(MARKS):
        raise InputError(
            f"{to.repo} exists and holds files that qtool did not write ({' or '.join(MARKS)} would say so), so they "
            "will not be replaced; choose another name"
        )
    return names


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a finished folder by their names in the repository; hidden ones stay behind.

    Raises:
        InputError: the folder was not written by qtool, or one of its files is not regular or lies elsewhere.
    """
    if not folder.is_dir() or not is_marked(folder):
        raise InputError(f"{folder} was not written by qtool ({' or '.join(MARKS)} would say so); only such are pushed")
    root, found = folder.resolve(), {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or (file.is_dir() and not file.is_symlink()):
            continue
        if not file.is_file() or not belongs(file.resolve(), root):
            raise InputError(f"{file} is no file of this folder; remove it, or put a copy in its place")
        found[name.as_posix()] = file
    return found


@contextmanager
def _explained(kind: type[QtoolError], what: str, advice: str = "") -> Iterator[None]:
    """Turn errors of the hub's client and of the network inside the ``with`` block into a ``kind``, without the token.

    ``what`` says what failed, and ``advice`` what to do after the cause is removed.
    """
    try:
        yield
    except QtoolError as error:
        if not advice:
            raise
        raise kind(f"{what}: {error}{advice}") from error
    except Exception as error:  # the client raises errors of many kinds, and other ones in each of its versions
        raise kind(f"{what}: {without_token(_reason(error))}{advice}") from None


def _reason(error: Exception) -> str:
    """Return why a request failed, in words."""
    response = error.response if isinstance(error, HfHubHTTPError) else getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    if status in STATUS:
        return STATUS[status].format(endpoint=constants.ENDPOINT)
    if status is not None:
        return f"the hub answered with status {status}, {first_line(error):.200}"
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    name = type(cause).__name__
    network = isinstance(cause, OSError) or any(word in name for word in ("Connect", "Timeout", "Network", "Protocol"))
    what = f"the hub at {constants.ENDPOINT} cannot be reached" if network else "the hub's client failed"
    return f"{what} ({name}: {first_line(cause):.200})"


def without_token(text: str) -> str:
    """Return ``text`` without the token, which may be in a file and so be unknown to ``redacted``."""
    token = get_token()
    return text.replace(token, HIDDEN) if token else text
