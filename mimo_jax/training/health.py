"""Tells when the training of an audio tokenizer goes wrong: codebooks that collapse, players that do not play.

A symptom is a name and a sentence that says what is seen and what helps. One that is seen in two reports in a row is
said once, and is in the metrics as long as it lasts; single ones come and go, above all in the first steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# A level whose codes have a perplexity below this share of its entries, or below this number, carries next to nothing.
_COLLAPSED, _CONSTANT = 0.01, 1.1
# Share of the gradient of the reconstruction loss under which the adversarial terms do not count.
_UNHEARD = 1e-3
_WON, _BLIND = 0.1, 0.01  # hinge loss of discriminators that have won; distance from a guess of those that see nothing


class Watch:
    """Remembers the symptoms of the reports before."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._said: set[str] = set()

    def update(self, symptoms: Mapping[str, str]) -> tuple[set[str], list[str]]:
        """Names of those that the report before had too, and what to say: the sentences of those that are new so."""
        persistent = self._seen & set(symptoms)
        new = [text for name, text in symptoms.items() if name in persistent - self._said]
        self._seen, self._said = set(symptoms), persistent
        return persistent, new


def codebook_symptoms(values: Mapping[str, float], sizes: Sequence[int]) -> dict[str, str]:
    """Levels whose codes are nearly always the same.

    Args:
        values: metrics of a report, `level/RR/perplexity` among them.
        sizes: entries of each level.
    """
    low = {
        r: values[name]
        for r, size in enumerate(sizes)
        if (name := f"level/{r:02d}/perplexity") in values and values[name] < max(_CONSTANT, _COLLAPSED * size)
    }
    if not low:
        return {}
    found = ", ".join(f"{r} (perplexity {p:.3g} of {sizes[r]})" for r, p in low.items())
    helps = "a shorter model.rvq.ema_decay, larger batches or a lower learning rate help"
    return {"collapse": f"codebook levels have collapsed: {found}; {helps}"}


def adversarial_symptoms(values: Mapping[str, float]) -> dict[str, str]:
    """Discriminators that have won or see nothing, and terms that do not reach the generator.

    Args:
        values: metrics of a report of the adversarial stage.
    """
    symptoms = {}
    if values.get("discriminator", 1.0) < _WON:
        symptoms["won"] = (
            f"the discriminators have won (loss {values['discriminator']:.2g}): what they teach is worth little; lower "
            "discriminator_learning_rate"
        )
    if abs(values.get("accuracy", 1.0) - 0.5) < _BLIND:
        symptoms["blind"] = (
            f"the discriminators tell nothing apart (accuracy {values['accuracy']:.1%}): raise "
            "discriminator_learning_rate, or the generator is already that good"
        )
    mel = values.get("term_norm/mel", 0.0)
    others = sum(values.get(f"term_norm/{name}", 0.0) for name in ("adversarial", "feature"))
    if 0 < others < _UNHEARD * mel:
        symptoms["unheard"] = (
            f"adversarial and feature terms have {others / mel:.1g} of the gradient of mel: they change nothing; "
            "loss.balance=gradients gives every term the share that its weight says"
        )
    return symptoms
