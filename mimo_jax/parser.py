"""The command line of `mimo-jax` as argparse sees it: verbs, options, help."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from typing import Any

from mimo_jax import __version__, verbs


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
    _add_launch(subparsers)
    _add_checkpoint(subparsers)
    _add_config(subparsers)
    _add_plan(subparsers)
    _add_data(subparsers)
    _add_text_tokenizer(subparsers)
    _add_generate(subparsers)
    _add_codec(subparsers)
    _add_eval(subparsers)
    _add_convert(subparsers)
    _add_parity(subparsers)
    _add_quickstart(subparsers)
    _add_prepare(subparsers)
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
    add = parser.add_argument
    _config_option(parser)
    add("--workdir", required=True, metavar="DIR", help="folder of the run; made if missing")
    add("--distributed", action="store_true", help="one of several processes; TPU pods, Slurm and GKE say which")
    add("--coordinator", metavar="HOST:PORT", help="the same where nothing says which: address of process 0")
    add("--processes", type=int, metavar="N", help="with --coordinator: number of processes")
    add("--process", type=int, metavar="I", help="with --coordinator: this process, from 0")
    add("--no-xla-flags", action="store_true", help="leave the compiler flags as the environment has them")


def _add_launch(subparsers: Any) -> None:
    group = _group(subparsers, "launch", "Start a training job and keep it running.")

    def verb(name: str, summary: str, example: str, **defaults: Any) -> argparse.ArgumentParser:
        run = verbs.run_launch_job if defaults else verbs.run_launch_local
        parser = _verb(group, name, run, summary, f"example:\n  mimo-jax launch {name} {example}\n")
        parser.set_defaults(**defaults)
        add = parser.add_argument
        _config_option(parser)
        add("--workdir", required=True, metavar="DIR", help="folder of the run, as the processes see it")
        add("--restarts", type=int, default=10, metavar="N", help="how often to start again (default %(default)s)")
        add("--dry-run", action="store_true", help="print what would be started, and start nothing")
        return parser

    parser = verb(
        "local",
        "Start the processes of a training job on this machine; where one fails, say why and start all again.",
        "--processes 2 --config configs/text.py:tiny --workdir runs/text",
    )
    add = parser.add_argument
    add("--processes", type=int, default=1, metavar="N", help="processes of the job; they share out the GPUs")

    parser = verb(
        "slurm",
        "Hand a training job on GPUs to Slurm (sbatch): one process per GPU, started again until it is done.",
        "--nodes 4 --config configs/joint.py:1b --workdir /shared/runs/joint --dry-run",
        scheduler="slurm",
    )
    add = parser.add_argument
    add("--name", default="mimo-jax", help="name of the job (default %(default)s)")
    add("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    add("--devices-per-node", type=int, default=8, metavar="N", help="GPUs of a node (default %(default)s)")

    examples = "--topology v5p:8x8x4 --image IMAGE {} --config configs/joint.py:7b --workdir /data/runs/joint --dry-run"
    for scheduler, summary, example in (
        ("gke", "Hand a training job on TPUs to GKE, as a JobSet (kubectl).", "--volume files:/data"),
        ("xpk", "Hand a training job on TPUs to xpk.", "--cluster tpus"),
    ):
        parser = verb(scheduler, summary, examples.format(example), scheduler=scheduler)
        add = parser.add_argument
        add("--name", default="mimo-jax", help="name of the job (default %(default)s)")
        add("--topology", required=True, metavar="KIND:SHAPE", help="a slice, as v5e:16x16, v5p:8x8x4, tpu7x:4x4x4")
        add("--slices", type=int, default=1, metavar="N", help="slices of that shape (default %(default)s)")
        add("--image", required=True, help="container image with mimo-jax and the config file")
        if scheduler == "gke":
            add("--volume", required=True, metavar="CLAIM:/PATH", help="persistent volume claim, and where it appears")
        else:
            add("--cluster", required=True, help="name of the cluster")


def _add_checkpoint(subparsers: Any) -> None:
    group = _group(subparsers, "checkpoint", "Look into checkpoints.")
    parser = _verb(
        group,
        "inspect",
        verbs.run_checkpoint_inspect,
        "List the checkpoints of a run, or say what is in one of them. Arrays are not read.",
        "examples:\n"
        "  mimo-jax checkpoint inspect runs/joint --verify\n"
        "  mimo-jax checkpoint inspect runs/joint --step 2000 --json\n",
    )
    add = parser.add_argument
    add("path", metavar="PATH", help="workdir of a run, or the folder of one checkpoint")
    add("--step", type=int, metavar="N", help="say what is in this one")
    add("--verify", action="store_true", help="compare every file with its checksum")
    add("--json", action="store_true", help="as JSON, with all settings of the run")


def _add_config(subparsers: Any) -> None:
    group = _group(subparsers, "config", "Look at settings.")
    parser = _verb(
        group,
        "show",
        verbs.run_config_show,
        "Print all settings of a job, its parameter counts, FLOPs and token budget. Nothing is compiled or read.",
        _OVERRIDES,
    )
    add = parser.add_argument
    _config_option(parser)
    add("--json", action="store_true", help="as JSON")


def _add_plan(subparsers: Any) -> None:
    parser = _verb(
        subparsers,
        "plan",
        verbs.run_plan,
        "Predict what a job needs and how fast it is. For TPUs its program is compiled (the training step: minutes).",
        """\
