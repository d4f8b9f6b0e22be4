"""Text tokenizers behind one interface: SentencePiece models, trained here, and Hugging Face `tokenizer.json` files.

Both hold the special tokens of the system, and neither ever makes one out of raw text: user text that reads `<|eot|>`
is encoded as the ordinary characters it consists of. Sequences are built by concatenating `encode(...)` lists and ids
from `special`, so `encode` adds nothing (no prefix space, no begin or end of text).
"""

from __future__ import annotations

import abc
import hashlib
import io
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path

from mimo_jax.atomic import atomic_write

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|sosp|>",
    "<|eosp|>",
    "<|empty|>",
    "<|Human|>",
    "<|SpeechLM|>",
    "<|sostm|>",
    "<|eostm|>",
    "<|eot|>",
)

_SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character, so the character itself needs care


class TextTokenizerError(ValueError):
    """A text tokenizer cannot be read or trained. The message names the file and what was expected."""


class TextTokenizer(abc.ABC):
    """Text to ids and back; `load_text_tokenizer` makes one."""

    name: str  # path of the file, for messages
    fingerprint: str  # first 16 hexadecimal digits of the SHA-256 of the file
    special: dict[str, int]  # id of each of `SPECIAL_TOKENS`
    vocab_size: int  # largest id + 1

    def __init__(self, content: bytes, name: str) -> None:
        self.name = name
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of raw text, none of them a special token's; raises UnicodeEncodeError for a lone surrogate."""
        text.encode()
        return self._encode(text)

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of raw text that is valid Unicode."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of a sequence of ids; special tokens and ids that stand for nothing are left out."""

    @abc.abstractmethod
    def _entry(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token."""

    def token(self, token_id: int) -> str:
        """One token for a person to read: its text where that is whole characters, else the vocabulary's spelling."""
        if not 0 <= token_id < self.vocab_size:
            return f"<unused {token_id}>"
        text = self.decode([token_id])
        return text if text and "\ufffd" not in text else self._entry(token_id)

    def _check_special(self, found: dict[str, int]) -> dict[str, int]:
        """Checks that all special tokens exist and that raw text cannot produce them."""
        missing = [t for t in SPECIAL_TOKENS if t not in found]
        if missing:
            raise TextTokenizerError(f"{self.name}: expected the special tokens of the system, missing {missing}")
        ids = set(found.values())
        for token in SPECIAL_TOKENS:
            if ids.intersection(self.encode(token)):
                raise TextTokenizerError(f"{self.name}: expected {token!r} to be a special token, but text yields it")
        return {t: found[t] for t in SPECIAL_TOKENS}


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece model with the special tokens as control symbols and with byte fallback."""

    def __init__(self, content: bytes, name: str) -> None:
        import sentencepiece

        super().__init__(content, name)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise TextTokenizerError(f"{name}: expected a SentencePiece model ({error})") from None
        self.vocab_size = self._model.get_piece_size()
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        if not all(map(self._model.is_byte, mark)):
            raise TextTokenizerError(f"{name}: expected a SentencePiece model with byte fallback")
        self._mark = mark
        control = {t: self._model.piece_to_id(t) for t in SPECIAL_TOKENS}
        self.special = self._check_special({t: i for t, i in control.items() if self._model.is_control(i)})

    def _encode(self, text: str) -> list[int]:
        first, *rest = text.split(_SPACE_MARK)
        ids = list(self._model.encode(first))
        for part in rest:
            ids += self._mark
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._model.decode([int(i) for i in ids if 0 < i < self.vocab_size]))

    def _entry(self, token_id: int) -> str:
        return str(self._model.id_to_piece(token_id))


class HuggingFaceTokenizer(TextTokenizer):
    """A Hugging Face `tokenizer.json`, with the ids it gives."""

    def __init__(self, content: bytes, name: str) -> None:
        import tokenizers

        super().__init__(content, name)
        try:
            values = json.loads(content)
            added = values["added_tokens"]
            for token in added:
                # Some published files list these as ordinary added tokens, which raw text would then yield.
                token["special"] = token["special"] or token["content"] in SPECIAL_TOKENS
            self._model = tokenizers.Tokenizer.from_str(json.dumps(values))
        except Exception as error:  # the library raises bare Exceptions
            raise TextTokenizerError(f"{name}: expected a Hugging Face tokenizer.json ({error})") from None
        self._model.encode_special_tokens = True  # "encode them like other text", not "find them in text"
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.special = self._check_special({t["content"]: t["id"] for t in added if t["special"]})

    def _encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._model.decode([int(i) for i in ids if i >= 0], skip_special_tokens=True))

    def _entry(self, token_id: int) -> str:
        entry = self._model.id_to_token(token_id)
        return f"<unused {token_id}>" if entry is None else str(entry)


def load_text_tokenizer(path: str | os.PathLike[str]) -> TextTokenizer:
    """Loads a SentencePiece model or a Hugging Face `tokenizer.json`, told apart by their first byte.

    Args:
        path: the file, or a folder that holds `tokenizer.json`.

    Raises:
        FileNotFoundError: there is no such file.
        TextTokenizerError: the file is neither, or lacks a special token.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such text tokenizer (expected a SentencePiece model or a tokenizer.json)")
    content = file.read_bytes()
    if not content:
        raise TextTokenizerError(f"{file}: expected a SentencePiece model or a tokenizer.json, got an empty file")
    kind = HuggingFaceTokenizer if content.lstrip()[:1] == b"{" else SentencePieceTokenizer
    return kind(content, str(file))


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike[str],
    vocab_size: int,
    *,
    character_coverage: float = 0.9995,
    max_lines: int = 2_000_000,
    seed: int = 0,
) -> TextTokenizer:
    """Trains a unigram SentencePiece model and writes it to `path`; the same texts and settings give the same bytes.

    Ids: 0 is "unknown" (never produced, because of byte fallback), 1..11 are `SPECIAL_TOKENS` in order, then 256 bytes,
    then the pieces. Text is not normalised and no space is added or removed, so `decode(encode(text)) == text`. Digits
    are split, and a line break is always the token of its byte.

    Args:
        vocab_size: all ids, special tokens and bytes included.
        character_coverage: share of the characters that get a piece of their own; the rest falls back to bytes.
        max_lines: of a larger corpus, this many lines are drawn at random.

    Raises:
        TextTokenizerError: the corpus is empty, or too small or too rich in characters for `vocab_size`.
    """
    import sentencepiece

    lines = _draw_lines(texts, max_lines, seed)
    if not lines:
        raise TextTokenizerError("training a text tokenizer: expected some text, got none")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            control_symbols=list(SPECIAL_TOKENS),
            required_chars=_SPACE_MARK,  # a corpus without spaces must still be able to write one
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=65_536,
            num_threads=4,  # fixed, since sums over threads depend on their number
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TextTokenizerError(f"training a text tokenizer with vocab_size {vocab_size}: {error}") from None
    content = model.getvalue()
    atomic_write(path, content)
    return SentencePieceTokenizer(content, str(path))


def _draw_lines(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Up to `count` lines of the texts, each equally likely (reservoir sampling), blank ones left out."""
    draw = random.Random(seed)
    chosen: list[str] = []
    seen = 0
    for text in texts:
        # What the model handles apart from its pieces must not become part of one.
        for line in text.replace(_SPACE_MARK, " ").replace("\0", "").splitlines():
            if not line.strip():
                continue
            seen += 1
            if len(chosen) < count:
                chosen.append(line)
            elif (place := draw.randrange(seen)) < count:
                chosen[place] = line
    return chosen
