"""LoRA: low-rank branches beside frozen matrices, y = x W + s (x A) B with s = alpha / rank (Hu et al. 2021).

What such a run trains, saves and restores is one tree: `a` and `b` at the place of the Linear they stand beside and,
with `LoRAConfig.tables`, the text and audio tables and heads themselves. Everything else is the base: it has no
gradient and no moments, may be bfloat16, and is not written to the run's checkpoints.

    split      the parameters of a model -> (base, tables)
    start      the tree that is trained
    variables  base and trained tree -> what `model.apply` takes; W + s A B is never formed
    merge      the same as ordinary parameters, to generate with and to export

Trees are nested dictionaries; a path is their keys joined by "/".
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.config import ConfigError, LoRAConfig
from mimo_jax.models.transformer import initializer
from mimo_jax.training.state import Tree
from mimo_jax.trees import flatten, nest

_TABLES = re.compile(r"(llm|patch_encoder)/embedding|llm/head|patch_decoder/head_\d+/kernel")
_INPUT_AXES = {"out": 2, "projection": 2}  # axes of a kernel that are its input, where that is not one


def is_table(path: str) -> bool:
    """Whether a parameter is one of the tables and heads that `LoRAConfig.tables` trains in full."""
    return _TABLES.fullmatch(path) is not None


def abstract(config: LoRAConfig, learning_rates: Mapping[str, float], boxed_params: Tree) -> Tree:
    """The tree that is trained, as shapes in boxes with the names of their axes; always float32.

    Args:
        learning_rates: of the groups; those of 0 get no adapter.
        boxed_params: from `abstract_params`.

    Raises:
        ConfigError: a group that shall learn has nothing to train.
    """
    leaves: dict[str, Any] = {}
    for path, box in flatten(boxed_params).items():
        group, name = path.split("/")[0], path.split("/")[-2]
        if not learning_rates[group]:
            continue
        shape, names = box.value.shape, box.names
        if config.tables and is_table(path):
            leaves[path] = box.replace(value=jax.ShapeDtypeStruct(shape, jnp.float32))
        elif path.endswith("/kernel") and name in config.targets:
            lead, cut = _cuts(path)
            for part, sizes, axes in (
                ("a", (*shape[:cut], config.rank), (*names[:cut], None)),
                ("b", (*shape[:lead], config.rank, *shape[cut:]), (*names[:lead], None, *names[cut:])),
            ):
                value = jax.ShapeDtypeStruct(sizes, jnp.float32)
                leaves[f"{path.removesuffix('kernel')}{part}"] = box.replace(value=value, names=axes)
    tree = nest(leaves)
    for group, rate in learning_rates.items():
        if rate and group not in tree:
            raise ConfigError(f"lora.targets: nothing to train in {group}, whose learning rate is {rate}")
    return {group: tree.get(group, {}) for group in learning_rates}


def _cuts(path: str) -> tuple[int, int]:
    """Where the input axes of a kernel begin (after the axis of the layers) and end."""
    lead = int("/layers/" in path)
    return lead, lead + _INPUT_AXES.get(path.split("/")[-2], 1)


def split(shapes: Tree, params: Tree) -> tuple[Tree, Tree]:
    """Parameters -> the frozen ones, and the tables that `shapes` (from `abstract`) says are trained in full."""
    leaves, learnt = flatten(params), flatten(shapes)
    frozen = nest({path: x for path, x in leaves.items() if path not in learnt})
    return frozen, nest({path: x for path, x in leaves.items() if path in learnt})


def start(shapes: Tree, tables: Tree, key: jax.Array) -> Tree:
    """The tree before the first step: A normal with variance 1 / inputs, B zero, tables as they are."""
    given = flatten(tables)

    def value(path: str, leaf: Any) -> jax.Array:
        if path in given:
            return given[path].astype(leaf.dtype)
        if path.endswith("/b"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        lead, cut = _cuts(path)
        init = initializer(math.prod(leaf.shape[lead:cut]) ** -0.5)
        return init(jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape, leaf.dtype)

    leaves = nest({path: value(path, leaf) for path, leaf in flatten(shapes).items()})
    return {group: leaves.get(group, {}) for group in shapes}


def target(path: str) -> str:
    """Path of the parameter that a leaf of the trained tree changes."""
    return f"{path[:-1]}kernel" if _is_branch(path) else path


def variables(config: LoRAConfig, base: Tree, learnt: Tree) -> dict[str, Tree]:
    """Collections "params" and "lora" of the model."""
    leaves = flatten(learnt)
    branches = {p: x * config.scale if p.endswith("/b") else x for p, x in leaves.items() if _is_branch(p)}
    tables = {p: x for p, x in leaves.items() if not _is_branch(p)}
    return {"params": nest(flatten(base) | tables), "lora": nest(branches)}


def _is_branch(path: str) -> bool:
    return path.endswith(("/a", "/b"))


def merge_lora(config: LoRAConfig, params: Tree, learnt: Tree) -> Tree:
    """Parameters that compute what base and adapters compute, in the dtypes that the base has.

    Args:
        params: the base's parameters, tables included.
        learnt: the trained tree of a run on this base.

    Raises:
        ConfigError: the adapters do not fit the base.
    """
    merged, leaves = flatten(params), flatten(learnt)
    for path, x in leaves.items():
        if path.endswith("/b"):
            continue
        changed = target(path)
        if changed != path:
            lead, cut = _cuts(path)
            b = leaves[f"{path[:-1]}b"]
            inputs, outputs = math.prod(x.shape[lead:cut]), math.prod(b.shape[lead + 1 :])
            stack, rank = x.shape[:lead], x.shape[-1]
            product = x.reshape(*stack, inputs, rank) @ b.reshape(*stack, rank, outputs)
            new = config.scale * product.reshape(*x.shape[:-1], *b.shape[lead + 1 :])
        else:
            new = x
        if changed not in merged or merged[changed].shape != new.shape:
            found = merged[changed].shape if changed in merged else "no such parameter"
            raise ConfigError(f"lora: {changed}: expected a base with shape {new.shape}, got {found}")
        old = merged[changed]
        merged[changed] = (new if changed == path else old.astype(new.dtype) + new).astype(old.dtype)
    return nest(merged)
