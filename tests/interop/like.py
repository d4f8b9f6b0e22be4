"""Config file whose model is the tests' small one."""

from interop.builders import LM

from mimo_jax import config as c
from mimo_jax.config_files import to_config_dict


def get_config(size):
    speech = {"speech": c.SourceConfig("speech", 1.0, c.LayoutWeights(tts=1.0))}
    return to_config_dict(
        c.LMTrainConfig(
            model=LM,
            data=c.LMDataConfig(speech, speech, "text.model", rows=1, row_length=8, row_patches=4),
            run=c.RunConfig(steps=1),
            learning_rates=c.LearningRates(llm=1e-3),
            loss=c.LMLossConfig(channel_weights=(1.0, 1.0, 1.0)),
        )
    )
