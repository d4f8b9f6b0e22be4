"""`mimo-jax convert`: there and back without a changed byte, text models, runs of our own, and bounded memory."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from interop.builders import (
    BF16,
    FIRST_SPECIAL,
    LM,
    TOKENIZERS,
    arrays,
    assert_same,
    read,
    tokenizer_json,
    write_model,
    write_text_model,
)

from mimo_jax import config as c
from mimo_jax import convert
from mimo_jax.cli import main
from mimo_jax.interop import published, safetensors
from mimo_jax.loading import load_codec
from mimo_jax.models.audio_lm import abstract_params
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.sharding import make_mesh, shardings
from mimo_jax.text.tokenizers import SPECIAL_TOKENS, load_text_tokenizer
from mimo_jax.training import lora
from mimo_jax.training.checkpoint import CheckpointError, CheckpointStore, find, load_params, make_meta, transfer
from mimo_jax.training.checkpoint import reference as base_reference
from mimo_jax.trees import flatten, nest

MODELS = {"audio_lm": (LM, np.float32), "audio_lm, bfloat16": (LM, BF16)} | {
    f"tokenizer, {name}": (config, np.float32) for name, config in TOKENIZERS.items()
}
LIKE = Path(__file__).with_name("like.py")


def run(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def assert_same_folder(found: Path, expected: Path) -> None:
    assert_same(read(found), read(expected))
    files = {p.name for p in expected.iterdir() if p.suffix != ".safetensors" and p.name != safetensors.INDEX}
    for name in files:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_changes_no_byte(name, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "BLOCK_BYTES", 2000)  # so that matrices and tables are cut, unevenly
    config, dtype = MODELS[name]
    folder = write_model(tmp_path / "published", config, arrays(config, dtype), eos_token_id=256)
    assert run(folder, "--out", tmp_path / "ours") == 0
    assert run(tmp_path / "ours", "--out", tmp_path / "back", "--shard-size", "0.002MB") == 0
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert_same_folder(tmp_path / "back", folder)
    assert run(tmp_path / "back", "--out", tmp_path / "again") == 0  # from shards
    assert_same(variables_of(tmp_path / "again"), variables_of(tmp_path / "ours"))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def variables_of(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in flatten(load_params(path)[1]).items()}


def test_the_goldens_go_there_and_back(parity_dir, tmp_path):
    folders = sorted(path.parent for path in parity_dir.glob("*/*/model/config.json"))
    assert len(folders) >= 4
    for i, folder in enumerate(folders):
        assert run(folder, "--out", tmp_path / f"{i}") == 0
        assert run(tmp_path / f"{i}", "--out", tmp_path / f"{i}-back") == 0
        assert_same_folder(tmp_path / f"{i}-back", folder)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A published language model in bfloat16, and its checkpoint."""
    home = tmp_path_factory.mktemp("converted")
    folder = write_model(home / "published", LM, arrays(LM, BF16))
    convert.import_published(folder, home / "ours")
    return folder, home / "ours"


def test_a_converted_checkpoint_is_one_like_any_other(converted):
    folder, ours = converted
    _, expected = published.load_lm(folder)
    config, variables, meta = load_params(ours)
    assert config == c.LMModelConfig(LM, c.ComputeConfig("bfloat16", "bfloat16"), "assets/tokenizer.json")
    assert meta["trained_groups"] == ["llm", "patch_encoder", "patch_decoder"]
    assert meta["data_fingerprint"]["text_tokenizer"] == load_text_tokenizer(ours / "assets").fingerprint
    assert_same({k: np.asarray(x) for k, x in flatten(variables["params"]).items()}, flatten(expected))
    with ocp.StandardCheckpointer() as reader:  # Orbax by itself, without being told what is there
        assert_same(flatten(reader.restore(ours.absolute() / "variables")["params"]), flatten(expected))


