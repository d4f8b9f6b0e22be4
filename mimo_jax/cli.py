"""The command `mimo-jax`: one verb for each thing the package does.

Exit status: 0 done, 1 a fault of the program (with traceback), 2 something the user can mend (one line on stderr),
130 interrupted. Modules are imported by the verb that needs them, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_jax import __version__
from mimo_jax.config import (
    AdversarialTrainConfig,
    ConfigError,
    JobConfig,
    LMTrainConfig,
    TokenizerTrainConfig,
)
from mimo_jax.config_files import load_config

if TYPE_CHECKING:
    from mimo_jax.generation.app import AppTiming, GenerationSettings, SpeechModel, SpeechOutput

CONFIG_FLAG = "--config."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    words, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options = parser.parse_args(words)
    options.overrides = overrides
    if overrides and not hasattr(options, "config"):
        parser.error(f"{overrides[0]}: only verbs with --config take overrides")
    try:
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 0
        if options.traceback or not is_expected(error):
            raise
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2
    return 0


def _nobody_reads() -> bool:
    """Whether the reader of our output is gone (`| head`): not a fault, and the rest of the output goes nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:
        return False  # not a stream of the operating system
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of a command line: (the rest, overrides with `=`)."""
    words, overrides = [], []
    rest = iter(arguments)
    for word in rest:
        if not word.startswith(CONFIG_FLAG):
            words.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            value = next(rest, None)
            overrides.append(word if value is None else f"{word}={value}")
    return words, overrides


def is_expected(error: BaseException) -> bool:
    """Whether an error is one that the package raises by name, or one of the file system: the message says it all."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "mimo_jax"


