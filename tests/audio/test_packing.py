"""Layout of clips in rows."""

import numpy as np
import pytest

from mimo_jax.audio import packing
from mimo_jax.audio.features import frame_log_mel, frame_mel
from mimo_jax.config import AudioTokenizerConfig, MelConfig, TransformerConfig


def _config(pool: int = 2, **mel) -> AudioTokenizerConfig:
    stack = TransformerConfig.codec(8, 4, 2, 16, False)
    return AudioTokenizerConfig(mel=MelConfig(**mel), encoder=stack, decoder=stack, vocoder=stack, pool=pool)


PUBLISHED = _config(n_mels=16)
WIDE_WINDOW = _config(pool=1, n_fft=1024, win_length=800, n_mels=16, f_min=50, f_max=8000)


def _noise(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=n).astype(np.float32) * 0.1 for n in lengths]


def _centred_log_mel(clip: np.ndarray, mel: MelConfig) -> np.ndarray:
    """Log-mel spectrogram of a clip on its own."""
    count = len(clip) // mel.hop_length + 1
    return np.log(np.maximum(frame_mel(np.pad(clip, mel.n_fft // 2, mode="reflect"), mel, count=count), mel.floor))


@pytest.mark.parametrize("samples", [1, 239, 240, 959, 960, 961, 24_000, 72_345])
@pytest.mark.parametrize("config", [PUBLISHED, WIDE_WINDOW])
def test_lengths_follow_the_stated_formulas_and_the_padded_clip_fits_its_slot(samples, config):
    frames = samples // 240 + 1
    per_code = 4 if config.pool == 2 else 2
    codes = -(-frames // per_code)
    assert packing.num_mel_frames(samples, config) == frames
    assert packing.num_codes(samples, config) == codes
    assert packing.slot_codes(samples, config) == codes + packing.guard_codes(config)
    assert packing.slot_codes(samples, config) * config.samples_per_code >= samples + config.mel.n_fft


def test_the_published_guard_is_one_code():
    assert packing.guard_codes(PUBLISHED) == 1


@pytest.mark.parametrize("config", [PUBLISHED, WIDE_WINDOW])
def test_mel_frames_of_a_packed_clip_are_those_of_the_clip_alone(config):
    clips = _noise(5000, 720, 2399, 961)
    wav_BS, ids_BT = packing.pack_clips(clips, config)
    row_mel = np.asarray(frame_log_mel(wav_BS, config.mel))[0]
    for i, clip in enumerate(clips):
        packed, alone = row_mel[ids_BT[0] == i + 1], _centred_log_mel(clip, config.mel)
        assert packed.shape == alone.shape
        np.testing.assert_allclose(packed, alone, atol=2e-5)


def test_slots_start_at_whole_codes_and_leave_padding_between_segments():
    clips = _noise(5000, 720, 2399)
    _, ids_BT = packing.pack_clips(clips, PUBLISHED)
    start = 0
    for i, clip in enumerate(clips):
        frames = packing.num_mel_frames(len(clip), PUBLISHED)
        slot = 4 * packing.slot_codes(len(clip), PUBLISHED)
        np.testing.assert_array_equal(ids_BT[0, start : start + frames], i + 1)
        assert slot - frames >= 4 and not ids_BT[0, start + frames : start + slot].any()
        start += slot
    assert ids_BT.shape[1] == start


def test_parts_of_a_long_clip_carry_the_mel_frames_of_the_whole_clip():
    (clip,) = _noise(9000)
    padded = packing.reflect_pad(clip, PUBLISHED)
    wav_S, ids_T = packing.empty_row(16, PUBLISHED)
    first = packing.write_frames(wav_S, ids_T, 0, padded, 0, 16, 1, PUBLISHED)
    packing.write_frames(wav_S, ids_T, first, padded, 16, 22, 2, PUBLISHED)
    parts = np.asarray(frame_log_mel(wav_S, PUBLISHED.mel))[ids_T > 0]
    np.testing.assert_allclose(parts, _centred_log_mel(clip, PUBLISHED.mel), atol=2e-5)


def test_bad_input_is_refused_by_name():
    wav_S, ids_T = packing.empty_row(4, PUBLISHED)
    with pytest.raises(ValueError, match="does not fit in a row of 4"):
        packing.write_clip(wav_S, ids_T, 2, np.ones(2400, np.float32), 1, PUBLISHED)
    with pytest.raises(ValueError, match="at least one sample"):
        packing.pack_clips([np.zeros(0, np.float32)], PUBLISHED)
    with pytest.raises(ValueError, match="mono"):
        packing.reflect_pad(np.zeros((10, 2), np.float32), PUBLISHED)
    with pytest.raises(ValueError, match="0 is padding"):
        packing.write_clip(wav_S, ids_T, 0, np.ones(240, np.float32), 0, PUBLISHED)
    assert not wav_S.any() and not ids_T.any()
