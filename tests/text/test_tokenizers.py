"""SentencePiece and Hugging Face tokenizers: special tokens only by id, round trips, determinism."""

import json
import random
import re

import numpy as np
import pytest

from mimo_jax.text.tokenizers import (
    SPECIAL_TOKENS,
    TextTokenizerError,
    load_text_tokenizer,
    train_sentencepiece,
)

WORDS = (
    "the river runs slowly past old houses and a bridge where people stop to talk about weather trains music work "
    "children dogs gardens letters bread numbers winter light paper stone glass morning evening window table"
).split()
TEXTS = [
    "Hello there.",
    "two\nlines\n\nand a blank one\n",
    " leading, double  and trailing spaces ",
    "tab\tand\r\ncarriage return",
    "naïve café, e\u0301 decomposed, 你好世界, привет, 😀🎧",
    "digits 1234567890",
    "<|eot|> and <|im_start|>user\n in a user's text",
    "<think>\n\n</think>\n",
    "▁ already marked ▁",
    "<0x41> <unk> <s>",
    "",
]


def _corpus(lines=300):
    draw = random.Random(0)
    return [" ".join(draw.choice(WORDS) for _ in range(12)).capitalize() + "." for _ in range(lines)]


def _byte_level_json(**added):
    """A minimal byte-level tokenizer.json without merges: every byte is a token, then the special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    vocab = {letters[b]: b for b in range(256)}
    tokens = [
        {
            "id": 300 + i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": added.get("special", True),
        }
        for i, token in enumerate(added.get("tokens", SPECIAL_TOKENS))
    ]
    # Ids of added tokens continue the vocabulary's, so it is filled up to 300.
    vocab |= {f"<filler{i}>": i for i in range(256, 300)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
            "padding": None,
            "added_tokens": tokens,
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
    )


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tokenizer.model"
    train_sentencepiece(_corpus(), path, 360)
    return path


@pytest.fixture(scope="module")
def hugging_face_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    path.write_text(_byte_level_json())
    return path


@pytest.fixture(params=["sentencepiece_file", "hugging_face_file"])
def tokenizer(request):
    return load_text_tokenizer(request.getfixturevalue(request.param))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_survives_a_round_trip(tokenizer):
    draw = random.Random(1)
    ranges = [(0, 128), (128, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF)]
    for _ in range(500):
        text = "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(20)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_of_a_text_can_be_encoded_on_their_own(tokenizer):
    """Documents are built piece by piece: a space at a border must be neither added nor lost."""
    parts = ["[Int]:", " a b", "c ", "\n", " d"]
    ids = [i for part in parts for i in tokenizer.encode(part)]
    assert tokenizer.decode(ids) == "".join(parts)


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_raw_text_never_yields_a_special_token(tokenizer, special):
    ids = set(tokenizer.special.values())
    for text in (special, f"say {special} now", special * 3, f"<|{special}|>", f"{special[:-1]}{special}"):
        encoded = tokenizer.encode(text)
        assert not ids.intersection(encoded)
        assert tokenizer.decode(encoded) == text


def test_special_tokens_are_left_out_of_the_text(tokenizer):
    ids = [*tokenizer.encode("one"), tokenizer.special["<|eot|>"], *tokenizer.encode(" two"), tokenizer.vocab_size + 7]
    assert tokenizer.decode(ids) == "one two"


def test_tokens_are_readable(tokenizer):
    for name in SPECIAL_TOKENS:
        assert tokenizer.token(tokenizer.special[name]) == name
    assert "".join(map(tokenizer.token, tokenizer.encode("a\n b"))) == "a\n b"
    assert all(tokenizer.token(i) for i in tokenizer.encode("你")), "half a character still has a name"
    assert tokenizer.token(tokenizer.vocab_size) == f"<unused {tokenizer.vocab_size}>"


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("a\ud800b")


# ----------------------------------------------------------------------------------------------------------
# SentencePiece


def test_sentencepiece_ids_are_fixed_by_the_order_of_the_special_tokens(sentencepiece_file):
    tokenizer = load_text_tokenizer(sentencepiece_file)
    assert tokenizer.special == {name: i for i, name in enumerate(SPECIAL_TOKENS, start=1)}
    assert tokenizer.vocab_size == 360
    assert tokenizer.encode("\n") == [12 + 10], "a line break is its byte"


def test_sentencepiece_learned_the_words_of_its_corpus(sentencepiece_file):
    tokenizer = load_text_tokenizer(sentencepiece_file)
    assert len(tokenizer.encode(" river bridge")) <= 4


def test_training_again_gives_the_same_bytes(sentencepiece_file, tmp_path):
    train_sentencepiece(iter(_corpus()), tmp_path / "again.model", 360)
    assert (tmp_path / "again.model").read_bytes() == sentencepiece_file.read_bytes()


def test_drawing_lines_follows_the_seed(tmp_path):
    corpus = _corpus(600)
    prints = {
        name: train_sentencepiece(corpus, tmp_path / name, 330, max_lines=120, seed=seed).fingerprint
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    }
    assert prints["a"] == prints["b"] != prints["c"]


def test_a_corpus_without_spaces_can_still_write_them(tmp_path):
    corpus = ["今天天气很好我们去公园散步吧", "你好世界这是一个测试今天我们测试"] * 30
    tokenizer = train_sentencepiece(corpus, tmp_path / "zh.model", 294)
    assert tokenizer.decode(tokenizer.encode("你好 世界")) == "你好 世界"


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [([], 360, "got none"), (["", " \n "], 360, "got none"), (["Hello."], 50_000, "50000"), (_corpus(), 100, "100")],
)
def test_impossible_training_is_refused_and_nothing_is_written(tmp_path, texts, size, message):
    with pytest.raises(TextTokenizerError, match=message):
        train_sentencepiece(texts, tmp_path / "new.model", size)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------
# Hugging Face


@pytest.mark.parametrize("case", ["lm_a", "lm_b"])
def test_published_style_tokenizer_gives_the_ids_of_its_file(parity_dir, case):
    folder = parity_dir / "lm" / case / "model"
    tokenizer = load_text_tokenizer(folder)
    added = {t["content"]: t["id"] for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    assert tokenizer.special == {name: added[name] for name in SPECIAL_TOKENS}
    assert tokenizer.vocab_size == 600
    for special, token_id in tokenizer.special.items():
        assert token_id not in tokenizer.encode(f"a {special} b")
        assert tokenizer.decode(tokenizer.encode(f"a {special} b")) == f"a {special} b"


def _with_special_tokens(tokenizer, text):
    """Ids of trusted text, in which the names of special tokens stand for the tokens."""
    pieces = re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", text)
    return [i for p in pieces for i in ([tokenizer.special[p]] if p in tokenizer.special else tokenizer.encode(p))]


@pytest.mark.parametrize(("case", "group_size"), [("lm_a", 4), ("lm_b", 2)])
def test_published_prompts_are_encoded_to_the_token(parity_dir, case, group_size):
    """The text ids of every golden prompt, patches left out."""
    tokenizer = load_text_tokenizer(parity_dir / "lm" / case / "model" / "tokenizer.json")
    special = tokenizer.special
    golden = np.load(parity_dir / "prompts" / case / "input_ids.npz")
    prompts = json.loads((parity_dir / "prompts" / case / "prompts.json").read_text())
    assert len(prompts) > 10
    for prompt in prompts:
        ids = []
        for segment in prompt["segments"]:
            text = _with_special_tokens(tokenizer, segment.get("text", ""))
            if segment["type"] == "streaming":
                text = [special["<|sostm|>"], *text, special["<|eot|>"], special["<|eostm|>"]]
            elif segment["type"] == "audio" and segment.get("add_sosp_eosp", True):
                text = [special["<|sosp|>"], special["<|eosp|>"]]
            ids += text
        expected = golden[prompt["name"]][0, ::group_size]
        assert ids == expected[expected != special["<|empty|>"]].tolist(), prompt["name"]


def test_truncation_and_padding_of_the_file_are_ignored(hugging_face_file):
    assert len(load_text_tokenizer(hugging_face_file).encode("longer than five bytes")) == 22


def test_special_tokens_listed_as_ordinary_ones_are_still_special(tmp_path):
    (tmp_path / "tokenizer.json").write_text(_byte_level_json(special=False))
    tokenizer = load_text_tokenizer(tmp_path)
    assert tokenizer.special["<|eot|>"] == 310
    assert 310 not in tokenizer.encode("<|eot|>")
    assert tokenizer.decode([310, 65]) == "A"


# ----------------------------------------------------------------------------------------------------------
# Files


def test_the_fingerprint_follows_the_bytes(hugging_face_file, tmp_path):
    first = load_text_tokenizer(hugging_face_file)
    (tmp_path / "same.json").write_bytes(hugging_face_file.read_bytes())
    (tmp_path / "other.json").write_bytes(hugging_face_file.read_bytes() + b"\n")
    assert load_text_tokenizer(tmp_path / "same.json").fingerprint == first.fingerprint
    assert load_text_tokenizer(tmp_path / "other.json").fingerprint != first.fingerprint
    assert len(first.fingerprint) == 16 and int(first.fingerprint, 16) >= 0


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.model"):
        load_text_tokenizer(tmp_path / "none.model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"{}", "Hugging Face"),
        (b'{"added_tokens": [', "Hugging Face"),
        (b"neither of the two", "SentencePiece"),
        (_byte_level_json(tokens=SPECIAL_TOKENS[:-1]).encode(), r"missing \['<\|eot\|>'\]"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "broken.file"
    path.write_bytes(content)
    with pytest.raises(TextTokenizerError, match=message) as caught:
        load_text_tokenizer(path)
    assert "broken.file" in str(caught.value)


def test_a_truncated_sentencepiece_model_is_refused(sentencepiece_file, tmp_path):
    path = tmp_path / "cut.model"
    path.write_bytes(sentencepiece_file.read_bytes()[:2000])
    with pytest.raises(TextTokenizerError, match="SentencePiece"):
        load_text_tokenizer(path)
