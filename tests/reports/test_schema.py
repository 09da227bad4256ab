"""The JSON schema of ``report.json``: every report follows it, and reports of other versions are read or refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.records import locked, per_step

from qtool.cli import main
from qtool.reports.base_card import BaseCard
from qtool.reports.gate import GateCheck, GateVerdict
from qtool.reports.records import CalibrationText, Exported, Linear, ModelTable, TaskResult
from qtool.reports.report import SCHEMA_VERSION, Report, read_report
from qtool.system.errors import InputError

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture
def full() -> Report:
    """A report with something in every part."""
    check = GateCheck(key="max_loss", measure="perplexity on c4", value=math.nan, limit=0.02, passed=False)
    return Report(
        model="m",
        quantized="out/q",
        label="w4g64",
        method="gptq",
        bits_per_weight=4.25,
        seconds={"quantize": 1.5},
        calibration=CalibrationText(source="c4", num_samples=1, seq_len=2),
        results=(TaskResult(task="c4", metric="perplexity", value=math.inf, windows=(1.0, math.nan), text="0" * 64),),
        gate=GateVerdict(passed=False, checks=(check,)),
        linears=(Linear(name="x", shape=(2, 3), num_bits=4, weight_error=math.nan),),
        tables=(ModelTable(name="e", role="embedding", shape=(2, 3), bits_per_weight=16.0, num_bytes=12),),
        series=(per_step("loss", [2.0, 1.0]),),
        exports=(Exported(format="dense", path="out/d", num_bytes=3, weight_difference=0.0, logit_difference=None),),
        lock=locked(method={"name": "gptq", "damp": 0.1}),
        base_card=BaseCard(license="mit", language=("en",)),
    )


@pytest.fixture
def schema(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main.main(["schema", "--report"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def faults(schema: dict[str, Any], value: object) -> list[str]:
    return ["/".join(map(str, each.path)) for each in jsonschema.Draft202012Validator(schema).iter_errors(value)]


def test_every_report_follows_the_schema(schema: dict[str, Any], full: Report) -> None:
    for report in (full, Report(model="m")):
        written = json.loads(report.json_text())
        assert faults(schema, written) == []
        assert written["schema_version"] == SCHEMA_VERSION
        assert set(written) == set(schema["properties"]), "the schema names every key"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "schema_version"),
        ({"model": None}, "model"),
        ({"results": [{"task": "c4", "metric": "perplexity", "value": "much"}]}, "results/0/value"),
        ({"seconds": {"load": -1}}, "seconds/load"),
    ],
)
def test_the_schema_finds_what_is_wrong(
    schema: dict[str, Any], full: Report, change: dict[str, object], where: str
) -> None:
    assert faults(schema, json.loads(full.json_text()) | change) == [where]


def test_reports_before_the_schema_are_read(schema: dict[str, Any], full: Report, tmp_path: Path) -> None:
    old = json.loads(full.json_text()) | {"licence": {"license": "mit"}}
    for key in ("schema_version", "gate", "base_card"):
        del old[key]
    for key in ("windows", "text"):
        del old["results"][0][key]
    assert faults(schema, old) == []
    (tmp_path / "report.json").write_text(json.dumps(old))
    found = read_report(tmp_path)
    assert found is not None
    assert found.results[0].value == math.inf
    assert found.model_dump(exclude={"results", "gate", "base_card"}) == full.model_dump(
        exclude={"results", "gate", "base_card"}
    ) | {"linears": found.model_dump()["linears"]}  # NaN is not equal to itself


def test_a_report_of_a_newer_schema_is_refused(full: Report, tmp_path: Path) -> None:
    newer = json.loads(full.json_text()) | {"schema_version": SCHEMA_VERSION + 1}
    (tmp_path / "report.json").write_text(json.dumps(newer))
    with pytest.raises(InputError, match=f"at most {SCHEMA_VERSION}: a newer qtool wrote it; update qtool to read it"):
        read_report(tmp_path)


def test_two_schemas_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["schema", "--report", "--sweep"]) == 2
    assert "give one of them" in capsys.readouterr().err
