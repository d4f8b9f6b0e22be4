"""What `mimo-jax launch` hands to Slurm, GKE and xpk. The scripts are run, with stand-ins for the schedulers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mimo_jax import launching, supervisor
from mimo_jax.cli import main
from mimo_jax.config import ConfigError

ROOT = Path(__file__).parents[1]
CONFIG = f"{ROOT / 'configs' / 'joint.py'}:1b"
HOSTILE = '/data/it\'s $(touch gone) "x" {{ y }} ${HOME} $$ \\ #é: `z`'
MESH = "--config.mesh.fsdp=1"
ACCUMULATION = "--config.run.accumulation=1"  # one row for each device of the largest job here
OVERRIDES = [ACCUMULATION, f"--config.data.sources.speech.path={HOSTILE}"]
TRAIN = ["train", "--distributed", "--config", CONFIG, *OVERRIDES, "--workdir", "/data/runs/a b"]

SLURM = ["slurm", "--nodes", "4"]
GKE = ["gke", "--image", "registry.example/mimo:1", "--volume", "files:/data", "--topology"]
XPK = ["xpk", "--image", "registry.example/mimo:1", "--cluster", "tpus", "--topology"]


def rendered(capsys, *arguments: str, config: str = CONFIG, workdir: str = "/data/runs/a b") -> str:
    words = ["launch", *arguments, "--config", config, "--workdir", workdir, "--dry-run", *OVERRIDES]
    assert main(words) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments: str, config: str = CONFIG) -> str:
    assert main(["launch", *arguments, "--config", config, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a program that notes its arguments and what it reads in NAME.json, and ends with a code."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), *os.environ["PATH"].split(os.pathsep)]))

    def make(name: str, code: int = 0, reads: bool = False) -> Path:
        note = tmp_path / f"{name}.json"
        body = f"import json, sys; text = sys.stdin.read() if {reads} else ''\n"
        body += f"open({str(note)!r}, 'w').write(json.dumps([sys.argv[1:], text])); sys.exit({code})\n"
        (tmp_path / name).write_text(f"#!{sys.executable}\n{body}")
        (tmp_path / name).chmod(0o755)
        return note

    return make


# ----------------------------------------------------------------------------------------------------------
# Scripts


@pytest.mark.parametrize("arguments", [SLURM, [*XPK, "v5e:16x16"], [*XPK, "tpu7x:4x4x4", "--slices", "2"]])
def test_scripts_are_valid_shell(capsys, arguments):
    text = rendered(capsys, *arguments)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    program = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, "--severity=warning", "-"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("code", "restarted", "again"),
    [(0, 0, False), (2, 0, False), (1, 0, True), (3, 2, True), (143, 9, True), (143, 10, False), (134, 0, True)],
)
def test_slurm_script_runs_the_job_and_requeues_what_may_go_on(capsys, stand_in, monkeypatch, code, restarted, again):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarted))
    text = rendered(capsys, *SLURM)
    ran, requeued = stand_in("srun", code), stand_in("scontrol")
    assert subprocess.run(["bash"], input=text, text=True).returncode == code
    assert json.loads(ran.read_text())[0] == ["--kill-on-bad-exit=1", "mimo-jax", *TRAIN]
    assert requeued.exists() == again
    if again:
        assert json.loads(requeued.read_text())[0] == ["requeue", "17"]


def test_slurm_script_asks_for_a_process_per_gpu_and_for_a_signal_in_time(capsys):
    lines = rendered(capsys, "slurm", "--nodes=16", "--name=speech-7b", "--config.run.grace_seconds=100").splitlines()
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert asked["nodes"] == "16" and asked["job-name"] == "speech-7b" and "requeue" in asked
    assert asked["mem"] == "0", "with --exclusive alone a job has all cores, but the default memory"
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert asked["signal"] == "TERM@235", "grace time, and what one step and one checkpoint take"


def test_xpk_gets_the_job_and_the_container_the_command(capsys, stand_in, tmp_path):
    note, inside = stand_in("xpk"), stand_in("mimo-jax")
    subprocess.run(["bash"], input=rendered(capsys, *XPK, "v5p:8x8x4", "--slices=2"), text=True, check=True)
    words = json.loads(note.read_text())[0]
    assert words[:2] == ["workload", "create"]
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words[2:])
    command = flags.pop("command")
    assert flags == {
        "cluster": "tpus",
        "workload": "mimo-jax",
        "tpu-type": "v5p-4x8x8",
        "num-slices": "2",
        "docker-image": "registry.example/mimo:1",
        "max-restarts": "10",
        "restart-on-exit-codes": "1,3",
        "termination-grace-period-seconds": "180",
        "env": "JAX_COMPILATION_CACHE_DIR=/data/runs/a b/compiled",
    }
    subprocess.run(["bash", "-c", command], check=True)
    assert json.loads(inside.read_text())[0] == TRAIN and not (tmp_path / "gone").exists()


# ----------------------------------------------------------------------------------------------------------
# JobSet


def expanded(text: str) -> str:
    """What Kubernetes makes of an argument: `$$` is `$`, and `$(NAME)` stays where there is no such variable."""
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", text), "no variable is named"
    return text.replace("$$", "$")


def check_keys(values: dict, required: str, optional: str = "") -> None:
    """The fields of an object of Kubernetes: a name that it does not know is an error there."""
    assert set(required.split()) <= set(values) <= {*required.split(), *optional.split()}


@pytest.mark.parametrize(
    ("topology", "slices", "accelerator", "shape", "hosts", "chips"),
    [
        ("v5e:16x16", 1, "tpu-v5-lite-podslice", "16x16", 64, 4),
        ("v5e:16x16", 2, "tpu-v5-lite-podslice", "16x16", 64, 4),
        ("v5p:8x8x4", 1, "tpu-v5p-slice", "4x8x8", 64, 4),
        ("v5p:2x2x1", 1, "tpu-v5p-slice", "2x2x1", 1, 4),
        ("v6e:8x16", 4, "tpu-v6e-slice", "8x16", 32, 4),
        ("v6e:1x1", 1, "tpu-v6e-slice", "1x1", 1, 1),
        ("tpu7x:4x4x4", 2, "tpu7x", "4x4x4", 16, 4),
    ],
)
def test_jobset_has_a_pod_for_each_host_of_each_slice(capsys, topology, slices, accelerator, shape, hosts, chips):
    job = yaml.safe_load(rendered(capsys, *GKE, topology, f"--slices={slices}", "--name=speech", "--restarts=7", MESH))
    check_keys(job, "apiVersion kind metadata spec")
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["metadata"]["name"] == "speech"
    spec = job["spec"]
    check_keys(spec, "failurePolicy replicatedJobs", "successPolicy network startupPolicy suspend")
    check_keys(spec["failurePolicy"], "maxRestarts rules", "restartStrategy")
    assert spec["failurePolicy"]["maxRestarts"] == 7
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]

    (replicated,) = spec["replicatedJobs"]
    check_keys(replicated, "name replicas template")
    assert replicated["replicas"] == slices
    batch = replicated["template"]["spec"]
    check_keys(batch, "completionMode completions parallelism backoffLimit podFailurePolicy template")
    assert batch["completionMode"] == "Indexed" and batch["backoffLimit"] == 0
    assert batch["completions"] == batch["parallelism"] == hosts
    (rule,) = batch["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]}}

    pod = batch["template"]["spec"]
    needed = "restartPolicy terminationGracePeriodSeconds nodeSelector containers volumes"
    check_keys(pod, needed, "hostNetwork dnsPolicy")
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy asks for it"
    assert pod["terminationGracePeriodSeconds"] == 180
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    (container,) = pod["containers"]
    check_keys(container, "name image command args env resources volumeMounts")
    assert container["name"] == "train" and container["image"] == "registry.example/mimo:1"
    assert container["resources"] == {"limits": {"google.com/tpu": chips}}
    assert [container["command"], [expanded(word) for word in container["args"]]] == [
        ["mimo-jax"],
        [*TRAIN[:4], MESH, *TRAIN[4:]],
    ]
    assert container["env"] == [{"name": "JAX_COMPILATION_CACHE_DIR", "value": "/data/runs/a b/compiled"}]
    assert container["volumeMounts"] == [{"name": "files", "mountPath": "/data"}]
    assert pod["volumes"] == [{"name": "files", "persistentVolumeClaim": {"claimName": "files"}}]


# ----------------------------------------------------------------------------------------------------------
# Starting, refusing


@pytest.mark.parametrize(
    ("program", "arguments", "beginning"),
    [
        ("sbatch", SLURM, "#!/usr/bin/env bash"),
        ("kubectl", [*GKE, "v5e:16x16"], "# A training job on TPU slices under GKE"),
    ],
)
def test_a_job_is_handed_to_its_scheduler(stand_in, program, arguments, beginning):
    note = stand_in(program, 5, reads=True)
    with pytest.raises(SystemExit, match="5"):
        main(["launch", *arguments, "--config", CONFIG, "--workdir", "/data/runs/a", ACCUMULATION])
    words, text = json.loads(note.read_text())
    assert text.startswith(beginning) and words == (["apply", "-f", "-"] if program == "kubectl" else [])


@pytest.mark.parametrize(
    ("program", "arguments"), [("sbatch", SLURM), ("kubectl", [*GKE, "v5e:16x16"]), ("xpk", [*XPK, "v5e:16x16"])]
)
def test_a_scheduler_that_is_missing_is_named(capsys, monkeypatch, tmp_path, program, arguments):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", *arguments, "--config", CONFIG, "--workdir", "/data/runs/a", ACCUMULATION]) == 2
    assert (
        capsys.readouterr().err == f"error: {program}: not found on this machine; --dry-run prints the job without it\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SLURM, "--name=a b", "--workdir=/data/a"], "--name=a b: expected"),
        ([*SLURM, "--name=-rf", "--workdir=/data/a"], "--name=-rf: expected"),
        ([*SLURM, f"--name={'a' * 41}", "--workdir=/data/a"], "expected at most 40"),
        ([*SLURM, "--workdir=/data/a\nb"], "line breaks"),
        (["slurm", "--nodes=0", "--workdir=/data/a"], "--nodes: expected at least 1"),
        ([*SLURM, "--restarts=-1", "--workdir=/data/a"], "--restarts: expected at least 0"),
        ([*SLURM, "--workdir=/data/a", "--config.mesh.tensor=2", "--config.mesh.fsdp=2"], "mesh.tensor: expected"),
        (["slurm", "--nodes=3", "--config.mesh.fsdp=1", "--workdir=/data/a"], "data.rows: expected"),
        (
            [*GKE, "v5e:16x16", "--workdir=/data/a", "--config.run.accumulation=4"],
            "run.accumulation: expected a divisor of the 2 rows",
        ),
        ([*GKE, "h100:8", "--workdir=/data/a"], "--topology=h100:8: expected TPUs"),
        ([*GKE, "v5e:16", "--workdir=/data/a"], "--topology=v5e:16"),
        ([*GKE, "v5e:1x2", "--workdir=/data/a"], "whole hosts of 4"),
        ([*GKE, "v5e:16x16", "--workdir=/elsewhere"], "below /data"),
        ([*GKE, "v5e:16x16", "--workdir=/data/../etc"], "below /data"),
        ([*GKE, "v5e:16x16", "--volume=files", "--workdir=/data/a"], "expected CLAIM:/PATH"),
        ([*GKE, "v5e:16x16", "--volume=files:/", "--workdir=/data/a"], "expected CLAIM:/PATH"),
        ([*GKE, "v5e:9999x9999", "--workdir=/data/a"], "at most 1048576 devices"),
        ([*GKE, "v5e:16x16", "--volume=Fi les:/data", "--workdir=/data/a"], "--volume=Fi les"),
        ([*GKE, "v5e:16x16", "--image=a b", "--workdir=/data/a"], "--image=a b"),
        ([*XPK, "v5e:16x16", "--cluster=$(x)", "--workdir=/data/a"], "--cluster=$(x)"),
        ([*XPK, "v5e:16x16", "--slices=2", "--config.mesh.data=1", "--config.mesh.fsdp=512", "--workdir=/a"], "slices"),
        ([*XPK, "v5e:4x4", "--config.mesh.fsdp=5", "--config.mesh.data=1", "--workdir=/data/a"], "mesh: expected"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(capsys, arguments, message):
    assert message in refusal(capsys, *arguments)


def test_templates_are_installed_with_the_package(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in launching.TEMPLATES.values():
        assert (tmp_path / "mimo_jax" / "launch" / name).read_bytes() == (ROOT / "launch" / name).read_bytes()
    shutil.rmtree(tmp_path / "mimo_jax" / "kernels")
    words = ["-m", "mimo_jax.cli", "launch", *SLURM, "--config", CONFIG, "--workdir", "/data/a", "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("#!/usr/bin/env bash"), done.stderr


# ----------------------------------------------------------------------------------------------------------
# Processes of this machine


@pytest.mark.parametrize(
    ("named", "smi", "processes", "shares"),
    [
        (None, "0\n1\n2\n3\n", 2, ["0,1", "2,3"]),
        ("4,6", "0\n1\n2\n3\n4\n5\n6\n7\n", 2, ["4", "6"]),
        ("GPU-a,GPU-b,-1,GPU-c", "", 2, ["GPU-a", "GPU-b"]),
        (None, None, 3, [None] * 3),
        (None, "NVIDIA-SMI has failed", 2, [None] * 2),
        ("", "0\n1\n", 3, [None] * 3),
        ("0,1", "0\n1\n", 1, [None]),
    ],
)
def test_local_processes_share_out_the_gpus(tmp_path, monkeypatch, named, smi, processes, shares):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setenv("PATH", str(tmp_path))
    if smi is not None:
        code = "exit 9" if "failed" in smi else ""
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf %s {shlex.quote(smi)}\n{code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    lines = supervisor.command_lines(["train"], processes)
    assert [extra.get("CUDA_VISIBLE_DEVICES") for _, extra in lines] == shares
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert all(extra == {} for _, extra in supervisor.command_lines(["train"], processes))


def test_gpus_that_cannot_be_shared_out_are_refused(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match="expected a divisor of the 3 GPUs here"):
        supervisor.command_lines(["train"], 2)


def test_dry_run_of_local_processes_prints_their_command_lines(capsys):
    lines = rendered(capsys, "local", "--processes", "2").splitlines()
    words = [shlex.split(line) for line in lines]
    assert len(words) == 2 and OVERRIDES[1] in words[0]
    assert [line[-1] for line in words] == ["0", "1"] and len(
        {line[line.index("--coordinator") + 1] for line in words}
    ) == 1