examples:
  mimo-jax plan --config configs/joint.py:7b --topology v5p:8x8x4
  mimo-jax plan --config configs/joint.py:7b --topology v5e:16x16 --slices 2 --config.run.accumulation=4 --json
  mimo-jax plan --config configs/sft.py:7b --topology h100:8 --config.lora.rank=64
  mimo-jax plan --config configs/joint.py:7b --topology v5p:8x8x4 --search
  mimo-jax plan --config configs/joint.py:7b --topology v6e:1x1 --program generate --batch 8 --length 4096
  mimo-jax plan --config configs/tokenizer.py:7b --topology v5e:1x1 --program tokenize --length 30
""",
    )
    add = parser.add_argument
    _config_option(parser)
    add("--topology", required=True, metavar="KIND:SHAPE", help="as v5p:8x8x4, v5e:16x16, h100:8, h200:1")
    add("--slices", type=int, default=1, metavar="N", help="TPU slices of that shape (default %(default)s)")
    programs = ("train", "generate", "tokenize")
    add("--program", choices=programs, default="train", help="what the job's model shall do (default %(default)s)")
    add("--batch", type=_count, default=1, metavar="N", help="generate: requests (default %(default)s)")
    length = "generate: positions of prompt and answer (default 2048); tokenize: seconds of a clip (default 30)"
    add("--length", type=_positive, metavar="N", help=length)
    add("--search", action="store_true", help="rank mesh, accumulation, remat and patch chunk; compile the best")
    add("--hbm-headroom", type=_share, default=0.1, metavar="X", help="--search: memory that stays free (%(default)s)")
    add("--compiles", type=_count, default=3, metavar="N", help="--search: compile so many at most (%(default)s)")
    add("--no-compile", action="store_true", help="arithmetic only, for TPUs too")
    add("--cache", metavar="DIR", help="where the compiler's answers are kept (default: the user's cache folder)")
    add("--no-cache", action="store_true", help="compile anew and keep nothing")
    add("--hlo", metavar="FILE", help="write the text of the compiled program")
    add("--json", action="store_true", help="as JSON, in bytes and seconds")


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number in [0, 1), got {text!r}")


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")


def _count(text: str) -> int:
    if text.isascii() and text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text!r}")


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
        add = parser.add_argument
        add("--out", required=True, metavar="DIR", help="folder of the shard set; made if missing")
        add("--text-tokenizer", metavar="FILE", help="also compute the lengths index for this tokenizer")
        inputs = "inputs of one shard (default %(default)s)"
        add("--records-per-shard", type=int, default=records, metavar="N", help=inputs)
        skipped = "share of the inputs that may be broken; they are reported and left out"
        add("--max-skipped", type=float, default=0.05, metavar="SHARE", help=f"{skipped} (default %(default)s)")
        add("--worker", type=_worker, default=(0, 1), metavar="I/N", help="make only every N-th shard, from I on")

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
    add = parser.add_argument
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--manifest", metavar="FILE", help="JSONL manifest")
    inputs.add_argument("--conversations", metavar="FILE", help="conversations to fine-tune on, one a line")
    add("--audio-tokenizer", required=True, metavar="DIR", help="workdir of a tokenizer run")
    add("--step", type=int, help="checkpoint of the tokenizer (default: the newest)")
    add("--threads", type=int, default=2, metavar="N", help="threads that read audio (default 2)")
    add_ingest_options(parser, 1024)

    parser = _verb(group, "ingest-text", verbs.run_data_ingest_text, "Turn text files into a shard set.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="UTF-8 text, or .jsonl whose lines have `text`")
    split = "what a document of a text file is (default %(default)s)"
    add("--split", choices=("paragraph", "line", "file"), default="paragraph", help=split)
    add("--language", default="", metavar="TAG", help="language of documents that do not say")
    add_ingest_options(parser, 16_384)

    summary = "Compute the lengths index of shard sets for a text tokenizer. Training needs it."
    parser = _verb(group, "index", verbs.run_data_index, summary)
    add = parser.add_argument
    add("shards", nargs="+", metavar="DIR", help="folders of shard sets")
    add("--text-tokenizer", required=True, metavar="FILE", help="tokenizer of the language model")

    parser = _verb(
        group,
        "show",
        verbs.run_data_show,
        "Print packed rows readably: documents, text, patches, target weights.",
        "example:\n  mimo-jax data show --config configs/joint.py:tiny --layout tts --rows 1\n",
    )
    add = parser.add_argument
    _config_option(parser)
    add("--split", choices=("train", "validation"), default="train", help="default %(default)s")
    add("--layout", metavar="NAME", help="only documents of this layout, such as asr or tts")
    add("--rows", type=int, default=1, metavar="N", help="rows to print (default %(default)s)")


def _add_text_tokenizer(subparsers: Any) -> None:
    group = _group(subparsers, "text-tokenizer", "Make a text tokenizer.")
    parser = _verb(
        group,
        "train",
        verbs.run_text_tokenizer_train,
        "Train a SentencePiece model with the special tokens of the system.",
        "example:\n  mimo-jax text-tokenizer train a.txt data/train.jsonl --vocab-size 1024 --out data/text.model\n",
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="UTF-8 text, or .jsonl whose lines have `text`")
    add("--out", required=True, metavar="FILE", help="model to write")
    size = "ids in all, special tokens included (default %(default)s)"
    add("--vocab-size", type=int, default=8192, metavar="N", help=size)
    coverage = "share of the characters with a piece of their own (default %(default)s)"
    add("--character-coverage", type=float, default=0.9995, metavar="SHARE", help=coverage)
    add("--seed", type=int, default=0, help="of the draw from a very large corpus (default %(default)s)")


# Flags of `generate`: name, where it stands (fields and traits that a task must have, or its name), settings.
_GENERATE_FLAGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("--checkpoint", "", dict(required=True, metavar="DIR", help="language model: a run or a converted one")),
    ("--step", "", dict(type=int, help="checkpoint to use (default: the newest)")),
    ("--audio-tokenizer", "", dict(required=True, metavar="DIR", help="its tokenizer: a run or a converted one")),
    ("--text-tokenizer", "", dict(metavar="FILE", help="default: the one that the checkpoint names")),
    ("--out", "", dict(required=True, metavar="DIR", help="folder for wav, txt and json; made if missing")),
    ("--prompts", "", dict(choices=("chat", "base"), help="what the model was trained on: conversations or plain "
        "documents (default: as the checkpoint says)")),
    ("--input", "audio", dict(dest="audio", nargs="+", metavar="FILE", help="recordings; each is a request")),
    ("--text", "text", dict(action="append", metavar="TEXT", help="what to say or ask; may be given several times")),
    ("--text-file", "text", dict(action="append", metavar="FILE", help="the same, one line each")),
    ("--instruction", "instruction", dict(metavar="TEXT", help="the style, or what the examples do")),
    ("--voice", "voice", dict(metavar="FILE", help="recording whose voice to take")),
    ("--voice-text", "voice_text", dict(metavar="TEXT", help="what it says; base prompts need it")),
    ("--system", "system", dict(metavar="TEXT", help="how the assistant shall behave")),
    ("--history", "history", dict(metavar="FILE", help="go on from NAME-history.json of an earlier call")),
    ("--example", "examples", dict(dest="examples", action="append", nargs=3, metavar=("IN", "OUT", "WORDS"),
        help="two recordings, what OUT says; repeatable")),
    ("--thinking", "thinking", dict(action="store_true", default=None, help="let it think before it answers")),
    ("--template", "template", dict(type=int, metavar="N", help="wording of the request (default: drawn by the seed); "
        "base prompts have only one")),
    ("--prompt-seconds", "continue", dict(type=float, metavar="S", help="only the beginning of each recording")),
    ("--requests", "", dict(metavar="FILE", help="more requests, of any task: see below")),
    ("--seed", "", dict(type=int, default=0, help="of the first request; the next ones follow (default 0)")),
    ("--batch-size", "", dict(type=int, default=8, metavar="N", help="requests at a time (default 8)")),
    ("--max-new", "", dict(type=int, metavar="N", help="positions of an answer, instead of the limits below")),
    ("--max-text", "", dict(type=int, metavar="N", help="text tokens of an answer at most (default 256)")),
    ("--free", "", dict(dest="constrain", action="store_false", default=None,
        help="also let the model draw ids that its layout has no place for")),
    ("--text-temperature", "", dict(type=float, metavar="T", help="text sampler; 0 is greedy (as published)")),
    ("--text-top-k", "", dict(type=int, metavar="K", help="0 is off")),
    ("--text-top-p", "", dict(type=float, metavar="P", help="0 is off")),
    ("--max-seconds", "speaks", dict(type=float, metavar="S", help="speech at most (default 20)")),
    ("--min-seconds", "speaks", dict(type=float, metavar="S", help="answer at least (default 0)")),
    ("--temperature", "speaks", dict(type=float, metavar="T", help="speech sampler; 0 is greedy (default 0.9)")),
    ("--top-k", "speaks", dict(type=int, metavar="K", help="0 is off (default)")),
    ("--top-p", "speaks", dict(type=float, metavar="P", help="0 is off (default 0.95)")),
    ("--force-text", "speaks text", dict(action="store_true", default=None,
        help="say exactly the given words, whatever the model says")),
)  # fmt: skip
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
        traits = {name, *task.needs, *task.takes, *(["speaks"] if task.speaks else [])}
        for flag, where, settings in _GENERATE_FLAGS:
            if set(where.split()) <= traits:
                parser.add_argument(flag, **settings)


def _add_codec(subparsers: Any) -> None:
    group = _group(subparsers, "codec", "Encode recordings with an audio tokenizer, and decode them.")

    def add_options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--audio-tokenizer", required=True, metavar="DIR", help="a tokenizer run or a converted one")
        add("--step", type=int, help="checkpoint of the tokenizer (default: the newest)")
        add("--out", required=True, metavar="DIR", help="folder of the files; made if missing")

    parser = _verb(group, "encode", verbs.run_codec_encode, "Turn recordings into RVQ codes, NAME.npz.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="recordings")
    add_options(parser)
    add("--levels", type=int, metavar="R", help="keep only the first R levels (default: all)")
    add(
        "--segment-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="encode in independent segments (default 60, as published; its evaluation suite and toolkit: 30)",
    )
    add("--reference-quirks", action="store_true", help="with the batching artefacts of the released code")

    parser = _verb(group, "decode", verbs.run_codec_decode, "Turn files of codes into recordings, NAME-decoded.wav.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="files that `codec encode` has made")
    add_options(parser)
    add(
        "--stream",
        action="store_true",
        help="as if the codes were coming in; says how far it looks ahead. A tokenizer of decoder_norm `frame` gives "
        "the same wave; the published norm, over the whole sequence, another, as in the released streaming decoder: "
        "how far off is measured on the first 60 s of each file, which are decoded twice more for it, and said",
    )
    add("--chunk-seconds", type=float, default=1.0, metavar="S", help="with --stream: audio of a step (default 1)")


def _add_eval(subparsers: Any) -> None:
    group = _group(subparsers, "eval", "Measure trained models.")
    _add_eval_codebooks(group)
    _add_eval_probe(group)
    _add_eval_reconstruction(group)


def _add_eval_codebooks(group: Any) -> None:
    parser = _verb(
        group,
        "codebooks",
        verbs.run_eval_codebooks,
        "Count how an audio tokenizer uses its codebooks: entries used, perplexity and entropy of each level.",
        "example:\n  mimo-jax eval codebooks --audio-tokenizer runs/tokenizer --manifest data/train.jsonl\n",
    )
    add = parser.add_argument
    add("--audio-tokenizer", required=True, metavar="DIR", help="a tokenizer run or a converted one")
    add("--step", type=int, help="checkpoint of the tokenizer (default: the newest)")
    add("--manifest", required=True, metavar="FILE", help="JSONL manifest of recordings")
    add("--out", metavar="FILE", help="write the figures as JSON")


def _add_eval_probe(group: Any) -> None:
    parser = _verb(
        group,
        "probe",
        verbs.run_eval_probe,
        "Tell phones or words from the codes of frozen audio tokenizers, by a linear map; compare tokenizers.",
        "examples:\n"
        "  mimo-jax eval probe phones --audio-tokenizer runs/tokenizer --train data/debian/train.jsonl \\\n"
        "      --test data/debian/validation.jsonl --phones data/debian/phones.jsonl\n"
        "  mimo-jax eval probe words --audio-tokenizer runs/a2t-{0,1,2} --against runs/plain-{0,1,2} \\\n"
        "      --train data/words/train.jsonl --test data/words/held-out-voices.jsonl --out words.json\n"
        "`mimo-jax prepare debian` and `prepare words` make the data.\n",
    )
    add = parser.add_argument
    add("task", choices=("phones", "words"), help="what to tell: the phone of each frame, or each spoken word")
    add("--audio-tokenizer", nargs="+", required=True, metavar="RUN", help="tokenizer runs or converted ones")
    against = "as many others to compare with, one by one in this order (the same seeds)"
    add("--against", nargs="+", default=[], metavar="RUN", help=against)
    add("--step", type=int, help="checkpoint of all of them (default: the newest of each)")
    add("--train", required=True, metavar="FILE", help="manifest to train the probe on")
    add("--test", required=True, metavar="FILE", help="manifest to measure on")
    add("--phones", metavar="FILE", help="phones: their labels, a manifest whose segments are phones")
    add("--levels", type=int, default=8, metavar="R", help="read the first R levels (default %(default)s)")
    add("--context", type=int, default=1, metavar="N", help="phones: frames on each side (default %(default)s)")
    add("--parts", type=int, default=3, metavar="N", help="words: parts of a word's time (default %(default)s)")
    features = "one-hot codes, or the sum of the codebook entries (default %(default)s)"
    add("--features", choices=("codes", "vectors"), default="codes", help=features)
    add("--keep-silence", action="store_true", help="phones: silence (pau) is a class; left out by default")
    add("--out", metavar="FILE", help="write the figures as JSON")


def _numbers(text: str) -> tuple[int, ...]:
    """`1-20`, `1,2,8` or both, as in `1-4,8`."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if (
            not (first.isdecimal() and (last.isdecimal() or not dash))
            or not 1 <= int(first) <= int(last or first) < 1000
        ):
            raise argparse.ArgumentTypeError(f"expected numbers as 1,2,8 or 1-20, got {text!r}")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def _add_eval_reconstruction(group: Any) -> None:
    parser = _verb(
        group,
        "reconstruction",
        verbs.run_eval_reconstruction,
        "Measure how well an audio tokenizer reproduces recordings, by number of RVQ levels, beside baselines.",
        "example:\n"
        "  mimo-jax eval reconstruction --audio-tokenizer runs/tokenizer --manifest data/validation.jsonl \\\n"
        "      --out runs/eval/tokenizer --compare runs/eval/before\n\n"
        "PESQ, STOI and Opus need the extra `eval`, DNSMOS the extra `dnsmos`, speaker similarity the weights in a\n"
        "package: pip install --no-deps resemblyzer==0.1.4. A killed evaluation goes on where it was. --out gets\n"
        "reconstruction.json, .md, .png and files.jsonl; docs/evaluation.md says what is measured how.\n",
    )
    add = parser.add_argument
    add("--audio-tokenizer", required=True, metavar="DIR", help="a tokenizer run or a converted one")
    add("--step", type=int, help="checkpoint of the tokenizer (default: the newest)")
    add("--manifest", required=True, metavar="FILE", help="JSONL manifest of recordings, as `data ingest` reads it")
    add("--out", required=True, metavar="DIR", help="folder of the results; made if missing")
    add("--levels", type=_numbers, metavar="N,...", help="decode from the first N levels; 1-20 is all (1,2,4,8,20)")
    add("--baselines", default="opus,griffin-lim", metavar="NAME,...", help="or `none` (default %(default)s)")
    metrics = "mel, stft, si-sdr, pesq, stoi, speaker, dnsmos, or `all` (default: all but dnsmos)"
    add("--metrics", metavar="NAME,...", help=metrics)
    speaker = "speaker embedding: resemblyzer, or MODULE:FUNCTION from (wave [S], rate) to [D] (default %(default)s)"
    add("--speaker-model", default="resemblyzer", metavar="NAME", help=speaker)
    add("--limit", type=_count, metavar="N", help="only N recordings, spread over the manifest")
    add(
        "--workers",
        type=_count,
        metavar="N",
        help="processes that measure; 0: none but this (default: half the cores, at most 8)",
    )
    add("--compare", metavar="DIR", help="--out of another evaluation of these recordings: print paired differences")


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
    add = parser.add_argument
    source = "folder with config.json and safetensors; or workdir of a run, or a checkpoint"
    add("source", metavar="SOURCE", help=source)
    add("--out", required=True, metavar="DIR", help="folder to make; nothing is overwritten")
    like = "for a text model: config whose patch encoder and decoder it gets"
    add("--like", default="", metavar="FILE:SIZE", help=like)
    add("--seed", type=int, default=0, help="of those (default %(default)s)")
    add("--step", type=int, help="checkpoint of a run (default: the newest)")
    largest = "largest safetensors file (default %(default)s)"
    add("--shard-size", type=_bytes, default="5GB", metavar="SIZE", help=largest)


