"""What each verb of the command line does: from parsed options to the functions of the package.

Modules are imported by the verb that needs them, so that the command line answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mimo_jax.atomic import atomic_write
from mimo_jax.config import AdversarialTrainConfig, ConfigError, LMTrainConfig, TokenizerTrainConfig, TrainingConfig
from mimo_jax.config_files import load_config
from mimo_jax.progress import Meter
from mimo_jax.trees import flatten
from mimo_jax.xla_flags import set_flags


def run_train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if not options.no_xla_flags:
        set_flags(os.environ, tensor=config.mesh.tensor != 1)
    import jax

    from mimo_jax.training.signals import stop_signal

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(options.workdir).absolute() / "compiled"))
    several = options.distributed or bool(options.coordinator)
    with stop_signal(0.0):
        if several:
            given = (options.coordinator, options.processes, options.process)
            if options.coordinator and None in given:
                raise ConfigError("--coordinator: expected --processes and --process beside it")
            jax.config.update("jax_enable_preemption_service", False)  # `stop_signal` takes the signals
            # A host that is gone or stuck is noticed within 40 s, and the job ends. At its end all wait for process 0,
            # which still hashes the last checkpoint.
            jax.distributed.initialize(*given, heartbeat_timeout_seconds=40, shutdown_timeout_seconds=3600)
        with stop_signal(config.run.grace_seconds if several else 0.0):
            if isinstance(config, LMTrainConfig):
                from mimo_jax.training.language_model import train_language_model

                train_language_model(config, options.workdir)
            elif isinstance(config, AdversarialTrainConfig):
                from mimo_jax.training.tokenizer_adversarial import train_adversarial

                train_adversarial(config, options.workdir)
            else:
                from mimo_jax.training.tokenizer import train_tokenizer

                train_tokenizer(config, options.workdir)


def worth_another_try(options: argparse.Namespace, error: Exception) -> bool:
    """Whether a training job that ended so may get on when it is started again, as `launch` asks.

    Settings stay wrong, and so does data that is wrong or not there, unless the run has a checkpoint: then it was there
    once, and a file system may be away for a while.
    """
    if options.run is not run_train or isinstance(error, ConfigError):
        return False
    began = any(path.name.isdecimal() for path in Path(options.workdir, "checkpoints").glob("*"))
    return began or not isinstance(error, (ValueError, FileNotFoundError))


def _check_least(options: argparse.Namespace, **least: int) -> None:
    for name, number in least.items():
        if getattr(options, name) < number:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag}: expected at least {number}, got {getattr(options, name)}")


def run_launch_local(options: argparse.Namespace) -> None:
    from mimo_jax.launching import stop_seconds
    from mimo_jax.supervisor import command_lines, supervise

    config = load_config(options.config, options.overrides)  # errors are shown once
    _check_least(options, processes=1, restarts=0)
    command = [sys.executable, "-m", "mimo_jax.cli", "train", "--config", options.config, *options.overrides]
    command += ["--workdir", options.workdir]
    if options.dry_run:
        for line, extra in command_lines(command, options.processes):
            print(shlex.join([*(f"{k}={v}" for k, v in extra.items()), *line]))
        return
    logs = Path(options.workdir)
    raise SystemExit(supervise(command, options.processes, options.restarts, logs, stop_seconds(config)))


def run_launch_job(options: argparse.Namespace) -> None:
    from mimo_jax import launching
    from mimo_jax.chips import parse_topology

    config = load_config(options.config, options.overrides)
    given = (options.name, options.config, options.overrides, options.workdir, options.restarts)
    job = launching.Job(*given, stop_seconds=launching.stop_seconds(config))
    if options.scheduler == "slurm":
        _check_least(options, nodes=1, devices_per_node=1)
        launching.check_devices(config, options.nodes * options.devices_per_node, 1)
        text = launching.slurm(job, options.nodes, options.devices_per_node)
    else:
        topology = parse_topology(options.topology, options.slices)
        if options.scheduler == "gke":
            text = launching.gke(job, topology, options.image, options.volume)
        else:
            text = launching.xpk(job, topology, options.image, options.cluster)
        per_process = launching.devices_per_host(topology)
        launching.check_devices(config, topology.devices, per_process, topology.slices)
    if options.dry_run:
        print(text, end="")
    else:
        raise SystemExit(launching.start(options.scheduler, text))


def run_checkpoint_inspect(options: argparse.Namespace) -> bool:
    """Prints what is there; True if `--verify` found damage."""
    from mimo_jax.training.checkpoint_report import inspect, render

    found = inspect(options.path, options.step, options.verify)
    print(json.dumps(found, indent=1) if options.json else render(found))
    return any(one["state"].startswith("damaged (") for one in found.get("checkpoints", [found]))


def run_config_show(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    figures = derived_figures(config)
    if options.json:
        print(json.dumps({"config": dataclasses.asdict(config), "derived": figures}, indent=2))
        return
    for key, value in flatten(dataclasses.asdict(config), ".", "config.").items():
        print(f"{key} = {value}")
    print()
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value:,.6g}")


def run_plan(options: argparse.Namespace) -> None:
    from mimo_jax.chips import parse_topology
    from mimo_jax.planning.compiled import Compiler, default_cache

    topology = parse_topology(options.topology, options.slices)
    cache = None if options.no_cache else Path(options.cache or default_cache())
    compiler = None if options.no_compile or not topology.is_tpu else Compiler(cache, options.hlo)
    if options.hlo and compiler is None:
        raise ConfigError(f"--hlo={options.hlo}: nothing is compiled for this topology")
    if options.search and options.program != "train":
        raise ConfigError(f"--search: expected --program=train, got {options.program}")
    if options.program == "train" and (options.batch != 1 or options.length is not None):
        raise ConfigError("--batch, --length: expected --program=generate or tokenize beside them")
    plan = _plan_of_program(options, topology, compiler)
    print(json.dumps(plan.to_json(), indent=1) if options.json else plan)


def _plan_of_program(options: argparse.Namespace, topology: Any, compiler: Any) -> Any:
    from mimo_jax.planning.plan import plan_training
    from mimo_jax.planning.programs import plan_generation, plan_tokenizing
    from mimo_jax.planning.search import search

    if options.program == "tokenize":
        config = load_config(options.config, options.overrides)
        if isinstance(config, LMTrainConfig):
            raise ConfigError(f"--config={options.config}: expected an audio tokenizer job, got job {config.job}")
        if options.batch != 1:
            raise ConfigError(f"--batch={options.batch}: expected 1: clips are encoded one after the other")
        return plan_tokenizing(config.model, config.compute, topology, compiler, options.length or 30.0)
    job = _language_model_job(options)
    if options.program == "generate":
        length = int(options.length or 2048)
        return plan_generation(job.model, job.compute, topology, compiler, options.batch, length)
    if options.search:
        return search(job, topology, compiler, options.hbm_headroom, options.compiles)
    return plan_training(job, topology, compiler)


def _language_model_job(options: argparse.Namespace) -> LMTrainConfig:
    config = load_config(options.config, options.overrides)
    if not isinstance(config, LMTrainConfig):
        raise ConfigError(f"--config={options.config}: expected a language model job, got job {config.job}")
    return config


def derived_figures(config: TrainingConfig) -> dict[str, int | float]:
    """What follows from a job's settings: parameters, positions, FLOPs (a training step counts 3 forward passes)."""
    steps = config.run.steps
    if isinstance(config, LMTrainConfig):
        lm, rows = config.model, config.data
        positions = rows.rows * rows.row_length
        patches = rows.row_patches / rows.row_length
        flops = lm.flops_per_position(rows.row_length, patches, generate=config.loss.trains_audio)
        return {
            "parameters": lm.num_params(),
            "parameters, LLM": lm.num_llm_params(),
            "parameters, patch encoder": lm.patch_encoder.num_params(),
            "parameters, patch decoder": lm.patch_decoder.num_params(),
            "positions per step": positions,
            "positions in all": positions * steps,
            "patches per step, at most": rows.rows * rows.row_patches,
            "FLOPs per position, forward": flops,
            "FLOPs per step": 3 * flops * positions,
            "FLOPs in all": 3 * flops * positions * steps,
        }
    assert isinstance(config, TokenizerTrainConfig | AdversarialTrainConfig)
    tokenizer, audio = config.model, config.data
    codes = audio.rows * audio.row_codes
    flops = tokenizer.flops_per_code(min(audio.row_codes, audio.max_seconds * tokenizer.frame_rate))
    figures: dict[str, int | float] = {"parameters": tokenizer.num_params()}
    if isinstance(config, TokenizerTrainConfig):
        figures["parameters, A2T text decoder"] = config.a2t.num_params(tokenizer.encoder.d_model)
    else:
        figures["parameters, discriminators"] = config.discriminator.num_params()
        figures["FLOPs of the discriminators per second of audio, forward"] = (
            config.discriminator.flops_per_sample() * tokenizer.mel.sample_rate
        )
    channels = 8  # of the RVQ levels, the language model reads these
    return {
        **figures,
        "RVQ frames per second": tokenizer.frame_rate,
        f"bit/s, first {channels} levels": tokenizer.bitrate(channels),
        "bit/s, all levels": tokenizer.bitrate(),
        "hours of audio per step, at most": codes / tokenizer.frame_rate / 3600,
        "hours of audio in all, at most": codes * steps / tokenizer.frame_rate / 3600,
        "FLOPs per RVQ frame, forward": flops,
        "FLOPs per step, without A2T": 3 * flops * codes,
        "FLOPs in all, without A2T": 3 * flops * codes * steps,
    }


