"""Jobs for Slurm, GKE and xpk, made from the templates of `launch/`."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mimo_jax.chips import Topology
from mimo_jax.config import ConfigError, TrainingConfig

TEMPLATES = {"slurm": "slurm.sh", "gke": "jobset.yaml", "xpk": "xpk.sh"}
_PROGRAMS = {"slurm": ["sbatch"], "gke": ["kubectl", "apply", "-f", "-"], "xpk": ["xpk"]}

# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: labels of nodes; and the names that xpk has.
_ACCELERATORS = {
    "v5e": ("tpu-v5-lite-podslice", "v5litepod"),
    "v5p": ("tpu-v5p-slice", "v5p"),
    "v6e": ("tpu-v6e-slice", "v6e"),
    "tpu7x": ("tpu7x", "tpu7x"),
}
_CHIPS_PER_HOST = 4  # of the machine types ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t and tpu7x-standard-4t
_SAVE_SECONDS = 135  # for one step and one checkpoint, beside the grace time


def stop_seconds(config: TrainingConfig) -> int:
    """How long a job may take to end after SIGTERM: the grace time, and what saving takes."""
    return math.ceil(config.run.grace_seconds) + _SAVE_SECONDS


@dataclass(frozen=True)
class Job:
    """What all schedulers are told.

    Attributes:
        name: a DNS label of at most 40 characters: names of pods are made from it.
        config: FILE:SIZE.
        overrides: `--config.KEY=VALUE`.
        workdir: folder of the run, as the processes see it.
        restarts: how often the job may be started again.
        stop_seconds: see there.
    """

    name: str
    config: str
    overrides: Sequence[str]
    workdir: str
    restarts: int
    stop_seconds: int

    def __post_init__(self) -> None:
        _check_name("--name", self.name, 40)
        if self.restarts < 0:
            raise ConfigError(f"--restarts: expected at least 0, got {self.restarts}")
        for word in (self.config, *self.overrides, self.workdir):
            if not word.isprintable():
                raise ConfigError(f"expected words without line breaks and control characters, got {word!r}")

    def values(self) -> dict[str, Any]:
        command = ["mimo-jax", "train", "--distributed", "--config", self.config, *self.overrides]
        command += ["--workdir", self.workdir]
        settings = {"name": self.name, "restarts": self.restarts, "stop_seconds": self.stop_seconds}
        return settings | {"command": command, "cache": str(PurePosixPath(self.workdir) / "compiled")}


def slurm(job: Job, nodes: int, devices_per_node: int) -> str:
    """The batch script of a GPU mesh."""
    return _render("slurm", job, nodes=nodes, devices_per_node=devices_per_node)


def gke(job: Job, topology: Topology, image: str, volume: str) -> str:
    """The JobSet of TPU slices.

    Args:
        image: container image that has `mimo-jax`, and the config file where `job.config` says.
        volume: CLAIM:/PATH, a persistent volume claim and where it is mounted; the working directory is below.

    Raises:
        ConfigError: GKE cannot have such a job.
    """
    claim, _, mount = volume.partition(":")
    _check_name("--volume", claim, 253, dots=True)
    path = PurePosixPath(mount)
    if not path.is_absolute() or path == path.parent or ":" in mount or not mount.isprintable():
        raise ConfigError(f"--volume={volume}: expected CLAIM:/PATH")
    workdir = PurePosixPath(job.workdir)
    if ".." in workdir.parts or not workdir.is_relative_to(path):
        raise ConfigError(f"--workdir={workdir}: expected a folder below {path}, where the volume is mounted")
    values = {"image": _checked_image(image), "claim": claim, "mount": str(path)}
    return _render("gke", job, **_slice(topology), **values)


def xpk(job: Job, topology: Topology, image: str, cluster: str) -> str:
    """The script that hands a job on TPU slices to xpk; `image` as for `gke`."""
    _check_name("--cluster", cluster, 40)
    return _render("xpk", job, **_slice(topology), image=_checked_image(image), cluster=cluster)


def start(scheduler: str, text: str) -> int:
    """Hands a rendered job to its scheduler and returns the exit code of that.

    Raises:
        ConfigError: the program is not installed.
    """
    command = _PROGRAMS[scheduler]
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]}: not found on this machine; --dry-run prints the job without it")
    if scheduler == "xpk":  # a script that calls it, and leaves it the terminal
        return subprocess.run(["bash", "-c", text], check=False).returncode
    return subprocess.run(command, input=text, text=True, check=False).returncode


def check_devices(config: TrainingConfig, devices: int, per_process: int, slices: int = 1) -> None:
    """Raises ConfigError unless the mesh and the batch of a job fit so many devices and slices."""
    from mimo_jax.sharding import check_batch, mesh_shape

    data, fsdp, tensor = mesh_shape(config.mesh, devices)
    if data % slices:
        raise ConfigError(f"mesh.data: expected a multiple of the {slices} slices, got {data}")
    if per_process % tensor:
        raise ConfigError(
            f"mesh.tensor: expected a divisor of the {per_process} devices of one process, got {tensor}: the devices "
            "along this axis read the same rows"
        )
    check_batch(config.data.rows, config.run.accumulation, data * fsdp)


def devices_per_host(topology: Topology) -> int:
    """JAX devices of one process of a TPU slice."""
    return min(_CHIPS_PER_HOST, math.prod(topology.bounds)) * topology.chip.devices


def _slice(topology: Topology) -> dict[str, Any]:
    kind = topology.name.partition(":")[0]
    if kind not in _ACCELERATORS:
        raise ConfigError(f"--topology={topology.name}: expected TPUs, KIND one of {', '.join(_ACCELERATORS)}")
    chips = math.prod(topology.bounds)
    if chips != 1 and chips % _CHIPS_PER_HOST:
        raise ConfigError(f"--topology={topology.name}: expected one chip or whole hosts of {_CHIPS_PER_HOST}")
    # Axes are named from the shortest to the longest; 2x2x1 is the exception.
    axes = sorted(topology.bounds, reverse=min(topology.bounds) == 1)
    shape = "x".join(map(str, axes))
    accelerator, prefix = _ACCELERATORS[kind]
    return {
        "slices": topology.slices,
        "accelerator": accelerator,
        "topology": shape,
        "tpu_type": f"{prefix}-{shape}",
        "chips_per_host": min(chips, _CHIPS_PER_HOST),
        "hosts": max(1, chips // _CHIPS_PER_HOST),
    }


def _check_name(what: str, name: str, length: int, dots: bool = False) -> None:
    """A DNS label (RFC 1123) that begins with a letter; several of them, joined by dots, where allowed."""
    label = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
    pattern = rf"{label}(?:\.{label})*" if dots else rf"(?=[a-z]){label}"
    if len(name) > length or not re.fullmatch(pattern, name):
        raise ConfigError(
            f"{what}={name}: expected at most {length} lower-case letters, digits and hyphens, a letter first, no "
            "hyphen last"
        )


def _checked_image(image: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", image):
        raise ConfigError(f"--image={image}: expected the name of a container image, as HOST/FOLDER/NAME:TAG")
    return image


def _render(scheduler: str, job: Job, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters |= {
        "sh": shlex.quote,
        "yaml": lambda text: json.dumps(text, ensure_ascii=False),  # a quoted string of YAML, too
        "kubernetes": lambda text: text.replace("$", "$$"),  # $(NAME) would be a variable
    }
    source = _folder() / TEMPLATES[scheduler]
    return environment.from_string(source.read_text(encoding="utf-8")).render(job.values() | values)


def _folder() -> Path:
    """The templates: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next(folder for folder in (package / "launch", package.parent / "launch") if folder.is_dir())
