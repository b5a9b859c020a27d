"""The records that flow through a run: Problem, Trace, Verdict, Example.

Each is a frozen, picklable dataclass that carries its parents' ids, so that every training row leads back to the
teacher's completion it came from. ``to_table`` and ``from_table`` move lists of one record type to and from Arrow with a
fixed schema: what is on disk can be read by pyarrow and ``datasets`` without this module.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import pyarrow as pa

SCHEMA_VERSION = 2
KEY_VERSION = 1
"""Part of every trace's key; stays when the schema gains columns, so that what was paid for is found again."""

Split = Literal["train", "validation", "test"]
Outcome = Literal["correct", "wrong", "undecided"]
DECIDED: tuple[Outcome, ...] = ("correct", "wrong")
"""Outcomes that a pass rate counts: what no verifier could decide is neither right nor wrong."""
FinishReason = Literal["stop", "length", "truncated", "loop", "content_filter"]
"""Why a completion ended: by itself; at its token limit; cut off on its way to us; stopped by us because it went in circles;
stopped by the server's content filter. Only ``stop`` is ever trained on."""


def content_key(*parts: Any) -> str:
    """Name content by its sha256: hex digest of the parts as canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt with an answer that a verifier can check.

    Args:
        prompt: the question as the model reads it, without chat markup.
        answer: the gold answer as text; for ``kind="reasoning_gym"`` the whole entry is in ``entry``.
        kind: which verifier judges it: ``reasoning_gym``, ``math``, ``choice`` or ``exact``.
        source: where it came from, for example ``reasoning_gym/chain_sum`` or a file name. The report groups by it.
        split: ``train``, ``validation`` or ``test``.
        entry: JSON text of what the verifier needs beyond the answer ("" when nothing).
        topic: what it is about, "" where nobody says; the selection shares out over sources and topics.
    """

    prompt: str
    answer: str
    kind: str
    source: str
    split: Split
    entry: str = ""
    topic: str = ""

    @property
    def id(self) -> str:
        """Hash of what is asked and how it is judged; the split is not part of it, so a leak between splits shows."""
        return content_key("problem", self.prompt, self.answer, self.kind, self.source)[:32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn; every field is part of a trace's key.

    Args:
        temperature: 0 is greedy decoding.
        top_p: keep the smallest set of tokens whose probability reaches it.
        max_new_tokens: a completion is cut here.
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the most likely one; 0 drops none.
        presence_penalty: taken from the logits of tokens that were written already; 0 is none.
        repetition_penalty: their logits are divided by it; 1 is none.
        reasoning_effort: ``low``, ``medium`` or ``high`` for teachers that know it (gpt-oss); "" sends none.
        top_logprobs: alternatives a token whose log probabilities are kept with the trace; 0 keeps none.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    reasoning_effort: str = ""
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ValueError(f"sampling needs temperature >= 0, 0 < top_p <= 1, max_new_tokens >= 1; got {self}")
        if self.top_k < 0 or not 0 <= self.min_p < 1 or self.repetition_penalty <= 0 or not 0 <= self.top_logprobs <= 20:
            raise ValueError(
                f"sampling needs top_k >= 0, 0 <= min_p < 1, repetition_penalty > 0, 0 <= top_logprobs <= 20; got {self}"
            )

    def extras(self) -> dict[str, Any]:
        """The settings beyond temperature, top_p and max_new_tokens that are not at their defaults, by name."""
        plain = Sampling(self.temperature, self.top_p, self.max_new_tokens)
        names = [f.name for f in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(plain, name)}


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote for one rendered prompt, before anything parses it.

    Args:
        text: generated text with special tokens kept, without the prompt and without the closing EOS.
        finish_reason: ``stop`` when the model wrote EOS, ``length`` when it was cut at ``max_new_tokens``, and so on.
        num_prompt_tokens, num_completion_tokens: token counts by the model's own tokenizer, EOS counted.
        seed: the 64-bit seed this row was sampled with.
        usage_counted: False where the server counted no tokens and both counts are estimates.
        response_id, served_model: what an endpoint called its answer and its model ("" elsewhere).
        logprobs: JSON text ``[[token, logprob, [[token, logprob], …]], …]``, one entry a token; "" where not asked for.
    """

    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    seed: int
    usage_counted: bool = True
    response_id: str = ""
    served_model: str = ""
    logprobs: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """One completion of one teacher for one problem.

    ``reasoning`` is the text inside the think block and ``answer_text`` what follows it; ``completion`` is the whole,
    unparsed. Both are None where the completion has no closed think block.
    """

    key: str
    problem_id: str
    teacher: str
    teacher_revision: str
    rendered_prompt: str
    completion: str
    reasoning: str | None
    answer_text: str | None
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    temperature: float
    top_p: float
    max_new_tokens: int
    sample_index: int
    seed: int
    seconds: float
    """Share of its batch's wall time, or from request to last byte, seconds."""
    dollars: float = 0.0
    """Price of its tokens by the recipe's prices; 0 where none are known."""
    usage_counted: bool = True
    """False where the server counted no tokens: both counts are then estimates."""
    sampling_extras: str = ""
    """JSON object of the sampling settings beyond the three above that were not at their defaults; "" for none."""
    response_id: str = ""
    served_model: str = ""
    """What the endpoint called its answer and its model."""
    logprobs: str = ""
    """JSON text, see `Completion`; "" where not asked for."""
    origin: str = ""
    """Where a replayed trace came from: data set, revision, row; "" for one that our own teacher wrote."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A trace that a run wants, and the problem that it answers there.

    A store may hold other traces too. The problem may be another than the trace's own: where a gold answer was corrected, the
    traces of its prompt are kept.
    """

    key: str
    problem_id: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check said of one trace.

    ``outcome`` is filled by verifiers only ("" for filters). A dropped trace keeps its verdict on disk. ``evidence``
    quotes what the check looked at (at most 200 characters). A ``shadow`` verdict says what a check would do that only watches.
    """

    trace_key: str
    check: str
    code_version: int
    keep: bool
    reason: str
    evidence: str = ""
    outcome: str = ""
    shadow: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """The tokens and labels that a trace became. ``labels[i] == -100`` where nothing is learnt; same length as input_ids."""

    key: str
    trace_key: str
    problem_id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    template_hash: str

    IGNORE_INDEX: ClassVar[int] = -100

    @property
    def num_supervised_tokens(self) -> int:
        return sum(label != self.IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True, slots=True)
class Graded:
    """One evaluated completion: which model answered which problem how."""

    model: str
    problem_id: str
    source: str
    sample_index: int
    correct: bool
    outcome: Outcome
    reason: str
    completion: str
    finish_reason: FinishReason
    num_completion_tokens: int
    think_closed: bool
    answer_found: bool


Record = TypeVar("Record", Problem, Trace, Planned, Verdict, Example, Graded)

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), tuple: pa.list_(pa.int32())}


def _arrow_type(hint: Any) -> pa.DataType:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return pa.string()
    if origin in (types.UnionType, typing.Union):
        return _arrow_type(next(arm for arm in typing.get_args(hint) if arm is not type(None)))
    return _ARROW[origin or hint]


@functools.cache
def arrow_schema(record_type: type) -> pa.Schema:
    """The Arrow schema of a record type: one column a field, ``schema_version`` in the metadata."""
    hints = typing.get_type_hints(record_type)
    columns = [pa.field(f.name, _arrow_type(hints[f.name])) for f in dataclasses.fields(record_type)]
    if record_type is Problem:
        columns.insert(0, pa.field("id", pa.string()))
    metadata = {"stillhouse.record": record_type.__name__, "stillhouse.schema_version": str(SCHEMA_VERSION)}
    return pa.schema(columns, metadata=metadata)


def to_table(record_type: type[Record], records: Iterable[Record]) -> pa.Table:
    """Turn records into an Arrow table with the type's fixed schema, also when there are none."""
    schema = arrow_schema(record_type)
    rows = list(records)
    columns = [pa.array([getattr(row, name) for row in rows], type=schema.field(name).type) for name in schema.names]
    return pa.table(columns, schema=schema)


def from_table(record_type: type[Record], table: pa.Table) -> list[Record]:
    """Read records back from an Arrow table.

    A column that an older version did not write yet gets its field's default.

    Raises:
        ValueError: a column of the record type is missing in the table.
    """
    fields = [f for f in dataclasses.fields(record_type) if f.name in table.column_names or f.default is dataclasses.MISSING]
    names = [f.name for f in fields]
    missing = sorted(set(names) - set(table.column_names))
    if missing:
        raise ValueError(f"a table of {record_type.__name__} needs the columns {missing}; it has {table.column_names}")
    tuples = {f.name for f in fields if typing.get_origin(typing.get_type_hints(record_type)[f.name]) is tuple}
    columns: list[Sequence[Any]] = [table.column(name).to_pylist() for name in names]
    columns = [[tuple(v) for v in column] if name in tuples else column for name, column in zip(names, columns)]
    if len(names) == len(dataclasses.fields(record_type)):
        return [record_type(*row) for row in zip(*columns)]
    return [record_type(**dict(zip(names, row))) for row in zip(*columns)]