def run_data_ingest(options: argparse.Namespace) -> None:
    from mimo_jax.data.ingest import ingest_audio, ingest_conversations
    from mimo_jax.loading import load_codec

    shared = _ingest_settings(options)
    ingest = ingest_conversations if options.conversations else ingest_audio
    source, codec = options.conversations or options.manifest, load_codec(options.audio_tokenizer, options.step)
    done = ingest(source, codec, options.out, threads=options.threads, **shared)
    _say_ingested(done, options.out)


def run_data_ingest_text(options: argparse.Namespace) -> None:
    from mimo_jax.data.ingest import ingest_text

    shared = _ingest_settings(options)
    done = ingest_text(options.files, options.out, split=options.split, language=options.language, **shared)
    _say_ingested(done, options.out)


def _ingest_settings(options: argparse.Namespace) -> dict[str, Any]:
    from mimo_jax.text.tokenizers import load_text_tokenizer

    return {
        "text_tokenizer": load_text_tokenizer(options.text_tokenizer) if options.text_tokenizer else None,
        "records_per_shard": options.records_per_shard,
        "max_skipped": options.max_skipped,
        "worker": options.worker,
    }


def _say_ingested(done: Any, out: str) -> None:
    if done is None:
        print(f"{out}: this worker's shards are made; others are still to come")
    else:
        print(f"{out}: {len(done):,} records")


