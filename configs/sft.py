"""Language model, post-training (report section 4): a trained or converted checkpoint is fine-tuned on conversations.

    mimo-jax convert MiMo-Audio-7B-Instruct --out runs/instruct
    mimo-jax data ingest --conversations chat.jsonl --audio-tokenizer runs/tokenizer --text-tokenizer tokenizer.json \
        --out data/shards/chat
    mimo-jax plan --config configs/sft.py:7b --topology h100:8
    mimo-jax train --config configs/sft.py:7b --workdir runs/sft --config.init_from=runs/instruct \
        --config.data.text_tokenizer=tokenizer.json --config.data.sources.chat.path=data/shards/chat \
        --config.data.validation.chat.path=data/shards/chat-validation

`7b` as published: 100 B positions, 256 rows x 8192, learning rates 5e-5 / 1e-5 / 5e-5 (patch encoder / LLM / patch
decoder; 0 freezes a part), cosine after 1 % warm-up, loss weights 100-12-8-6-4-2-2-1-1; only what the assistant says is
learned. One row per device at a time: `run.accumulation` = 256 / devices. With LoRA adapters alone are trained and
saved, and the base may be bfloat16; rates ten times higher are a good start:

    --config.lora.rank=64 --config.lora.tables=true --config.compute.param_dtype=bfloat16 \
        --config.learning_rates.llm=1e-4

Plans (`mimo-jax plan`, docs/planning.md), memory of a device and time of a step; nothing was run there (adapters: see
docs/training.md):

    7b h100:8: 28.9 GiB by arithmetic, 63.5 s
    7b v5p:2x2x2: 28.9 GiB by arithmetic, 76.9 s
    7b h100:8 lora.rank=64 lora.tables=true compute.param_dtype=bfloat16: 17.1 GiB by arithmetic, 53.1 s
    1b h100:8: 6.2 GiB by arithmetic, 5.9 s
    1b v5e:2x4: 6.2 GiB by arithmetic, 19.0 s
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
    rows, length, patches, steps, accumulation, rates = {
        "tiny": (4, 256, 192, 200, 1, LearningRates(llm=3e-4, patch_encoder=5e-4, patch_decoder=5e-4)),
        "100m": (32, 2048, 1536, 10_000, 1, LearningRates(llm=1e-4, patch_encoder=2e-4, patch_decoder=2e-4)),
        "1b": (128, 8192, 6144, 20_000, 16, LearningRates(llm=5e-5, patch_encoder=1e-4, patch_decoder=1e-4)),
        "7b": (256, 8192, 6144, 47_684, 32, LearningRates(llm=1e-5, patch_encoder=5e-5, patch_decoder=5e-5)),
    }[size]
    every = {"tiny": 100}.get(size, 500)
    formats = LayoutWeights(
        sft_asr=1.0,
        sft_tts=1.0,
        sft_instruct_tts=1.0,
        sft_understanding=1.0,
        sft_spoken_dialogue=1.0,
        sft_text_dialogue=1.0,
    )
    return to_config_dict(
        LMTrainConfig(
            model=presets.audio_lm(size),
            data=LMDataConfig(
                sources={"chat": SourceConfig("data/shards/chat", 1.0, formats)},
                validation={"chat": SourceConfig("data/shards/chat-validation", 1.0, formats)},
                text_tokenizer="data/text.model",
                rows=rows,
                row_length=length,
                row_patches=patches,
                block_documents=256 if size == "tiny" else 4096,
            ),
            run=RunConfig(steps=steps, accumulation=accumulation, eval_every=every, checkpoint_every=every),
            learning_rates=rates,
            compute=presets.compute(size),
            mesh=MeshConfig() if size in ("tiny", "100m") else MeshConfig(data=1, fsdp=-1),
            init_from="runs/joint",
        )
    )
