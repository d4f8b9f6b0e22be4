"""The whole path at a small size, on a CPU: speech and text in, a trained model, speech and text out, and a report.

    mimo-jax quickstart [--out runs/quickstart] [--audio DIR]

Stages: corpus, text tokenizer, audio tokenizer (stage 1), RVQ shards, text LM, understanding (LM stage 1), joint (LM
stage 2), samples, measurements, report. Each leaves a stamp with the fingerprint of what it was made from, so the same
command goes on where a killed one stopped and repeats only what has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimo_jax.atomic import atomic_write
from mimo_jax.audio.files import load_audio, save_wav
from mimo_jax.config import ConfigError, JobConfig, LMTrainConfig, TokenizerTrainConfig
from mimo_jax.config_files import load_config, to_json
from mimo_jax.corpora.synthetic import build_corpus
from mimo_jax.data.ingest import ingest_audio, ingest_text
from mimo_jax.data.manifest import Manifest
from mimo_jax.data.shards import ShardSet
from mimo_jax.evals.channel_entropy import channel_entropies
from mimo_jax.evals.reconstruction import reconstruct, reconstruction_quality
from mimo_jax.generation import app
from mimo_jax.loading import load_codec, load_speech_model
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.quickstart_report import quickstart_page
from mimo_jax.report import write_page
from mimo_jax.text.tokenizers import load_text_tokenizer, train_sentencepiece
from mimo_jax.training import metrics
from mimo_jax.training.checkpoint import load_params
from mimo_jax.training.language_model import train_language_model
from mimo_jax.training.tokenizer import starting_tokenizer, train_tokenizer

_CHECKOUT = Path(__file__).resolve().parents[1]
_TEXT_VOCABULARY = 1024
# Held-out examples: seconds of a prompt, of its continuation, of speech from text; tokens of a transcript.
_PROMPT_SECONDS, _MIN_SECONDS, _MAX_SECONDS, _SPOKEN_SECONDS, _TRANSCRIPT_TOKENS = 2.0, 1.0, 4.0, 8.0, 48
_EXAMPLES = 4  # held-out clips that are reconstructed, continued, spoken and transcribed


@dataclass(frozen=True)
class Stage:
    """What a finished stage took."""

    name: str
    command: str  # shell command that repeats it
    wall: float  # seconds
    cpu: float  # seconds, all threads and child processes
    note: str  # what came out, in a few words


def run_quickstart(
    out: str | Path = "runs/quickstart",
    audio: Sequence[str | Path] = (),
    *,
    minutes: float = 18.0,
    steps_scale: float = 1.0,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Path:
    """Runs what has not run yet and writes `OUT/report.html`; returns its path.

    Args:
        audio: folders with recordings of the user, to train on as well (`corpora.synthetic`).
        steps_scale: factor on the training steps of `configs/*.py:tiny`; 1 is what the measurements are meant for.

    Raises:
        SynthError: the extra `synth` is not installed.
        ConfigError: the config files are not there, or `out` holds something else.
        AudioError, DataError, OSError: see the stages.
    """
    return Quickstart(Path(out), tuple(Path(a) for a in audio), minutes, steps_scale, say).run()


class Quickstart:
    """The stages in order; each method makes one thing and returns a note on it."""

    def __init__(
        self, out: Path, audio: tuple[Path, ...], minutes: float, steps_scale: float, say: Callable[[str], None]
    ) -> None:
        self.out, self.audio, self.minutes, self.steps_scale, self.say = out, audio, minutes, steps_scale, say
        self.stages: list[Stage] = []
        self._chain = ""  # fingerprint of all inputs so far: a stage depends on every stage before it
        self.corpus = out / "corpus"
        self.text_model = out / "text.model"
        names = ("speech", "speech-validation", "text", "text-validation")
        self.shards = {name: out / "shards" / name for name in names}

    def run(self) -> Path:
        begin, begin_cpu = time.perf_counter(), _cpu_seconds()
        # The stages have programs in common, and a run that goes on after a stop has compiled most of its own before.
        jax.config.update("jax_compilation_cache_dir", str((self.out / "compiled").absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        own = [part for folder in self.audio for part in ("--audio", folder)]
        quickstart = _commands([["quickstart", "--out", self.out, *own]])

        corpus_inputs = [self.minutes, _recordings(self.audio), _sha256(*_corpus_sources())]
        self._stage("corpus", [self.corpus], corpus_inputs, quickstart, self._corpus)
        text = ["text-tokenizer", "train", self.corpus / "train.txt", "--vocab-size", _TEXT_VOCABULARY]
        command = _commands([[*text, "--out", self.text_model]])
        self._stage("text tokenizer", [self.text_model], _TEXT_VOCABULARY, command, self._text_tokenizer)

        data = "--config.data."
        texts = {f"{data}text_tokenizer": self.text_model}
        clips = {f"{data}manifest": self.corpus / "train.jsonl", f"{data}validation": self.corpus / "validation.jsonl"}
        self._train("tokenizer", clips | texts)
        self._stage("shards", [self.out / "shards"], "", self._ingest_commands(), self._ingest)
        sources = {f"{data}sources.text.path": self.shards["text"]} | texts
        held_out = {f"{data}validation.speech.path": self.shards["speech-validation"]}
        speech = {f"{data}sources.speech.path": self.shards["speech"]}
        self._train("text", {f"{data}validation.text.path": self.shards["text-validation"]} | sources)
        self._train("understanding", {"--config.init_from": self.out / "text"} | sources | speech | held_out)
        self._train("joint", {"--config.init_from": self.out / "understanding"} | sources | speech | held_out)
        self._stage("samples", [self.out / "samples"], _EXAMPLES, self._sample_commands(), self._samples)
        self._stage("measurements", [self.out / "measurements.json"], "", quickstart, self._measure)

        report = self.out / "report.html"
        write_page(report, quickstart_page(self.out, self.stages))
        wall, cpu = time.perf_counter() - begin, _cpu_seconds() - begin_cpu
        measured = json.loads((self.out / "measurements.json").read_text(encoding="utf-8"))
        for bar in measured["bars"]:
            self.say(f"{'met    ' if bar['met'] else 'NOT met'}  {bar['name']}: {bar['found']}")
        self.say(f"quickstart: {wall:.0f} s wall, {cpu:.0f} s CPU  ->  {report}")
        return report

    # ------------------------------------------------------------------------------------------------------
    # Stamps

    def _stage(self, name: str, paths: Sequence[Path], inputs: Any, command: str, make: Callable[[], str]) -> None:
        """Runs `make`, which returns a note, unless its stamp says that it has finished with the same inputs.

        Args:
            name, command: for the report.
            paths: files and folders that it makes. They are removed when the inputs have changed, and kept when the
                stage was only interrupted: training and ingest go on from what they find.
            inputs: JSON of what the stage depends on, besides the stages before it.
        """
        self._chain = hashlib.sha256(json.dumps([self._chain, name, inputs], sort_keys=True).encode()).hexdigest()[:16]
        stamp = self.out / "stages" / f"{name.replace(' ', '-')}.json"
        known = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else None
        if known is None and any(p.exists() for p in paths):
            found = ", ".join(str(p) for p in paths if p.exists())
            raise ConfigError(f"{found}: not made by a quickstart; choose another --out, or remove it")
        if known is not None and known["inputs"] != self._chain:
            for path in paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        elif known is not None and known["done"] and all(p.exists() for p in paths):
            stage = Stage(**known["stage"])
            self.stages.append(stage)
            self.say(f"[{name}] done before: {stage.note}")
            return
        _write_json(stamp, {"inputs": self._chain, "done": False})
        self.say(f"[{name}] {command}")
        begin, begin_cpu = time.perf_counter(), _cpu_seconds()
        note = make()
        stage = Stage(name, command, time.perf_counter() - begin, _cpu_seconds() - begin_cpu, note)
        _write_json(stamp, {"inputs": self._chain, "done": True, "stage": dataclasses.asdict(stage)})
        self.stages.append(stage)
        self.say(f"[{name}] {stage.wall:.1f} s wall, {stage.cpu:.1f} s CPU: {note}")

    # ------------------------------------------------------------------------------------------------------
    # Data

    def _corpus(self) -> str:
        summary = build_corpus(
            self.corpus, minutes=self.minutes, recorded=[_recorded()], audio=self.audio, progress=self.say
        )
        for line in summary.skipped:
            self.say(f"skipped: {line}")
        (train, held_out), (seconds, held_seconds) = summary.clips, summary.seconds
        return f"{train} clips, {seconds / 60:.1f} min; held out {held_out} clips, {held_seconds / 60:.1f} min"

    def _text_tokenizer(self) -> str:
        lines = (self.corpus / "train.txt").read_text(encoding="utf-8").splitlines()
        tokenizer = train_sentencepiece(lines, self.text_model, _TEXT_VOCABULARY)
        return f"{tokenizer.vocab_size} pieces"

    def _ingest(self) -> str:
        codec, tokenizer = load_codec(self.out / "tokenizer"), load_text_tokenizer(self.text_model)
        hours, records = 0.0, 0
        for side, suffix in (("train", ""), ("validation", "-validation")):
            manifest, folder = self.corpus / f"{side}.jsonl", self.shards[f"speech{suffix}"]
            speech = ingest_audio(manifest, codec, folder, text_tokenizer=tokenizer)
            files, folder = [self.corpus / f"{side}.txt"], self.shards[f"text{suffix}"]
            text = ingest_text(files, folder, split="line", language="en", text_tokenizer=tokenizer)
            assert speech is not None and text is not None  # there is no other worker
            hours, records = hours + speech.info.hours, records + len(speech) + len(text)
        return f"{records} records, {hours * 60:.1f} min of speech"

    def _ingest_commands(self) -> str:
        lines = []
        for side, suffix in (("train", ""), ("validation", "-validation")):
            tokenizer = ["--text-tokenizer", self.text_model]
            audio = ["ingest", "--manifest", self.corpus / f"{side}.jsonl", "--audio-tokenizer", self.out / "tokenizer"]
            lines.append(["data", *audio, *tokenizer, "--out", self.shards[f"speech{suffix}"]])
            text = ["ingest-text", self.corpus / f"{side}.txt", "--split", "line", "--language", "en"]
            lines.append(["data", *text, *tokenizer, "--out", self.shards[f"text{suffix}"]])
        return _commands(lines)

    # ------------------------------------------------------------------------------------------------------
    # Training

    def _train(self, job: str, overrides: Mapping[str, Any]) -> None:
        """One training run with `configs/JOB.py:tiny`, in `OUT/JOB`."""
        spec = f"{_relative(_configs() / f'{job}.py')}:tiny"
        flags = [f"{key}={value}" for key, value in overrides.items()]
        config = load_config(spec, flags)
        if self.steps_scale != 1.0:
            steps = max(2, round(config.run.steps * self.steps_scale))
            every = min(config.run.eval_every, steps)
            flags += [f"--config.run.{k}={v}" for k, v in (("steps", steps), ("eval_every", every))]
            flags.append(f"--config.run.checkpoint_every={every}")
            config = load_config(spec, flags)
        workdir = self.out / job
        command = _commands([["train", "--config", spec, "--workdir", workdir, *flags]])
        self._stage(job, [workdir], to_json(config), command, lambda: _run_training(config, workdir))

    # ------------------------------------------------------------------------------------------------------
    # Samples and measurements

    def _examples(self) -> list[Any]:
        """Held-out clips to show: of as many speakers as possible, recorded ones first."""
        entries = [e for e in Manifest(self.corpus / "validation.jsonl") if e.text and e.duration > _PROMPT_SECONDS]
        entries.sort(key=lambda e: e.speaker.startswith("espeak-"))  # stable
        seen: dict[str, int] = {}
        ranked: list[tuple[int, int, Any]] = []
        for entry in entries:
            seen[entry.speaker] = seen.get(entry.speaker, 0) + 1
            ranked.append((seen[entry.speaker], len(ranked), entry))
        return [entry for _, _, entry in sorted(ranked, key=lambda r: r[:2])[:_EXAMPLES]]

    def _sample_commands(self) -> str:
        examples = self._examples()
        audio, texts = [e.audio for e in examples], [part for e in examples for part in ("--text", e.text)]
        model = ["--checkpoint", self.out / "joint", "--audio-tokenizer", self.out / "tokenizer"]
        model += ["--text-tokenizer", self.text_model, "--out", self.out / "samples"]
        limits = ["--prompt-seconds", _PROMPT_SECONDS, "--min-seconds", _MIN_SECONDS, "--max-seconds", _MAX_SECONDS]
        return _commands(
            [
                ["generate", "continue", "--input", *audio, *limits, *model],
                ["generate", "tts", *texts, "--force-text", "--max-seconds", _SPOKEN_SECONDS, *model],
                ["generate", "asr", "--input", *audio, "--max-text", _TRANSCRIPT_TOKENS, *model],
            ]
        )

    def _samples(self) -> str:
        """Reconstructions, continuations, speech from text, transcripts: files and `samples.json` in `OUT/samples`."""
        model = load_speech_model(self.out / "joint", self.out / "tokenizer", self.text_model)
        codec = model.codec
        rate = codec.config.mel.sample_rate
        examples = self._examples()
        wavs = [load_audio(e.audio, rate) for e in examples]
        folder, channels = self.out / "samples", model.generator.config.num_channels
        shown: dict[str, list[dict[str, Any]]] = {name: [] for name in ("reconstruction", "continuation", "tts", "asr")}

        def keep(name: str, wav: np.ndarray) -> str:
            save_wav(folder / f"{name}.wav", wav, rate)
            return f"{name}.wav"

        for i, (entry, wav, codes_MR) in enumerate(zip(examples, wavs, codec.encode(wavs), strict=True)):
            clips = {"original": keep(f"reconstruction-{i}-original", wav)}
            for levels in (channels, codec.config.rvq.num_levels):
                decoded = codec.decode(codes_MR[:, :levels])[: len(wav)]
                clips[f"{levels} codebooks"] = keep(f"reconstruction-{i}-{levels}", decoded)
            shown["reconstruction"].append({"title": entry.speaker, "text": entry.text, "clips": clips})

        settings = app.GenerationSettings(max_seconds=_MAX_SECONDS, min_seconds=_MIN_SECONDS)
        prompts = [wav[: int(_PROMPT_SECONDS * rate)] for wav in wavs]
        outputs, timing = app.generate_speech_continuation(model, prompts, settings)
        timings = {"continuation": dataclasses.asdict(timing)}
        for i, (entry, prompt, output) in enumerate(zip(examples, prompts, outputs, strict=True)):
            clips = {f"prompt, {_PROMPT_SECONDS:g} s": keep(f"continuation-{i}-prompt", prompt)}
            clips["prompt and continuation, decoded"] = keep(f"continuation-{i}", output.full_wav)
            shown["continuation"].append({"title": entry.speaker, "clips": clips})

        texts = [e.text for e in examples]
        settings = app.GenerationSettings(max_seconds=_SPOKEN_SECONDS, force_text=True)
        outputs, timing = app.generate_tts(model, texts, settings)
        timings["tts"] = dataclasses.asdict(timing)
        for i, (text, output) in enumerate(zip(texts, outputs, strict=True)):
            clips = {"generated": keep(f"tts-{i}", output.wav)} if len(output.wav) else {}
            shown["tts"].append({"title": f"Text {i + 1}", "text": text, "said": output.text, "clips": clips})

        outputs, timing = app.transcribe(model, wavs, app.GenerationSettings(max_text=_TRANSCRIPT_TOKENS))
        timings["asr"] = dataclasses.asdict(timing)
        for entry, output in zip(examples, outputs, strict=True):
            shown["asr"].append({"title": entry.speaker, "reference": entry.text, "hypothesis": output.text})
        _write_json(folder / "samples.json", {"samples": shown, "timings": timings})
        seconds = timings["tts"]["audio_seconds"] + timings["continuation"]["audio_seconds"]
        return f"{seconds:.1f} s of speech generated, {len(examples)} clips transcribed"

    def _measure(self) -> str:
        """Writes `OUT/measurements.json`: audio tokenizer against its start, language model against its references."""
        trained, variables, _ = load_params(self.out / "tokenizer")
        assert isinstance(trained, TokenizerTrainConfig)
        rate = trained.model.mel.sample_rate
        wavs = [load_audio(e.audio, rate) for e in Manifest(self.corpus / "validation.jsonl")]
        end = {"params": variables["params"]["audio_tokenizer"], "codebook": variables["codebook"]}
        tokenizer: dict[str, Any] = {}
        for when, state in (("start", starting_tokenizer(trained)), ("end", end)):
            codec = Codec(trained.model, state["params"], state["codebook"], trained.compute)
            quality = reconstruction_quality(reconstruct(codec, wavs), wavs, trained.model)
            tokenizer[when] = {
                "distance": {str(n): interval.to_json() for n, interval in quality.distance.items()},
                "perplexity": [interval.to_json() for interval in quality.perplexity],
                "used": list(quality.used),
            }
        config, variables, _ = load_params(self.out / "joint")
        assert isinstance(config, LMTrainConfig)
        entropies = channel_entropies(
            config.model,
            config.compute,
            variables["params"],
            load_text_tokenizer(self.text_model),
            ShardSet(self.shards["speech"]),
            list(ShardSet(self.shards["speech-validation"])),
            config.data.row_length,
            config.data.row_patches,
        )
        channels = []
        for r in range(config.model.num_channels):
            figures = {name: entropies.mean(name, r) for name in ("model", "control", "unigram")}
            figures |= {"reduction": entropies.reduction(r), "control_gap": entropies.control_gap(r)}
            channels.append({name: interval.to_json() for name, interval in figures.items()})
        result: dict[str, Any] = {
            "tokenizer": tokenizer,
            "codebook_sizes": list(trained.model.rvq.codebook_sizes),
            "channels": channels,
            "control_gap": entropies.control_gap().to_json(),
            "held_out": {"clips": len(wavs), "seconds": sum(map(len, wavs)) / rate},
        }
        result["bars"] = bars(result)
        _write_json(self.out / "measurements.json", result)
        met = sum(bar["met"] for bar in result["bars"])
        return f"{met} of {len(result['bars'])} bars met"


# ----------------------------------------------------------------------------------------------------------
# Bars


def bars(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the quickstart has to show, judged on held-out clips: `name`, `found`, `met`.

    "Clearly better" is that the 95 % intervals of start and end do not overlap; "below" and "worse" that the interval
    of the paired difference lies on one side of 0.
    """
    out: list[dict[str, Any]] = []

    def bar(name: str, found: str, met: bool) -> None:
        out.append({"name": name, "found": found, "met": met})

    def change(before: Mapping[str, float], after: Mapping[str, float]) -> str:
        was, now = (f"{x['value']:.3g} ({x['low']:.3g} to {x['high']:.3g})" for x in (before, after))
        return f"{was} at step 0, {now} now"

    start, end = measured["tokenizer"]["start"], measured["tokenizer"]["end"]
    levels = max(end["distance"], key=int)
    before, after = start["distance"][levels], end["distance"][levels]
    bar("Log-mel distance clearly below step 0", change(before, after), after["high"] < before["low"])
    before, after = start["perplexity"][0], end["perplexity"][0]
    bar("Level-1 perplexity clearly above step 0", change(before, after), after["low"] > before["high"])
    for r, channel in enumerate(measured["channels"]):
        wanted, needed = ("at least 10 % below", 0.10) if r == 0 else ("below", 0.0)
        value, low, high = (channel["reduction"][key] for key in ("value", "low", "high"))
        found = f"{-value:+.1%} ({-high:+.1%} to {-low:+.1%})"
        bar(f"Channel {r} {wanted} the unigram", found, value >= needed and low > 0)
    gap = measured["control_gap"]
    found = f"{gap['value']:+.3f} nats a frame ({gap['low']:+.3f} to {gap['high']:+.3f})"
    bar("All channels worse with another utterance's context", found, gap["low"] > 0)
    return out


