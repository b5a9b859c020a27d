"""Embeddings and output heads in 4 or 8 bits, for serving: ``quantize_head(model, "int4")``.

The head of a small model weighs more than all its packed linear layers together, and a tied one is read twice a token. Here
its rows are int4 (``PackedWeight``) or int8 with a scale a group; the embedding decodes the rows of the tokens it is given, the
head multiplies by the same tensors, and tied modules stay tied: one set of tensors, held by the embedding.

Cost. int4 runs on the operators of ``ops.py``, int8 on those of ``int8_rows.py``. A bfloat16 token by 151,936 × 896 on 2 Zen 5
cores: 9.0 ms dense, 2.1 int4, 3.8 int8 with one scale a row (``group_size=None``), 29 int8 in groups of 32, which is decoded:
int8 in groups saves memory, not time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from stillhouse.kernels import formats, reference
from stillhouse.kernels.formats import PackedWeight
from stillhouse.kernels.int8_rows import Int8Rows, decode_int8, quantize_int8
from stillhouse.kernels.linear import Activations, linear4bit

HeadFormat = Literal["int4", "int8"]
HEAD_FORMATS: tuple[str, ...] = ("int4", "int8")
_TENSOR_NAMES = ("codes", "scales", "zero_points")


@dataclass(frozen=True)
class HeadReport:
    """What :func:`quantize_head` replaced; sizes count a shared tensor once."""

    embedding: str
    head: str
    tied: bool
    size_bytes_before: int
    size_bytes_after: int


def quantize_head(
    model: nn.Module,
    format: HeadFormat = "int4",
    *,
    group_size: int | None = 32,
    symmetric: bool = True,
    activations: Activations = "bf16",
) -> HeadReport:
    """Pack a causal language model's embedding and output head, in place; a tied pair keeps one set of tensors.

    Args:
        model: a transformers model, or a PEFT model over one; its head an ``nn.Linear`` and its embedding an ``nn.Embedding``.
        format: ``int4`` or ``int8``.
        group_size: weights of a row that share one scale; None, one scale a row.
        symmetric: int4: no zero points. int8 is always symmetric.
        activations: int4: how the head multiplies, as in :func:`stillhouse.kernels.linear.linear4bit`.

    Raises:
        ValueError: an unknown format or setting, no head, or modules of another type (packed already, or under an adapter).
    """
    if format not in HEAD_FORMATS:
        raise ValueError(f"format must be one of {HEAD_FORMATS}, not {format!r}")
    if format == "int8" and (not symmetric or activations != "bf16"):
        raise ValueError(
            f"int8 is symmetric and multiplies in 'bf16' mode, not symmetric={symmetric}, activations={activations!r}"
        )
    if hasattr(model, "get_base_model"):  # a PEFT model
        model = model.get_base_model()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        raise ValueError(
            f"expected an nn.Embedding and an nn.Linear head, found a {type(embedding).__name__} and a {type(head).__name__}; "
            "pack a model's head once, and before adapters are put on it"
        )
    names = {module: name for name, module in model.named_modules()}
    tied = head.weight is embedding.weight
    weights = (embedding.weight,) if tied else (embedding.weight, head.weight)
    size_before = sum(weight.numel() * weight.element_size() for weight in weights)
    report_names = names[embedding], names[head]

    def pack(weight: torch.Tensor) -> PackedWeight | Int8Rows:
        group = weight.shape[1] if group_size is None else group_size
        if format == "int8":
            return quantize_int8(weight, group_size=group)
        return formats.quantize(weight, "int4", group_size=group, symmetric=symmetric)

    new_embedding = PackedEmbedding(pack(embedding.weight), dtype=embedding.weight.dtype, padding_idx=embedding.padding_idx)
    rows = new_embedding if tied else PackedRows(pack(head.weight), dtype=head.weight.dtype)
    new_head = PackedHead(rows, head.bias, tied=tied, activations=activations)
    install_packed_head(model, new_embedding.train(embedding.training), new_head.train(head.training))
    size_after = sum(t.numel() * t.element_size() for t in {*new_embedding.buffers(), *new_head.buffers()})
    if hasattr(model, "save_pretrained"):
        from stillhouse.kernels.huggingface import mark_as_packed

        mark_as_packed(model)
    return HeadReport(*report_names, tied, size_before, size_after)


def install_packed_head(model: nn.Module, embedding: PackedEmbedding, head: PackedHead) -> None:
    """Put packed modules in their places, and take the pair off transformers' list of parameters to tie."""
    head_name = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        keys = getattr(model, attribute, None)
        if isinstance(keys, dict):  # on the instance: the class serves other models
            setattr(model, attribute, {target: source for target, source in keys.items() if target != f"{head_name}.weight"})