def run_data_index(options: argparse.Namespace) -> None:
    from mimo_jax.data.shards import index_path, index_shards
    from mimo_jax.text.tokenizers import load_text_tokenizer

    tokenizer = load_text_tokenizer(options.text_tokenizer)
    for folder in options.shards:
        index = index_shards(folder, tokenizer, progress=True)
        print(f"{index_path(folder, tokenizer)}: {len(index.text):,} records, {int(index.text.sum()):,} text tokens")


def run_data_show(options: argparse.Namespace) -> None:
    from mimo_jax.data.show import show_rows

    print(show_rows(_language_model_job(options), options.split, options.rows, options.layout))


def run_text_tokenizer_train(options: argparse.Namespace) -> None:
    from mimo_jax.text.tokenizers import train_sentencepiece

    given = (corpus_lines(options.files), options.out, options.vocab_size)
    tokenizer = train_sentencepiece(*given, character_coverage=options.character_coverage, seed=options.seed)
    print(f"{options.out}: {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint}")


def corpus_lines(files: Sequence[str]) -> Iterator[str]:
    """Lines of text files, and the `text` of JSONL files (manifests among them)."""
    for path in files:
        for number, line in enumerate(_lines(path), 1):
            if not path.endswith(".jsonl"):
                yield line
                continue
            try:
                text = json.loads(line).get("text", "")
            except (json.JSONDecodeError, AttributeError):
                raise ConfigError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}") from None
            if text:
                yield str(text)


