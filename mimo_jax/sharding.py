"""Device mesh and logical-axis rules, once for the whole package.

A parameter carries the logical name of each of its axes ("embed", "heads", ...); `LOGICAL_RULES` says which mesh axis
each name is cut over. Activations are cut over the batch only; their other axes follow from the parameters.

Mesh axes: `data` replicates parameters, `fsdp` cuts parameters and batch, `tensor` cuts heads, feed-forward and
vocabulary. All axes are `AxisType.Auto`: the compiler places the collectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mimo_jax.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis (None: every device holds the whole axis).
LOGICAL_RULES: Mapping[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "audio_vocab": None,
    "frame": None,
    "norm": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with axes `MESH_AXES` over `devices`, by default all."""
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Size of each of `MESH_AXES` on so many devices; an axis of -1 takes those that the others leave.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = {name: getattr(config, name) for name in MESH_AXES}
    known = math.prod(s for s in sizes.values() if s != -1)
    if -1 in sizes.values() and devices % known == 0:
        sizes = {name: devices // known if s == -1 else s for name, s in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ConfigError(
            f"mesh: expected data * fsdp * tensor = {devices} (the number of devices), "
            f"got data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}"
        )
    return tuple(sizes.values())


def partition_spec(names: Sequence[str | None], parameter: str = "array") -> PartitionSpec:
    """Mesh axes of an array whose axes have these logical names.

    Raises:
        ValueError: a name is not in `LOGICAL_RULES`, or two axes would be cut over the same mesh axis. The message
            names the parameter and the axis.
    """
    used: dict[str, str] = {}
    axes = []
    for name in names:
        if name is not None and name not in LOGICAL_RULES:
            raise ValueError(f"{parameter}: axis {name!r} is not in LOGICAL_RULES ({', '.join(LOGICAL_RULES)})")
        axis = None if name is None else LOGICAL_RULES[name]
        if axis in used:
            raise ValueError(f"{parameter}: axes {used[axis]!r} and {name!r} are both cut over mesh axis {axis!r}")
        if axis is not None:
            used[axis] = str(name)
        axes.append(axis)
    return PartitionSpec(*axes)


def shardings(abstract_boxed_variables: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Sharding of every variable.

    Args:
        abstract_boxed_variables: tree of shapes in boxes that hold the logical names of the axes, as
            `jax.eval_shape` of a module's `init` gives it. A leaf without a box is replicated.
        mesh: from `make_mesh`, or one without devices.

    Returns:
        Tree of `NamedSharding`, of the structure of the unboxed variables.

    Raises:
        ConfigError: an axis cannot be divided over its mesh axes; the message names parameter, axis and divisor.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        names = getattr(leaf, "names", None)
        if names is None:
            return NamedSharding(mesh, PartitionSpec())
        parameter = "/".join(str(getattr(k, "key", k)) for k in path)
        spec = partition_spec(names, parameter)
        for size, name, axis in zip(leaf.value.shape, names, spec, strict=True):
            divisor = 1 if axis is None else mesh.shape[axis]
            if size % divisor:
                raise ConfigError(
                    f"{parameter}: axis {name!r} of size {size} cannot be divided over "
                    f"mesh axis {axis!r} of size {divisor}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, abstract_boxed_variables, is_leaf=lambda x: hasattr(x, "names"))


def unboxed(variables: Any) -> Any:
    """Takes arrays or shapes out of the boxes that hold the logical names of their axes."""
    return jax.tree.map(lambda x: getattr(x, "value", x), variables, is_leaf=lambda x: hasattr(x, "names"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an input whose leading axis is the batch: cut over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def current_mesh() -> Any:
    """The mesh that `jax.set_mesh` has set, if it is one of `make_mesh`; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh is not None and set(MESH_AXES) <= set(mesh.axis_names) else None


def constrain_batch(x: jax.Array) -> jax.Array:
    """Cuts the leading axis over `data` and `fsdp` when a mesh is set and divides it; otherwise leaves `x` alone."""
    mesh = current_mesh()
    if mesh is None or x.shape[0] % int(np.prod([mesh.shape[a] for a in BATCH_AXES])):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *(None,) * (x.ndim - 1)))
