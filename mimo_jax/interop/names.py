"""The one map between our parameters and the published tensors; it serves both directions and every model.

A rule is a path of ours, a published name and a layout, such as

    params/llm/transformer/layers/attn/q/kernel    model.layers.{layer}.self_attn.q_proj.weight    d n h -> (n h) d

Our arrays are on the left: their axes, and the order and grouping of the same axes in the published tensor. `{layer}`
takes a leading axis of ours apart, `{channel}` the rows of the audio tables; both, and `{level}`, may also stand for
digits in our path. What the letters measure follows from the shapes of our arrays, so that no size stands here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """One pattern on both sides."""

    ours: str
    theirs: str
    layout: str


def _map(ours: str, theirs: str, kernel: str = "i o -> o i", bias: str = "d -> d") -> list[Rule]:
    """Rules of a linear map, a convolution or a norm; which of the arrays there are depends on the model."""
    return [
        Rule(f"{ours}/kernel", f"{theirs}.weight", kernel),
        Rule(f"{ours}/scale", f"{theirs}.weight", "d -> d"),
        Rule(f"{ours}/bias", f"{theirs}.bias", bias),
    ]


def _up_conv(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(f"{ours}/conv/kernel", f"{theirs}.conv.weight", "i k o -> i o k"),
        Rule(f"{ours}/bias", f"{theirs}.conv.bias", "d -> d"),
        Rule(f"{ours}/norm_scale", f"{theirs}.norm.weight", "d -> d"),
        Rule(f"{ours}/norm_bias", f"{theirs}.norm.bias", "d -> d"),
    ]


_HEADS = ("d n h -> (n h) d", "n h -> (n h)")
_LAYOUTS = {"attn/q": _HEADS, "attn/k": _HEADS, "attn/v": _HEADS, "attn/out": ("n h d -> d (n h)", "d -> d")}
_ATTENTION = {f"attn/{x}": f"self_attn.{x}_proj" for x in "qkv"}
_QWEN2 = _ATTENTION | {
    "attn/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "norm_attn": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
}
_CODEC = _ATTENTION | {
    "attn/out": "self_attn.out_proj",
    "mlp/up": "fc1",
    "mlp/down": "fc2",
    "norm_attn": "self_attn_layer_norm",
    "norm_mlp": "final_layer_norm",
}


def _stack(ours: str, theirs: str, block: Mapping[str, str], norm: str) -> list[Rule]:
    rules = _map(f"{ours}/norm", f"{theirs}.{norm}")
    for name, published in block.items():
        rules += _map(f"{ours}/layers/{name}", f"{theirs}.layers.{{layer}}.{published}", *_LAYOUTS.get(name, ()))
    return rules


LLM_RULES: tuple[Rule, ...] = (
    Rule("params/llm/embedding", "model.embed_tokens.weight", "v d -> v d"),
    Rule("params/llm/head", "lm_head.weight", "d v -> v d"),
    *_stack("params/llm/transformer", "model", _QWEN2, "norm"),
)
TIED_LLM_RULES = (LLM_RULES[0], Rule("params/llm/head", "model.embed_tokens.weight", "d v -> v d"), *LLM_RULES[2:])

LM_RULES: tuple[Rule, ...] = (
    *LLM_RULES,
    Rule("params/patch_encoder/embedding", "speech_embeddings.{channel}.weight", "v e -> v e"),
    *_stack("params/patch_encoder/transformer", "input_local_transformer", _QWEN2, "norm"),
    *_map("params/patch_encoder/projection", "speech_group_downcast", "g e d -> d (g e)"),
    *_map("params/patch_decoder/input", "hidden_states_downcast"),
    *_map("params/patch_decoder/codes", "speech_embeddings_to_local"),
    *_stack("params/patch_decoder/transformer", "local_transformer", _QWEN2, "norm"),
    *_map("params/patch_decoder/head_{channel}", "local_transformer_lm_heads.{channel}"),
)

_CODEBOOK = "encoder.quantizer.vq.layers.{level}._codebook"
TOKENIZER_RULES: tuple[Rule, ...] = (
    *_map("params/encoder/conv1", "encoder.conv1", "k i o -> o i k"),
    *_map("params/encoder/conv2", "encoder.conv2", "k i o -> o i k"),
    *_stack("params/encoder/lower", "encoder", _CODEC, "layer_norm"),
    *_stack("params/encoder/upper", "encoder", _CODEC, "layer_norm"),
    *_map("params/encoder/norm", "encoder.layer_norm"),
    *_map("params/encoder/pool", "encoder.down_sample_layer.0", "k i o -> o i k"),
    *_map("params/encoder/pool_norm", "encoder.down_sample_norm"),
    *_up_conv("params/decoder/up1", "decoder.dconv1"),
    *_stack("params/decoder/transformer", "decoder", _CODEC, "layer_norm"),
    *_up_conv("params/decoder/up2", "decoder.dconv2"),
    *_map("params/vocoder/embed", "decoder.vocoder.embeddings"),
    *_stack("params/vocoder/transformer", "decoder.vocoder", _CODEC, "layer_norm"),
    *_map("params/vocoder/head", "decoder.vocoder.head.out"),
    Rule("buffers/istft_window", "decoder.vocoder.head.istft.window", "n -> n"),
    Rule("buffers/inited/level_{level}", f"{_CODEBOOK}.inited", "one -> one"),
    Rule("codebook/level_{level}/entries", f"{_CODEBOOK}.embed", "k d -> k d"),
    Rule("codebook/level_{level}/code_sum", f"{_CODEBOOK}.embed_avg", "k d -> k d"),
    Rule("codebook/level_{level}/count", f"{_CODEBOOK}.cluster_size", "k -> k"),
)

# Tensors of plain text models that ours has no use for: the layers that MiMo-7B predicts further tokens with, and
# tables of angles that old Llama checkpoints store.
IGNORED = (r"model\.mtp_layers\..*", r".*\.rotary_emb\.inv_freq")


class Tensor(NamedTuple):
    """One published tensor and the part of our array that it is."""

    name: str  # published
    shape: Shape  # published
    path: str  # of our array
    # Where on the first axis of our array it lies: a layer (that axis is gone in the part), rows, or None for the whole
    # array.
    at: int | slice | None
    part: Shape  # shape of the part
    # Axes of the part in published order, those joined to one published axis together.
    groups: tuple[tuple[int, ...], ...]

    @property
    def axis(self) -> int:
        """Axis of the part that runs slowest in the published tensor; both can be cut into blocks along it."""
        return self.groups[0][0]

    @property
    def rows(self) -> int:
        """Published rows for each step along that axis."""
        return self.shape[0] // self.part[self.axis]

    def to_published(self, part: np.ndarray) -> np.ndarray:
        """A part, or a block of it along `axis`, as the published tensor has it."""
        x = part.transpose([a for group in self.groups for a in group])
        return x.reshape((-1, *self.shape[1:]))

    def from_published(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of `to_published`."""
        order = [a for group in self.groups for a in group]
        x = rows.reshape((-1, *(self.part[a] for a in order[1:])))
        return x.transpose(np.argsort(order))

    def place(self, start: int | None = None, stop: int | None = None) -> tuple[int | slice, ...]:
        """Index, in our array, of the block start..stop along `axis`."""
        block = [slice(None)] * len(self.part)
        block[self.axis] = slice(start, stop)
        if isinstance(self.at, slice):
            block[0] = self.at
        return (self.at, *block) if isinstance(self.at, int) else tuple(block)


