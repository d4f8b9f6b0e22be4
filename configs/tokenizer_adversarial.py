"""Audio tokenizer, stage 2: decoder and vocoder against 5 multi-period and 5 STFT discriminators (report section 2.1).

    mimo-jax train --config configs/tokenizer_adversarial.py:tiny --workdir runs/tokenizer-adversarial \
        --config.init_from=runs/tokenizer \
        --config.data.manifest=data/train.jsonl --config.data.validation=data/validation.jsonl

Encoder and codebooks stay as stage 1 left them (`init_from`), and so do the codes. Generator: 1 x mel + 1 x adversarial
+ 2 x feature matching; hinge loss, spectral norm on every discriminator layer, no weight decay for the discriminators.
"""

from ml_collections import ConfigDict

from mimo_jax import presets
from mimo_jax.config import (
    AdversarialTrainConfig,
    AudioDataConfig,
    DiscriminatorConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
)
from mimo_jax.config_files import to_config_dict


def get_config(size: str | None = None) -> ConfigDict:
    size = presets.check_size(size)
    rows, row_codes, max_seconds, steps, learning_rate = {
        "tiny": (4, 128, 5.0, 400, 1e-4),
        "100m": (16, 64, 2.5, 200_000, 2e-4),
        "1b": (64, 64, 2.5, 300_000, 1e-4),
        "7b": (128, 64, 2.5, 500_000, 1e-4),
    }[size]
    every = {"tiny": 100}.get(size, 2000)
    tiny = DiscriminatorConfig(period_channels=(8, 16, 32, 64, 64), stft_channels=8, window_codes=16)
    return to_config_dict(
        AdversarialTrainConfig(
            model=presets.audio_tokenizer(size),
            discriminator=tiny if size == "tiny" else DiscriminatorConfig(),
            data=AudioDataConfig(
                manifest="data/train.jsonl",
                validation="data/validation.jsonl",
                text_tokenizer="",
                rows=rows,
                row_codes=row_codes,
                row_text=0,
                max_seconds=max_seconds,
            ),
            run=RunConfig(steps=steps, eval_every=every, checkpoint_every=every),
            learning_rate=learning_rate,
            discriminator_learning_rate=1e-3 if size == "tiny" else learning_rate,
            optimizer=OptimizerConfig(b1=0.8, b2=0.99, warmup_fraction=0.05 if size == "tiny" else 0.01),
            init_from="runs/tokenizer",
            compute=presets.compute(size),
            mesh=MeshConfig() if size in ("tiny", "100m") else MeshConfig(data=-1, fsdp=8),
        )
    )
