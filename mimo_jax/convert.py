"""Published checkpoints to ours and back, in bounded memory.

    FOLDER (config.json, model.safetensors or shards with an index, tokenizer.json)
        <->  CHECKPOINT/variables    arrays, in chunks of one layer or one block of rows
             CHECKPOINT/meta         what the model is
             CHECKPOINT/assets       config.json, tokenizer.json and the other small files, as they were
             CHECKPOINT/commit.json  the marker of every checkpoint of ours

Both sides are read and written block by block, so that memory depends on the largest layer, not on their number. Output
goes to a temporary folder beside its place and is renamed when complete; nothing is overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mimo_jax.atomic import atomic_write, sync_folder
from mimo_jax.config import (
    AudioLMConfig,
    AudioTokenizerConfig,
    ComputeConfig,
    ConfigError,
    LMModelConfig,
    LMTrainConfig,
    TokenizerModelConfig,
)
from mimo_jax.config_files import from_config_dict, load_config
from mimo_jax.interop import names, published
from mimo_jax.interop.arrays import ArrayInfo, ArrayReader, ArrayWriter, Place
from mimo_jax.interop.names import Tensor
from mimo_jax.interop.safetensors import INDEX, SINGLE, Reader, Writer, describe
from mimo_jax.models.audio_lm import GROUPS, init_params
from mimo_jax.progress import Meter
from mimo_jax.text.tokenizers import SPECIAL_TOKENS, HuggingFaceTokenizer, load_text_tokenizer
from mimo_jax.training import checkpoint, lora
from mimo_jax.trees import flatten

ASSETS = "assets"
BLOCK_BYTES = 64 << 20  # of a table; a layer's matrix is a few of these at most
SHARD_BYTES = 5 * 10**9
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_MODEL_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
_SPECIAL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # all list special tokens
_VOCAB_FILES = ("vocab.json", "merges.txt")
_CHAT_FILES = ("chat_template.json", "chat_template.jinja")
_ASSETS = (*_TOKENIZERS, *_MODEL_FILES, *_SPECIAL_FILES, *_VOCAB_FILES, *_CHAT_FILES)
_KEPT_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range")
_TOKENIZER_PREFIX = "params/audio_tokenizer/"
_ROW_MULTIPLE = 128  # a text table that must grow stays divisible by any mesh


class Converted(NamedTuple):
    """What was made: tensors of the published side, bytes written, and lines that the user should read."""

    tensors: int
    nbytes: int
    notes: Sequence[str]


def is_published(source: str | os.PathLike[str]) -> bool:
    """Whether a folder holds safetensors (otherwise it should be a checkpoint)."""
    return any((Path(source) / name).is_file() for name in (SINGLE, INDEX))


# ----------------------------------------------------------------------------------------------------------
# Blocks


def _step(tensor: Tensor, itemsize: int) -> int:
    """Steps along a tensor's `axis` that are moved at once: of a layer all, of a table a share."""
    size = tensor.part[tensor.axis]
    blocks = math.prod(tensor.part) * itemsize // BLOCK_BYTES + 1
    return size if isinstance(tensor.at, int) else -(-size // blocks)


def _blocks(tensors: Sequence[Tensor], itemsize: int) -> Iterator[tuple[Place, list[tuple[Tensor, int, int]]]]:
    """The blocks that one array of ours is moved in: where each lies in it, and the parts of tensors it consists of."""
    if isinstance(tensors[0].at, slice):  # audio tables, which are small
        yield (), [(t, 0, t.part[t.axis]) for t in tensors]
        return
    for t in tensors:
        size, step = t.part[t.axis], _step(t, itemsize)
        for start in range(0, size, step):
            stop = min(start + step, size)
            yield t.place(start, stop), [(t, start, stop)]


def _info(tensors: Sequence[Tensor], shape: names.Shape, dtype: np.dtype) -> ArrayInfo:
    """An array of ours, in chunks that are those blocks."""
    t, chunk = tensors[0], list(shape)
    if isinstance(t.at, int):
        chunk[0] = 1
    elif t.at is None:
        chunk[t.axis] = _step(t, dtype.itemsize)
    return ArrayInfo(dtype, shape, tuple(chunk))


def _packed(x: np.ndarray) -> np.ndarray:
    """`np.ascontiguousarray`, five times as fast for transposed matrices: few columns at a time, as plain integers."""
    if x.flags.c_contiguous:
        return x
    raw = x.view(f"u{x.dtype.itemsize}")
    out = np.empty(raw.shape, raw.dtype)
    for i in range(0, raw.shape[-1], 16):
        out[..., i : i + 16] = raw[..., i : i + 16]
    return out.view(x.dtype)


def _by_path(tensors: Sequence[Tensor]) -> Mapping[str, list[Tensor]]:
    out = defaultdict(list)
    for tensor in tensors:
        out[tensor.path].append(tensor)
    return out


def _meter(out: Path, total: int, on: bool) -> Meter:
    def line(done: float, rate: float) -> str:
        return f"convert: {out}: {done / 1e9:.1f}/{total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s"

    return Meter(total, line, on)


@contextlib.contextmanager
def _new_folder(out: Path, nbytes: int) -> Iterator[Path]:
    """A temporary folder that becomes `out` at the end, or vanishes. What killed calls have left is removed."""
    if os.path.lexists(out):
        raise ConfigError(f"{out}: expected the name of a new folder, this one exists")
    out.parent.mkdir(parents=True, exist_ok=True)
    leftover = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{32}}\.tmp")
    for path in out.parent.iterdir():
        if leftover.fullmatch(path.name):
            with contextlib.suppress(OSError), _locked(path):
                shutil.rmtree(path)
    disk = shutil.disk_usage(out.parent)
    nbytes += 64 << 20  # for the small files
    if disk.total and disk.free < nbytes:
        expected, got = (f"{n / 1e6:,.0f} MB" for n in (nbytes, disk.free))
        raise checkpoint.CheckpointError(f"{out}: expected {expected} of free disk space, got {got}")
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a file system without locks, on which nobody removes leftovers
                stack.enter_context(_locked(temporary))
            yield temporary
            os.rename(temporary, out)
            sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which ends with the process; OSError if a process that lives holds it."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------
