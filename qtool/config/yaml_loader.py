"""YAML as recipes mean it, and what is wrong with a text as one ``ValueError`` that says where."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice; dates stay text, and so do on, off, yes and no (as in YAML 1.2)."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (a class attribute by PyYAML's design)
        first: [(tag, pattern) for tag, pattern in rows if not tag.endswith((":timestamp", ":bool"))]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True) if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def parse(text: str) -> Any:
    """YAML as data; every failure as a ``ValueError`` that says where."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"character {error.position + 1}: {error.reason}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # from PyYAML: !!bool maybe, 0b_
        raise ValueError("a value does not fit its tag") from error
