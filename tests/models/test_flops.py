"""The FLOPs that a run prints, against what XLA counts in an unrolled model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mimo_jax.config import AudioLMConfig, ComputeConfig, TransformerConfig
from mimo_jax.models.audio_lm import AudioLM, abstract_params
from mimo_jax.sharding import unboxed

_STACK = TransformerConfig.qwen2
CONFIG = AudioLMConfig(
    vocab_size=1024,
    empty_id=6,
    llm=_STACK(256, 3, 4, 64, 704, num_kv_heads=2),
    patch_encoder=_STACK(128, 2, 4, 32, 384, causal=False),
    patch_decoder=_STACK(128, 2, 4, 32, 384),
    codebook_sizes=(256, 128),
    delays=(0, 1),
)
L, C = 64, 48


def forward(model: AudioLM, params, text_BL, patches_BCGR, at_BC, audio: bool):
    variables = {"params": params}
    x_BLD = model.apply(variables, text_BL, patches_BCGR, at_BC, method="embed")
    h_BLD, _ = model.apply(variables, x_BLD, method="hidden")
    out = [model.apply(variables, h_BLD, method="text_head").sum()]
    if audio:
        h_ND = h_BLD[:, :C].reshape(-1, h_BLD.shape[-1])
        patches = patches_BCGR.reshape(-1, *patches_BCGR.shape[2:])
        out += [x.sum() for x in model.apply(variables, h_ND, patches, method="patch_logits")]
    return sum(out)


@pytest.mark.parametrize(("audio", "training"), [(True, False), (False, False), (True, True)])
def test_flops_per_position_are_those_of_xla(audio, training):
    config, compute = CONFIG, ComputeConfig(scan_layers=False, attention="dense")
    model = AudioLM(config, compute)
    params = unboxed(abstract_params(config, compute))["params"]
    rows = [
        jax.ShapeDtypeStruct(shape, jnp.int32)
        for shape in ((1, L), (1, C, config.group_size, config.num_channels), (1, C))
    ]

    def function(params, *rows):
        return forward(model, params, *rows, audio=audio)

    step = jax.grad(function) if training else function
    counted = jax.jit(step).lower(params, *rows).compile().cost_analysis()["flops"]
    # Dense attention computes the masked half too: as many keys as a causal document of twice the length has on
    # average. The same holds for the T steps of the patch decoder, where it is a small part.
    expected = L * config.flops_per_position(2 * L - 1, C / L, generate=audio) * (3 if training else 1)
    assert counted == pytest.approx(expected, rel=0.05)
