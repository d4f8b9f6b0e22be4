"""Audio tokenizer, stage 1: unified representation learning (report section 2.1).

    mimo-jax train --config configs/tokenizer.py:tiny --workdir runs/tokenizer \
        --config.data.manifest=data/train.jsonl --config.data.validation=data/validation.jsonl \
        --config.data.text_tokenizer=data/text.model

Loss: 10 x audio-to-text + 1 x three-scale mel + 1 x commitment. The report states neither optimiser nor batch nor
text decoder: those values are ours. `tiny` trains on two CPU cores; the others are meant for accelerators.
"""

from ml_collections import ConfigDict

from mimo_jax import presets
from mimo_jax.config import (
    AudioDataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerTrainConfig,
)
from mimo_jax.config_files import to_config_dict


def get_config(size: str | None = None) -> ConfigDict:
    size = presets.check_size(size)
    rows, row_codes, row_text, learning_rate, steps = {
        "tiny": (4, 256, 128, 1e-3, 150),
        "100m": (32, 1500, 640, 5e-4, 100_000),
        "1b": (256, 1500, 640, 3e-4, 300_000),
        "7b": (512, 1500, 640, 2e-4, 500_000),
    }[size]
    every = {"tiny": 75}.get(size, 2000)
    return to_config_dict(
        TokenizerTrainConfig(
            model=presets.audio_tokenizer(size),
            a2t=presets.a2t_decoder(size),
            data=AudioDataConfig(
                manifest="data/train.jsonl",
                validation="data/validation.jsonl",
                text_tokenizer="data/text.model",
                rows=rows,
                row_codes=row_codes,
                row_text=row_text,
                max_seconds=10.0 if size == "tiny" else 30.0,
            ),
            run=RunConfig(steps=steps, eval_every=every, checkpoint_every=every),
            learning_rate=learning_rate,
            optimizer=OptimizerConfig(weight_decay=0.01),
            compute=presets.compute(size),
            mesh=MeshConfig() if size in ("tiny", "100m") else MeshConfig(data=-1, fsdp=8),
        )
    )
