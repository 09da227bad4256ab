"""Recipes as YAML 1.2: text to data, with faults as one ``ValueError`` that says where, and data to text.

YAML 1.2 reads ``on``, ``off``, ``yes`` and ``no`` as text and ``1e-4`` as a number. Dates stay text, too.
"""

import warnings
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from qtool.system.errors import first_line


class _Constructor(SafeConstructor):
    """Build plain data; refuse a key that is written twice, and a list as a key, which ruamel makes a tuple."""

    def check_mapping_key(self, node: Any, key_node: Any, mapping: Any, key: Any, value: Any) -> bool:
        if isinstance(key, tuple):
            raise ConstructorError(None, None, "found unhashable key", key_node.start_mark)
        if key in mapping:
            raise ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
        return True


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


class _Representer(SafeRepresenter):
    """Quote text with Unicode line breaks, which ruamel would write plain and read back as spaces."""

    def represent_str(self, data: Any) -> ScalarNode:
        style = '"' if any(char in data for char in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def parse(text: str) -> Any:
    """Read YAML as plain data.

    Raises:
        ValueError: The text is not YAML, or names an anchor twice; the message is one line with the place.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReusedAnchorWarning)
            return yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except ReaderError as error:
        raise ValueError(f"character {error.position + 1}: {error.reason}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (ReusedAnchorWarning, AssertionError) as error:  # the latter: %YAML 1.3
        raise ValueError(first_line(error)) from error
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # ruamel raises them for `!!bool maybe` and `0b_`
        raise ValueError("a value does not fit its tag") from error


def dump(data: Any) -> str:
    """Write plain data as YAML that ``parse`` reads back, keys in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # typed as its default, None
    stream = StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()
