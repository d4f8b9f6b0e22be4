"""Language model, stage 1: speech understanding (report section 3). Patch encoder and LLM learn; text targets only.

    mimo-jax train --config configs/understanding.py:tiny --workdir runs/understanding \
        --config.init_from=runs/text --config.data.text_tokenizer=data/text.model \
        --config.data.sources.speech.path=data/shards/speech --config.data.sources.text.path=data/shards/text \
        --config.data.validation.speech.path=data/shards/speech-validation

`7b` as published: 2048 rows x 8192 positions, 2.6 T positions (1.2 T text, 1.4 T speech), learning rates 2e-4 (patch
encoder) and 3e-5 (LLM), constant after 1 % warm-up, loss on text alone. Those rates assume a trained text LLM to start
from; the smaller sizes are trained from scratch here and have their own.

Plans (`mimo-jax plan`, docs/planning.md), memory of a device and time of a step; nothing was run there:

    7b v5p:8x8x4: 11.9 GiB by arithmetic, 14.0 s
    7b v5e:16x16: 11.9 GiB by arithmetic, 34.7 s
    1b v5e:8x8: 7.1 GiB by arithmetic, 5.6 s
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
    OptimizerConfig,
    RunConfig,
    SourceConfig,
)
from mimo_jax.config_files import to_config_dict


def get_config(size: str | None = None) -> ConfigDict:
    size = presets.check_size(size)
    rows, length, patches, steps, encoder_rate, llm_rate = {
        "tiny": (4, 256, 192, 100, 2e-3, 1e-3),
        "100m": (64, 2048, 1536, 20_000, 1e-3, 5e-4),
        "1b": (512, 8192, 4608, 50_000, 4e-4, 2e-4),
        "7b": (2048, 8192, 4608, 154_972, 2e-4, 3e-5),
    }[size]
    # 1b, 7b: up to 56 % of the positions are patches; in the published data it is 1.4 of 2.6 T.
    accumulation = {"1b": 4, "7b": 8}.get(size, 1)  # two rows per device at a time on 64 devices, one on 256
    every = {"tiny": 50}.get(size, 1000)
    speech = LayoutWeights(interleaved=0.5, asr=0.4, caption=0.1)
    text_share = 1.2 / 2.6  # of the positions, as published
    return to_config_dict(
        LMTrainConfig(
            model=presets.audio_lm(size),
            data=LMDataConfig(
                sources={
                    "speech": SourceConfig("data/shards/speech", 1.0 - text_share, speech),
                    "text": SourceConfig("data/shards/text", text_share, LayoutWeights(text=1.0)),
                },
                validation={"speech": SourceConfig("data/shards/speech-validation", 1.0, speech)},
                text_tokenizer="data/text.model",
                rows=rows,
                row_length=length,
                row_patches=patches,
                block_documents=256 if size == "tiny" else 4096,
            ),
            run=RunConfig(
                steps=steps,
                accumulation=accumulation,
                eval_every=every,
                checkpoint_every=every,
                grace_seconds=180.0 if size == "7b" else 45.0,  # longer than two steps
            ),
            learning_rates=LearningRates(llm=llm_rate, patch_encoder=encoder_rate),
            loss=LMLossConfig(text_weight=1.0, channel_weights=(0.0,) * 8),
            optimizer=OptimizerConfig(schedule="constant"),
            compute=presets.compute(size),
            mesh={"1b": MeshConfig(data=-1, fsdp=8), "7b": MeshConfig(data=-1, fsdp=32)}.get(size, MeshConfig()),
            init_from="runs/text",
        )
    )