# Published -> ours


class _Plan(NamedTuple):
    """What an import makes."""

    config: TokenizerModelConfig | LMModelConfig
    groups: list[str]  # those that are trained
    tensors: list[Tensor]  # to be read
    shapes: Mapping[str, names.Shape]  # of our arrays; text tables may have more rows than their tensors
    fresh: Mapping[str, np.ndarray] = {}  # arrays that no tensor gives
    tokenizer: bytes = b""  # tokenizer.json, where it is not that of the folder
    ignored: Sequence[str] = ()  # patterns of tensors that ours has no use for
    notes: Sequence[str] = ()  # see `Converted`


def import_published(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    like: str = "",
    seed: int = 0,
    progress: bool = False,
) -> Converted:
    """Makes a checkpoint of a published audio tokenizer, audio language model or text model (Qwen2, MiMo-7B, Llama).

    A text model becomes the LLM of an audio language model whose patch encoder and decoder are as initialised; the
    checkpoint says that only `llm` is trained, so a run that starts from it begins the others anew.

    Args:
        source: folder with config.json, safetensors and, for language models, tokenizer.json.
        like: for a text model, FILE:SIZE of a language model config, whose patch encoder, patch decoder, codebooks and
            delays the new model has.

    Raises:
        ConfigError, SafetensorsError, TextTokenizerError: the folder does not hold what it should.
        CheckpointError: the disk is full.
    """
    source, out = Path(source), Path(out)
    with Reader(source) as reader:
        plan = _plan(source, reader, like, seed)
        published.check_tensors(reader, plan.tensors, plan.ignored)
        arrays = _by_path(plan.tensors)
        infos = {path: ArrayInfo(x.dtype, x.shape, x.shape) for path, x in plan.fresh.items()} | {
            path: _info(tensors, plan.shapes[path], reader.entries[tensors[0].name].dtype)
            for path, tensors in arrays.items()
        }
        nbytes = sum(info.stored_bytes for info in infos.values())
        prefix = _TOKENIZER_PREFIX if isinstance(plan.config, TokenizerModelConfig) else "params/"
        ours = {path: path.replace("params/", prefix, 1) for path in infos}
        with _new_folder(out, nbytes) as folder:
            meter = _meter(out, nbytes, progress)
            writer = ArrayWriter(folder / "variables", {ours[path]: info for path, info in infos.items()})
            for path, x in plan.fresh.items():
                writer.write(ours[path], (), x)
                meter.step(x.nbytes)
            for path, tensors in arrays.items():
                for place, value in _import_blocks(reader, tensors, plan.shapes[path]):
                    writer.write(ours[path], place, value)
                    meter.step(value.nbytes)
            assets, stale = _assets(source), []
            if plan.tokenizer and plan.tokenizer != assets["tokenizer.json"]:
                assets["tokenizer.json"] = plan.tokenizer
                stale = [name for name in _SPECIAL_FILES if assets.pop(name, b"")]
            text_tokenizer = assets.get(Path(getattr(plan.config, "text_tokenizer", "")).name)
            fingerprint = {"text_tokenizer": hashlib.sha256(text_tokenizer).hexdigest()[:16]} if text_tokenizer else {}
            meta = checkpoint.make_meta(0, plan.config, {}, fingerprint, plan.groups, {})
            files = {f"{ASSETS}/{name}": content for name, content in assets.items()}
            _write_files(folder, files | {"meta/metadata": json.dumps(meta).encode()})
            checkpoint.write_marker(folder)
    left_out = [f"left out, since they lack the new special tokens: {', '.join(stale)}"] if stale else []
    return Converted(len(plan.tensors), nbytes, [*plan.notes, *left_out])


