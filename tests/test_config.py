"""Settings: published sizes to the parameter, overrides, and refusals that name the setting."""

import json
from pathlib import Path

import pytest

from mimo_jax import config as c
from mimo_jax import config_files as files
from mimo_jax import presets, verbs

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("tokenizer", "tokenizer_adversarial", "text", "understanding", "joint", "sft")


def spec(stage: str, size: str = "tiny") -> str:
    return f"{CONFIGS / stage}.py:{size}"


def load(stage: str, *overrides: str):
    return files.load_config(spec(stage), [f"--config.{o}" for o in overrides])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", presets.SIZES)
def test_every_config_file_is_valid_at_every_size(stage, size):
    config = files.load_config(spec(stage, size), [])
    assert config.job == {"tokenizer": "tokenizer", "tokenizer_adversarial": "tokenizer_adversarial"}.get(
        stage, "language_model"
    )
    audio = config.model if stage.startswith("tokenizer") else None
    if audio is not None:
        assert audio.rvq.num_levels == 20
    else:
        assert (
            config.model.num_channels == 8 and config.model.delays == tuple(range(8)) and config.model.num_steps == 11
        )


def test_7b_has_the_published_parameter_counts():
    lm = presets.audio_lm("7b")
    assert lm.num_llm_params() == 7_622_619_136
    assert lm.num_params() == 8_018_587_648
    assert lm.patch_encoder.num_params() == 100_695_040
    assert lm.patch_decoder.num_params() == 268_518_400
    assert presets.audio_tokenizer("7b").num_params() == pytest.approx(1.29e9, rel=0.005)


def test_7b_has_the_published_bitrates():
    tokenizer = presets.audio_tokenizer("7b")
    assert tokenizer.frame_rate == 25.0
    assert tokenizer.bitrate(8) == 1550.0
    assert tokenizer.bitrate() == 3650.0


def test_7b_joint_holds_the_published_schedule():
    joint = files.load_config(spec("joint", "7b"), [])
    assert joint.data.rows * joint.data.row_length == 16_777_216
    assert joint.learning_rates == c.LearningRates(llm=3e-5, patch_encoder=2e-4, patch_decoder=2e-4)
    assert (joint.loss.text_weight, *joint.loss.channel_weights) == (100, 12, 8, 6, 4, 2, 2, 1, 1)
    assert joint.optimizer.schedule == "cosine" and joint.optimizer.warmup_fraction == 0.01
    understanding = files.load_config(spec("understanding", "7b"), [])
    assert understanding.optimizer.schedule == "constant" and not understanding.loss.trains_audio
    sft = files.load_config(spec("sft", "7b"), [])
    assert sft.data.rows * sft.data.row_length == 2_097_152
    assert sft.learning_rates == c.LearningRates(llm=1e-5, patch_encoder=5e-5, patch_decoder=5e-5)
    assert sft.loss == joint.loss and sft.optimizer == joint.optimizer


def test_flops_per_position_counts_two_per_weight_and_the_patch_towers():
    lm = presets.audio_lm("7b")
    text = lm.flops_per_position(1, 0.0)
    embedding = lm.vocab_size * lm.llm.d_model
    vectors = lm.llm.num_layers * (2 * lm.llm.d_model + (32 + 8 + 8) * 128) + lm.llm.d_model
    attention = 4 * lm.llm.num_layers * 32 * 128
    assert text == 2.0 * (lm.num_llm_params() - embedding - vectors) + attention
    assert lm.flops_per_position(8192, 1.0, generate=False) > lm.flops_per_position(8192, 0.0)
    assert lm.flops_per_position(8192, 1.0) > lm.flops_per_position(8192, 1.0, generate=False)


def test_overrides_set_numbers_tuples_switches_and_nested_sources():
    config = load(
        "joint",
        "run.steps=7",
        "learning_rates.llm=1e-4",
        "loss.channel_weights=(1, 2., 3,4,5,6,7,8)",
        "data.target_conditioning=false",
        "data.sources.speech.path=/elsewhere/speech=1",
        "data.sources.speech.layouts.asr=2",
        "compute.dtype=bfloat16",
        "init_from=",
    )
    assert config.run.steps == 7 and config.learning_rates.llm == 1e-4
    assert config.loss.channel_weights == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    assert config.data.target_conditioning is False
    assert config.data.sources["speech"].path == "/elsewhere/speech=1"
    assert config.data.sources["speech"].layouts.asr == 2.0
    assert config.compute.dtype == "bfloat16" and config.init_from == ""