def test_inspect_reads_converted_weights(converted, capsys):
    for arguments in ([], ["--verify"], ["--step", "0"]):
        assert main(["checkpoint", "inspect", str(converted[1]), *arguments]) == 0
        printed = capsys.readouterr().out
        assert "patch_decoder" in printed and ("intact" if arguments == ["--verify"] else "complete") in printed
    assert main(["checkpoint", "inspect", str(converted[1]), "--step", "1"]) == 2
    assert "which is not step 1" in capsys.readouterr().err


def test_a_run_starts_from_converted_weights_on_any_mesh_in_its_own_precision(converted):
    _, expected = published.load_lm(converted[0], np.float32)
    mesh = make_mesh(c.MeshConfig(fsdp=2, tensor=2))
    boxed = abstract_params(LM, c.ComputeConfig())["params"]
    wanted = jax.tree.map(
        lambda box, s: jax.ShapeDtypeStruct(box.value.shape, box.value.dtype, sharding=s),
        boxed,
        shardings(boxed, mesh),
        is_leaf=lambda x: hasattr(x, "names"),
    )
    params = transfer(converted[1], wanted, {"text_tokenizer": "", "audio_tokenizer": "any"})
    assert_same({k: np.asarray(x) for k, x in flatten(params).items()}, flatten(expected))
    with pytest.raises(CheckpointError, match="was trained with text tokenizer"):
        transfer(converted[1], wanted, {"text_tokenizer": "another"})


def test_a_converted_tokenizer_is_a_codec(tmp_path):
    config = TOKENIZERS["published"]
    folder = write_model(tmp_path / "published", config, arrays(config))
    assert run(folder, "--out", tmp_path / "ours") == 0
    _, tree = published.load_tokenizer(folder)
    codec = load_codec(tmp_path / "ours", reference_quirks=True)
    assert codec.config == config
    assert codec.fingerprint == Codec(config, tree["params"], tree["codebook"], reference_quirks=True).fingerprint
    assert_same(
        {k: np.asarray(x) for k, x in flatten(codec.variables).items()},
        flatten({name: tree[name] for name in ("params", "codebook")}),
    )


