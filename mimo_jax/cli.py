"""The command `mimo-jax`: one verb for each thing the package does.

Exit status: 0 done, 1 a fault of the program (with traceback) or a failed comparison, 2 something the user can mend
(one line on stderr), 130 interrupted. Modules are imported by the verb that needs them, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from mimo_jax import __version__, verbs

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
        failed = options.run(options)
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
    return 1 if failed else 0


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
    _add_plan(subparsers)
    _add_data(subparsers)
    _add_text_tokenizer(subparsers)
    _add_generate(subparsers)
    _add_codec(subparsers)
    _add_convert(subparsers)
    _add_parity(subparsers)
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
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], bool | None], summary: str, epilog: str = ""
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


def _add_plan(subparsers: Any) -> None:
    parser = _verb(
        subparsers,
        "plan",
        verbs.run_plan,
        "Predict what a language model job takes of each device's memory. Nothing is compiled or read.",
        "example:\n  mimo-jax plan --config configs/sft.py:7b --devices h100:8 --config.lora.rank=64\n",
    )
    _config_option(parser)
    parser.add_argument("--devices", required=True, metavar="KIND:N", help="as h100:8, h200:1, v5p:64")
    parser.add_argument("--json", action="store_true", help="as JSON, in bytes")


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
        "Turn the recordings of a manifest, or of conversations, into shards of RVQ codes. A killed run can go on.",
        'a line of the manifest:\n  {"audio": "a.wav", "text": "hello", "language": "en", "speaker": "anna", '
        '"caption": "...", "instruction": "...",\n   "segments": [{"start": 0.0, "end": 0.4, "text": "hello"}]}\n'
        "only `audio` is required; paths are relative to the manifest. A conversation is a list of\n"
        '  {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "audio", "audio": "a.wav"}]}\n'
        "and, from the assistant, `thinking` (true, false, null) and `Chain-of-thought`; see docs/data.md.\n",
    )
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--manifest", metavar="FILE", help="JSONL manifest")
    inputs.add_argument("--conversations", metavar="FILE", help="conversations to fine-tune on, one a line")
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


_INPUT_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "audio": ("--input", dict(nargs="+", metavar="FILE", help="recordings; each is a request")),
    "text": ("--text", dict(action="append", metavar="TEXT", help="what to say or ask; may be given several times")),
    "instruction": ("--instruction", dict(metavar="TEXT", help="the style, or what the examples do")),
    "voice": ("--voice", dict(metavar="FILE", help="recording whose voice to take")),
    "voice_text": ("--voice-text", dict(metavar="TEXT", help="what it says; base prompts need it")),
    "system": ("--system", dict(metavar="TEXT", help="how the assistant shall behave")),
    "history": ("--history", dict(metavar="FILE", help="go on from NAME-history.json of an earlier call")),
    "examples": (
        "--example",
        dict(
            action="append", nargs=3, metavar=("IN", "OUT", "WORDS"), help="two recordings, what OUT says; repeatable"
        ),
    ),
    "thinking": ("--thinking", dict(action="store_true", default=None, help="let it think before it answers")),
    "template": ("--template", dict(type=int, metavar="N", help="wording of the request (default: drawn by the seed)")),
}
_INPUT_EXAMPLES = {
    "asr": "--input a.wav b.flac",
    "tts": '--text "hello there"',
    "instruct-tts": '--text "hello there" --instruction "whispering"',
    "understand": '--input a.wav --text "Who is speaking?"',
    "dialogue": "--input question.wav --voice anna.wav --system 'Be brief.'",
    "speech-to-text": "--input question.wav --thinking",
    "chat": '--text "What is a codec?" --history out/chat-0-history.json',
    "few-shot": '--instruction "Say it happily." --example a.wav b.wav "good day" --input c.wav',
    "continue": "--input a.wav --prompt-seconds 3",
    "clone": '--text "hello there" --voice anna.wav --voice-text "what anna says"',
}


_REQUESTS = """\

