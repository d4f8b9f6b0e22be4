"""What identifies an audio tokenizer, and what a checkpoint tells about the prompts it knows."""

from pathlib import Path

import jax
from generation.small_speech import AUDIO, audio_variables

from mimo_jax.config_files import load_config
from mimo_jax.loading import _has_conversations
from mimo_jax.models.tokenizer.codec import Codec

CONFIGS = Path(__file__).parents[1] / "configs"


def fingerprint(params=None, codebook=None, **settings):
    variables = audio_variables()
    return Codec(AUDIO, params or variables["params"], codebook or variables["codebook"], **settings).fingerprint


def test_the_fingerprint_changes_with_encoder_codebook_and_segments_but_not_with_the_decoder():
    variables = audio_variables()

    def changed(part):
        return {**variables["params"], part: jax.tree.map(lambda x: x + 1, variables["params"][part])}

    start = fingerprint()
    assert len(start) == 16 and start == fingerprint()
    assert fingerprint(params=changed("decoder")) == start and fingerprint(params=changed("vocoder")) == start
    assert fingerprint(params=changed("encoder")) != start
    assert fingerprint(codebook=jax.tree.map(lambda x: x * 2, variables["codebook"])) != start
    assert fingerprint(segment_seconds=30.0) != start


def test_only_a_model_of_conversations_gets_their_prompts():
    assert _has_conversations(load_config(f"{CONFIGS / 'sft.py'}:tiny"))
    assert not _has_conversations(load_config(f"{CONFIGS / 'joint.py'}:tiny"))
