"""Text-only pre-training: the language model that the audio stages start from.

    mimo-jax train --config configs/text.py:tiny --workdir runs/text \
        --config.data.sources.text.path=data/shards/text --config.data.text_tokenizer=data/text.model \
        --config.data.validation.text.path=data/shards/text-validation

The published system starts from MiMo-7B-Base; this config trains such a start. Budgets and learning rates are ours.

Plans (`mimo-jax plan`, docs/planning.md), memory of a device and time of a step; nothing was run there:

    7b v5p:8x8x4: 11.5 GiB by arithmetic, 13.3 s
    7b v5e:16x16: 11.5 GiB by arithmetic, 32.9 s
    1b v5e:8x8: 6.7 GiB by arithmetic, 5.0 s
"""

from ml_collections import ConfigDict

from mimo_jax import presets
from mimo_jax.config import (
    LayoutWeights,
    LearningRates,
    LMDataConfig,
    LMLossConfig,
    LMTrainConfig,
    MeshConfig,
    RunConfig,
    SourceConfig,
)
from mimo_jax.config_files import to_config_dict


def get_config(size: str | None = None) -> ConfigDict:
    size = presets.check_size(size)
    rows, length, steps, learning_rate = {
        "tiny": (4, 256, 80, 2e-3),
        "100m": (64, 2048, 20_000, 1e-3),
        "1b": (512, 8192, 50_000, 4e-4),
        "7b": (2048, 8192, 500_000, 1.5e-4),
    }[size]
    accumulation = {"1b": 4, "7b": 8}.get(size, 1)  # two rows per device at a time on 64 devices, one on 256
    every = {"tiny": 40}.get(size, 1000)
    text = LayoutWeights(text=1.0)
    return to_config_dict(
        LMTrainConfig(
            model=presets.audio_lm(size),
            data=LMDataConfig(
                sources={"text": SourceConfig("data/shards/text", 1.0, text)},
                validation={"text": SourceConfig("data/shards/text-validation", 1.0, text)},
                text_tokenizer="data/text.model",
                rows=rows,
                row_length=length,
                row_patches=0,
                block_documents=256 if size == "tiny" else 4096,
            ),
            run=RunConfig(
                steps=steps,
                accumulation=accumulation,
                eval_every=every,
                checkpoint_every=every,
                grace_seconds=180.0 if size == "7b" else 45.0,  # longer than two steps
            ),
            learning_rates=LearningRates(llm=learning_rate),
            loss=LMLossConfig(text_weight=1.0, channel_weights=(0.0,) * 8),
            compute=presets.compute(size),
            mesh={"1b": MeshConfig(data=-1, fsdp=8), "7b": MeshConfig(data=-1, fsdp=32)}.get(size, MeshConfig()),
        )
    )
