"""Recipes as YAML 1.2: text to data, with faults as one ``ValueError`` that says where, and data to text.

YAML 1.2 reads ``on``, ``off``, ``yes`` and ``no`` as text and ``1e-4`` as a number. Dates stay text, too. Anchors,
aliases and merge keys (``<<: *anchor``) work. A text of a kilobyte can stand for more values than memory holds, because
aliases repeat aliases: the values are counted before any is made.
"""

import warnings
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from qtool.system.errors import first_line

MAX_CHARACTERS = 2**17  # largest YAML text; a plan for a model of 1000 linears has 100,000 characters
MAX_DIGITS = 400  # most characters of a number; 309 digits hold the largest float
MAX_VALUES = 100_000  # most values of a text, where each alias counts as all that it stands for
MAX_DEPTH = 60  # deepest nesting of lists and mappings
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "merge", "value")
}


class _Constructor(SafeConstructor):
    """Build plain data; refuse a key that is written twice, and a list as a key, which ruamel makes a tuple."""

    def construct_document(self, node: Any) -> Any:
        _count(node, {}, 0)
        return super().construct_document(node)

    def flatten_mapping(self, node: Any) -> None:
        """Put merged keys into ``node``; ruamel checks for doubled keys only where nothing is merged."""
        if getattr(node, "merge", None) is None:  # it is not flattened yet, so its keys are those that are written
            written: dict[Any, None] = {}
            for key_node, _ in node.value:
                if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key_node, ScalarNode):
                    key = self.construct_object(key_node, deep=True)
                    self.check_mapping_key(node, key_node, written, key, None)
                    written[key] = None
        super().flatten_mapping(node)

    def check_mapping_key(self, node: Any, key_node: Any, mapping: Any, key: Any, value: Any) -> bool:
        if isinstance(key, tuple):
            raise ConstructorError(None, None, "found unhashable key", key_node.start_mark)
        if key in mapping:
            raise ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
        return True


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def _count(node: Node, known: dict[int, int | None], depth: int) -> int:
    """Return the number of values that ``node`` stands for; ``known`` has those of other nodes, or ``None`` meanwhile.

    Raises:
        ConstructorError: The number or the depth is too large, a value contains itself, or a tag is not plain.
    """
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ConstructorError(None, None, "a value contains itself", node.start_mark)
        return size
    if str(node.tag) not in PLAIN_TAGS:
        short = str(node.tag).replace("tag:yaml.org,2002:", "!!")
        raise ConstructorError(None, None, f"the tag {short} is not taken; write plain values", node.start_mark)
    if depth > MAX_DEPTH:
        raise ConstructorError(None, None, f"nested more than {MAX_DEPTH} deep", node.start_mark)
    known[id(node)] = None
    size = 1
    if isinstance(node, ScalarNode):
        if str(node.tag).endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise ConstructorError(None, None, f"a number of {len(node.value)} characters", node.start_mark)
    elif isinstance(node, SequenceNode | MappingNode):
        inner = node.value if isinstance(node, SequenceNode) else [part for pair in node.value for part in pair]
        size += sum(_count(each, known, depth + 1) for each in inner)
    if size > MAX_VALUES:
        what = f"stands for {size:.3g} values with its aliases; at most {MAX_VALUES:,} are taken"
        raise ConstructorError(None, None, what, node.start_mark)
    known[id(node)] = size
    return size


class _Representer(SafeRepresenter):
    """Quote text with Unicode line breaks, which ruamel would write plain and read back as spaces."""

    def represent_str(self, data: Any) -> ScalarNode:
        style = '"' if any(char in data for char in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def parse(text: str) -> Any:
    """Read YAML as plain data.

    Raises:
        ValueError: The text is not YAML of plain values, names an anchor twice, or is too large; the message is one
            line with the place.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {MAX_CHARACTERS:,} are taken")
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