def _import_blocks(reader: Reader, tensors: Sequence[Tensor], shape: names.Shape) -> Iterator[tuple[Place, np.ndarray]]:
    """The blocks of one array. Rows that a text table has beyond its tensor are the mean of those of the tensor."""
    t = tensors[0]
    grown = t.at is None and t.part != shape
    total: Any = 0.0
    for place, parts in _blocks(tensors, reader.entries[t.name].dtype.itemsize):
        values = [x.from_published(reader.read(x.name, a * x.rows, b * x.rows)) for x, a, b in parts]
        value = _packed(values[0] if len(values) == 1 else np.concatenate(values))
        if grown:
            total = total + value.sum(t.axis, dtype=np.float64, keepdims=True)
        yield place, value
    if grown:
        rows = shape[t.axis] - t.part[t.axis]
        mean = (total / t.part[t.axis]).astype(value.dtype)
        yield t.place(t.part[t.axis], shape[t.axis]), _packed(np.repeat(mean, rows, t.axis))


def _assets(folder: Path, names: Sequence[str] = _ASSETS) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        atomic_write(folder / name, content)


def _plan(source: Path, reader: Reader, like: str, seed: int) -> _Plan:
    kind = published.kind_of(source)
    if kind == "text_lm":
        return _plan_text_lm(source, reader, like, seed)
    if like:
        raise ConfigError(f"--like={like}: only for a text model; {source} holds an {kind.replace('_', ' ')}")
    model = published.read_config(source)
    shapes = published.shapes_of(model)
    tensors = published.tensors_of(model, shapes)
    config: Any
    if isinstance(model, AudioLMConfig):
        file = next((f"{ASSETS}/{name}" for name in _TOKENIZERS if (source / name).is_file()), "")
        config, groups = LMModelConfig(model, _compute(reader, "model.embed_tokens.weight"), file), [*GROUPS]
    else:
        compute = dataclasses.replace(_compute(reader, "encoder.conv1.weight"), dtype="float32")
        config, groups = TokenizerModelConfig(model, compute), ["audio_tokenizer"]
    return _Plan(config, groups, tensors, shapes)


def _compute(reader: Reader, tensor: str) -> ComputeConfig:
    """Precision to compute in: that of the weights."""
    entry = reader.entries.get(tensor)
    bfloat16 = entry is not None and entry.dtype.name == "bfloat16"
    return ComputeConfig("bfloat16", "bfloat16") if bfloat16 else ComputeConfig()


