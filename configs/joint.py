"""Language model, stage 2: understanding and generation (report section 3). Text and 8 audio channels.

    mimo-jax train --config configs/joint.py:tiny --workdir runs/joint \
        --config.init_from=runs/understanding --config.data.text_tokenizer=data/text.model \
        --config.data.sources.speech.path=data/shards/speech --config.data.sources.text.path=data/shards/text \
        --config.data.validation.speech.path=data/shards/speech-validation

`7b` as published: 2048 rows x 8192 positions, 5 T positions (2.6 T text, 2.4 T audio, about 107 million hours),
learning rates 2e-4 / 3e-5 / 2e-4 (patch encoder / LLM / patch decoder), cosine after 1 % warm-up, loss
weights 100-12-8-6-4-2-2-1-1. The smaller sizes are trained from scratch here and have their own rates.

Plans (`mimo-jax plan`, docs/planning.md), memory of a device and time of a step; nothing was run there:

    7b v5p:8x8x4: 12.0 GiB compiled, 17.8 s
    7b v5e:16x16: 11.8 GiB compiled, 45.0 s
    7b v6e:16x16: 12.2 GiB compiled, 12.9 s
    7b v5e:16x16 slices=2 run.accumulation=4: 11.8 GiB compiled, 22.5 s
    1b v5e:8x8: 7.5 GiB compiled, 8.4 s
    1b v5p:4x4x4: 8.7 GiB by arithmetic, 3.1 s
    1b v6e:8x8: 8.7 GiB by arithmetic, 2.7 s
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
    rows, length, patches, steps, rates = {
        "tiny": (4, 256, 192, 260, LearningRates(llm=1e-3, patch_encoder=2e-3, patch_decoder=2e-3)),
        "100m": (64, 2048, 1536, 40_000, LearningRates(llm=5e-4, patch_encoder=1e-3, patch_decoder=1e-3)),
        "1b": (512, 8192, 4608, 100_000, LearningRates(llm=2e-4, patch_encoder=4e-4, patch_decoder=4e-4)),
        "7b": (2048, 8192, 4608, 298_023, LearningRates(llm=3e-5, patch_encoder=2e-4, patch_decoder=2e-4)),
    }[size]
    # 1b, 7b: up to 56 % of the positions are patches; in the published data it is 2.4 of 5 T.
    accumulation = {"1b": 4, "7b": 8}.get(size, 1)  # two rows per device at a time on 64 devices, one on 256
    every = {"tiny": 130}.get(size, 1000)
    speech = LayoutWeights(continuation=0.3, interleaved=0.2, asr=0.15, tts=0.2, caption=0.05, instruct_tts=0.1)
    text_share = 2.6 / 5.0  # of the positions, as published
    if size == "tiny":
        text_share = 0.2  # the tiny run has minutes, and its text is a few sentences
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
            # In so few steps the published weight of `<|empty|>` targets teaches no change from text to speech.
            loss=LMLossConfig(empty_weight=0.1) if size == "tiny" else LMLossConfig(),
            learning_rates=rates,
            compute=presets.compute(size),
            mesh={"1b": MeshConfig(data=-1, fsdp=8), "7b": MeshConfig(data=-1, fsdp=32)}.get(size, MeshConfig()),
            init_from="runs/understanding",
        )
    )
