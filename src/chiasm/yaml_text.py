"""Reads YAML that people write. A name that one mapping has twice is an error: YAML's own readers would take the last one."""

from __future__ import annotations

import datetime
from typing import Any

import msgspec

_MERGE = "tag:yaml.org,2002:merge"
_SHOWN_CHARACTERS = 40


def read_yaml(text: bytes | str, kind: Any) -> Any:
    """Return what a text says, as the type ``kind``. Raises what ``chiasm.wire.UNREADABLE_YAML`` names."""
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _check_names(node)
            said = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, LookupError, AttributeError) as error:
        raise ValueError(str(error)) from None
    return msgspec.convert(said, kind, builtin_types=(datetime.datetime, datetime.date))


def _check_names(document: Any) -> None:
    """Raise ValueError if a mapping has a name twice."""
    import yaml

    pending, seen = [document], {id(document)}
    while pending:
        node = pending.pop()
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            names: set[tuple[str, str]] = set()
            for name, _ in node.value:
                if not isinstance(name, yaml.ScalarNode) or name.tag == _MERGE:
                    continue
                if (name.tag, name.value) in names:
                    place = f"line {name.start_mark.line + 1}, column {name.start_mark.column + 1}"
                    raise ValueError(
                        f"{name.value[:_SHOWN_CHARACTERS]!r} is there twice, again at {place}; several values go into one list"
                    )
                names.add((name.tag, name.value))
            parts = [part for pair in node.value for part in pair]
        for part in parts:
            if id(part) not in seen:
                seen.add(id(part))
                pending.append(part)