def _plan_text_lm(source: Path, reader: Reader, like: str, seed: int) -> _Plan:
    if not like:
        raise ConfigError(
            f"{source}: a text model has no patch encoder and decoder: --like=configs/joint.py:7b, or another "
            "language model config, says what the new ones shall be"
        )
    job = load_config(like)
    if not isinstance(job, LMTrainConfig):
        raise ConfigError(f"--like={like}: expected a language model config, got one of job {job.job}")
    llm, rows, tied = published.read_text_lm_config(source)
    content, special, added = _with_special_tokens(source / "tokenizer.json")
    needed = max(special.values()) + 1
    vocab_size = rows if needed <= rows else -(-needed // _ROW_MULTIPLE) * _ROW_MULTIPLE
    shared: Any = {"rope_theta": llm.rope_theta, "norm_eps": llm.norm_eps}  # the published format has one of each
    model = dataclasses.replace(
        job.model,
        vocab_size=vocab_size,
        empty_id=special[published.EMPTY_TOKEN],
        llm=llm,
        patch_encoder=dataclasses.replace(job.model.patch_encoder, **shared),
        patch_decoder=dataclasses.replace(job.model.patch_decoder, **shared),
    )
    shapes = published.shapes_of(model)
    ours = {path: shape for path, shape in shapes.items() if path.startswith("params/llm/")}
    ours |= {"params/llm/embedding": (rows, llm.d_model), "params/llm/head": (llm.d_model, rows)}
    tied = tied and "lm_head.weight" not in reader.entries
    tensors = names.tensors(names.TIED_LLM_RULES if tied else names.LLM_RULES, ours)
    compute = _compute(reader, "model.embed_tokens.weight")
    old = _settings(job.model)
    changed = [f"--config.model.{key}={value}" for key, value in _settings(model).items() if value != old[key]]
    notes = {
        f"new special tokens: {', '.join(f'{token} {special[token]}' for token in added)}": added,
        f"the text tables have {vocab_size} rows now; the new ones are the mean of the {rows}": vocab_size > rows,
        "the text head was tied to the embedding; it is a copy now, which training moves on its own": tied,
        f"settings that differ from {like}: {' '.join(changed)}": changed,
    }
    config, fresh = LMModelConfig(model, compute, f"{ASSETS}/tokenizer.json"), _fresh_codec(model, compute, seed)
    said = [note for note, applies in notes.items() if applies]
    return _Plan(config, ["llm"], tensors, shapes, fresh, content, names.IGNORED, said)


def _settings(model: AudioLMConfig) -> dict[str, Any]:
    settings = flatten(dataclasses.asdict(model), ".")
    return {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in settings.items()}


def _with_special_tokens(path: Path) -> tuple[bytes, dict[str, int], list[str]]:
    """A tokenizer.json with the special tokens of the system: its bytes, their ids, and those that it lacked.

    New ones get the ids after the last that is in use, in the published order.
    """
    ids = published.added_tokens(path.parent)
    added = [token for token in SPECIAL_TOKENS if token not in ids]
    content = path.read_bytes()
    if added:
        values = json.loads(content)
        vocab = values["model"]["vocab"]
        used = [*ids.values(), *(vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1])]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        for new, token in enumerate(added, max(used) + 1):
            values["added_tokens"].append({"id": new, "content": token, **flags})
        content = json.dumps(values, ensure_ascii=False, indent=2).encode()
    return content, HuggingFaceTokenizer(content, str(path)).special, added


def _fresh_codec(model: AudioLMConfig, compute: ComputeConfig, seed: int) -> dict[str, np.ndarray]:
    """Patch encoder and decoder before training."""

    def init(key: jax.Array) -> Any:
        params = init_params(model, compute, key)["params"]  # XLA leaves out the LLM, which nobody asks for
        return {"params": {group: params[group] for group in ("patch_encoder", "patch_decoder")}}

    return flatten(jax.tree.map(np.asarray, jax.jit(init)(jax.random.key(seed))))


# ----------------------------------------------------------------------------------------------------------
# Ours -> published