def _add_parity(subparsers: Any) -> None:
    parser = _verb(
        subparsers,
        "parity",
        verbs.run_parity,
        "Compare everything with the arrays of the reference implementation; exit status 1 if one differs.",
        "example:\n  mimo-jax parity ../shared/parity --only tokenizer/tok_a,sampler --json parity.json\n",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="with manifest.json and the arrays that it lists")
    add("--only", default="", metavar="NAME,...", help="files that begin so, as tokenizer/tok_a")
    add("--json", metavar="FILE", help="write the table as JSON too")
    kernels = "implementation of the kernels (interpret: Pallas, anywhere; default %(default)s)"
    add("--kernels", choices=("auto", "xla", "mosaic", "triton", "interpret"), default="auto", help=kernels)


def _add_quickstart(subparsers: Any) -> None:
    parser = _verb(
        subparsers,
        "quickstart",
        verbs.run_quickstart,
        "Run the whole path on a small corpus: tokenizer, shards, both language model stages, generation, report.",
    )
    add = parser.add_argument
    add("--out", default="runs/quickstart", metavar="DIR", help="default %(default)s")
    add("--audio", action="append", metavar="DIR", help="also use your own recordings in this folder; repeatable")


def _add_prepare(subparsers: Any) -> None:
    group = _group(subparsers, "prepare", "Prepare small corpora: public recordings, synthetic speech.")

    def add_hold_out(parser: argparse.ArgumentParser) -> None:
        hold_out = "a speaker who is only in held-out-voices.jsonl; repeatable"
        parser.add_argument("--hold-out", action="append", default=[], metavar="NAME", help=hold_out)

    parser = _verb(
        group,
        "debian",
        verbs.run_prepare_debian,
        "Make manifests of the recorded speech in Debian packages (about 230 minutes, transcribed).",
        "packages:\n  apt-get install asterisk-core-sounds-{en,es,fr,it,ru}{,-g722} festvox-ru\n",
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder for wav files and manifests")
    add("--root", default="/", metavar="DIR", help="where the packages are installed or unpacked")
    add("--language", action="append", metavar="TAG", help="only these Asterisk languages; repeatable")
    add("--no-festvox", action="store_true", help="leave festvox-ru out")
    shorter = "leave shorter transcripts out (default %(default)s)"
    add("--min-characters", type=int, default=1, metavar="N", help=shorter)
    add_hold_out(parser)

    for name, run, minutes, speaking, summary in (
        (
            "synthetic",
            verbs.run_prepare_synthetic,
            18.0,
            "those of the quickstart",
            "Let espeak-ng speak English sentences: the quickstart's synthetic speech, and its text corpora.",
        ),
        (
            "words",
            verbs.run_prepare_words,
            30.0,
            "all",
            "Let espeak-ng speak a closed vocabulary in random order, with the time of every word, for `eval probe`.",
        ),
    ):
        parser = _verb(
            group, name, run, summary, f"example:\n  mimo-jax prepare {name} --out data/{name} --hold-out klatt\n"
        )
        add = parser.add_argument
        add("--out", required=True, metavar="DIR", help="folder for wav files and manifests")
        length = "speech to train on (default %(default)s)"
        add("--minutes", type=_positive, default=minutes, metavar="M", help=length)
        voices = f"voices that speak (default: {speaking}, but for those held out)"
        add("--voices", nargs="+", metavar="NAME", help=voices)
        add_hold_out(parser)
    add("--seed", type=int, default=0, help="of what is said and how (default %(default)s)")

    parser = _verb(
        group,
        "join",
        verbs.run_prepare_join,
        "Make one manifest of several; the audio files stay where they are.",
        "example:\n  mimo-jax prepare join data/debian/train.jsonl data/words/train.jsonl --out data/train.jsonl\n",
    )
    add = parser.add_argument
    add("manifests", nargs="+", metavar="FILE", help="JSONL manifests")
    add("--out", required=True, metavar="FILE", help="manifest to write")
