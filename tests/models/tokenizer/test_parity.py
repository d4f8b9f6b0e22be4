"""Packed rows on recorded speech and the reference's weights: packing-invariant where the released code is not."""

import jax.numpy as jnp
import numpy as np
import pytest
from models.tokenizer.tiny import fast_jit

from mimo_jax.audio.packing import pack_clips
from mimo_jax.config import ComputeConfig
from mimo_jax.interop.published import load_tokenizer
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer


@pytest.mark.parametrize("name", ["tok_a", "tok_b"])
def test_clips_in_one_packed_row_get_the_codes_they_get_alone(parity_dir, name):
    folder = parity_dir / "tokenizer" / name
    config, variables = load_tokenizer(folder / "model")
    inputs, expected = (np.load(folder / f"batch_{kind}.npz") for kind in ("inputs", "expected"))
    wav_BS, ids_BT = pack_clips([inputs[f"wav_{i}"] for i in range(3)], config)
    model = AudioTokenizer(config, ComputeConfig())
    codes_BMR = fast_jit(lambda v, *rows: model.apply(v, *rows, method="encode"))(
        variables, jnp.asarray(wav_BS), jnp.asarray(ids_BT)
    )
    ids_M = np.asarray(ids_BT)[0, :: config.mel_frames_per_code]
    for i in range(3):
        np.testing.assert_array_equal(np.asarray(codes_BMR)[0, ids_M == i + 1].T, expected[f"codes_alone_{i}"])