lines of --requests (recordings relative to the file; each line may have its own seed, limits and samplers):
  {"task": "tts", "text": "hello", "seed": 3, "temperature": 0.8, "max_seconds": 5, "name": "greeting"}
  {"task": "dialogue", "audio": "q.wav", "voice": "anna.wav", "system": "Be brief.", "text_top_p": 0.9,
   "turns": [{"role": "user", "audio": "a.wav"}, {"role": "assistant", "text": "yes", "audio": "b.wav"}]}
  {"task": "few-shot", "instruction": "...", "audio": "c.wav",
   "examples": [{"input": "a.wav", "output": "b.wav", "text": "what b.wav says"}]}
  (other keys: instruction, voice_text, history, thinking, template, min_seconds, max_text, max_new, top_k, top_p,
   text_temperature, text_top_k, force_text, constrain)
"""


def _add_generate(subparsers: Any) -> None:
    from mimo_jax.generation.tasks import TASKS

    group = _group(subparsers, "generate", "Let a trained model speak and listen.")
    for name, task in TASKS.items():
        example = f"mimo-jax generate {name} --checkpoint runs/joint --audio-tokenizer runs/tokenizer --out out"
        epilog = f"example:\n  {example} \\\n      {_INPUT_EXAMPLES[name]}\n{_REQUESTS}"
        parser = _verb(group, name, verbs.run_generate, task.summary, epilog)
        parser.set_defaults(task=name)
        _add_generate_options(parser, task)


def _add_generate_options(parser: argparse.ArgumentParser, task: Any) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="language model: a run or a converted one")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument(
        "--audio-tokenizer", required=True, metavar="DIR", help="its tokenizer: a run or a converted one"
    )
    parser.add_argument("--text-tokenizer", metavar="FILE", help="default: the one that the checkpoint names")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for wav, txt and json; made if missing")
    parser.add_argument(
        "--prompts",
        choices=("chat", "base"),
        help="what the model was trained on: conversations or plain documents (default: as the checkpoint says)",
    )
    for field in task.needs + task.takes:
        if field in _INPUT_FLAGS:
            flag, settings = _INPUT_FLAGS[field]
            parser.add_argument(flag, dest=field, **settings)
    if "text" in task.needs:
        parser.add_argument("--text-file", action="append", metavar="FILE", help="the same, one line each")
    if "audio" in task.needs and task.speaks and "instruction" not in task.needs and not task.converses:
        parser.add_argument("--prompt-seconds", type=float, metavar="S", help="only the beginning of each recording")
    parser.add_argument(
        "--requests",
        metavar="FILE",
        help="more requests, of any task: see below",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first request; the next ones follow (default 0)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests at a time (default 8)")
    parser.add_argument("--max-new", type=int, metavar="N", help="positions of an answer, instead of the limits below")
    parser.add_argument("--max-text", type=int, metavar="N", help="text tokens of an answer at most (default 256)")
    parser.add_argument(
        "--free",
        dest="constrain",
        action="store_false",
        default=None,
        help="also let the model draw ids that its layout has no place for",
    )
    parser.add_argument("--text-temperature", type=float, metavar="T", help="text sampler; 0 is greedy (as published)")
    parser.add_argument("--text-top-k", type=int, metavar="K", help="0 is off")
    parser.add_argument("--text-top-p", type=float, metavar="P", help="0 is off")
    if not task.speaks:
        return
    parser.add_argument("--max-seconds", type=float, metavar="S", help="speech at most (default 20)")
    parser.add_argument("--min-seconds", type=float, metavar="S", help="answer at least (default 0)")
    parser.add_argument("--temperature", type=float, metavar="T", help="speech sampler; 0 is greedy (default 0.9)")
    parser.add_argument("--top-k", type=int, metavar="K", help="0 is off (default)")
    parser.add_argument("--top-p", type=float, metavar="P", help="0 is off (default 0.95)")
    if "text" in task.needs:
        parser.add_argument(
            "--force-text",
            action="store_true",
            default=None,
            help="say exactly the given words, whatever the model says",
        )


def _add_codec(subparsers: Any) -> None:
    group = _group(subparsers, "codec", "Encode recordings with an audio tokenizer, and decode them.")

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--audio-tokenizer", required=True, metavar="DIR", help="a tokenizer run or a converted one"
        )
        parser.add_argument("--step", type=int, help="checkpoint of the tokenizer (default: the newest)")
        parser.add_argument("--out", required=True, metavar="DIR", help="folder of the files; made if missing")

    parser = _verb(group, "encode", verbs.run_codec_encode, "Turn recordings into RVQ codes, NAME.npz.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="recordings")
    add_options(parser)
    parser.add_argument("--levels", type=int, metavar="R", help="keep only the first R levels (default: all)")
    parser.add_argument(
        "--segment-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="encode in independent segments (default 60, as published; its evaluation suite and toolkit: 30)",
    )
    parser.add_argument(
        "--reference-quirks", action="store_true", help="with the batching artefacts of the released code"
    )

    parser = _verb(group, "decode", verbs.run_codec_decode, "Turn files of codes into recordings, NAME-decoded.wav.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="files that `codec encode` has made")
    add_options(parser)
    parser.add_argument(
        "--stream",
        action="store_true",
        help="as if the codes were coming in. A tokenizer of decoder_norm `frame` gives the same wave; the published "
        "norm, over the whole sequence, another, as in the released streaming decoder",
    )
    parser.add_argument(
        "--chunk-seconds", type=float, default=1.0, metavar="S", help="with --stream: audio of a step (default 1)"
    )


def _bytes(text: str) -> int:
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * {"MB": 10**6, "GB": 10**9}[unit])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"expected a size as 500MB or 5GB, got {text!r}") from None
    if size <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive size, got {text!r}")
    return size


def _add_convert(subparsers: Any) -> None:
    parser = _verb(
        subparsers,
        "convert",
        verbs.run_convert,
        "Turn published weights into a checkpoint, or a checkpoint of ours into published weights.",
        "examples:\n"
        "  mimo-jax convert MiMo-Audio-7B-Instruct --out weights/audio-lm   (or an audio tokenizer)\n"
        "  mimo-jax convert MiMo-7B-Base --out weights/llm --like configs/understanding.py:7b\n"
        "  mimo-jax convert runs/joint --out release\n"
        "a text model (Qwen2, MiMo-7B, Llama) becomes the LLM of a new audio language model, to start a run from with\n"
        "--config.init_from. Memory is that of one layer, whatever the size.\n",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="folder with config.json and safetensors; or workdir of a run, or a checkpoint"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make; nothing is overwritten")
    parser.add_argument(
        "--like",
        default="",
        metavar="FILE:SIZE",
        help="for a text model: config whose patch encoder and decoder it gets",
    )
    parser.add_argument("--seed", type=int, default=0, help="of those (default %(default)s)")
    parser.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    parser.add_argument(
        "--shard-size",
        type=_bytes,
        default="5GB",
        metavar="SIZE",
        help="largest safetensors file (default %(default)s)",
    )


def _add_parity(subparsers: Any) -> None:
    parser = _verb(
        subparsers,
        "parity",
        verbs.run_parity,
        "Compare everything with the arrays of the reference implementation; exit status 1 if one differs.",
        "example:\n  mimo-jax parity ../shared/parity --only tokenizer/tok_a,sampler --json parity.json\n",
    )
    parser.add_argument("folder", metavar="FOLDER", help="with manifest.json and the arrays that it lists")
    parser.add_argument("--only", default="", metavar="NAME,...", help="files that begin so, as tokenizer/tok_a")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")


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