def _lines(path: str) -> Iterator[str]:
    """Lines of a UTF-8 file, without their ends."""
    with open(path, encoding="utf-8") as file:
        try:
            for line in file:
                yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: expected UTF-8 text ({error.reason} at byte {error.start})") from None


def run_generate(options: argparse.Namespace) -> None:
    from mimo_jax.generation.app import GenerationSettings, run_batches
    from mimo_jax.generation.generate import Timing
    from mimo_jax.generation.outputs import check_names, write_output, write_record
    from mimo_jax.generation.requests import SETTINGS, apply_settings, make_requests, output_names
    from mimo_jax.generation.tasks import TASKS
    from mimo_jax.loading import load_speech_model

    changes = {key: getattr(options, key, None) for key in SETTINGS}
    settings = apply_settings(GenerationSettings(batch_size=options.batch_size), changes)
    seconds = getattr(options, "prompt_seconds", None)
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(f"--prompt-seconds: expected a positive number, got {seconds}")
    inputs = _generate_inputs(options)
    names = output_names(inputs)
    check_names(names)
    Path(options.out).mkdir(parents=True, exist_ok=True)  # before the work is done that goes there
    model = load_speech_model(
        options.checkpoint,
        options.audio_tokenizer,
        options.text_tokenizer,
        step=options.step,
        speaks=any(TASKS[request["task"]].speaks for request in inputs),
        prompts=options.prompts,
    )
    requests = make_requests(inputs, model, settings, seconds)
    rate = model.codec.config.mel.sample_rate
    meter = Meter(len(inputs), lambda done, _: f"generate: {done:.0f} of {len(inputs)} requests", every=0.0)
    items: dict[int, dict[str, Any]] = {}
    timing = Timing()
    for batch in run_batches(model, requests, settings):  # what is done is written: an interruption loses one batch
        timing += batch.timing
        for number, output in zip(batch.numbers, batch.outputs, strict=True):
            name, asked = names[number], inputs[number].get("audio", inputs[number].get("text", ""))
            items[number] = write_output(options.out, name, output, asked, model, settings)
            ended = "ended by the model" if output.stopped else "cut at the limit"
            spoken = f"{len(output.wav) / rate:.2f} s of speech, " if TASKS[output.task].speaks else ""
            print(f"{name}: {spoken}{ended}{f': {output.text}' if output.text else ''}", flush=True)
        done = [items[number] for number in sorted(items)]
        path = write_record(options.out, options.task, model, done, timing, settings)
        meter.step(len(batch.numbers))
    speed = f"{timing.positions} positions in {timing.decode_seconds:.2f} s"
    if timing.real_time_factor is not None:
        speed += f", {timing.patches_per_second:.1f} patches/s, real-time factor {timing.real_time_factor:.2f}"
    print(f"{speed}; compiled in {timing.compile_seconds:.1f} s")
    print(path)


