"""A checkpoint counts only if it is whole; a broken one must neither be loaded nor take an older one with it."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from training.toy import make_config

from mimo_jax import cli
from mimo_jax.config import ConfigError, LearningRates, MeshConfig, RunConfig
from mimo_jax.sharding import make_mesh
from mimo_jax.training import checkpoint
from mimo_jax.training.checkpoint import CheckpointError, CheckpointStore, check_same_run, load_params, make_meta

CONFIG = make_config(10)
SHAPES = {"llm": (8, 12), "patch_encoder": (4, 8), "patch_decoder": (16,)}


def values(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {group: {"kernel": jnp.asarray(rng.standard_normal(s, np.float32))} for group, s in SHAPES.items()}


def save(store: CheckpointStore, step: int, groups=("llm",), config=CONFIG, loss=None, bad=0) -> None:
    count = {"positions": 1.0 * step}
    params = values(step)
    store.save(
        step,
        {"params": params, "codebook": {}},
        {"step": jnp.int32(step), "optimizer": {"mu": values(step + 100)}},
        make_meta(step, config, {"step": step}, {"data": "d"}, list(groups), count, None, loss, bad),
    )


@pytest.fixture
def saved(tmp_path):
    """A run with checkpoints of steps 1, 2 and 3."""
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(store, step)
    store.close()
    return tmp_path


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_byte(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def steps(workdir) -> list[int]:
    return checkpoint.good_steps(workdir / "checkpoints")


def test_loads_what_was_saved(saved):
    config, variables, meta = load_params(saved)
    assert config == CONFIG and meta["step"] == 3 and variables["codebook"] == {}
    jax.tree.map(np.testing.assert_array_equal, variables["params"], values(3))
    assert meta["data_state"] == {"step": 3} and meta["counters"] == {"positions": 3.0}
    for place in (saved, saved / "checkpoints"):
        assert load_params(place, step=2)[2]["step"] == 2
    assert load_params(saved / "checkpoints" / "1")[2]["step"] == 1


@pytest.mark.parametrize("sizes", [(4, 1), (2, 2), (1, 4)])
def test_restores_onto_another_mesh(saved, sizes):
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1]))
    cut = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def abstract(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    store = CheckpointStore(saved)
    variables, progress = store.restore(
        store.find(),
        {"params": abstract(values(0), cut), "codebook": {}},
        {"step": abstract(jnp.int32(0), whole), "optimizer": {"mu": abstract(values(0), cut)}},
    )
    store.close()
    assert variables["params"]["llm"]["kernel"].sharding == cut
    jax.tree.map(np.testing.assert_array_equal, variables["params"], values(3))
    jax.tree.map(np.testing.assert_array_equal, progress["optimizer"]["mu"], values(103))


def test_state_may_be_overwritten_as_soon_as_save_returns(tmp_path):
    store = CheckpointStore(tmp_path)
    big = jnp.arange(2_000_000, dtype=jnp.float32)
    update = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    store.save(1, {"params": {"llm": {"kernel": big}}, "codebook": {}}, {"step": jnp.int32(1)}, {})
    jax.block_until_ready(update(big))
    store.wait()
    shapes = checkpoint.saved_shapes(store.find())
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
    loaded = checkpoint.read_variables(store.find(), abstract)["params"]["llm"]["kernel"]
    store.close()
    np.testing.assert_array_equal(loaded, np.arange(2_000_000, dtype=np.float32))


def test_the_names_of_a_step_are_on_disk_with_its_marker(tmp_path, monkeypatch):
    synced, sync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), sync(file)))
    step = tmp_path / "5"
    (step / "variables" / "array").mkdir(parents=True)
    (step / "variables" / "array" / "0.0").write_bytes(b"x")
    checkpoint.write_marker(step)
    assert {path.stat().st_ino for path in (tmp_path, step, *step.rglob("*"))} <= synced


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "extra", "marker"])
@pytest.mark.parametrize("item", ["variables", "optimizer", "meta"])
def test_damaged_latest_checkpoint_falls_back_to_the_one_before(saved, item, damage):
    latest = saved / "checkpoints" / "3"
    path = largest_file(latest / item)
    if damage == "flip":
        flip_a_byte(path)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "delete":
        path.unlink()
    elif damage == "extra":
        (path.parent / "stranger").write_text("x")
    else:
        (latest / "commit.json").write_text('{"format": 1, "files"')
    if item == "optimizer" and damage in ("flip", "truncate"):  # inference does not read the moments
        assert load_params(saved)[2]["step"] == 3
        with pytest.warns(UserWarning, match="passed over"):
            assert checkpoint.find(saved).name == "2"
        return
    with pytest.warns(UserWarning, match="passed over"):
        _, variables, meta = load_params(saved)
    assert meta["step"] == 2
    jax.tree.map(np.testing.assert_array_equal, variables["params"], values(2))
    with pytest.raises(CheckpointError, match=str(latest)):
        load_params(saved, step=3)


def test_training_moves_a_damaged_checkpoint_aside_and_goes_back(saved):
    flip_a_byte(largest_file(saved / "checkpoints" / "3" / "variables"))
    store = CheckpointStore(saved)
    with pytest.warns(UserWarning, match="damaged"):
        assert store.find().name == "2"
    assert (saved / "checkpoints" / "3.damaged").is_dir() and steps(saved) == [1, 2]
    save(store, 3)
    store.close()
    assert load_params(saved)[2]["step"] == 3


def test_when_all_are_damaged_training_stops_instead_of_starting_over(saved):
    for step in (1, 2, 3):
        flip_a_byte(largest_file(saved / "checkpoints" / str(step) / "variables"))
    store = CheckpointStore(saved)
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CheckpointError, match="every checkpoint is damaged"),
    ):
        store.find()
    store.close()
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(CheckpointError, match="damaged"):
        load_params(saved)


def test_step_without_marker_is_ignored_and_cleaned_away(saved):
    (saved / "checkpoints" / "3" / "commit.json").unlink()
    shutil.copytree(saved / "checkpoints" / "2" / "meta", saved / "checkpoints" / "4.orbax-checkpoint-tmp" / "meta")
    assert load_params(saved)[2]["step"] == 2
    with pytest.warns(UserWarning, match="unfinished checkpoint removed") as warned:
        store = CheckpointStore(saved)
    assert {str(w.message).split("/")[-1] for w in warned} == {"3", "4.orbax-checkpoint-tmp"}
    assert store.find().name == "2"
    store.close()
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["1", "2"]


def test_keeps_the_newest_only(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        save(store, step)
    store.close()
    assert steps(tmp_path) == [15, 20]


def test_the_newest_from_before_bad_steps_stays_as_long_as_there_is_no_newer_one(tmp_path):
    store, left = CheckpointStore(tmp_path, keep=1), []
    for step, bad in ((5, 0), (10, 1), (15, 6), (20, 0)):
        save(store, step, bad=bad)
        store.wait()
        left.append(steps(tmp_path))
    store.close()
    assert left == [[5], [5, 10], [5, 15], [20]]


def test_keeps_the_first_beyond_each_multiple_of_tokens_and_the_best_also_after_a_restart(tmp_path):
    """A step has 8 rows x 16 positions; steps 9 and 15 are the first saved at 850 and 1,700 of them or more."""
    losses = {6: 2.0, 9: 4.0, 12: 1.0, 15: None, 18: 3.0}
    for step, loss in losses.items():  # every save is by a process of its own
        store = CheckpointStore(tmp_path, 1, keep_every_tokens=850, keep_best=2)
        save(store, step, loss=loss)
        store.close()
    assert steps(tmp_path) == [6, 9, 12, 15, 18]
    store = CheckpointStore(tmp_path, 1, keep_every_tokens=850, keep_best=2)
    save(store, 19, loss=1.5)
    store.close()
    assert steps(tmp_path) == [9, 12, 15, 19], "6 and 18 are neither new, nor the first of a multiple, nor good"
    reasons = checkpoint.reasons_to_keep(checkpoint.read_metas(tmp_path / "checkpoints"), 1, 850, 2)
    every = ["every 850 tokens"]
    assert reasons == {9: every, 12: ["best 1"], 15: every, 19: ["newest", "best 2"]}
    (tmp_path / "checkpoints" / "9" / "meta" / "metadata").write_text("{")
    store = CheckpointStore(tmp_path, 1)
    save(store, 20)
    store.close()
    assert steps(tmp_path) == [9, 20], "what cannot be read is not removed"


def test_inspect_lists_the_steps_their_states_and_why_they_are_kept(saved, capsys):
    (saved / "checkpoints" / "1" / "commit.json").unlink()
    flip_a_byte(largest_file(saved / "checkpoints" / "3" / "optimizer"))
    assert cli.main(["checkpoint", "inspect", str(saved)]) == 0
    _, head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "state", "size", "tokens", "validation", "loss", "kept", "as"]
    assert [row.split()[:2] for row in rows] == [["1", "incomplete"], ["2", "complete"], ["3", "complete"]]
    assert [row.split()[-1] for row in rows] == ["-", "3", "newest"] and " 256 " in rows[1]
    assert cli.main(["checkpoint", "inspect", str(saved), "--verify"]) == 1
    rows = capsys.readouterr().out.splitlines()[2:]
    assert "intact" in rows[1] and "damaged (optimizer/" in rows[2] and "SHA-256 differs" in rows[2]
    with pytest.warns(UserWarning, match="passed over"):
        CheckpointStore(saved).find()
    assert cli.main(["checkpoint", "inspect", str(saved), "--verify"]) == 0, "what is set aside is no news"
    assert "damaged, set aside" in capsys.readouterr().out


def test_inspect_says_what_is_in_a_step(saved, capsys):
    assert cli.main(["checkpoint", "inspect", str(saved), "--step", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["job"], found["step"], found["tokens"]) == ("language_model", 2, 256)
    assert found["counters"] == {"positions": 2.0}
    assert found["data_state"] == {"step": 2} and found["data_fingerprint"] == {"data": "d"}
    assert found["groups"]["patch_encoder"] == {"arrays": 1, "parameters": 32, "dtype": "float32", "bytes": 128}
    assert cli.main(["checkpoint", "inspect", str(saved / "checkpoints" / "2")]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["patch_encoder", "1", "32", "float32", "0.0", "MB"] in lines and ["trained", "groups", "llm"] in lines


def test_inspect_names_what_is_missing_in_one_line(saved, tmp_path, capsys):
    (saved / "checkpoints" / "2" / "meta" / "metadata").unlink()
    (saved / "checkpoints" / "1" / "meta" / "metadata").write_text("[]")
    (saved / "empty").mkdir()
    for arguments, message in (
        (["--step", "7"], "no checkpoint of step 7; there are [1, 2, 3]"),
        (["--step", "2"], "expected the JSON of a checkpoint"),
        (["--step", "1"], "expected a JSON object, got list"),
        (["empty"], "expected the folder of a run with checkpoints under"),
    ):
        path = saved / arguments.pop() if arguments == ["empty"] else saved
        assert cli.main(["checkpoint", "inspect", str(path), *arguments]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
    assert cli.main(["checkpoint", "inspect", str(saved)]) == 0
    assert cli.main(["checkpoint", "inspect", str(saved), "--step", "1", "--verify"]) == 1, "it is known to be damaged"
    assert "damaged (meta/metadata" in capsys.readouterr().out


def test_empty_folder_has_no_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.find() is None
    store.close()
    with pytest.raises(CheckpointError, match="there is none"):
        load_params(tmp_path)
    with pytest.raises(CheckpointError, match="there is none"):
        load_params(tmp_path / "nowhere")


def save_and_wait(store: CheckpointStore, variables: dict) -> None:
    """A failure may show at once or in the background."""
    store.save(2, variables, {"step": jnp.int32(2)}, {})
    store.wait()


def test_a_full_disk_is_named_before_anything_is_written(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    store.wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(CheckpointError, match=r"free disk space, got 0 MB; .*untouched: steps \[1\]"):
        save(store, 2)
    store.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_save_that_fails_leaves_older_checkpoints_alone(tmp_path):
    """A limit on the size of files stands in for a full disk: the system refuses to write on."""
    store = CheckpointStore(tmp_path)
    save(store, 1)
    store.wait()
    big = {"params": {"llm": {"kernel": jax.random.normal(jax.random.key(0), (1000, 1000))}}, "codebook": {}}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written.*File too large.*untouched: steps \[1\]"):
            save_and_wait(store, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    store.close()
    assert load_params(tmp_path)[2]["step"] == 1
    again = CheckpointStore(tmp_path)  # and the rest of the failed one is cleaned away
    again.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


META = make_meta(5, CONFIG, {}, {"tokenizer": "abc", "sources": {"speech": "123"}}, ["llm"], {})


def test_run_goes_on_with_other_length_rhythm_mesh_and_file_places():
    run = dataclasses.replace(
        CONFIG.run, steps=99, log_every=7, checkpoint_every=11, keep_checkpoints=1, data_threads=9, keep_best=2
    )
    run = dataclasses.replace(run, keep_every_tokens=5, rollback_after=2, max_rollbacks=9, grace_seconds=9.0)
    data = dataclasses.replace(CONFIG.data, text_tokenizer="/elsewhere/text.model")
    compute = dataclasses.replace(CONFIG.compute, remat="full", attention="dense")
    mesh = MeshConfig(data=1, fsdp=4)
    config = dataclasses.replace(CONFIG, run=run, data=data, compute=compute, mesh=mesh, init_from="/elsewhere")
    check_same_run(META, config, META["data_fingerprint"], "ckpt")


def test_run_goes_on_when_the_package_has_learnt_a_setting_that_keeps_its_default():
    old = json.loads(json.dumps(META))
    del old["config"]["optimizer"]["final_fraction"]
    check_same_run(old, CONFIG, META["data_fingerprint"], "ckpt")
    changed = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, final_fraction=0.5))
    with pytest.raises(CheckpointError, match=r"optimizer\.final_fraction was 0\.1 and is 0\.5"):
        check_same_run(old, changed, META["data_fingerprint"], "ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": dataclasses.replace(CONFIG.optimizer, b2=0.99)}, r"optimizer\.b2 was 0\.95 and is 0\.99"),
        ({"run": RunConfig(steps=10, seed=3)}, r"run\.seed was 0 and is 3"),
        ({"learning_rates": LearningRates(llm=1.0)}, r"learning_rates\.llm"),
        ({"data": dataclasses.replace(CONFIG.data, row_length=32)}, r"data\.row_length was 16 and is 32"),
        ({"compute": dataclasses.replace(CONFIG.compute, scan_layers=False)}, r"compute\.scan_layers"),
        (
            {"model": dataclasses.replace(CONFIG.model, llm=dataclasses.replace(CONFIG.model.llm, d_ff=8))},
            r"model\.llm\.d_ff was 512 and is 8",
        ),
    ],
)
def test_run_does_not_go_on_with_other_settings(change, message):
    with pytest.raises(CheckpointError, match=message):
        check_same_run(META, dataclasses.replace(CONFIG, **change), META["data_fingerprint"], "ckpt")


def test_run_does_not_go_on_with_other_data():
    with pytest.raises(CheckpointError, match=r"sources\.speech was '123' and is '124'") as refused:
        check_same_run(META, CONFIG, {"tokenizer": "abc", "sources": {"speech": "124"}}, "ckpt")
    assert isinstance(refused.value, ConfigError), "which ends a job with code 2: it would be refused again"
    with pytest.raises(CheckpointError, match=r"packs rows otherwise \(packing 1 before, 2 now\)"):
        check_same_run(META, CONFIG, META["data_fingerprint"] | {"packing": 2}, "ckpt")


def wanted(params: dict | None = None, sharding=None) -> dict:
    """Shapes of a new run's parameters, on one device unless told otherwise."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(lambda: values(0) if params is None else params)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)


