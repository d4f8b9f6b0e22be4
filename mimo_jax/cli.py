"""The command `mimo-jax`: one verb for each thing the package does.

Exit status: 0 done, 1 a fault of the program (with traceback), 2 something the user can mend (one line on stderr),
130 interrupted. Modules are imported by the verb that needs them, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mimo_jax import __version__, verbs

if TYPE_CHECKING:
    pass

CONFIG_FLAG = "--config."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    words, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options = parser.parse_args(words)
    options.overrides = overrides
    if overrides and not hasattr(options, "config"):
        parser.error(f"{overrides[0]}: only verbs with --config take overrides")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
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
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_train(subparsers)
    _add_config(subparsers)
    _add_data(subparsers)
    _add_text_tokenizer(subparsers)
    _add_generate(subparsers)
    _add_quickstart(subparsers)
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
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, epilog: str = ""
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
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


def _group(subparsers: Any, name: str, summary: str) -> Any:
    parser = subparsers.add_parser(name, help=summary[0].lower() + summary[1:].rstrip("."), description=summary)
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


def _add_train(subparsers: Any) -> None:
    parser = _verb(
        subparsers,
        "train",
        verbs.run_train,
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


def _add_config(subparsers: Any) -> None:
    group = _group(subparsers, "config", "Look at settings.")
    parser = _verb(
        group,
        "show",
        verbs.run_config_show,
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


def _add_data(subparsers: Any) -> None:
    group = _group(subparsers, "data", "Make shard sets and look into them.")

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
        verbs.run_data_ingest,
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

    parser = _verb(group, "ingest-text", verbs.run_data_ingest_text, "Turn text files into a shard set.")
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
        verbs.run_data_index,
        "Compute the lengths index of shard sets for a text tokenizer. Training needs it.",
    )
    parser.add_argument("shards", nargs="+", metavar="DIR", help="folders of shard sets")
    parser.add_argument("--text-tokenizer", required=True, metavar="FILE", help="tokenizer of the language model")

    parser = _verb(
        group,
        "show",
        verbs.run_data_show,
        "Print packed rows readably: documents, text, patches, target weights.",
        "example:\n  mimo-jax data show --config configs/joint.py:tiny --layout tts --rows 1\n",
    )
    _config_option(parser)
    parser.add_argument("--split", choices=("train", "validation"), default="train", help="default %(default)s")
    parser.add_argument("--layout", metavar="NAME", help="only documents of this layout, such as asr or tts")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="rows to print (default %(default)s)")


def _add_text_tokenizer(subparsers: Any) -> None:
    group = _group(subparsers, "text-tokenizer", "Make a text tokenizer.")
    parser = _verb(
        group,
        "train",
        verbs.run_text_tokenizer_train,
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


def _add_generate(subparsers: Any) -> None:
    group = _group(subparsers, "generate", "Let a trained model speak and listen.")

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
        verbs.run_generate_continue,
        "Go on speaking after recordings. Writes the new speech, and also prompt and new speech in one.",
        example.format("continue", "--input a.wav --prompt-seconds 3"),
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="recordings to continue")
    parser.add_argument("--prompt-seconds", type=float, metavar="S", help="use only the beginning of each recording")
    parser.add_argument("--min-seconds", type=float, default=0.0, metavar="S", help="speech at least (default 0)")
    add_options(parser, speech=True)

    parser = _verb(group, "tts", verbs.run_generate_tts, "Speak texts.", example.format("tts", '--text "hello there"'))
    parser.add_argument("--text", action="append", metavar="TEXT", help="what to say; may be given several times")
    parser.add_argument("--text-file", action="append", metavar="FILE", help="what to say, one line each")
    add_options(parser, speech=True)

    parser = _verb(
        group, "asr", verbs.run_generate_asr, "Transcribe recordings.", example.format("asr", "--input a.wav b.flac")
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="recordings to transcribe")
    parser.add_argument("--max-text", type=int, default=256, metavar="N", help="text tokens at most (default 256)")
    add_options(parser, speech=False)


def _add_quickstart(subparsers: Any) -> None:
    parser = _verb(
        subparsers,
        "quickstart",
        verbs.run_quickstart,
        "Run the whole path on a small corpus: tokenizer, shards, both language model stages, generation, report.",
    )
    parser.add_argument("--out", default="runs/quickstart", metavar="DIR", help="default %(default)s")
    parser.add_argument(
        "--audio", action="append", metavar="DIR", help="also use your own recordings in this folder; repeatable"
    )

    group = _group(subparsers, "prepare", "Prepare public corpora.")
    parser = _verb(
        group,
        "debian",
        verbs.run_prepare_debian,
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
