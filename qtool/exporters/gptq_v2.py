"""``gptq-v2``: version 2 of GPTQ's format for symmetric and asymmetric grids; ``gptq.py`` describes both versions."""

from functools import partial

from qtool.exporters._base import Exporter
from qtool.exporters._folder import WrittenFolder
from qtool.exporters.gptq import LOADING, READER, bits, describe_version, read, refuses, write_version

EXPORTER = Exporter(
    "GPTQ version 2: zero points stored as they are",
    refuses,
    partial(write_version, version=2),
    partial(describe_version, version=2),
    read,
    LOADING,
    partial(WrittenFolder, marker="scales"),
    bits=bits,
    reader=READER,
)
