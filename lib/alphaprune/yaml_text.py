"""YAML that others wrote: plain values within limits, or one line that says why not.

`yaml.safe_load` makes no objects, but it takes a few hundred bytes for billions of values (anchors that repeat
anchors), recurses as deep as the text is nested, and lets the last of two equal keys win.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from alphaprune.errors import UsageError

# Many times what any file of the project needs, and still read in a second.
BYTES = 64 * 1024
VALUES = 10_000  # with every alias written out
DEPTH = 20
LARGEST = 2**63 - 1  # of whole numbers


def _at(part: yaml.Event | yaml.Node) -> str:
    return f" (line {part.start_mark.line + 1})"


class _Loader(yaml.SafeLoader):
    """yaml's safe loader with limits, without tags and without equal keys."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.values = 0
        self.size_of_anchor: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self.size_of_anchor:
                raise yaml.YAMLError(f"'{event.anchor}' holds itself{_at(event)}")
            self._count(self.size_of_anchor.get(event.anchor, 0), event)
            return super().compose_node(parent, index)
        if getattr(event, "tag", None) not in (None, "!"):
            raise yaml.YAMLError(f"the tag '{event.tag}' is not taken; write the plain value{_at(event)}")
        self.depth += 1
        if self.depth > DEPTH:
            raise yaml.YAMLError(f"nested deeper than {DEPTH} levels{_at(event)}")
        before = self.values
        self._count(1, event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if event.anchor:
            self.size_of_anchor[event.anchor] = self.values - before
        return node

    def _count(self, more: int, event: yaml.Event) -> None:
        self.values += more
        if self.values > VALUES:
            raise yaml.YAMLError(f"more than {VALUES} values, with aliases written out{_at(event)}")

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.YAMLError(f"'{key.value}' stands twice{_at(key)}")
                seen.add((key.tag, key.value))
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) > LARGEST:
            raise yaml.YAMLError(f"a whole number beyond 2**63{_at(node)}")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse(text: str) -> Any:
    """The value that a YAML text holds.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        return copy.deepcopy(_parsed(text))
    except (yaml.YAMLError, ValueError, OverflowError) as e:  # such as 2020-99-99, read as a date
        raise ValueError(" ".join(str(e).split())[:200]) from None


@lru_cache  # 20 ms each, and a comparison reads the same few files thousands of times
def _parsed(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read(path: Path) -> Any:
    """The value that a YAML file holds.

    Raises:
        UsageError: if it is no regular file, not UTF-8, not YAML, or beyond the limits above.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe could be waited for without end
            raise ValueError("it is no regular file")
        with path.open("rb") as f:
            raw = f.read(BYTES + 1)
        if len(raw) > BYTES:
            raise ValueError(f"it is larger than {BYTES // 1024} KiB")
        return parse(raw.decode("utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(f"{path} is not readable YAML: {e}") from None


def in_yaml(value: Any) -> str:
    """A setting as it is written on a command line, on one line.

    >>> in_yaml(1e-5), in_yaml([{"alpha": 0.5}])
    ('1.0e-05', '[{alpha: 0.5}]')
    """
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("...\n").strip()