def message_of(error: BaseException) -> str:
    """One line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


# ----------------------------------------------------------------------------------------------------------
# Verbs


def run_train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if options.distributed or options.coordinator:
        import jax

        given = (options.coordinator, options.processes, options.process)
        if options.coordinator and None in given:
            raise ConfigError("--coordinator: expected --processes and --process beside it")
        jax.distributed.initialize(*given)
    if isinstance(config, LMTrainConfig):
        from mimo_jax.training.language_model import train_language_model

        train_language_model(config, options.workdir)
    elif isinstance(config, TokenizerTrainConfig):
        from mimo_jax.training.tokenizer import train_tokenizer

        train_tokenizer(config, options.workdir)
    else:
        raise ConfigError(
            f"--config={options.config}: this describes the adversarial stage of the audio tokenizer, "
            "which this version does not train"
        )


def run_config_show(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    figures = derived_figures(config)
    if options.json:
        print(json.dumps({"config": dataclasses.asdict(config), "derived": figures}, indent=2))
        return
    for key, value in flat_settings(dataclasses.asdict(config), "config"):
        print(f"{key} = {value}")
    print()
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value:,.6g}")


def flat_settings(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted key, value), in order."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat_settings(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


def derived_figures(config: JobConfig) -> dict[str, int | float]:
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
    from mimo_jax.data.ingest import ingest_audio
    from mimo_jax.loading import load_codec
    from mimo_jax.text.tokenizers import load_text_tokenizer

    text_tokenizer = load_text_tokenizer(options.text_tokenizer) if options.text_tokenizer else None
    done = ingest_audio(
        options.manifest,
        load_codec(options.audio_tokenizer, options.step),
        options.out,
        text_tokenizer=text_tokenizer,
        records_per_shard=options.records_per_shard,
        max_skipped=options.max_skipped,
        worker=options.worker,
        threads=options.threads,
    )
    _say_ingested(done, options.out)


def run_data_ingest_text(options: argparse.Namespace) -> None:
    from mimo_jax.data.ingest import ingest_text
    from mimo_jax.text.tokenizers import load_text_tokenizer

    done = ingest_text(
        options.files,
        options.out,
        split=options.split,
        language=options.language,
        text_tokenizer=load_text_tokenizer(options.text_tokenizer) if options.text_tokenizer else None,
        records_per_shard=options.records_per_shard,
        max_skipped=options.max_skipped,
        worker=options.worker,
    )
    _say_ingested(done, options.out)


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

    config = load_config(options.config, options.overrides)
    if not isinstance(config, LMTrainConfig):
        raise ConfigError(f"--config={options.config}: expected a language model job, got job {config.job}")
    print(show_rows(config, options.split, options.rows, options.layout))


def run_text_tokenizer_train(options: argparse.Namespace) -> None:
    from mimo_jax.text.tokenizers import train_sentencepiece

    tokenizer = train_sentencepiece(
        corpus_lines(options.files),
        options.out,
        options.vocab_size,
        character_coverage=options.character_coverage,
        seed=options.seed,
    )
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


def run_generate_continue(options: argparse.Namespace) -> None:
    from mimo_jax.generation.app import generate_speech_continuation

    _generate_from_audio(options, "continue", generate_speech_continuation, speaks=True)


def run_generate_asr(options: argparse.Namespace) -> None:
    from mimo_jax.generation.app import transcribe

    _generate_from_audio(options, "asr", transcribe, speaks=False)


def run_generate_tts(options: argparse.Namespace) -> None:
    from mimo_jax.generation.app import generate_tts

    texts = list(options.text or [])
    for path in options.text_file or []:
        texts += [line.strip() for line in _lines(path) if line.strip()]
    if not texts:
        raise ConfigError("generate tts: expected --text or --text-file with something to say")
    settings = _settings(options)
    model = _speech_model(options, speaks=True)
    outputs, timing = generate_tts(model, texts, settings)
    _write(options, "tts", model, outputs, timing, settings, [f"tts-{i}" for i in range(len(texts))], texts)


def _generate_from_audio(options: argparse.Namespace, task: str, generate: Callable[..., Any], speaks: bool) -> None:
    from mimo_jax.audio.files import load_audio

    settings = _settings(options)
    model = _speech_model(options, speaks)
    rate = model.codec.config.mel.sample_rate
    wavs = [load_audio(path, rate) for path in options.input]
    if getattr(options, "prompt_seconds", None) is not None:
        wavs = [wav[: max(1, round(options.prompt_seconds * rate))] for wav in wavs]
    outputs, timing = generate(model, wavs, settings)
    names = [f"{Path(path).stem}-{task}" for path in options.input]
    if len(set(names)) < len(names):
        names = [f"{i}-{name}" for i, name in enumerate(names)]
    _write(options, task, model, outputs, timing, settings, names, options.input)


def _settings(options: argparse.Namespace) -> GenerationSettings:
    from mimo_jax.generation.app import GenerationSettings
    from mimo_jax.generation.sampling import PATCHES, SamplingConfig

    text = None
    if any(getattr(options, f"text_{name}") is not None for name in ("temperature", "top_k", "top_p")):
        temperature = 1.0 if options.text_temperature is None else options.text_temperature
        text = SamplingConfig(temperature, options.text_top_k or 0, options.text_top_p or 0.0)
    patches = {
        name: getattr(options, name)
        for name in ("temperature", "top_k", "top_p")
        if getattr(options, name, None) is not None
    }
    lengths = {
        name: getattr(options, name) for name in ("max_seconds", "min_seconds", "max_text") if hasattr(options, name)
    }
    return GenerationSettings(
        **lengths,
        text_sampling=text,
        patch_sampling=dataclasses.replace(PATCHES, **patches),
        constrain=not options.free,
        seed=options.seed,
        batch_size=options.batch_size,
    )


def _speech_model(options: argparse.Namespace, speaks: bool) -> SpeechModel:
    from mimo_jax.loading import load_speech_model

    return load_speech_model(
        options.checkpoint, options.audio_tokenizer, options.text_tokenizer, step=options.step, speaks=speaks
    )


def _write(
    options: argparse.Namespace,
    task: str,
    model: SpeechModel,
    outputs: list[SpeechOutput],
    timing: AppTiming,
    settings: GenerationSettings,
    names: list[str],
    inputs: list[str],
) -> None:
    from mimo_jax.generation.app import write_outputs

    path = write_outputs(options.out, task, model, outputs, timing, settings, names, inputs)
    rate = model.codec.config.mel.sample_rate
    for name, output in zip(names, outputs, strict=True):
        ended = "ended by the model" if output.stopped else "cut at the limit"
        print(f"{name}: {len(output.wav) / rate:.2f} s of speech, {ended}{f': {output.text}' if output.text else ''}")
    speed = f"{timing.positions} positions in {timing.decode_seconds:.2f} s"
    if timing.real_time_factor is not None:
        speed += f", {timing.patches_per_second:.1f} patches/s, real-time factor {timing.real_time_factor:.2f}"
    print(f"{speed}; compiled in {timing.compile_seconds:.1f} s")
    print(path)


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
        progress=lambda line: print(line, file=sys.stderr),
    )
    for line in summary.skipped:
        print(f"left out: {line}", file=sys.stderr)
    for path, clips, seconds in zip((summary.train, summary.validation), summary.clips, summary.seconds, strict=True):
        print(f"{path}: {clips:,} clips, {seconds / 60:.1f} minutes")


# ----------------------------------------------------------------------------------------------------------
# Parser


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="mimo-jax",
        description="Pre-training of audio language models in JAX, from recordings to a model that listens and speaks.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mimo-jax {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_train(verbs)
    _add_config(verbs)
    _add_data(verbs)
    _add_text_tokenizer(verbs)
    _add_generate(verbs)
    _add_quickstart(verbs)
    return parser


_EXAMPLES = """\
from recordings to speech:
  mimo-jax text-tokenizer train corpus.txt --vocab-size 8192 --out data/text.model
  mimo-jax train --config configs/tokenizer.py:tiny --workdir runs/tokenizer
  mimo-jax data ingest --manifest data/train.jsonl --audio-tokenizer runs/tokenizer \\
      --text-tokenizer data/text.model --out data/shards/speech
  mimo-jax data ingest-text corpus.txt --text-tokenizer data/text.model --out data/shards/text
  mimo-jax data show --config configs/joint.py:tiny --layout tts
  mimo-jax train --config configs/joint.py:tiny --workdir runs/joint --config.run.steps=2000
  mimo-jax generate tts --checkpoint runs/joint --audio-tokenizer runs/tokenizer --text "hello" --out out