class _Variables:
    """The arrays of a checkpoint by the paths of `published`; adapters are merged into what they stand on.

    What the run of a tokenizer holds beside it is left out, and the constants that the published one stores are added.
    """

    def __init__(self, step_dir: Path) -> None:
        config: Any = from_config_dict(checkpoint.read_meta(step_dir)["config"])
        self._lora: Any = getattr(config, "lora", None)
        self._own = ArrayReader(step_dir / "variables")
        base = checkpoint.base_of(step_dir)
        self._base = None if base is None else _Variables(base)
        self.infos: dict[str, ArrayInfo] = dict((self._base or self._own).infos)
        self._stored = {path: path for path in self.infos}
        self._made: dict[str, np.ndarray] = {}
        if isinstance(config.model, AudioTokenizerConfig):
            kept = (_TOKENIZER_PREFIX, "codebook/", "buffers/")
            self._stored = {p.replace(_TOKENIZER_PREFIX, "params/"): p for p in self.infos if p.startswith(kept)}
            self.infos = {path: self.infos[p] for path, p in self._stored.items()}
            if "buffers/istft_window" not in self.infos:
                self._made = flatten({"buffers": published.default_buffers(config.model)})
                self.infos |= {path: ArrayInfo(x.dtype, x.shape, x.shape) for path, x in self._made.items()}

    def read(self, path: str, place: Place = ()) -> np.ndarray:
        """A part of an array, or all of it."""
        if path in self._made:
            return self._made[path][place]
        if self._base is None:
            return self._own.read(self._stored[path], place)
        if path in self._own.infos:  # a table that was trained in full
            return self._own.read(path, place).astype(self.infos[path].dtype)
        branches = [f"{path.removesuffix('kernel')}{x}" for x in "ab"]
        if branches[0] not in self._own.infos:
            return self._base.read(path, place)
        layer: Place = (slice(place[0], place[0] + 1),) if place and isinstance(place[0], int) else ()
        learnt = {branch: self._own.read(branch, layer) for branch in branches}
        merged = lora.merge_lora(self._lora, {path: self._base.read(path, layer)}, learnt)
        return np.asarray(flatten(merged)[path])[(0, *place[1:]) if layer else place]


