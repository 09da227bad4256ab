"""``qtool_verified.json``: what was verified of an export, and the part of its model card that says so.

The file lies in the export's folder, and the manifest does not list it. It has the hash of the manifest, which has
those of all other files: a record of other files is not believed.
"""

from pathlib import Path

from pydantic import ValidationError

from qtool.checkpoints.files import file_hashes, write_json
from qtool.pipelines.export_manifest import EXPORT_MANIFEST, VERIFIED
from qtool.reports import model_card
from qtool.reports.records import Record, Sha256
from qtool.reports.verification import EngineCheck, ReaderCheck
from qtool.system import reading
from qtool.system.errors import InputError
from qtool.system.version import __version__

FORMAT_VERSION = 1


class VerifiedRecord(Record):
    """The content of ``qtool_verified.json``."""

    format_version: int = FORMAT_VERSION
    qtool: str = __version__
    manifest: Sha256  # SHA-256 of qtool_export.json, which has those of the other files
    against: ReaderCheck | None = None
    engines: tuple[EngineCheck, ...] = ()

    def with_engine(self, check: EngineCheck) -> "VerifiedRecord":
        """Return the record with ``check`` in the place of an earlier one of the same engine."""
        others = [each for each in self.engines if each.engine != check.engine]
        return self.model_copy(update={"engines": tuple(sorted([*others, check], key=lambda each: each.engine))})


def read(folder: Path) -> VerifiedRecord:
    """Return the record of an export; an empty one if there is none, or it is of other files, or damaged."""
    manifest = file_hashes(folder, EXPORT_MANIFEST)[EXPORT_MANIFEST]
    try:
        found = VerifiedRecord.model_validate(reading.read_object(folder / VERIFIED))
    except (FileNotFoundError, InputError, ValidationError):
        return VerifiedRecord(manifest=manifest)
    return found if found.manifest == manifest else VerifiedRecord(manifest=manifest)


def write(folder: Path, record: VerifiedRecord) -> None:
    """Write the record, and what it says into the export's model card; a card that was removed stays away."""
    write_json(folder / VERIFIED, record.model_dump(mode="json"))
    model_card.update_verified(folder, record.against, record.engines)
