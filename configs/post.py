"""Language model, post-training (report section 4): 100 B positions, 256 rows x 8192, every part trained, on
conditioned targets only.

    mimo-jax train --config configs/post.py:tiny --workdir runs/post \
        --config.init_from=runs/joint --config.data.text_tokenizer=data/text.model \
        --config.data.sources.speech.path=data/shards/speech --config.data.sources.text.path=data/shards/text \
        --config.data.validation.speech.path=data/shards/speech-validation

`7b` as published: learning rates 5e-5 / 1e-5 / 5e-5 (patch encoder / LLM / patch decoder), cosine after 1 % warm-up,
loss weights 100-12-8-6-4-2-2-1-1. Documents are rendered in the pre-training layouts of their tasks, with the
conditioning side taken out of the targets (`target_conditioning`).
"""

from ml_collections import ConfigDict

from mimo_jax import presets
from mimo_jax.config import (
    LayoutWeights,
    LearningRates,
    LMDataConfig,
    LMTrainConfig,
    MeshConfig,
    RunConfig,
    SourceConfig,
)
from mimo_jax.config_files import to_config_dict


def get_config(size: str | None = None) -> ConfigDict:
    size = presets.check_size(size)
    rows, length, patches, steps, rates = {
        "tiny": (4, 256, 192, 200, LearningRates(llm=3e-4, patch_encoder=5e-4, patch_decoder=5e-4)),
        "100m": (32, 2048, 1536, 10_000, LearningRates(llm=1e-4, patch_encoder=2e-4, patch_decoder=2e-4)),
        "1b": (128, 8192, 6144, 20_000, LearningRates(llm=5e-5, patch_encoder=1e-4, patch_decoder=1e-4)),
        "7b": (256, 8192, 6144, 47_684, LearningRates(llm=1e-5, patch_encoder=5e-5, patch_decoder=5e-5)),
    }[size]
    every = {"tiny": 100}.get(size, 1000)
    speech = LayoutWeights(asr=0.35, tts=0.35, caption=0.15, instruct_tts=0.15)
    return to_config_dict(
        LMTrainConfig(
            model=presets.audio_lm(size),
            data=LMDataConfig(
                sources={
                    "speech": SourceConfig("data/shards/speech", 0.8, speech),
                    "text": SourceConfig("data/shards/text", 0.2, LayoutWeights(text=1.0)),
                },
                validation={"speech": SourceConfig("data/shards/speech-validation", 1.0, speech)},
                text_tokenizer="data/text.model",
                rows=rows,
                row_length=length,
                row_patches=patches,
                block_documents=256 if size == "tiny" else 4096,
                target_conditioning=False,
            ),
            run=RunConfig(steps=steps, eval_every=every, checkpoint_every=every),
            learning_rates=rates,
            compute=presets.compute(size),
            mesh=MeshConfig() if size in ("tiny", "100m") else MeshConfig(data=-1, fsdp=32),
            init_from="runs/joint",
        )
    )
