"""Pushing to the hub: checked before the run, whole and byte for byte after it, and the token is nowhere."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from helpers import hub, tiny
from helpers.hub import TOKEN, Hub, Repository
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http

from qtool.cli.main import main
from qtool.pipelines import push as pipeline
from qtool.reports.base_card import BaseCard, base_card
from qtool.system.errors import RunError

# huggingface_hub 2.4 gives the library below it content under a name of former times
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
CARD = (
    "---\nlicense: other\nlicense_name: 'Small'\nlicense_link: https://example.org/LICENSE\ntags: [x]\n---\n# A model\n"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in ``q``; only read it."""
    at = tmp_path_factory.mktemp("push")
    (tiny.llama(at / "float") / "README.md").write_text(CARD, encoding="utf-8")
    recipe = {
        "model": {"path": str(at / "float"), "device": "cpu"},
        "method": {"name": "rtn"},
        "quant": {"num_bits": 4, "group_size": 32},
        "output": {"path": str(at / "q")},
    }
    (at / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["ptq", str(at / "r.yaml"), "--quiet"]) == 0
    return at


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in of the hub, and a user who is logged in."""
    with hub.running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))  # no waiting
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    assert "bug in qtool" not in printed.err
    return code, printed.out, printed.err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bytes_of_a_folder_are_those_on_the_hub(
    made: Path, served: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "push", made / "q", "tiny-w4", "--private", "--json")
    assert code == 0, err
    assert json.loads(out)["pushed"] == f"{served.address}/ada/tiny-w4"
    pushed = served.repositories["ada/tiny-w4"]
    assert pushed.private
    assert pushed.commits == 1
    assert pushed.files == contents(made / "q") | {".gitattributes": b""}
    assert served.refused == 0


def test_a_second_push_replaces_weights_that_are_gone(
    made: Path, served: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"qtool.json": b"{}", "model-00009-of-00009.safetensors": b"old", "notes.txt": b"kept"}
    served.repositories["lab/tiny"] = Repository(files=dict(old))
    assert run(capsys, "push", made / "q", "lab/tiny", "-q")[0] == 0
    assert served.repositories["lab/tiny"].files == contents(made / "q") | {"notes.txt": b"kept"}


def test_a_run_pushes_its_folder_and_the_token_is_nowhere(
    made: Path,
    served: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "token").write_text(TOKEN)  # as hf auth login keeps it
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    where = ("--set", f"output.path={tmp_path / 'q'}")
    code, out, err = run(capsys, "ptq", made / "r.yaml", *where, "--push-to-hub", "ada/run", "--json")
    assert code == 0, err
    assert json.loads(out)["pushed"] == f"{served.address}/ada/run"
    assert f"was pushed to {served.address}/ada/run" in err
    files = contents(tmp_path / "q")
    assert served.repositories["ada/run"].files == files | {".gitattributes": b""}
    assert not [name for name, content in files.items() if TOKEN.encode() in content]
    assert served.refused == 0


def test_a_message_of_the_hub_with_the_token_hides_it(
    made: Path, served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))

    def fail(*args: object, **keys: object) -> None:
        raise ValueError(f"Bearer {TOKEN} and {TOKEN}")

    monkeypatch.setattr(HfApi, "create_commit", fail)
    with pytest.raises(RunError) as caught:
        pipeline.push(made / "q", pipeline.Destination("ada/x", False))
    assert TOKEN not in str(caught.value)
    assert "***" in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("format", ["dense", "gptq"])
def test_an_export_is_pushed(
    made: Path, served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    args = ("export", made / "q", "-f", format, "-o", tmp_path / format, "--push-to-hub", f"ada/{format}")
    code, _, err = run(capsys, *args, "-q")
    assert code == 0, err
    assert served.repositories[f"ada/{format}"].files == contents(tmp_path / format) | {".gitattributes": b""}


def test_cards_have_the_licence_of_the_float_model(made: Path, tmp_path: Path) -> None:
    keys = {"license": "other", "license_name": "Small", "license_link": "https://example.org/LICENSE"}
    assert base_card(made / "float", str(made / "float")).keys() == keys
    assert main(["export", str(made / "q"), "-f", "dense", "-o", str(tmp_path / "dense"), "-q"]) == 0
    for folder in (made / "q", tmp_path / "dense"):
        card = huggingface_hub.ModelCard.load(folder / "README.md")
        assert {key: card.data.get(key) for key in keys} == keys
        assert base_card(folder, folder.name, quantized=False).keys() == keys | {"pipeline_tag": "text-generation"}


@pytest.mark.parametrize(
    "text",
    ["", "# license: mit\n", "---\nlicense: [mit]\n---\n", "---\nlicense: {a: b}\n---\n", "---\nlicense: mit\n", "\0"],
)
def test_a_card_without_a_licence_has_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert base_card(tmp_path, str(tmp_path)) == BaseCard()


# ------------------------------------------------------------------------------------------------ refused before


def _set(served: Hub, **changes: Any) -> None:
    for key, value in changes.items():
        setattr(served, key, value)


READS = {"name": "ada", "orgs": [], "auth": {"accessToken": {"displayName": "r", "role": "read"}}}
FINE = {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "lab"}, "permissions": ["repo.write"]}]}}
NARROW = {"name": "ada", "orgs": [], "auth": {"accessToken": FINE}}


@pytest.mark.parametrize(
    ("repo", "changes", "words"),
    [
        ("a/b/c", {}, "'a/b/c' is no name of a repository"),
        ("ada/x y", {}, "is no name of a repository"),
        ("eve/x", {}, "the token belongs to ada, who is not eve and no member of it; write to one of ada, lab, club"),
        ("club/x", {}, "ada may only read in club"),
        ("ada/x", {"user": READS}, "the token r may not write there"),
        ("ada/x", {"user": NARROW}, "may not write there"),
        ("ada/x", {"fails": {"GET /api/whoami-v2": 401}}, "the hub refused the token"),
        ("ada/x", {"fails": {"GET /api/models": 403}}, "the token may not do this"),
        ("ada/x", {"fails": {"GET /api/whoami-v2": 500}}, "the hub answered with status 500"),
        ("ada/x", {"repositories": {"ada/x": Repository()}}, "exists and is public, and --private was given"),
        (
            "ada/x",
            {"repositories": {"ada/x": Repository(True, {"a.bin": b""})}},
            "holds files that qtool did not write",
        ),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_run(
    made: Path,
    served: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    repo: str,
    changes: dict[str, Any],
    words: str,
) -> None:
    _set(served, **changes)
    where = ("--set", f"output.path={tmp_path / 'q'}")
    code, out, err = run(capsys, "ptq", made / "r.yaml", *where, "--push-to-hub", repo, "--private")
    assert code == 2, err
    assert words in err
    assert out == ""
    assert not list(tmp_path.iterdir())
    assert not [request for request in served.requests if not request.startswith("GET ")]


def test_without_a_network_a_token_or_a_repository_it_is_refused(
    made: Path, served: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [(("--private",), "--private needs --push-to-hub REPO")]
    for args, words in refused:
        code, _, err = run(capsys, "ptq", made / "r.yaml", *args)
        assert (code, words in err) == (2, True)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        code, _, err = run(capsys, "push", made / "q", "x")
        assert (code, "HF_HUB_OFFLINE is set; unset it" in err) == (2, True)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "get_token", lambda: None)
        code, _, err = run(capsys, "push", made / "q", "x")
        assert (code, "there is no token of the hub; log in with hf auth login, or set HF_TOKEN" in err) == (2, True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    code, _, err = run(capsys, "push", made / "q", "x")
    assert (code, "the hub at http://127.0.0.1:1 cannot be reached" in err) == (2, True)


def test_only_folders_of_qtool_are_pushed(
    made: Path, served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "push", made / "float", "x")
    assert (code, "was not written by qtool" in err) == (2, True)
    copy = tiny.copied(made / "q", tmp_path / "copy")
    (copy / "stolen").symlink_to("/etc/passwd")
    code, _, err = run(capsys, "push", copy, "x")
    assert (code, "stolen is no file of this folder" in err) == (2, True)
    (copy / "stolen").unlink()
    (copy / ".hidden").write_text("mine")
    (copy / "config.json").write_text("{}")
    assert run(capsys, "push", copy, "x")[0] in (1, 2)
    assert not served.repositories
    (copy / "config.json").write_bytes((made / "q" / "config.json").read_bytes())
    assert run(capsys, "push", copy, "x")[0] == 0
    assert ".hidden" not in served.repositories["ada/x"].files


# ------------------------------------------------------------------------------------------------ faults afterwards

FAULTS = {  # the beginning of the request that fails, the status, and what is said
    "no permission": ("POST /api/repos/create", 403, "the token may not do this"),
    "an upload": ("PUT /large", 500, "the hub answered with status 500"),
    "the commit": ("POST /api/models/ada/x/commit", 500, "the hub answered with status 500"),
    "another commit": ("POST /api/models/ada/x/commit", 409, "the hub answered with status 409"),
    "a token that ended": ("POST /api/models/ada/x/preupload", 401, "the hub refused the token"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_after_the_run_loses_nothing_and_says_how_to_push_again(
    made: Path, served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    request, status, words = FAULTS[fault]
    served.fails[request] = status
    where = ("--set", f"output.path={tmp_path / 'q'}")
    code, out, err = run(capsys, "ptq", made / "r.yaml", *where, "--push-to-hub", "x", "--json")
    assert code == 1
    assert words in err
    assert f"then: qtool push {tmp_path / 'q'} ada/x" in err
    assert json.loads(out)["pushed"] is None
    assert json.loads(out)["path"] == str(tmp_path / "q")
    assert main(["verify", str(tmp_path / "q")]) == 0
    assert "qtool.json" not in served.repositories.get("ada/x", Repository()).files
    served.fails.clear()
    uploaded = len(served.large)
    served.requests.clear()
    assert run(capsys, "push", tmp_path / "q", "ada/x")[0] == 0
    again = sum(request.startswith("PUT ") for request in served.requests)
    assert again == len(served.large) - uploaded  # what was uploaded is not uploaded again
    assert served.repositories["ada/x"].files == contents(tmp_path / "q") | {".gitattributes": b""}