def install_empty_head(
    model: nn.Module, format: HeadFormat, *, group_size: int | None, symmetric: bool, activations: Activations
) -> None:
    """Put packed modules with tensors on the meta device in place, for a checkpoint's packed head to be read into."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

    def empty(shape: tuple[int, int]) -> PackedWeight | Int8Rows:
        group = shape[1] if group_size is None else group_size
        if format == "int4":
            return formats.empty_packed(shape, "int4", group_size=group, symmetric=symmetric, device="meta")
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        return Int8Rows(codes, codes.new_empty((shape[0], -(-shape[1] // group)), dtype=torch.float16), group)

    dtype, tied = embedding.weight.dtype, bool(model.config.tie_word_embeddings)
    new_embedding = PackedEmbedding(empty(tuple(embedding.weight.shape)), dtype=dtype, padding_idx=embedding.padding_idx)
    rows = new_embedding if tied else PackedRows(empty(tuple(head.weight.shape)), dtype=dtype)
    install_packed_head(model, new_embedding, PackedHead(rows, head.bias, tied=tied, activations=activations))


class PackedRows(nn.Module):
    """A matrix of N rows packed in 4 or 8 bits: plain buffers ``codes``, ``scales`` and, asymmetric int4, ``zero_points``.

    Args:
        rows: the matrix.
        dtype: what ``weight`` reads as. ``.to(dtype)`` changes it, and never a scale.
    """

    def __init__(self, rows: PackedWeight | Int8Rows, *, dtype: torch.dtype) -> None:
        super().__init__()
        if rows.format not in HEAD_FORMATS:
            raise ValueError(
                f"an embedding is packed as one of {HEAD_FORMATS}, not {rows.format!r}: nf4's blocks may cross rows"
            )
        self.format, self.shape, self.group_size, self.dtype = rows.format, tuple(rows.shape), rows.group_size, dtype
        for name in _TENSOR_NAMES:
            self.register_buffer(name, getattr(rows, name))

    @property
    def packed(self) -> PackedWeight | Int8Rows:
        """The matrix as it stands now, sharing the module's tensors."""
        if self.format == "int8":
            return Int8Rows(self.codes, self.scales, self.group_size)
        return PackedWeight(
            "int4", self.shape, self.codes, group_size=self.group_size, scales=self.scales, zero_points=self.zero_points
        )

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix, decoded anew at each access: for code that reads an embedding's or a head's weight."""
        return self._decode(self.codes, self.scales, self.zero_points).to(self.dtype)

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None) -> torch.Tensor:
        if self.format == "int8":
            return decode_int8(codes, scales, self.group_size)
        return reference.decode_int4(codes, scales, zero_points, self.shape[1], self.group_size)

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # Module.to(dtype) casts every float buffer; a cast scale is another weight
            self.scales = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, {self.format}, group_size={self.group_size}"


class PackedEmbedding(PackedRows):
    """A frozen embedding whose rows are packed; takes the place of ``torch.nn.Embedding``.

    Raises:
        ValueError: (at construction) the rows are not int4 or int8.
    """

    def __init__(self, rows: PackedWeight | Int8Rows, *, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(rows, dtype=dtype)
        self.num_embeddings, self.embedding_dim = self.shape
        self.padding_idx = padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Decode the rows of token ids, any shape (...), to (..., K) in the module's dtype."""
        flat = ids.reshape(-1)
        parts = [None if part is None else part.index_select(0, flat) for part in (self.codes, self.scales, self.zero_points)]
        return self._decode(*parts).to(self.dtype).view(*ids.shape, self.shape[1])


class PackedHead(nn.Module):
    """A frozen output head over packed rows; takes the place of ``torch.nn.Linear``.

    Args:
        rows: what it multiplies by; of a tied head, the embedding.
        bias: (N,) or None.
        tied: the rows belong to another module, which moves and saves them: this one has no tensor but its bias.
        activations: int4: as in :func:`stillhouse.kernels.linear.linear4bit`.
    """

    def __init__(
        self, rows: PackedRows, bias: torch.Tensor | None = None, *, tied: bool, activations: Activations = "bf16"
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = rows.shape
        self.tied = tied
        self.activations = activations
        if tied:
            object.__setattr__(self, "rows", rows)  # a plain attribute: not a submodule, so not in the state dict again
        else:
            self.rows = rows
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix, decoded anew at each access; TRL and others read a head's weight."""
        return self.rows.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., N) of x (..., K), in the dtype of x (the autocast dtype under ``torch.autocast``)."""
        rows = self.rows
        if rows.format == "int4":
            return linear4bit(x, rows.packed, self.bias, self.activations)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return torch.ops.stillhouse.linear_int8(x, rows.codes, rows.scales, self.bias, rows.group_size)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied={self.tied}"
