"""Every task of a trained model: recordings and texts in, recordings and texts out.

    model = SpeechModel(Generator(config, params), codec, tokenizer, prompts="chat")
    requests = [TaskRequest(task="asr", audio=wav), TaskRequest(task="tts", text="hello")]
    outputs, timing = run_tasks(model, requests, GenerationSettings(seed=1))

`run_batches` gives the same as it comes, and `generation.outputs` writes it down.

Requests of one call may differ in task, length, sampler and limits. Each has a seed of its own, so its answer does not
depend on its neighbours. Waves are float32, mono, at the audio tokenizer's rate (24 kHz); wherever a wave is asked for,
its codes, integers [M, R], will do.

M RVQ frames, R channels, S samples, G frames of a patch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mimo_jax.config import Checked, ConfigError
from mimo_jax.data.chat import Stream
from mimo_jax.generation.generate import Bucket, Generated, Generator, Prompt, Request, Timing
from mimo_jax.generation.prompts import Kind, Prompts, TaskPrompt
from mimo_jax.generation.sampling import PATCHES, SamplingConfig
from mimo_jax.generation.tasks import TASKS
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.text.tokenizers import TextTokenizer


@dataclass(frozen=True)
class SpeechModel:
    """A language model with the two tokenizers it was trained with.

    Raises:
        ConfigError: the three do not fit together.
    """

    generator: Generator
    codec: Codec
    tokenizer: TextTokenizer
    # Where they come from, for the record that `write_record` makes.
    description: Mapping[str, Any] = field(default_factory=dict)
    prompts: Kind = "base"  # which prompts it knows: "base" after pre-training, "chat" after post-training

    def __post_init__(self) -> None:
        lm, levels = self.generator.config, self.codec.config.rvq.codebook_sizes
        if levels[: lm.num_channels] != lm.codebook_sizes:
            raise ConfigError(f"audio tokenizer: expected codebooks {lm.codebook_sizes} of the model, got {levels}")
        if self.tokenizer.special["<|empty|>"] != lm.empty_id or self.tokenizer.vocab_size > lm.vocab_size:
            raise ConfigError(
                f"text tokenizer {self.tokenizer.name}: expected <|empty|> at id {lm.empty_id} and at most "
                f"{lm.vocab_size} ids, got {self.tokenizer.special['<|empty|>']} and {self.tokenizer.vocab_size}"
            )

    @functools.cached_property
    def layouts(self) -> Prompts:
        """Its prompts."""
        return Prompts(self.tokenizer, self.generator.config, self.prompts)

    @property
    def patches_per_second(self) -> float:
        """6.25 at the published sizes."""
        return self.codec.config.frame_rate / self.generator.config.group_size


@dataclass(frozen=True)
class GenerationSettings(Checked):
    """How to generate."""

    max_seconds: float = 20.0  # speech to generate at most
    min_seconds: float = 0.0  # the answer is not ended before so many seconds of positions
    max_text: int = 256  # text tokens of an answer at most; as many again for a chain of thought
    max_new: int | None = None  # positions of an answer, instead of what follows from these
    # Sampler of the text head; by default the published one of the task (ASR is greedy).
    text_sampling: SamplingConfig | None = None
    patch_sampling: SamplingConfig = PATCHES  # sampler of the patch decoder
    constrain: bool = True  # draw only ids that the layout has a place for (a continuation holds no words)
    force_text: bool = False  # where the words are given, say exactly those (see `Prompts.hold_text`)
    seed: int = 0  # of the first input; the next ones follow
    batch_size: int = 8  # inputs that run together
    # As the released code does: the last position of an answer is dropped even where the limit ended it, texts keep
    # their chain of thought and stray special tokens, no speech is a second of silence, and the history of a
    # conversation does not close the assistant's turn.
    reference_quirks: bool = False

    def __post_init__(self) -> None:
        self._require(0 < self.max_seconds <= 1e6, "max_seconds", "a positive number up to 1e6")
        longest = f"0..max_seconds ({self.max_seconds})"
        self._require(0 <= self.min_seconds <= self.max_seconds, "min_seconds", longest)
        self._positive("max_text", "batch_size", *([] if self.max_new is None else ["max_new"]))
        self._require(0 <= self.seed < 2**32, "seed", "an integer in 0..2^32-1")


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskRequest:
    """One input of a task; `TASKS` says which fields a task needs and takes."""

    task: str  # a key of `TASKS`
    audio: np.ndarray | None = None  # recording to transcribe, answer, continue, ...
    text: str | None = None  # what to say, or the question
    instruction: str | None = None  # style of speech, or what the examples do
    voice: np.ndarray | None = None  # recording whose voice to take
    voice_text: str | None = None  # what is said in it
    system: str | None = None  # how to behave
    # Earlier turns, the user's and the assistant's alternately. In a dialogue the user's are waves and the assistant's
    # (text, wave); else the user's are waves or texts and the assistant's texts.
    turns: tuple[Any, ...] = ()
    history: tuple[Prompt, ...] = ()  # earlier turns as an earlier call's output holds them in `history`
    examples: tuple[tuple[np.ndarray, np.ndarray, str], ...] = ()  # (input wave, output wave, words of the output)
    thinking: bool = False  # let the model think before it answers
    template: int | None = None  # which of the published wordings (an index); drawn by the seed otherwise
    settings: GenerationSettings | None = None  # instead of those of the call

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        task = TASKS[self.task]
        for f in dataclasses.fields(self)[1:-1]:
            value = getattr(self, f.name)
            given = value is not None and value is not False and not (isinstance(value, tuple) and not value)
            if f.name in task.needs and not given:
                raise ConfigError(f"{self.task}: {f.name} is missing")
            if given and f.name not in task.needs + task.takes:
                raise ConfigError(f"{self.task}: takes no {f.name}")
        if self.history and (self.turns or self.system or self.voice is not None):
            raise ConfigError(f"{self.task}: turns, system and voice belong to the first turn, which the history holds")
        if len(self.turns) % 2:
            raise ConfigError("turns: expected pairs of a user's turn and an assistant's")


@dataclass(frozen=True, eq=False)
class SpeechOutput:
    """The answer to one input."""

    text: str  # generated text (empty for a continuation)
    codes_MR: np.ndarray  # uint16, generated frames
    # float32 [S], generated speech; where the answer goes on after a recording, cut out of the decoding of both.
    wav: np.ndarray
    full_wav: np.ndarray  # float32 [S], with that recording; equal to `wav` otherwise
    positions: int  # generated positions
    stopped: bool  # whether the model ended the answer itself, before its limit
    seed: int  # all draws follow from it
    thinking: str  # generated chain of thought
    history: tuple[Prompt, ...]  # the turns of the conversation so far, this one last: prompt and answer
    task: str  # a key of `TASKS`
    settings: GenerationSettings


class Batch(NamedTuple):
    """Answers to requests that ran together."""

    numbers: list[int]  # which of the requests of the call they answer
    outputs: list[SpeechOutput]
    timing: Timing  # of this batch; encoding is done before the first and counted there


def run_tasks(
    model: SpeechModel,
    requests: Sequence[TaskRequest],
    settings: GenerationSettings = GenerationSettings(),
    bucket: Bucket | None = None,
) -> tuple[list[SpeechOutput], Timing]:
    """Answers requests of any tasks, lengths and samplers; arguments and errors are those of `run_batches`.

    Returns:
        One output per request, in order, and the time it took.
    """
    outputs, timing = dict[int, SpeechOutput](), Timing()
    for batch in run_batches(model, requests, settings, bucket):
        outputs |= zip(batch.numbers, batch.outputs, strict=True)
        timing += batch.timing
    return [outputs[number] for number in range(len(requests))], timing


def run_batches(
    model: SpeechModel,
    requests: Sequence[TaskRequest],
    settings: GenerationSettings = GenerationSettings(),
    bucket: Bucket | None = None,
) -> Iterator[Batch]:
    """`run_tasks`, batch by batch as they are done; requests with prompts of similar length share a batch.

    Args:
        settings: of the requests without settings of their own, and the batch size of the call.
        bucket: padded sizes of every batch. In one bucket an answer is the same bit for bit whatever runs beside it; in
            another, and by default in the smallest that holds each batch, the same up to the rounding of sums.

    Raises:
        ConfigError: a request is impossible, or the bucket too small; nothing has been generated.
    """
    started = time.perf_counter()
    plans = []
    for number, request in enumerate(requests):
        own = request.settings or dataclasses.replace(settings, seed=(settings.seed + number) % 2**32)
        try:
            plans.append(_plan(model, request, own))
            model.generator.check(plans[-1].generation)
        except ValueError as error:
            raise ConfigError(f"request {number}: {error}" if len(requests) > 1 else str(error)) from None
    order = sorted(range(len(plans)), key=lambda i: len(plans[i].task.prompt.text))
    size = settings.batch_size
    batches = [sorted(order[first : first + size]) for first in range(0, len(order), size)]
    buckets = [model.generator.bucket_of([plans[i].generation for i in batch], bucket) for batch in batches]
    encoding = Timing(encode_seconds=time.perf_counter() - started)
    for numbers, padded in zip(batches, buckets, strict=True):
        results, timing = model.generator.generate([plans[i].generation for i in numbers], padded)
        started = time.perf_counter()
        outputs = [_output(model, plans[i], result) for i, result in zip(numbers, results, strict=True)]
        spoken = sum(len(output.wav) for output in outputs) / model.codec.config.mel.sample_rate
        vocoding = Timing(vocode_seconds=time.perf_counter() - started, audio_seconds=spoken)
        yield Batch(numbers, outputs, encoding + timing + vocoding)
        encoding = Timing()


def generate_speech_continuation(
    model: SpeechModel, prompts: Iterable[np.ndarray], settings: GenerationSettings = GenerationSettings()
) -> tuple[list[SpeechOutput], Timing]:
    """Lets the model go on speaking after waves of at least one patch (0.16 s) each."""
    return run_tasks(model, [TaskRequest(task="continue", audio=wav) for wav in prompts], settings)


def generate_tts(
    model: SpeechModel, texts: Iterable[str], settings: GenerationSettings = GenerationSettings()
) -> tuple[list[SpeechOutput], Timing]:
    """Speaks texts."""
    return run_tasks(model, [TaskRequest(task="tts", text=text) for text in texts], settings)


def transcribe(
    model: SpeechModel, wavs: Iterable[np.ndarray], settings: GenerationSettings = GenerationSettings()
) -> tuple[list[SpeechOutput], Timing]:
    """Writes down what is said in waves."""
    return run_tasks(model, [TaskRequest(task="asr", audio=wav) for wav in wavs], settings)


# ----------------------------------------------------------------------------------------------------------
# A request before and after generation


@dataclass(frozen=True, eq=False)
class _Plan:
    request: TaskRequest
    settings: GenerationSettings
    task: TaskPrompt
    generation: Request
    before_MR: np.ndarray  # frames that the answer's speech follows on


def _plan(model: SpeechModel, r: TaskRequest, settings: GenerationSettings) -> _Plan:
    """Encodes what a request holds and lays out its prompt."""
    prompts = model.layouts
    G, R = model.generator.config.group_size, model.generator.config.num_channels

    def codes(wav: np.ndarray) -> np.ndarray:
        wav = np.asarray(wav)
        return wav if wav.ndim == 2 else model.codec.encode([wav], num_levels=R)[0]

    def turn(content: Any) -> Any:
        if isinstance(content, str):
            return content
        return Stream(content[0], codes(content[1])) if isinstance(content, tuple) else codes(content)

    audio: Any = None if r.audio is None else codes(r.audio)
    voice: Any = None if r.voice is None else codes(r.voice)
    text: Any = r.text
    instruction: Any = r.instruction
    history = functools.reduce(operator.add, r.history) if r.history else None
    before: np.ndarray = np.zeros((0, R), np.uint16)
    wording: dict[str, Any] = {"template": r.template, "seed": settings.seed}
    match r.task:
        case "asr":
            task = prompts.asr(audio, **wording)
        case "tts":
            task = prompts.tts(text, **wording)
        case "instruct-tts":
            task = prompts.instruct_tts(text, r.instruction, voice, **wording)
        case "understand":
            task = prompts.understanding(audio, text, r.thinking)
        case "dialogue":
            task = prompts.spoken_dialogue([*map(turn, r.turns), audio], r.system, voice, history)
        case "speech-to-text" | "chat":
            last = text if audio is None else audio
            task = prompts.written_dialogue([*map(turn, r.turns), last], r.thinking, history)
        case "few-shot":
            examples = [(codes(given), Stream(words, codes(reply))) for given, reply, words in r.examples]
            task = prompts.few_shot(instruction, examples, audio)
        case "continue":
            task, before = prompts.continuation(audio), audio
        case "clone":
            task = prompts.clone(text, voice, r.voice_text, **wording)
            before = before if r.voice_text is None else voice
    if settings.force_text:
        task = prompts.hold_text(task)
    rate, speaks = model.patches_per_second, TASKS[r.task].speaks
    max_new = math.ceil(settings.max_seconds * rate) if speaks else 0
    if r.task != "continue":
        max_new += len(task.text) + len(task.forced_ids) + 3 if task.text else settings.max_text
    max_new += settings.max_text if task.thinking else 0
    generation = Request(
        prompt=task.prompt,
        max_new=settings.max_new or max_new,
        min_new=math.ceil(settings.min_seconds * rate) if speaks else 0,
        stop_ids=task.stop_ids,
        allowed_ids=task.allowed_ids if settings.constrain or settings.force_text else None,
        forced_ids=task.forced_ids,
        text_sampling=settings.text_sampling or task.text_sampling,
        patch_sampling=settings.patch_sampling,
        seed=settings.seed,
    )
    return _Plan(r, settings, task, generation, before[: len(before) // G * G, :R].astype(np.uint16))


def _output(model: SpeechModel, plan: _Plan, result: Generated) -> SpeechOutput:
    settings, task, special = plan.settings, plan.task, model.tokenizer.special
    quirks, speaks = settings.reference_quirks, TASKS[plan.request.task].speaks
    ids = result.text[:-1] if quirks else result.text
    # Speech and its words stand between the first of these, or from the beginning or to the end where there is none.
    begins, ends = (np.flatnonzero(ids == special[name]) for name in ("<|sostm|>", "<|eostm|>"))
    first, last = int(begins[0]) + 1 if len(begins) else 0, int(ends[0]) if len(ends) else len(ids)
    is_patch = ids == model.generator.config.empty_id
    spoken = (np.arange(len(ids)) >= first) & (np.arange(len(ids)) < last) & is_patch & speaks
    codes_MR = result.patches[: is_patch.sum()][spoken[is_patch]].reshape(-1, result.patches.shape[-1])
    codes_MR = codes_MR[: math.ceil(settings.max_seconds * model.codec.config.frame_rate)].astype(np.uint16)
    full_wav = model.codec.decode(np.concatenate([plan.before_MR, codes_MR]))
    wav = full_wav[len(plan.before_MR) * model.codec.config.samples_per_code :]
    if quirks:
        text, thinking = _published_text(model.tokenizer, ids), ""
        if speaks and not len(codes_MR):
            wav = full_wav = np.zeros(model.codec.config.mel.sample_rate, np.float32)
    else:
        thinking, text = words(model.tokenizer, ids[:first]), words(model.tokenizer, ids[first:last])
        if task.thinking and not first:  # an answer in writing, or a chain of thought that the limit cut off
            thinking, _, text = text.partition("</think>")
        thinking, text = thinking.strip().removesuffix("</think>").strip(), text.strip()
    answer, earlier = Prompt(result.text, result.patches), plan.request.history
    if TASKS[plan.request.task].converses and not quirks:
        answer = model.layouts.closed(answer)
    said = sum(len(turn.text) for turn in earlier), sum(len(turn.patches) for turn in earlier)
    asked = Prompt(task.prompt.text[said[0] :], task.prompt.patches[said[1] :])
    return SpeechOutput(
        text=text,
        codes_MR=codes_MR,
        wav=wav,
        full_wav=full_wav,
        positions=len(result.text),
        stopped=result.stop_id is not None,
        seed=settings.seed,
        thinking=thinking,
        history=(*earlier, asked + answer),
        task=plan.request.task,
        settings=settings,
    )


def words(tokenizer: TextTokenizer, ids: np.ndarray) -> str:
    """Ordinary text. Special tokens go first: a character of several tokens may stand on both sides of a patch."""
    special = set(tokenizer.special.values())
    return tokenizer.decode([int(i) for i in ids if i not in special])


def _published_text(tokenizer: TextTokenizer, ids: np.ndarray) -> str:
    """Text as the released code returns it: runs of tokens between special ones, most of which stay."""
    names = {i: name for name, i in tokenizer.special.items()}
    text, run = "", list[int]()
    for i in [*ids.tolist(), None]:
        if i is None or i in names:
            text += tokenizer.decode(run) + names.get(i, "")
            run = []
        else:
            run.append(i)
    text = text.strip()
    for name in ("<|empty|>", "<|eot|>", "<|eostm|>"):
        text = text.replace(name, "")
    return text