def test_transfer_takes_the_trained_groups_only(saved):
    params = checkpoint.transfer(saved, wanted())
    assert list(params) == ["llm"]
    np.testing.assert_array_equal(params["llm"]["kernel"], values(3)["llm"]["kernel"])


def test_transfer_puts_parameters_where_the_new_run_wants_them(saved):
    cut = NamedSharding(make_mesh(MeshConfig(data=1, fsdp=4)), PartitionSpec("fsdp"))
    params = checkpoint.transfer(saved, wanted(sharding=cut))
    assert params["llm"]["kernel"].sharding == cut
    np.testing.assert_array_equal(params["llm"]["kernel"], values(3)["llm"]["kernel"])


def test_transfer_names_the_parameter_and_both_shapes(saved):
    with pytest.raises(CheckpointError, match=r"llm/kernel: expected \(8, 13\), the checkpoint has \(8, 12\)"):
        checkpoint.transfer(saved, wanted({"llm": {"kernel": jnp.zeros((8, 13))}}))
    with pytest.raises(CheckpointError, match=r"llm/bias: expected \(3,\), the checkpoint has no such parameter"):
        checkpoint.transfer(saved, wanted({"llm": {"kernel": jnp.zeros((8, 12)), "bias": jnp.zeros(3)}}))


def test_transfer_from_a_run_with_another_tokenizer_is_refused(saved):
    meta = saved / "checkpoints" / "3" / "meta" / "metadata"
    values = json.loads(meta.read_text()) | {"data_fingerprint": {"text_tokenizer": "a", "audio_tokenizer": ""}}
    meta.write_text(json.dumps(values))
    checkpoint.write_marker(saved / "checkpoints" / "3")
    assert checkpoint.transfer(saved, wanted(), {"text_tokenizer": "a", "audio_tokenizer": "b"})
    with pytest.raises(CheckpointError, match="trained with text tokenizer a, the data of this run are of b"):
        checkpoint.transfer(saved, wanted(), {"text_tokenizer": "b", "audio_tokenizer": "b"})


def test_transfer_from_a_run_that_trained_nothing_of_this_model_is_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1, groups=["audio_tokenizer"])
    store.close()
    with pytest.raises(CheckpointError, match="no trained group"):
        checkpoint.transfer(tmp_path, wanted())


def test_meta_is_plain_json_with_revision_and_version(saved):
    meta = json.loads((saved / "checkpoints" / "3" / "meta" / "metadata").read_text())
    assert meta["job"] == "language_model" and meta["package_version"]
    assert isinstance(meta["git_revision"], str)