or all of it, small, on a CPU:
  mimo-jax quickstart

`mimo-jax VERB --help` explains each verb. Exit status: 0 done, 1 a fault of the program, 2 something to mend (one line
says what), 130 interrupted.
"""


def _verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, epilog: str = ""
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=summary[0].lower() + summary[1:].rstrip("."),
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _group(verbs: Any, name: str, summary: str) -> Any:
    parser = verbs.add_parser(name, help=summary[0].lower() + summary[1:].rstrip("."), description=summary)
    return parser.add_subparsers(title="verbs", metavar="VERB", required=True)


def _config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE:SIZE",
        help="config file and size (tiny, 100m, 1b, 7b), as in configs/joint.py:tiny; change single settings with "
        "--config.KEY=VALUE",
    )


_OVERRIDES = """\
single settings are changed on the command line; `mimo-jax config show` lists them:
  --config.run.steps=2000 --config.loss.channel_weights=12,8,6,4,2,2,1,1 \\
  --config.data.sources.speech.path=data/shards/speech
"""


def _add_train(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "train",
        run_train,
        "Train an audio tokenizer or a language model. A run that was interrupted goes on where it was.",
        f"{_OVERRIDES}\nThe workdir gets checkpoints/, metrics.jsonl, tensorboard/, config.json and parameters.txt.\n",
    )
    _config_option(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run; made if missing")
    parser.add_argument(
        "--distributed", action="store_true", help="one of several processes; TPU pods, Slurm and GKE say which"
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="the same where nothing says which: address of process 0"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="with --coordinator: number of processes")
    parser.add_argument("--process", type=int, metavar="I", help="with --coordinator: this process, from 0")


def _add_config(verbs: Any) -> None:
    group = _group(verbs, "config", "Look at settings.")
    parser = _verb(
        group,
        "show",
        run_config_show,
        "Print all settings of a job, its parameter counts, FLOPs and token budget. Nothing is compiled or read.",
        _OVERRIDES,
    )
    _config_option(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def _worker(text: str) -> tuple[int, int]:
    try:
        i, n = (int(x) for x in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected I/N, as in 0/8, got {text!r}") from None
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got {text!r}")
    return i, n


def _add_data(verbs: Any) -> None:
    group = _group(verbs, "data", "Make shard sets and look into them.")

    def add_ingest_options(parser: argparse.ArgumentParser, records: int) -> None:
        parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shard set; made if missing")
        parser.add_argument(
            "--text-tokenizer", metavar="FILE", help="also compute the lengths index for this tokenizer"
        )
        parser.add_argument(
            "--records-per-shard",
            type=int,
            default=records,
            metavar="N",
            help="inputs of one shard (default %(default)s)",
        )
        parser.add_argument(
            "--max-skipped",
            type=float,
            default=0.05,
            metavar="SHARE",
            help="share of the inputs that may be broken; they are reported and left out (default %(default)s)",
        )
        parser.add_argument(
            "--worker", type=_worker, default=(0, 1), metavar="I/N", help="make only every N-th shard, from I on"
        )

    parser = _verb(
        group,
        "ingest",
        run_data_ingest,
        "Turn the recordings of a manifest into shards of RVQ codes. What a killed run has made is kept.",
        'a line of the manifest:\n  {"audio": "a.wav", "text": "hello", "language": "en", "speaker": "anna", '
        '"caption": "...", "instruction": "...",\n   "segments": [{"start": 0.0, "end": 0.4, "text": "hello"}]}\n'
        "only `audio` is required; paths are relative to the manifest.\n",
    )
    parser.add_argument("--manifest", required=True, metavar="FILE", help="JSONL manifest")
    parser.add_argument("--audio-tokenizer", required=True, metavar="DIR", help="workdir of a tokenizer run")
    parser.add_argument("--step", type=int, help="checkpoint of the tokenizer (default: the newest)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads that read audio (default 2)")
    add_ingest_options(parser, 1024)

    parser = _verb(group, "ingest-text", run_data_ingest_text, "Turn text files into a shard set.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text, or .jsonl whose lines have `text`")
    parser.add_argument(
        "--split",
        choices=("paragraph", "line", "file"),
        default="paragraph",
        help="what a document of a text file is (default %(default)s)",
    )
    parser.add_argument("--language", default="", metavar="TAG", help="language of documents that do not say")
    add_ingest_options(parser, 16_384)

    parser = _verb(
        group,
        "index",
        run_data_index,
        "Compute the lengths index of shard sets for a text tokenizer. Training needs it.",
    )
    parser.add_argument("shards", nargs="+", metavar="DIR", help="folders of shard sets")
    parser.add_argument("--text-tokenizer", required=True, metavar="FILE", help="tokenizer of the language model")

    parser = _verb(
        group,
        "show",
        run_data_show,
        "Print packed rows readably: documents, text, patches, target weights.",
        "example:\n  mimo-jax data show --config configs/joint.py:tiny --layout tts --rows 1\n",
    )
    _config_option(parser)
    parser.add_argument("--split", choices=("train", "validation"), default="train", help="default %(default)s")
    parser.add_argument("--layout", metavar="NAME", help="only documents of this layout, such as asr or tts")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="rows to print (default %(default)s)")


def _add_text_tokenizer(verbs: Any) -> None:
    group = _group(verbs, "text-tokenizer", "Make a text tokenizer.")
    parser = _verb(
        group,
        "train",
        run_text_tokenizer_train,
        "Train a SentencePiece model with the special tokens of the system.",
        "example:\n  mimo-jax text-tokenizer train a.txt data/train.jsonl --vocab-size 1024 --out data/text.model\n",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text, or .jsonl whose lines have `text`")
    parser.add_argument("--out", required=True, metavar="FILE", help="model to write")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=8192,
        metavar="N",
        help="ids in all, special tokens included (default %(default)s)",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of the characters with a piece of their own (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the draw from a very large corpus (default %(default)s)"
    )


def _add_generate(verbs: Any) -> None:
    group = _group(verbs, "generate", "Let a trained model speak and listen.")

    def add_options(parser: argparse.ArgumentParser, speech: bool) -> None:
        parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir of a language model run")
        parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
        parser.add_argument("--audio-tokenizer", required=True, metavar="DIR", help="workdir of the tokenizer run")
        parser.add_argument("--text-tokenizer", metavar="FILE", help="default: the one that the run's config names")
        parser.add_argument("--out", required=True, metavar="DIR", help="folder for wav, txt and json; made if missing")
        parser.add_argument("--seed", type=int, default=0, help="of the first input; the next ones follow (default 0)")
        parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="inputs at a time (default 8)")
        parser.add_argument(
            "--free", action="store_true", help="also let the model draw ids that its layout has no place for"
        )
        text = "greedy" if not speech else "as published for the task"
        parser.add_argument("--text-temperature", type=float, metavar="T", help=f"text sampler; 0 is greedy ({text})")
        parser.add_argument("--text-top-k", type=int, metavar="K", help="0 is off")
        parser.add_argument("--text-top-p", type=float, metavar="P", help="0 is off")
        if speech:
            parser.add_argument(
                "--max-seconds", type=float, default=20.0, metavar="S", help="speech at most (default 20)"
            )
            parser.add_argument(
                "--temperature", type=float, metavar="T", help="speech sampler; 0 is greedy (default 0.9)"
            )
            parser.add_argument("--top-k", type=int, metavar="K", help="0 is off (default)")
            parser.add_argument("--top-p", type=float, metavar="P", help="0 is off (default 0.95)")

    example = "example:\n  mimo-jax generate {} --checkpoint runs/joint --audio-tokenizer runs/tokenizer {} --out out\n"
    parser = _verb(
        group,
        "continue",
        run_generate_continue,
        "Go on speaking after recordings. Writes the new speech, and also prompt and new speech in one.",
        example.format("continue", "--input a.wav --prompt-seconds 3"),
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="recordings to continue")
    parser.add_argument("--prompt-seconds", type=float, metavar="S", help="use only the beginning of each recording")
    parser.add_argument("--min-seconds", type=float, default=0.0, metavar="S", help="speech at least (default 0)")
    add_options(parser, speech=True)

    parser = _verb(group, "tts", run_generate_tts, "Speak texts.", example.format("tts", '--text "hello there"'))
    parser.add_argument("--text", action="append", metavar="TEXT", help="what to say; may be given several times")
    parser.add_argument("--text-file", action="append", metavar="FILE", help="what to say, one line each")
    add_options(parser, speech=True)

    parser = _verb(
        group, "asr", run_generate_asr, "Transcribe recordings.", example.format("asr", "--input a.wav b.flac")
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="recordings to transcribe")
    parser.add_argument("--max-text", type=int, default=256, metavar="N", help="text tokens at most (default 256)")
    add_options(parser, speech=False)


def _add_quickstart(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "quickstart",
        run_quickstart,
        "Run the whole path on a small corpus: tokenizer, shards, both language model stages, generation, report.",
    )
    parser.add_argument("--out", default="runs/quickstart", metavar="DIR", help="default %(default)s")
    parser.add_argument(
        "--audio", action="append", metavar="DIR", help="also use your own recordings in this folder; repeatable"
    )

    group = _group(verbs, "prepare", "Prepare public corpora.")
    parser = _verb(
        group,
        "debian",
        run_prepare_debian,
        "Make manifests of the recorded speech in Debian packages (about 230 minutes, transcribed).",
        "packages:\n  apt-get install asterisk-core-sounds-{en,es,fr,it,ru}{,-g722} festvox-ru\n",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for wav files and manifests")
    parser.add_argument("--root", default="/", metavar="DIR", help="where the packages are installed or unpacked")
    parser.add_argument("--language", action="append", metavar="TAG", help="only these Asterisk languages; repeatable")
    parser.add_argument("--no-festvox", action="store_true", help="leave festvox-ru out")
    parser.add_argument(
        "--min-characters", type=int, default=1, metavar="N", help="leave shorter transcripts out (default %(default)s)"
    )


if __name__ == "__main__":
    sys.exit(main())
