"""A run that goes wrong says so: what is a symptom, and when it is said."""

from __future__ import annotations

from training import toy

from mimo_jax.training import metrics
from mimo_jax.training.health import Watch, adversarial_symptoms, codebook_symptoms

SIZES = (1024, 1024, 128)


def _perplexities(*values):
    return {f"level/{r:02d}/perplexity": p for r, p in enumerate(values)}


def test_a_level_with_a_hundredth_of_its_entries_has_collapsed():
    assert codebook_symptoms(_perplexities(700.0, 10.5, 1.3), SIZES) == {}
    found = codebook_symptoms(_perplexities(700.0, 9.0, 1.2), SIZES)["collapse"]
    assert "1 (perplexity 9 of 1024), 2 (perplexity 1.2 of 128)" in found and "model.rvq.ema_decay" in found
    assert codebook_symptoms({}, SIZES) == {}, "validation lines without these metrics are no symptom"


def test_discriminators_that_have_won_or_see_nothing_and_terms_without_weight_are_named():
    healthy = {"discriminator": 1.6, "accuracy": 0.7, "term_norm/mel": 3.0, "term_norm/feature": 1.0}
    assert adversarial_symptoms(healthy) == {}
    assert "lower discriminator_learning_rate" in adversarial_symptoms(healthy | {"discriminator": 0.03})["won"]
    assert "accuracy 50.4%" in adversarial_symptoms(healthy | {"accuracy": 0.504})["blind"]
    unheard = adversarial_symptoms(healthy | {"term_norm/feature": 1e-4, "term_norm/adversarial": 1e-5})
    assert "loss.balance=gradients" in unheard["unheard"]


def test_a_symptom_is_said_once_when_two_reports_in_a_row_have_it():
    watch = Watch()
    assert watch.update({"a": "x"}) == (set(), [])
    assert watch.update({"a": "y", "b": "z"}) == ({"a"}, ["y"])
    assert watch.update({"a": "y", "b": "z"}) == ({"a", "b"}, ["z"])
    assert watch.update({}) == (set(), [])
    assert watch.update({"a": "x"}) == (set(), [])
    assert watch.update({"a": "x"}) == ({"a"}, ["x"])


def test_the_run_says_it_once_and_writes_it_as_long_as_it_lasts(tmp_path, capsys):
    symptoms = {"steps": "everything"}
    toy.train(tmp_path, toy.make_config(8), toy.ToyLoader(), symptoms=lambda values: symptoms)
    said = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    lines = [line for line in metrics.read(tmp_path / "metrics.jsonl") if line["split"] == "train"]
    warned = [line["step"] for line in lines if line.get("warning/steps")]
    assert len(said) == 1 and len(warned) == len(lines) - 1 > 0 and "everything" in said[0]
    assert warned == [line["step"] for line in lines[1:]]
