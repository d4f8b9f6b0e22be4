"""Settings in and out: config files, command-line overrides, JSON.

A config file builds a dataclass of `config` and hands it out as `ml_collections.ConfigDict` (`to_config_dict`).
Whatever comes back, with overrides applied, becomes the dataclass again (`build`), which refuses unknown keys, wrong
types and impossible values by name, before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.machinery
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from mimo_jax.config import JOBS, TRAINING_JOBS, ConfigError, JobConfig, TrainingConfig, require


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """Turns a dataclass into a ConfigDict of the same shape, for a config file to return."""
    out = ml_collections.ConfigDict()
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif isinstance(value, Mapping):
            value = ml_collections.ConfigDict({k: to_config_dict(v) for k, v in value.items()})
        elif value is None:
            value = config_dict.placeholder(_optional_type(typing.get_type_hints(type(config))[f.name]))
        out[f.name] = value
    return out


def _optional_type(hint: Any) -> type:
    return next(a for a in typing.get_args(hint) if a is not type(None))


def from_config_dict(values: ml_collections.ConfigDict | Mapping[str, Any]) -> JobConfig:
    """Builds the job config that a config file or a checkpoint's parsed JSON describes (its `job` key says which).

    Raises:
        ConfigError: a key is unknown or missing, has the wrong type, or holds an impossible value.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    return build(_job_class(values, JOBS), values, "config")


def _job_class(values: Mapping[str, Any], jobs: Mapping[str, Any]) -> Any:
    job = str(values.get("job"))
    require(job in jobs, "config.job", f"one of {sorted(jobs)}", job)
    return jobs[job]


def build(cls: type, values: Mapping[str, Any], name: str) -> Any:
    """Builds dataclass `cls` from nested mappings (a ConfigDict or parsed JSON); errors say which key of `name`."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{name}.{key}: unknown setting; known are {', '.join(sorted(known))}")
    for key, f in known.items():
        if key not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{name}.{key}: this setting is missing")
    try:
        return cls(**{key: _convert(hints[key], values[key], f"{name}.{key}") for key in values})
    except ConfigError as error:
        message, group = str(error), name.rpartition(".")[2]
        if message.startswith((f"{group}.", f"{group}:")):  # a group that names itself, as RunConfig does
            message = name + message.removeprefix(group)
        raise ConfigError(message if message.startswith(name) else f"{name}.{message}") from None


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if (dataclasses.is_dataclass(hint) or origin is Mapping) and not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected a group of settings, got {value!r}")
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, name)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(_optional_type(hint), value, name)
    if origin is Literal:
        require(value in args, name, f"one of {', '.join(map(repr, args))}", value)
        return value
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{name}: expected a tuple, got {value!r}")
        return tuple(_convert(args[0], v, f"{name}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        return {k: _convert(args[1], v, f"{name}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name}: expected {hint.__name__}, got {value!r}")
    if hint is float:
        require(math.isfinite(value), name, "a finite number", value)
    return value


def to_json(config: Any) -> str:
    """Canonical JSON of a config dataclass (sorted keys): what checkpoints and manifests store."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def load_config(spec: str, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Loads `FILE:SIZE` and applies `--config.a.b=value` overrides.

    Args:
        spec: path of a config file, and after a colon the argument for its `get_config`.
        overrides: command-line flags that begin with `--config.`. A value is read as the type of its setting: `None`
            for a setting that may be left out, `1,2,3` or `(1, 2, 3)` for a tuple, `true` or `false` for a switch.

    Raises:
        ConfigError: the file, a key or a value is wrong.
    """
    values = _load_config_file(spec)
    cls = _job_class(values, TRAINING_JOBS)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not key.startswith("--config.") or not equals:
            raise ConfigError(f"{override}: expected --config.KEY=VALUE")
        _override(cls, values, key.removeprefix("--config.").split("."), text, "config")
    return build(cls, values, "config")


def _load_config_file(spec: str) -> dict[str, Any]:
    """What `get_config(SIZE)` of a config file describes."""
    path, colon, argument = spec.rpartition(":")
    if not colon:
        path, argument = spec, ""
    if not os.path.isfile(path):
        raise ConfigError(f"--config={spec}: there is no file {path!r}; expected FILE:SIZE, as configs/joint.py:tiny")
    try:
        loader = importlib.machinery.SourceFileLoader("mimo_jax_config_file", path)
        module = types.ModuleType(loader.name)
        loader.exec_module(module)
        values = module.get_config(argument) if argument else module.get_config()
        return values.to_dict()
    except ConfigError as error:
        raise ConfigError(f"--config={spec}: {error}") from None
    except Exception as error:
        raise ConfigError(f"--config={spec}: the config file fails: {type(error).__name__}: {error}") from error


def _override(hint: Any, values: dict[str, Any], path: list[str], text: str, name: str) -> None:
    """Sets `path` below the group `values` (described by `hint`) to the value that `text` stands for."""
    key, rest = path[0], path[1:]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(hints))}"
            raise ConfigError(f"{name}.{key}: unknown setting; {advice}")
        inner = hints[key]
    else:  # a mapping, such as data.sources: a new name starts a new group
        inner = typing.get_args(hint)[1]
    name = f"{name}.{key}"
    is_group = dataclasses.is_dataclass(inner) or typing.get_origin(inner) is Mapping
    if is_group and rest:
        _override(inner, values.setdefault(key, {}), rest, text, name)
    elif is_group:
        raise ConfigError(f"{name}: this is a group of settings; set one of them, as in --{name}.KEY=VALUE")
    elif rest:
        raise ConfigError(f"{name}: this is a single setting, it has no {'.'.join(rest)}")
    else:
        values[key] = _parse(inner, text, name)


def _parse(hint: Any, text: str, name: str) -> Any:
    """Reads a command-line value as the type of its setting; `build` checks what it may be."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if text.lower() == "none" else _parse(_optional_type(hint), text, name)
    if origin is tuple:
        items = text.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]").split(",")
        if typing.get_origin(args[0]) is tuple:  # pairs, as 1e9:0.5
            number = typing.get_args(args[0])[0]
            return [[_parse(number, part, name) for part in item.split(":")] for item in items if item.strip()]
        return [_parse(args[0], item.strip().strip("'\""), name) for item in items if item.strip()]
    if hint is bool:
        require(text.lower() in ("true", "false"), name, "true or false", text)
        return text.lower() == "true"
    if hint in (int, float):
        try:
            # An integer may be written as 5e12.
            return int(float(text)) if hint is int and re.fullmatch(r"\d+(\.0*)?[eE]\+?\d{1,2}", text) else hint(text)
        except ValueError:
            raise ConfigError(f"{name}: expected {'an integer' if hint is int else 'a number'}, got {text!r}") from None
    return text