def tensors(
    rules: Sequence[Rule], shapes: Mapping[str, Shape], rows: Sequence[int] = (), first_layer: Mapping[str, int] = {}
) -> list[Tensor]:
    """The published tensors of a model.

    Args:
        shapes: our arrays by path, layers stacked (`layers/...`) or apart (`layers_0/...`).
        rows: of each channel's audio table.
        first_layer: published number of a stack's layer 0, by the stack's path, where it is not 0.

    Raises:
        KeyError: there is no rule for a path.
    """
    patterns = [(re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(rule.ours))), rule) for rule in rules]
    found = []
    for path, shape in shapes.items():
        apart = re.search(r"/layers_(\d+)/", path)
        plain = path.replace(apart[0], "/layers/") if apart else path
        matches = [(m, rule) for pattern, rule in patterns if (m := pattern.fullmatch(plain))]
        # A norm has no kernel and a linear map no scale, so at most one rule of a block fits the last word of a path.
        if not matches:
            raise KeyError(f"{path}: no published name")
        match, rule = matches[0]
        first = first_layer.get(path.split("/layers")[0], 0)
        numbers = {key: int(value) for key, value in match.groupdict().items()}
        parts: list[tuple[dict[str, int], int | slice | None, Shape]]
        if apart:
            parts = [({"layer": first + int(apart[1])}, None, shape)]
        elif "/layers/" in path:
            parts = [({"layer": first + i}, i, shape[1:]) for i in range(shape[0])]
        elif "{channel}" in rule.theirs and not numbers:
            parts = [
                ({"channel": r}, slice(end - n, end), (n, *shape[1:]))
                for r, (n, end) in enumerate(zip(rows, itertools.accumulate(rows), strict=True))
            ]
        else:
            parts = [(numbers, None, shape)]
        left, groups = _parse(rule.layout)
        for values, at, part in parts:
            if len(left) != len(part):
                raise KeyError(f"{path}: the layout {rule.layout!r} does not fit the shape {part}")
            published = tuple(math.prod(part[a] for a in group) for group in groups)
            found.append(Tensor(rule.theirs.format(**values), published, path, at, part, groups))
    return found


def _parse(layout: str) -> tuple[list[str], tuple[tuple[int, ...], ...]]:
    left, _, right = layout.partition("->")
    letters = left.split()
    groups = re.findall(r"\(([^)]*)\)|(\S+)", right.strip())
    return letters, tuple(tuple(letters.index(x) for x in (joined or single).split()) for joined, single in groups)
