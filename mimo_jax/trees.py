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


def part(tree: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """What `tree` has at the places that `like` has."""
    return {key: part(tree[key], x) if isinstance(x, Mapping) else tree[key] for key, x in like.items()}


def merge(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with the leaves of `other`, which has some of its places."""
    return {**tree, **{key: merge(tree[key], x) if isinstance(x, Mapping) else x for key, x in other.items()}}