def test_nothing_is_overwritten_and_nothing_half_made_is_left(converted, tmp_path, capsys, monkeypatch):
    folder, ours = converted
    (tmp_path / "there").mkdir()
    assert run(folder, "--out", tmp_path / "there") == 2 and "this one exists" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        for source in (folder, ours):
            assert run(source, "--out", tmp_path / "full") == 2
            assert "MB of free disk space, got 0 MB" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(convert.checkpoint, "write_marker", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(folder, "--out", tmp_path / "broken")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


_KILLED = """
import os, signal, sys
from mimo_jax import convert
convert.checkpoint.write_marker = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
convert.import_published(*sys.argv[1:])
"""


def test_the_next_call_removes_what_a_killed_one_left_and_nothing_else(converted, tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", _KILLED, converted[0], out], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and (left / "variables").is_dir()
    strangers = {f".out.{'0' * 31}g.tmp", f".other.{'0' * 32}.tmp", f".out.{'1' * 32}.tmp"}
    for name in strangers:
        (tmp_path / name).mkdir()
    with convert._locked(tmp_path / f".out.{'1' * 32}.tmp"):  # as a call that is still running does
        assert run(converted[0], "--out", out) == 0
    assert names_in(tmp_path) == {"out", *strangers}


def test_a_folder_with_a_wrong_tensor_or_a_damaged_checkpoint_is_refused(converted, tmp_path, capsys):
    folder, ours = (shutil.copytree(path, tmp_path / path.name) for path in converted)
    tensors = read(folder) | {"model.layers.0.mlp.up_proj.weight": np.zeros((5, 16), BF16)}
    (folder / safetensors.SINGLE).unlink()
    safetensors.save(folder, tensors)
    assert run(folder, "--out", tmp_path / "out") == 2
    assert "model.layers.0.mlp.up_proj.weight: found [5, 16], expected [24, 16]" in capsys.readouterr().err
    chunk = next((ours / "variables" / "params.llm.head").glob("[0-9]*"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    assert run(ours, "--out", tmp_path / "out") == 2
    assert "damaged" in capsys.readouterr().err
    assert run(tmp_path, "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------
# Text models

LLM_TENSORS = {k: v for k, v in published.to_published(arrays(LM, BF16)["params"], LM).items() if "model." in k[:6]}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 24,
    "vocab_size": 272,
    "rope_theta": 640000.0,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 256,
}
HEAD = np.random.default_rng(5).normal(size=(272, 16)).astype(BF16)


def import_text(tmp_path, values, tensors, *arguments, **options) -> tuple[int, Path]:
    folder = write_text_model(tmp_path / "text", values, tensors, **options)
    return run(folder, "--out", tmp_path / "ours", "--like", f"{LIKE}:small", *arguments), tmp_path / "ours"


def test_qwen2_becomes_the_llm_and_the_patch_codec_is_new(tmp_path, capsys):
    extra = {"model.mtp_layers.0.mlp.up_proj.weight": np.zeros((4, 4), BF16)}  # as in MiMo-7B
    status, ours = import_text(
        tmp_path, QWEN2 | {"model_type": "mimo", "attention_bias": True}, LLM_TENSORS | extra | {"lm_head.weight": HEAD}
    )
    assert status == 0
    said = capsys.readouterr().out
    assert "new special tokens: <|sosp|> 259, <|eosp|> 260, <|empty|> 261" in said
    assert "--config.model.llm.norm_eps=1e-05" in said and "--config.model.vocab_size" not in said
    config, variables, meta = load_params(ours)
    assert meta["trained_groups"] == ["llm"]
    params = variables["params"]
    expected = arrays(LM, BF16)["params"]["llm"] | {"head": HEAD.T}
    assert_same({k: np.asarray(x) for k, x in flatten(params["llm"]).items()}, flatten(expected))
    assert config.model.empty_id == FIRST_SPECIAL + SPECIAL_TOKENS.index("<|empty|>") == 261
    assert config.model.patch_encoder.norm_eps == config.model.patch_decoder.norm_eps == 1e-5
    assert load_text_tokenizer(ours / "assets").special == {t: 256 + i for i, t in enumerate(SPECIAL_TOKENS)}
    kernel = np.asarray(params["patch_decoder"]["head_0"]["kernel"], np.float32)
    assert kernel.shape == (12, 13) and 0.01 < kernel.std() < 0.03

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=here), params)
    assert list(transfer(ours, wanted)) == ["llm"]  # a run begins the rest anew

    assert run(ours, "--out", tmp_path / "back") == 0  # as an audio language model that has yet to learn to listen
    back = read(tmp_path / "back")
    assert_same({k: v for k, v in back.items() if k in LLM_TENSORS}, LLM_TENSORS)
    assert published.read_lm_config(tmp_path / "back") == config.model
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 256


def test_a_tied_head_becomes_a_copy_of_the_embedding(tmp_path, capsys):
    status, ours = import_text(tmp_path, QWEN2 | {"tie_word_embeddings": True}, LLM_TENSORS)
    assert status == 0 and "tied" in capsys.readouterr().out
    llm = load_params(ours)[1]["params"]["llm"]
    np.testing.assert_array_equal(llm["head"].T, LLM_TENSORS["model.embed_tokens.weight"])
    np.testing.assert_array_equal(llm["embedding"], LLM_TENSORS["model.embed_tokens.weight"])


def test_llama_has_no_biases_and_a_full_table_grows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "BLOCK_BYTES", 2000)
    values = {k: v for k, v in QWEN2.items() if k != "head_dim"} | {"model_type": "llama", "vocab_size": 259}
    head_dim = 4
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=[{12: 8, 24: 16}.get(n, n) if "self_attn" in name else n for n in x.shape]).astype(BF16)
        for name, x in LLM_TENSORS.items()
        if not name.endswith(".bias")
    }
    tables = {name: rng.normal(size=(259, 16)).astype(BF16) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    status, ours = import_text(tmp_path, values, tensors | tables)
    assert status == 0 and "384 rows now; the new ones are the mean of the 259" in capsys.readouterr().out
    config, variables, _ = load_params(ours)
    llm = config.model.llm
    assert (llm.head_dim, llm.q_bias, llm.k_bias, llm.v_bias, llm.out_bias) == (head_dim, False, False, False, False)
    assert config.model.vocab_size == 384
    embedding, head = (np.asarray(variables["params"]["llm"][name]) for name in ("embedding", "head"))
    for table, name in ((embedding, "model.embed_tokens.weight"), (head.T, "lm_head.weight")):
        np.testing.assert_array_equal(table[:259], tables[name])
        mean = tables[name].astype(np.float64).mean(0).astype(BF16)
        np.testing.assert_array_equal(table[259:], np.broadcast_to(mean, (125, 16)))
    capsys.readouterr()
    assert run(ours, "--out", tmp_path / "back") == 0
    assert "the LLM has no q/k/v biases, and the Qwen2 of the published code always has" in capsys.readouterr().out
    assert published.read_lm_config(tmp_path / "back") == config.model  # attention_bias survives


@pytest.mark.parametrize("known", [3, len(SPECIAL_TOKENS)])
def test_files_that_list_special_tokens_stay_only_beside_an_unchanged_tokenizer(tmp_path, capsys, known):
    folder = write_text_model(tmp_path / "text", QWEN2, LLM_TENSORS | {"lm_head.weight": HEAD}, SPECIAL_TOKENS[:known])
    lists = {"added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"}
    for name in {*lists, "merges.txt"}:
        (folder / name).write_text("{}")
    assert run(folder, "--out", tmp_path / "ours", "--like", f"{LIKE}:small") == 0
    assert ("left out" in capsys.readouterr().out) == (known == 3)
    assert run(tmp_path / "ours", "--out", tmp_path / "back") == 0
    for found in (names_in(tmp_path / "ours" / "assets"), names_in(tmp_path / "back") - {safetensors.SINGLE}):
        assert found == {"config.json", "tokenizer.json", "merges.txt"} | (lists if known > 3 else set())


@pytest.mark.parametrize(
    ("values", "tensors", "arguments", "message"),
    [
        ({}, {"model.layers.0.self_attn.q_norm.weight": np.zeros(6, BF16)}, (), "q_norm.weight [6]: unknown"),
        ({"model_type": "gemma"}, {}, (), "model_type: expected 'qwen2' or 'llama'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, {}, (), "rope_scaling: expected None"),
        ({}, {}, ("--like", ""), "--like=configs/joint.py:7b"),
        ({}, {}, ("--like", "configs/tokenizer.py:tiny"), "expected a language model config"),
    ],
)
def test_text_models_that_are_not_understood_are_refused_by_name(tmp_path, capsys, values, tensors, arguments, message):
    status, _ = import_text(tmp_path, QWEN2 | values, LLM_TENSORS | {"lm_head.weight": HEAD} | tensors, *arguments)
    assert status == 2 and message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Runs of our own


def lm_job(folder: Path, **changes) -> c.LMTrainConfig:
    speech = {"speech": c.SourceConfig("speech", 1.0, c.LayoutWeights(tts=1.0))}
    return c.LMTrainConfig(
        model=LM,
        data=c.LMDataConfig(speech, speech, str(folder / "tokenizer.json"), rows=1, row_length=8, row_patches=4),
        run=c.RunConfig(steps=1),
        learning_rates=c.LearningRates(llm=1e-3, patch_encoder=1e-3, patch_decoder=1e-3),
        loss=c.LMLossConfig(channel_weights=(1.0, 1.0, 1.0)),
        **changes,
    )


def save(workdir: Path, config, variables, base=None, fingerprint=None) -> Path:
    store = CheckpointStore(workdir)
    groups = ["llm", "patch_encoder", "patch_decoder"]
    store.save(1, variables, {"count": np.zeros(1)}, make_meta(1, config, {}, fingerprint or {}, groups, {}, base))
    store.wait()
    store.close()
    return workdir


def test_a_run_is_exported_with_the_settings_it_came_with(tmp_path):
    folder = write_model(tmp_path / "published", LM, arrays(LM), torch_dtype="bfloat16")
    tree = arrays(LM, seed=1)
    workdir = save(tmp_path / "run", lm_job(folder), tree | {"codebook": {}})
    assert run(workdir, "--out", tmp_path / "out") == 0
    assert_same(read(tmp_path / "out"), published.to_published(tree["params"], LM))
    original = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == original | {"torch_dtype": "float32"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == tokenizer_json()


def save_run(workdir: Path, folder: Path) -> Path:
    """A run with the text tokenizer of a folder."""
    fingerprint = {"text_tokenizer": load_text_tokenizer(folder).fingerprint}
    return save(workdir, lm_job(folder), arrays(LM) | {"codebook": {}}, fingerprint=fingerprint)


def test_a_run_is_not_exported_with_another_tokenizer_or_none(tmp_path, capsys, converted):
    folder = tmp_path / "data"
    folder.mkdir()
    file = folder / "tokenizer.json"
    file.write_text(tokenizer_json())
    workdir = save_run(tmp_path / "run", folder)
    expected = load_text_tokenizer(file).fingerprint
    file.write_text(tokenizer_json() + "\n")
    found = load_text_tokenizer(file).fingerprint
    assert run(workdir, "--out", tmp_path / "out") == 2
    message = f"{file}: expected the text tokenizer that the model was trained with ({expected}), got {found}"
    assert message in capsys.readouterr().err
    file.unlink()
    with pytest.raises(CheckpointError, match=f"the text tokenizer of the run is gone: {file}: no such"):
        convert.export_published(workdir, tmp_path / "out")
    ours = shutil.copytree(converted[1], tmp_path / "ours")
    (ours / "assets" / "tokenizer.json").write_text(tokenizer_json() + "\n")
    with pytest.raises(CheckpointError, match=r"assets/tokenizer.json: damaged"):
        convert.export_published(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("foreign", ["nonsense", '{"a": 1}', json.dumps(QWEN2 | {"hidden_size": 32})])
def test_a_run_takes_only_what_belongs_to_its_tokenizer(tmp_path, monkeypatch, foreign):
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.json").write_text(tokenizer_json())
    workdir = save_run(tmp_path / "run", Path())
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "vocab.json", "merges.txt"):
        Path(name).write_text(foreign)
    Path("tokenizer_config.json").write_text("{}")
    assert run(workdir, "--out", "out") == 0
    assert names_in(Path("out")) == {safetensors.SINGLE, "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads(Path("out/config.json").read_text()) == published.config_json(LM, "float32")
    Path("vocab.json").write_text(json.dumps(json.loads(tokenizer_json())["model"]["vocab"], indent=1))
    assert run(workdir, "--out", "with-vocab") == 0
    assert names_in(Path("with-vocab")) - names_in(Path("out")) == {"vocab.json", "merges.txt"}


def test_a_run_from_a_text_model_keeps_its_settings(tmp_path):
    _, ours = import_text(tmp_path, QWEN2, LLM_TENSORS | {"lm_head.weight": HEAD})
    model = load_params(ours)[0].model
    job = dataclasses.replace(lm_job(ours / "assets"), model=model)
    assert run(save(tmp_path / "run", job, arrays(model) | {"codebook": {}}), "--out", tmp_path / "out") == 0
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values == published.config_json(model, "float32") | {"eos_token_id": 256}


def test_every_exported_file_is_on_disk_before_it_has_its_name_and_the_names_are_too(converted, tmp_path, monkeypatch):
    synced, sync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), sync(file)))
    convert.export_published(converted[1], tmp_path / "out", shard_bytes=10_000)
    files = {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    assert {safetensors.INDEX, "config.json", "tokenizer.json"} <= set(files) and set(files.values()) <= synced
    assert {(tmp_path / "out").stat().st_ino, tmp_path.stat().st_ino} <= synced


@pytest.mark.parametrize("norm", ["sequence", "frame"])
def test_a_norm_that_the_published_code_does_not_know_is_said(tmp_path, norm):
    model = dataclasses.replace(TOKENIZERS["published"], decoder_norm=norm)
    convert.import_published(write_model(tmp_path / "published", model, arrays(model)), tmp_path / "ours")
    notes = convert.export_published(tmp_path / "ours", tmp_path / "back").notes
    assert ["ignores decoder_norm frame" in note for note in notes] == ([True] if norm == "frame" else [])


def test_a_run_of_the_tokenizer_is_exported_without_its_text_decoder(tmp_path):
    model = TOKENIZERS["published"]
    tree = arrays(model, seed=2)
    audio = c.AudioDataConfig("a", "b", "c", rows=1, row_codes=8, row_text=0)
    decoder = c.A2TConfig(c.TransformerConfig.qwen2(8, 1, 2, 4, 8), 30)
    job = c.TokenizerTrainConfig(model, decoder, audio, c.RunConfig(steps=1), 1e-3)
    text_decoder = {"embedding": np.zeros((30, 8), np.float32)}
    params = {"audio_tokenizer": tree["params"], "text_decoder": text_decoder}
    workdir = save(tmp_path / "run", job, {"params": params, "codebook": tree["codebook"]})
    assert run(workdir, "--out", tmp_path / "out") == 0
    assert_same(read(tmp_path / "out"), published.to_published({k: tree[k] for k in ("params", "codebook")}, model))
    assert published.read_tokenizer_config(tmp_path / "out") == model


def test_adapters_are_merged_on_export(converted, tmp_path):
    config = lm_job(
        converted[0],
        lora=c.LoRAConfig(rank=2, targets=("q", "out", "projection"), tables=True),
        init_from=str(converted[1]),
    )
    rates = dataclasses.asdict(config.learning_rates)
    shapes = lora.abstract(config.lora, rates, abstract_params(LM, c.ComputeConfig())["params"])
    rng = np.random.default_rng(3)
    learnt = jax.tree.map(
        lambda box: rng.normal(size=box.value.shape).astype(np.float32), shapes, is_leaf=lambda x: hasattr(x, "names")
    )
    base = find(converted[1])
    folder = tmp_path / "run" / "checkpoints"
    workdir = save(tmp_path / "run", config, {"params": learnt, "codebook": {}}, base_reference(base, folder))
    assert run(workdir, "--out", tmp_path / "out") == 0
    merged = load_params(workdir)[1]["params"]
    expected = published.to_published(merged, LM)
    found = read(tmp_path / "out")
    assert sorted(found) == sorted(expected) and all(x.dtype == BF16 for x in found.values())
    for name, x in expected.items():  # in another order of operations, so up to rounding
        np.testing.assert_allclose(found[name].astype(np.float32), x.astype(np.float32), rtol=2e-2, atol=1e-2)
    assert not np.array_equal(
        found["model.layers.1.self_attn.q_proj.weight"], read(converted[0])["model.layers.1.self_attn.q_proj.weight"]
    )


# ----------------------------------------------------------------------------------------------------------
# Memory


_CONVERT = """
import pathlib, sys
from mimo_jax import convert
convert.BLOCK_BYTES = 1 << 20
source, out = sys.argv[1:]
(convert.import_published if convert.is_published(source) else convert.export_published)(source, out, progress=False)
print(int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3)
"""


def _peak_mb(source, out) -> float:
    """Peak of resident memory of a process of its own; `ru_maxrss` would begin with that of its parent."""
    done = subprocess.run([sys.executable, "-c", _CONVERT, source, out], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def test_memory_is_that_of_one_layer_whatever_the_depth(tmp_path):
    peaks = {}
    for layers in (2, 14):
        config = dataclasses.replace(LM, llm=c.TransformerConfig.qwen2(512, layers, 8, 64, 4096, 8))
        zeros = {path: np.zeros(shape, BF16) for path, shape in published.shapes_of(config).items()}
        folder = write_model(tmp_path / f"{layers}", config, nest(zeros))
        zeros.clear()
        ours = tmp_path / f"{layers}-ours"
        peaks[layers] = _peak_mb(folder, ours), _peak_mb(ours, tmp_path / f"{layers}-back")
    assert (folder / safetensors.SINGLE).stat().st_size > 200e6
    assert max(deep - flat for deep, flat in zip(peaks[14], peaks[2], strict=True)) < 50, peaks
