"""The harness: what differs, is missing or is unknown fails by name; nothing but a near-tie is excused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mimo_jax import cli
from mimo_jax.parity import harness
from mimo_jax.parity.harness import EQUAL, FAILED, INPUT, SKIPPED, TIE, compare

COMPACT = Path(__file__).parents[1] / "data" / "parity"


@pytest.fixture
def folder(tmp_path):
    """The samplers' arrays alone, to be spoiled."""
    shutil.copytree(COMPACT / "sampler", tmp_path / "sampler")
    manifest = {k: v for k, v in _manifest(COMPACT).items() if k.startswith("sampler/")}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def _manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def _rewrite(path, change):
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, **arrays)


def _parity(capsys, *arguments):
    status = cli.main(["parity", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def _failures(table):
    return [line.split()[0] for line in table.splitlines() if "  failed" in line]


def test_an_intact_folder_passes_and_is_written_as_json(folder, capsys, tmp_path):
    status, out, _ = _parity(capsys, folder, "--json", tmp_path / "out.json")
    assert status == 0
    assert "compared 84, fed in 1, skipped 0, failed 0;" in out.splitlines()[-1]
    arrays = json.loads((tmp_path / "out.json").read_text())["arrays"]
    assert len(arrays) == 85 and {a["verdict"] for a in arrays} == {EQUAL, INPUT}
    assert all(a["tolerance"] is not None for a in arrays if a["verdict"] == EQUAL)


def test_a_perturbed_array_fails_by_name(folder, capsys):
    def change(arrays):
        finite = np.isfinite(arrays["setting03/processed"])
        arrays["setting03/processed"][np.flatnonzero(finite)[0]] += 1e-3

    _rewrite(folder / "sampler" / "expected.npz", change)
    status, out, _ = _parity(capsys, folder)
    assert status == 1 and _failures(out) == ["sampler/expected.npz/setting03/processed"]
    assert "failed 1;" in out


def test_an_integer_off_by_one_fails(folder, capsys):
    _rewrite(folder / "sampler" / "expected.npz", lambda arrays: arrays.update({"setting00/greedy_token": np.int64(7)}))
    assert _failures(_parity(capsys, folder)[1]) == ["sampler/expected.npz/setting00/greedy_token"]


def test_an_array_that_no_case_computes_fails(folder, capsys):
    _rewrite(folder / "sampler" / "expected.npz", lambda arrays: arrays.update(new=np.zeros(3, np.float32)))
    status, out, _ = _parity(capsys, folder)
    assert status == 1 and "new" in _failures(out)[0] and "not in the manifest" in out
    manifest = _manifest(folder)
    manifest["sampler/expected.npz"]["new"] = {"shape": [3], "dtype": "float32", "suggested_atol": 1.0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, out, _ = _parity(capsys, folder)
    assert status == 1 and _failures(out) == ["sampler/expected.npz/new"] and "no case computes it" in out


def test_words_about_the_arrays_are_skipped_and_said_to_be(folder, capsys):
    words = np.array('{"seed": 1}')
    _rewrite(folder / "sampler" / "expected.npz", lambda arrays: arrays.update(meta=words))
    manifest = _manifest(folder)
    manifest["sampler/expected.npz"]["meta"] = {"shape": [], "dtype": str(words.dtype)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, out, _ = _parity(capsys, folder)
    assert status == 0 and "skipped 1" in out and "says where the arrays come from" in out


def test_a_file_of_no_known_case_fails(folder, capsys):
    (folder / "sampler" / "expected.npz").rename(folder / "sampler" / "surprise.npz")
    manifest = _manifest(folder)
    manifest["sampler/surprise.npz"] = manifest.pop("sampler/expected.npz")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, out, _ = _parity(capsys, folder)
    assert status == 1 and out.count("no case computes it") == 84


def test_a_missing_file_and_a_broken_one_fail_by_name(folder, capsys):
    (folder / "sampler" / "inputs.npz").unlink()
    status, out, _ = _parity(capsys, folder)
    assert status == 1 and f"{folder / 'sampler' / 'inputs.npz'}: no such file" in out
    (folder / "sampler" / "inputs.npz").write_bytes(b"PK\x03\x04 not really")
    assert "expected an intact .npz file" in _parity(capsys, folder)[1]


def test_inputs_that_are_not_those_of_the_manifest_fail(folder, capsys):
    _rewrite(folder / "sampler" / "inputs.npz", lambda a: a.update(logits_ties=a["logits_ties"].astype(np.float64)))
    status, out, _ = _parity(capsys, folder)
    assert status == 1 and "sampler/inputs.npz/logits_ties" in _failures(out)
    assert "expected float32 [64] as in the manifest, got float64 [64]" in out


@pytest.mark.parametrize("content", [None, "[]", "{}", '{"a.npz": {"x": 3}}', "no json"])
def test_a_folder_without_a_manifest_is_refused(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    status, _, err = _parity(capsys, tmp_path)
    assert status == 2 and "manifest.json: " in err and err.count("\n") == 1


def test_what_is_not_asked_for_is_named_as_skipped(folder, capsys):
    status, out, _ = _parity(capsys, folder, "--only", "sampler/inputs")
    assert status == 0 and "skipped: 84 arrays, not asked for" in out
    assert "compared 0, fed in 1, skipped 1, failed 0" in out
    assert _parity(capsys, folder, "--only", "nothing")[0] == 2


def test_a_case_that_breaks_off_fails_what_it_did_not_compute(folder, monkeypatch):
    def broken(case):
        case.check("setting00/greedy_token", case.expected["setting00/greedy_token"])
        raise KeyError("gone")

    monkeypatch.setattr(harness, "_cases", lambda: {"sampler/expected.npz": broken})
    rows = [r for r in harness.run(folder) if "expected" in r.array]
    assert [r.verdict for r in rows].count(EQUAL) == 1
    assert all("broke off: KeyError: 'gone'" in r.note for r in rows if r.verdict == FAILED)
    assert not any(r.verdict == SKIPPED for r in rows)


def test_comparison_of_numbers():
    a = np.array([1.0, -np.inf, np.nan, 4.0], np.float32)
    assert compare(a, a.astype(np.float64), 0.0)[:2] == (EQUAL, 0.0)
    assert compare(a, a + 1e-3, 1e-2)[0] == EQUAL
    assert compare(a, a + 1e-3, 1e-4)[0] == FAILED
    assert compare(a, np.nan_to_num(a), 1e3)[0] == FAILED  # no tolerance covers an infinity
    assert compare(a, np.where(np.isnan(a), 0, a), 1e3)[0] == FAILED
    assert compare(a, a[:3], 1.0)[0] == FAILED
    assert compare(np.array([1, 2]), np.array([1.0, 2.0]), 1.0)[0] == FAILED  # floats for integers
    assert compare(np.array([1, 2]), np.array([1, 2], np.uint16), 0.0)[0] == EQUAL
    assert compare(np.array([True]), np.array([1]), 0.0)[0] == FAILED
    assert compare(np.zeros(0, np.float32), np.zeros(0, np.float32), 0.0)[0] == EQUAL


def test_only_what_follows_a_near_tie_is_excused():
    expected, actual = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, 2, 9], [4, 5, 6]])
    decided = np.array([[True, True, False], [True, True, True]])
    verdict, difference, _, note = compare(expected, actual, 0.0, decided)
    assert (verdict, difference) == (TIE, 6.0) and "1 of 6 differ" in note
    actual[1, 2] = 7
    assert compare(expected, actual, 0.0, decided)[0] == FAILED
