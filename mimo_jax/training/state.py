"""What a training step reads and writes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any  # nested dictionaries of arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; a checkpoint of it and of the data position continues a run exactly."""

    step: jax.Array  # int32 scalar, batches consumed. Skipped steps count: the data moves on.
    skipped: jax.Array  # int32 scalar, steps that were skipped because loss or gradient were not finite
    # int32 scalar, how many of the latest steps were skipped in a row. Having reached the limit of the run it stays
    # there and nothing is updated any more, until the host has seen it and ended the run.
    bad_in_row: jax.Array
    params: Tree  # parameters; the names on the top level are the optimiser's groups
    codebook: Tree  # EMA codebooks of the audio tokenizer, `{}` for other models
    optimizer: Tree  # state of the optimiser, of the trained groups only; of both optimisers in the adversarial stage
    # Vectors of the power iterations of the discriminators; `{}` for other models.
    spectral: Tree = dataclasses.field(default_factory=dict)

    @classmethod
    def start(
        cls, params: Tree, optimizer: Tree, codebook: Tree | None = None, spectral: Tree | None = None
    ) -> TrainState:
        """The state before the first step."""
        step, skipped, bad_in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        return cls(step, skipped, bad_in_row, params, codebook or {}, optimizer, spectral or {})

    def variables(self) -> dict[str, Tree]:
        """What inference needs: `params` and `codebook`."""
        return {"params": self.params, "codebook": self.codebook}

    def progress(self) -> dict[str, Tree]:
        """What only going on with training needs: the optimiser's state, the counters, the power iterations."""
        names = ("step", "skipped", "bad_in_row", "optimizer", *(["spectral"] if self.spectral else []))
        return {name: getattr(self, name) for name in names}

    @classmethod
    def join(cls, variables: dict[str, Tree], progress: dict[str, Tree]) -> TrainState:
        """Puts together what `variables` and `progress` took apart."""
        return cls(params=variables["params"], codebook=variables["codebook"], **progress)