def test_the_length_can_be_given_in_tokens():
    config = files.load_config(spec("joint", "7b"), ["--config.run.steps=0", "--config.run.tokens=5_000_000_000_000"])
    assert config.run.steps == 298_024 and config.tokens_per_step == 16_777_216
    assert load("joint", "run.steps=0", "run.tokens=5e5").run.tokens == 500_000
    assert files.from_config_dict(json.loads(files.to_json(config))) == config
    speech = load("tokenizer", "run.steps=0", "run.tokens=1000000")
    assert speech.run.steps == -(-1_000_000 // (speech.data.rows * speech.data.row_codes))
    assert verbs.derived_figures(config)["positions in all"] == 298_024 * 16_777_216


def test_an_override_can_add_a_source():
    config = load(
        "joint", "data.sources.song.path=/x", "data.sources.song.weight=1", "data.sources.song.layouts.continuation=1"
    )
    assert config.data.sources["song"] == c.SourceConfig("/x", 1.0, c.LayoutWeights(continuation=1.0))


def test_weights_of_sources_may_change_at_token_counts():
    config = load("joint", "data.sources.text.changes=1e9:0.5,2e9:0")
    assert config.data.sources["text"].changes == ((1e9, 0.5), (2e9, 0.0))
    assert files.from_config_dict(json.loads(files.to_json(config))) == config
    assert files.from_config_dict(files.to_config_dict(config)) == config


def test_optional_settings_take_none_and_values():
    assert load("tokenizer", "model.mel.f_max=8000").model.mel.f_max == 8000.0
    assert load("tokenizer", "model.mel.f_max=None").model.mel.f_max is None
    assert load("tokenizer", "model.encoder_skip_layer=none").model.encoder_skip_layer is None
    assert load("tokenizer", "model.encoder_skip_layer=2").model.encoder_skip_layer == 2


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("joint", "run.stepz=7", r"config\.run\.stepz: unknown setting; did you mean steps\?"),
        ("joint", "nothing=7", r"config\.nothing: unknown setting; known are compute, data"),
        ("joint", "run.steps=many", r"config\.run\.steps: expected an integer, got 'many'"),
        ("joint", "run.steps=1.5", r"config\.run\.steps: expected an integer"),
        ("joint", "run.steps=0", r"^config\.run\.steps: expected a positive integer"),
        ("joint", "run.tokens=3000", r"^config\.run\.steps: expected 0 beside run\.tokens, or the 3 steps .*, got 260"),
        ("joint", "run.steps=1e10", r"^config\.run\.steps: expected fewer than 2\^31"),
        ("joint", "run.hang_seconds=1e300", r"^config\.run\.hang_seconds: .* below 1e9"),
        ("text", "data.sources.text.changes=1e3:0", r"data\.sources: .* positive weight from 1,000 tokens on, got \[0"),
        ("joint", "optimizer.spike_window=99999999999", r"^config\.optimizer\.spike_window: expected 2\.\.2\^20 steps"),
        ("joint", "run.tokens=-1", r"^config\.run\.tokens: expected a non-negative"),
        ("joint", "optimizer.warmup_tokens=1000000", r"^config\.optimizer\.warmup_tokens: expected fewer than the 26"),
        ("joint", "optimizer.b1=2", r"^config\.optimizer\.b1: expected a number in \[0, 1\), got 2"),
        ("joint", "optimizer.b2=1", r"^config\.optimizer\.b2: expected a number in \[0, 1\)"),
        ("joint", "optimizer.eps=-1", r"^config\.optimizer\.eps: expected a positive number"),
        ("joint", "optimizer.clip_norm=0", r"^config\.optimizer\.clip_norm: expected a positive number"),
        ("tokenizer", "optimizer.weight_decay=-0.1", r"^config\.optimizer\.weight_decay: expected a non-negative"),
        ("joint", "run.eval_batches=-1", r"^config\.run\.eval_batches: expected a non-negative integer"),
        ("joint", "run.data_threads=-1", r"^config\.run\.data_threads: expected a non-negative integer"),
        ("joint", "run=3", r"config\.run: this is a group"),
        ("joint", "run.steps.x=3", r"config\.run\.steps: this is a single setting"),
        ("joint", "data.rows=0", r"^config\.data\.rows: expected a positive integer"),
        ("joint", "data.row_patches=100000", r"^config\.data\.row_patches: expected 0\.\.row_length"),
        ("joint", "data.row_patches=0", r"^config\.data\.row_patches: expected a positive patch budget"),
        ("joint", "data.target_conditioning=7", r"config\.data\.target_conditioning: expected true or false"),
        (
            "joint",
            "data.sources.song.path=/x",
            r"config\.data\.sources\.song\.(weight|layouts): this setting is missing",
        ),
        ("joint", "data.sources.speech.weight=-1", r"^config\.data\.sources\.speech\.weight: expected a non-negative"),
        ("joint", "data.sources.text.changes=2e9:1,1e9:0", r"^config\.data\.sources\.text\.changes: .* in ascending"),
        ("joint", "data.sources.text.changes=2e9", r"^config\.data\.sources\.text\.changes: .*\(tokens, weight\)"),
        ("joint", "data.validation.speech.changes=2e9:1", r"config.*data\.validation\.speech\.changes: expected none"),
        ("joint", "learning_rates.llm=-1", r"^config\.learning_rates\.llm: expected a non-negative"),
        ("joint", "learning_rates.llm=nan", r"^config\.learning_rates\.llm: expected a finite number"),
        ("text", "learning_rates.patch_decoder=1e-3", r"^config\.learning_rates\.patch_decoder: expected 0, since no"),
        ("joint", "mesh.fsdp=0", r"^config\.mesh: expected positive axis sizes"),
        ("joint", "run.accumulation=3", r"^config\.run\.accumulation: expected a divisor of data\.rows"),
        ("joint", "loss.channel_weights=1,2", r"^config\.loss\.channel_weights: expected one weight for each of 8"),
        ("joint", "loss.text_weight=-1", r"^config\.loss: expected non-negative weights"),
        ("joint", "optimizer.schedule=linear", r"config\.optimizer\.schedule: expected one of 'constant', 'cosine'"),
        ("joint", "compute.dtype=float16", r"config\.compute\.dtype: expected one of"),
        ("joint", "model.llm.num_heads=5", r"^config\.model\.llm\.num_kv_heads: expected a divisor of num_heads 5"),
        ("joint", "model.empty_id=99999999", r"^config\.model\.empty_id: expected an id below vocab_size"),
        ("joint", "job=tokenizer", r"config\.job: expected one of 'language_model'"),
        (
            "tokenizer",
            "model.rvq.codebook_sizes=(70000,)",
            r"config\.model\.rvq\.codebook_sizes: expected sizes that fit",
        ),
        ("tokenizer", "model.mel.f_max=13000", r"^config\.model\.mel\.f_max: expected f_min < f_max"),
    ],
)
def test_a_wrong_override_is_refused_by_name(stage, override, message):
    with pytest.raises(c.ConfigError, match=message):
        load(stage, override)