# ----------------------------------------------------------------------------------------------------------
# Training runs


def _run_training(config: JobConfig, workdir: Path) -> str:
    if isinstance(config, TokenizerTrainConfig):
        train_tokenizer(config, workdir)
    else:
        assert isinstance(config, LMTrainConfig)
        train_language_model(config, workdir)
    lines = [x for x in metrics.read(workdir / metrics.METRICS_FILE) if x["split"] == "validation"]
    return f"{config.run.steps} steps, held-out loss {lines[0]['loss']:.3g} -> {lines[-1]['loss']:.3g}"


# ----------------------------------------------------------------------------------------------------------
# Files


def _configs() -> Path:
    for folder in (_CHECKOUT / "configs", Path("configs")):
        if (folder / "joint.py").is_file():
            return folder
    raise ConfigError(f"{_CHECKOUT / 'configs'}: not found; run the quickstart from a checkout of the repository")


def _commands(lines: Sequence[Sequence[Any]]) -> str:
    """Shell commands, one a line, from the arguments of `mimo-jax`."""
    return "\n".join(shlex.join(["mimo-jax", *map(str, arguments)]) for arguments in lines)


def _recorded() -> Path:
    return _CHECKOUT / "tests" / "data" / "librivox" / "manifest.jsonl"


def _corpus_sources() -> list[Path]:
    package = Path(__file__).parent
    sources = [*sorted(package.glob("corpora/*.txt")), package / "corpora/synthetic.py", package / "audio/synth.py"]
    return sources + [path for path in [_recorded()] if path.is_file()]


def _recordings(folders: Sequence[Path]) -> list[list[Any]]:
    """Names, sizes and times of the user's recordings: what the corpus depends on."""
    files = [p for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _relative(path: Path) -> str:
    """Path from the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def _write_json(path: Path, values: Any) -> None:
    atomic_write(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
