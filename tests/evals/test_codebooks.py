"""Use of codebooks: known counts, and a whole manifest."""

import json

import numpy as np
import pytest
from generation.small_speech import AUDIO, audio_variables

from mimo_jax.audio.files import save_wav
from mimo_jax.data.manifest import Manifest
from mimo_jax.evals.codebooks import codebook_use, measure, table
from mimo_jax.models.tokenizer.codec import Codec


def test_use_of_known_codes():
    even = np.stack([np.arange(8) % 4, np.zeros(8, int)], axis=1)
    first, second = codebook_use([even, even], (8, 4))
    assert (first.used, second.used) == (0.5, 0.25)
    assert first.perplexity.value == pytest.approx(4.0) and first.bits == pytest.approx(2.0)
    assert second.perplexity.value == pytest.approx(1.0) and second.bits == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="at least one clip"):
        codebook_use([], (4,))


def test_recordings_of_a_manifest_are_encoded_and_what_cannot_be_read_is_counted(tmp_path):
    variables = audio_variables()
    codec = Codec(AUDIO, variables["params"], variables["codebook"])
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        save_wav(tmp_path / f"{name}.wav", rng.normal(0, 0.1, 12_000), 24_000)
    (tmp_path / "c.wav").write_bytes(b"no sound")
    lines = "".join(json.dumps({"audio": f"{n}.wav"}) + "\n" for n in "abc")
    (tmp_path / "m.jsonl").write_text(lines)
    found = measure(codec, Manifest(tmp_path / "m.jsonl"))
    assert found["clips"] == 2 and found["seconds"] == 1.0 and len(found["left_out"]) == 1
    assert [level["size"] for level in found["levels"]] == list(AUDIO.rvq.codebook_sizes)
    assert 0 < found["bits_per_second"] <= found["bits_per_second_at_most"]
    lines = table(found).splitlines()
    assert len(lines) == 2 + len(found["levels"]) and "2 clips" in lines[-1]