@pytest.mark.parametrize("flag", ["--other=1", "run.steps=3", "--config.run.steps"])
def test_a_flag_that_is_no_override_is_refused(flag):
    with pytest.raises(c.ConfigError, match="expected --config.KEY=VALUE"):
        files.load_config(spec("joint"), [flag])


def test_a_wrong_file_or_size_is_refused(tmp_path):
    with pytest.raises(c.ConfigError, match="there is no file .*nowhere.py"):
        files.load_config("nowhere.py:tiny", [])
    for wrong in (spec("joint", "huge"), str(CONFIGS / "joint.py")):
        with pytest.raises(c.ConfigError, match="one of tiny, 100m, 1b, 7b"):
            files.load_config(wrong, [])
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(size):\n    return 1 / 0\n")
    with pytest.raises(c.ConfigError, match=r"broken\.py:tiny: the config file fails: ZeroDivisionError"):
        files.load_config(f"{broken}:tiny", [])
    broken.write_text(
        "import ml_collections\ndef get_config(size):\n    return ml_collections.ConfigDict({'job': 'nap'})\n"
    )
    with pytest.raises(c.ConfigError, match=r"config\.job: expected one of"):
        files.load_config(f"{broken}:tiny", [])


@pytest.mark.parametrize("stage", STAGES)
def test_json_and_config_dict_give_the_same_config_back(stage):
    config = load(stage)
    assert files.from_config_dict(files.to_config_dict(config)) == config
    assert files.from_config_dict(json.loads(files.to_json(config))) == config


def test_stored_json_with_a_setting_of_another_version_is_refused():
    stored = json.loads(files.to_json(load("joint")))
    stored["mesh"]["fsdpp"] = 1
    with pytest.raises(c.ConfigError, match=r"config\.mesh\.fsdpp: unknown setting"):
        files.from_config_dict(stored)
