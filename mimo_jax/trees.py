"""Nested dictionaries by path: `{"llm": {"head": x}}` <-> `{"llm/head": x}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """Leaves by path, `prefix` before each, in order; an empty dictionary leaves nothing."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= flatten(value, separator, path + separator) if isinstance(value, Mapping) else {path: value}
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`, with the separator "/"."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
        place[name] = leaf
    return tree
