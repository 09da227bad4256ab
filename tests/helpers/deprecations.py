"""The deprecations that transformers announces: most go to its logger, where no filter of warnings sees them."""

import logging
import re
from typing import ClassVar


class Deprecations(logging.Handler):
    """Collects the messages that are about a deprecation."""

    found: ClassVar[list[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of a record that is about a deprecation."""
        message = record.getMessage()
        if re.search("deprecat|will be removed", message, re.IGNORECASE):
            self.found.append(message)