def export_published(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> Converted:
    """Makes a published folder of a checkpoint of ours, be it converted or of a training run (adapters are merged).

    Args:
        source: working directory of a run, or a checkpoint.
        step: of a run, the newest intact one by default.

    Raises:
        ConfigError: the published format cannot express the model.
        CheckpointError: there is no intact checkpoint, the text tokenizer of the run is gone or has changed since, or
            the disk is full.
        TextTokenizerError: the text tokenizer of the run is none any more.
    """
    out = Path(out)
    step_dir = checkpoint.open_step(source, step)
    meta = checkpoint.read_meta(step_dir)
    config: Any = from_config_dict(meta["config"])
    variables = _Variables(step_dir)
    try:
        tensors = sorted(published.tensors_of(config.model, {path: x.shape for path, x in variables.infos.items()}))
    except KeyError as error:
        raise checkpoint.CheckpointError(f"{step_dir}: array {error.args[0]}") from None
    wanted = {t.name for t in published.tensors_of(config.model, published.shapes_of(config.model))}
    if missing := sorted(wanted - {t.name for t in tensors}):
        raise checkpoint.CheckpointError(f"{step_dir}: no array for {describe(missing)}")
    dtypes = {path: info.dtype for path, info in variables.infos.items()}
    nbytes = sum(math.prod(t.shape) * dtypes[t.path].itemsize for t in tensors)
    widest = max((dtype for path, dtype in dtypes.items() if path.startswith("params/")), key=lambda d: d.itemsize)
    files = _files_beside(step_dir, config, meta["data_fingerprint"], widest.name)
    with _new_folder(out, nbytes) as folder:
        meter = _meter(out, nbytes, progress)
        with Writer(folder, {t.name: (dtypes[t.path], t.shape) for t in tensors}, shard_bytes) as writer:
            for path, parts in _by_path(tensors).items():
                for place, block in _blocks(parts, dtypes[path].itemsize):
                    value = variables.read(path, place)
                    for t, start, _ in block:
                        part = value[t.place()] if isinstance(t.at, slice) else value
                        writer.write(t.name, _packed(t.to_published(part)), start * t.rows)
                    meter.step(value.nbytes)
        _write_files(folder, files)
    return Converted(len(tensors), nbytes, _export_notes(config.model))


def _export_notes(model: AudioLMConfig | AudioTokenizerConfig) -> list[str]:
    """What the published code computes differently from ours."""
    if isinstance(model, AudioTokenizerConfig):
        if model.decoder_norm == "sequence":
            return []
        ignored = f"ignores decoder_norm {model.decoder_norm} and normalises over time"
        return [f"the published code {ignored}: its waves differ from this tokenizer's"]
    if model.llm.q_bias and model.llm.k_bias and model.llm.v_bias:
        return []
    return [
        "the LLM has no q/k/v biases, and the Qwen2 of the published code always has: it computes the same only if it "
        "loads the missing ones as zeros"
    ]


def _files_beside(step_dir: Path, config: Any, data_fingerprint: Mapping[str, Any], dtype: str) -> dict[str, bytes]:
    """The small files beside the weights: those that came with the model where it came from, or as good as can be made.

    A run that was started from converted weights finds them beside its text tokenizer. Whatever else lies there is not
    taken: see `_tokenizer_files`, `_original_config`.
    """
    trained, beside = isinstance(config, LMTrainConfig), step_dir / ASSETS
    if trained:
        beside, files = _tokenizer_files(step_dir, config.data.text_tokenizer, data_fingerprint.get("text_tokenizer"))
    else:
        checkpoint.verify(step_dir, [ASSETS])
        files = _assets(beside)
    made = published.config_json(config.model, dtype)
    original, same = _original_config(beside, config.model, made)
    if same and not trained:
        return files
    if original and trained:
        files |= _assets(beside, _MODEL_FILES)
    if same:
        made = original | ({"torch_dtype": dtype} if "torch_dtype" in original else {})
    made |= {key: original[key] for key in _KEPT_KEYS if key in original}
    return files | {"config.json": (json.dumps(made, indent=2) + "\n").encode()}


def _tokenizer_files(step_dir: Path, path: str, expected: str | None) -> tuple[Path, dict[str, bytes]]:
    """The folder of a run's text tokenizer, the tokenizer and the files there that belong to it.

    Those of a Hugging Face tokenizer are known by their names; vocab.json and merges.txt, which other programs also
    write, by the vocabulary.
    """
    try:
        tokenizer = load_text_tokenizer(path)
    except FileNotFoundError as error:
        raise checkpoint.CheckpointError(f"{step_dir}: the text tokenizer of the run is gone: {error}") from None
    if expected and tokenizer.fingerprint != expected:
        raise checkpoint.CheckpointError(
            f"{tokenizer.name}: expected the text tokenizer that the model was trained with ({expected}), got "
            f"{tokenizer.fingerprint}"
        )
    file = Path(tokenizer.name)
    content = file.read_bytes()
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return file.parent, {"tokenizer.model": content}
    files = {"tokenizer.json": content}
    if file.name in files:
        files |= _assets(file.parent, (*_SPECIAL_FILES, *_CHAT_FILES))
        vocabulary = _assets(file.parent, _VOCAB_FILES)
        with contextlib.suppress(ValueError, RecursionError):
            if json.loads(vocabulary.get("vocab.json", b"null")) == json.loads(content)["model"]["vocab"]:
                files |= vocabulary
    return file.parent, files


def _original_config(
    folder: Path, model: AudioLMConfig | AudioTokenizerConfig, made: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """A folder's config.json, if it is that of the model (then also True) or of the text model that its LLM was."""
    try:
        values = published.read_json(folder)
        if published.kind_of(folder) == "text_lm":
            same = False
            related = isinstance(model, AudioLMConfig) and published.read_text_lm_config(folder)[0] == model.llm
        else:
            related = same = published.config_json(published.read_config(folder), made["torch_dtype"]) == made
    except (ConfigError, OSError):  # none, or of something else
        return {}, False
    return (values if related else {}), same
