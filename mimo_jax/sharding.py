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
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mimo_jax.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
LONG_ROW = 16  # positions from which on a row is worth cutting; no patch has as many

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
    """Mesh with axes `MESH_AXES` over `devices`, by default all.

    Several TPU slices lie along `data`, the outermost axis: only gradients cross the network between them.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or a slice would be cut.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    if devices[0].platform != "tpu":
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if shape[0] % slices:
        raise ConfigError(f"mesh.data: expected a multiple of the {slices} slices, got {shape[0]}")
    of_slice = (shape[0] // slices, *shape[1:])
    if slices == 1:
        grid = mesh_utils.create_device_mesh(of_slice, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(of_slice, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=types)


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


def mesh_that_divides(*, batch: int, fsdp: int = 0, tensor: int = 0) -> Any:
    """The mesh that is set, for a `jax.shard_map` of arrays with axes of these sizes.

    None if there is none, if it is one device, or if an axis cannot be cut: then each device works on whole arrays.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1 or fsdp % mesh.shape["fsdp"] or tensor % mesh.shape["tensor"]:
        return None
    return None if batch % math.prod(mesh.shape[a] for a in BATCH_AXES) else mesh


def check_batch(rows: int, accumulation: int, devices: int) -> None:
    """Raises ConfigError unless a batch of `rows` can be cut into equal micro-batches over data * fsdp `devices`."""
    if rows % (accumulation * devices) == 0:
        return
    if rows % devices == 0:  # then the batch is as it should be
        raise ConfigError(
            f"run.accumulation: expected a divisor of the {rows // devices} rows of each of data * fsdp = {devices} "
            f"devices (data.rows={rows}), got {accumulation}"
        )
    raise ConfigError(
        f"data.rows: expected a multiple of run.accumulation * data * fsdp devices ({accumulation} * {devices}), "
        f"got {rows}"
    )


def rows_per_device(rows: int) -> int:
    """How many of a batch's rows a device holds under the mesh that is set; all without one."""
    mesh = current_mesh()
    devices = 1 if mesh is None else math.prod(mesh.shape[a] for a in BATCH_AXES)
    return rows if rows % devices else rows // devices


def constrain_batch(x: jax.Array, second: str | None = None) -> jax.Array:
    """Cuts the leading axis over `data` and `fsdp` when a mesh is set and divides it; otherwise leaves `x` alone.

    The other axes are whole, but for the second one, which may be cut over a mesh axis too.
    """
    mesh = current_mesh()
    if mesh is None or x.shape[0] % math.prod(mesh.shape[a] for a in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, second))


def constrain_residual(x: jax.Array) -> jax.Array:
    """Places the residual stream [B, L, D] of a stack like `constrain_batch`.

    Over `tensor`, norms and residuals of a row would be the same on every device: there, rows longer than a patch are
    cut along L (sequence parallelism), so that each device does its part.
    """
    mesh = current_mesh()
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    long = tensor > 1 and x.shape[1] >= LONG_ROW and x.shape[1] % tensor == 0
    return constrain_batch(x, "tensor" if long else None)


def scatter_by_rows(matrix: jax.Array, rows: str | None, columns: str | None) -> jax.Array:
    """A matrix whose gradient is a sum over devices that hold parts of its columns: the sum is made of the transpose.

    TPUs scatter a sum along any axis but the minor one; that one they would sum whole, which sends twice the bytes.

    Args:
        matrix: [rows, columns].
        rows: logical name of its rows; the same for `columns`.
    """
    mesh = current_mesh()
    spec = partition_spec((columns, rows))
    if mesh is None or spec[0] != "fsdp" or mesh.shape["fsdp"] == 1:
        return matrix
    return jax.lax.with_sharding_constraint(matrix.T, spec).T