def _generate_inputs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is asked for on the command line, checked: one request for each recording, or for each text."""
    from mimo_jax.generation.requests import check_request, read_requests
    from mimo_jax.generation.tasks import TASKS

    task = TASKS[options.task]
    shared = {
        field: value
        for field in task.needs + task.takes
        if field not in ("audio", "text") and (value := getattr(options, field, None)) is not None
    }
    if "examples" in shared:
        shared["examples"] = [dict(zip(("input", "output", "text"), e, strict=True)) for e in shared["examples"]]
    texts = list(getattr(options, "text", None) or [])
    for path in getattr(options, "text_file", None) or []:
        texts += [line.strip() for line in _lines(path) if line.strip()]
    one = {"task": options.task, **shared}
    if "audio" in task.needs:
        asked = [{"text": text} for text in texts] if "text" in task.needs else [{}]
        inputs = [{**one, "audio": path, **text} for path in options.audio or [] for text in asked]
    else:
        inputs = [{**one, "text": text} for text in texts]
    for request in inputs:
        check_request(request)
    if options.requests:
        inputs += read_requests(options.requests, options.task)
    if not inputs:
        flags = [{"audio": "--input", "text": "--text"}[f] for f in task.needs if f in ("audio", "text")]
        raise ConfigError(f"generate {options.task}: expected {' and '.join(flags)}, or --requests")
    if "history" in one and len(inputs) > 1:
        raise ConfigError(f"generate {options.task}: expected one request with --history, got {len(inputs)}")
    return inputs


def run_codec_encode(options: argparse.Namespace) -> None:
    from mimo_jax.codec_files import encode_files
    from mimo_jax.loading import load_codec

    if not 1 <= options.segment_seconds <= 3600:
        raise ConfigError(f"--segment-seconds: expected 1..3600, got {options.segment_seconds}")
    how = {"segment_seconds": options.segment_seconds, "reference_quirks": options.reference_quirks}
    codec = load_codec(options.audio_tokenizer, options.step, **how)
    print(*encode_files(options.files, codec, options.out, options.levels), sep="\n")


def run_codec_decode(options: argparse.Namespace) -> None:
    from mimo_jax.codec_files import decode_files
    from mimo_jax.loading import load_codec

    if not 0 < options.chunk_seconds <= 60:
        raise ConfigError(f"--chunk-seconds: expected a positive number of at most 60, got {options.chunk_seconds}")
    load = functools.partial(load_codec, options.audio_tokenizer, options.step)
    chunk_seconds = options.chunk_seconds if options.stream else None
    print(*decode_files(options.files, load, options.out, chunk_seconds), sep="\n")


def run_eval_reconstruction(options: argparse.Namespace) -> None:
    import jax

    from mimo_jax.evals import reconstruction_results as results
    from mimo_jax.evals.quality import DEFAULT_METRICS, METRICS
    from mimo_jax.evals.reconstruction_run import Evaluation, evaluate_reconstruction
    from mimo_jax.loading import load_codec
    from mimo_jax.training.checkpoint import open_step, read_meta

    if options.limit == 0:
        raise ConfigError("--limit: expected at least 1, got 0")
    other = results.load_result(options.compare) if options.compare else None  # faults are found before the work
    metrics = options.metrics.split(",") if options.metrics else DEFAULT_METRICS
    evaluation = Evaluation(
        levels=options.levels,
        baselines=() if options.baselines == "none" else tuple(options.baselines.split(",")),
        metrics=tuple(METRICS) if options.metrics == "all" else tuple(dict.fromkeys(metrics)),
        speaker_model=options.speaker_model,
        limit=options.limit,
    )
    workers = min(8, max(1, (os.cpu_count() or 1) // 2)) if options.workers is None else options.workers
    if jax.config.jax_compilation_cache_dir is None:  # a program for each length of clip: an evaluation may go on
        jax.config.update("jax_compilation_cache_dir", str(Path(options.out).absolute() / "compiled"))
    step = open_step(options.audio_tokenizer, options.step)
    codec = load_codec(step)
    tokenizer = {"path": options.audio_tokenizer, "step": read_meta(step)["step"]}
    content = evaluate_reconstruction(
        codec, options.manifest, options.out, evaluation, workers=workers, tokenizer=tokenizer
    )
    print(results.markdown(content))
    if other is not None:
        print(results.write_comparison(options.out, results.compare(content, other)))
    print(Path(options.out) / results.RESULT)


def run_convert(options: argparse.Namespace) -> None:
    from mimo_jax import convert

    if convert.is_published(options.source):
        if options.step is not None:
            raise ConfigError(f"--step={options.step}: {options.source} holds published weights, which have no steps")
        done = convert.import_published(
            options.source, options.out, like=options.like, seed=options.seed, progress=True
        )
    elif options.like:
        raise ConfigError(f"--like={options.like}: expected a folder with safetensors, got {options.source}")
    else:
        done = convert.export_published(
            options.source, options.out, step=options.step, shard_bytes=options.shard_size, progress=True
        )
    for note in done.notes:
        print(note)
    print(f"{options.out}: {done.tensors:,} tensors, {done.nbytes / 1e6:,.1f} MB")


def run_eval_codebooks(options: argparse.Namespace) -> None:
    from mimo_jax.data.manifest import Manifest
    from mimo_jax.evals.codebooks import measure, table
    from mimo_jax.loading import load_codec

    found = measure(load_codec(options.audio_tokenizer, options.step), Manifest(options.manifest))
    if options.out:
        atomic_write(options.out, (json.dumps(found, indent=1) + "\n").encode())
    print(table(found))
    for line in found["left_out"]:
        print(f"left out: {line}", file=sys.stderr)


def run_eval_probe(options: argparse.Namespace) -> None:
    from mimo_jax.evals.probes import Settings, phone_side, run_probes, word_side
    from mimo_jax.loading import load_codec

    _check_least(options, levels=1, context=0, parts=1)
    runs, against = options.audio_tokenizer, options.against
    if against and len(against) != len(runs):
        raise ConfigError(f"--against: expected as many runs as --audio-tokenizer ({len(runs)}), got {len(against)}")
    if (options.task == "phones") != bool(options.phones):
        raise ConfigError("--phones: expected the file of phone labels with `phones`, and none with `words`")
    settings = Settings(
        options.task, options.features, options.levels, options.context, options.parts, options.keep_silence
    )

    def side(manifest: str) -> Any:
        if options.task == "words":
            return word_side(manifest)
        return phone_side(manifest, options.phones, options.keep_silence)

    meters: dict[str, Meter] = {}

    def progress(run: str, done: int, total: int) -> None:
        meter = meters.setdefault(run, Meter(total, lambda n, _: f"{run}: {n:.0f} of {total} recordings encoded"))
        meter.step()

    sides = side(options.train), side(options.test)
    report = run_probes(settings, *sides, runs, against, lambda run: load_codec(run, options.step), progress)
    if options.out:
        atomic_write(options.out, (json.dumps(report.to_json(), indent=1) + "\n").encode())
    print(report)


def run_parity(options: argparse.Namespace) -> bool:
    """Prints the table row by row; True if an array failed."""
    from mimo_jax.parity import harness

    started = time.perf_counter()
    rows = []
    for row in harness.run(options.folder, [name for name in options.only.split(",") if name], options.kernels):
        print(harness.line(row), flush=True)
        rows.append(row)
    seconds = time.perf_counter() - started
    if options.json:
        atomic_write(options.json, harness.report(rows, seconds).encode())
    print(f"{harness.summary(rows)}; {seconds:.0f} s")
    return any(row.verdict == harness.FAILED for row in rows)


def run_quickstart(options: argparse.Namespace) -> None:
    from mimo_jax.quickstart import run_quickstart as run

    print(run(options.out, options.audio or ()))


def run_prepare_debian(options: argparse.Namespace) -> None:
    from mimo_jax.corpora.debian import ASTERISK_LANGUAGES, prepare_debian

    summary = prepare_debian(
        options.out,
        root=options.root,
        languages=options.language or ASTERISK_LANGUAGES,
        festvox=not options.no_festvox,
        min_characters=options.min_characters,
        hold_out=options.hold_out,
        progress=_say_progress,
    )
    _say_prepared(summary)


def run_prepare_synthetic(options: argparse.Namespace) -> None:
    from mimo_jax.corpora.synthetic import QUICKSTART_VOICES, build_corpus

    voices = options.voices or QUICKSTART_VOICES
    given = {"minutes": options.minutes, "voices": voices, "hold_out": options.hold_out}
    _say_prepared(build_corpus(options.out, **given, progress=_say_progress))


def run_prepare_words(options: argparse.Namespace) -> None:
    from mimo_jax.audio.synth import VOICES
    from mimo_jax.corpora.words import build_words

    given = {"minutes": options.minutes, "hold_out": options.hold_out, "seed": options.seed}
    _say_prepared(build_words(options.out, voices=options.voices or tuple(VOICES), **given, progress=_say_progress))


def run_prepare_join(options: argparse.Namespace) -> None:
    from mimo_jax.corpora.manifest import join_manifests

    clips, seconds = join_manifests(options.manifests, options.out)
    print(f"{options.out}: {clips:,} clips, {seconds / 60:.1f} minutes")


def _say_progress(line: str) -> None:
    print(line, file=sys.stderr)


def _say_prepared(summary: Any) -> None:
    for line in summary.skipped:
        print(f"left out: {line}", file=sys.stderr)
    for path, clips, seconds in zip(summary.manifests, summary.clips, summary.seconds, strict=True):
        print(f"{path}: {clips:,} clips, {seconds / 60:.1f} minutes")
