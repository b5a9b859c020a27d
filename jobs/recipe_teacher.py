"""The recipe's teacher: which model writes the traces, what serves it, how it is asked, and what it may cost.

A known teacher (`stillhouse.teachers.known`) brings its published settings along, and what the recipe says stands before
them. Any other teacher needs its settings said: a guess would be paid for by the token.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stillhouse.jobs.recipe_section import NonNegativeFloat, PositiveFloat, PositiveInt, Section, Text, VerifierKind
from stillhouse.teachers.known import known_teacher

ENGINES = ("vllm", "sglang", "transformers_serve", "llama_cpp")
"""Kinds whose server Ray starts on its workers."""


class TeacherSampling(Section):
    """How the teacher's completions are drawn; a known teacher's published values where a key is left out."""

    temperature: NonNegativeFloat
    """0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """Keep the smallest set of tokens whose probability reaches this."""
    max_new_tokens: PositiveInt
    """A completion is cut here, stored, and never trained on."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drop tokens less likely than this share of the likeliest; 0 drops none."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken from the logits of tokens that were written already."""
    repetition_penalty: PositiveFloat = 1.0
    """The logits of tokens that were written already are divided by it."""
    reasoning_effort: Literal["", "low", "medium", "high"] = ""
    """For teachers that know it (gpt-oss)."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Alternatives a token whose log probabilities are kept with the trace, from servers that give them; 0 keeps none."""


class Adaptive(Section):
    """Sample a problem until enough traces are verified or it looks hopeless, instead of a fixed number of times."""

    verified: PositiveInt = 1
    """Verified traces of a problem after which it is left alone."""
    max_samples: PositiveInt = 32
    """Draws a problem at most."""
    min_pass_rate: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """A problem that the teacher solves this often or more is given up by mistake with probability ``error`` at most."""
    error: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """See min_pass_rate: with 0.2 and 0.05 a problem is given up after 14 draws without a verified one
    (`stillhouse.pipeline.stopping`)."""

    @model_validator(mode="after")
    def _possible(self) -> Adaptive:
        if self.verified > self.max_samples:
            raise ValueError(f"asks for {self.verified} verified traces of at most max_samples={self.max_samples} draws")
        return self


class BudgetCaps(Section):
    """What all traces of a run may cost over all its restarts; reserved before a request goes out. null sets no cap."""

    max_dollars: PositiveFloat | None = None
    """Needs the prices of an endpoint."""
    max_tokens: PositiveInt | None = None
    """Prompt and completion tokens together."""
    max_hours: PositiveFloat | None = None
    """Hours in which traces are being written."""


class Teacher(Section):
    """What every teacher has, whatever serves it."""

    kind: str
    """What serves it."""
    model: Text
    """Shipped name, path, hub name, or the name that an endpoint knows the model by."""
    like: Text | None = None
    """A known teacher whose published settings this one takes: for a local copy, a fine-tune or an endpoint's own name."""
    samples_per_problem: PositiveInt = 1
    """Completions drawn for each problem; see adaptive for another way."""
    adaptive: Adaptive | None = None
    """Sample until enough traces of a problem are verified; null draws samples_per_problem."""
    sampling: TeacherSampling
    system_prompt: str | None = None
    """Sent before the problem; null sends none, as DeepSeek-R1 and its distillations ask for."""
    prompt_suffix: str = ""
    """Text that follows every problem after a blank line, for the teacher and for the student alike."""
    opens_think: bool
    """True where the teacher's generation prompt already ends with an opened think block."""
    budget: BudgetCaps = BudgetCaps()
    store: Text | None = None
    """Where traces are kept: a folder or a URL such as s3://bucket/traces; null takes the run's folder."""
    spool: Text | None = None
    """A folder on a local disk for what is not in the store yet; null takes one in the run's folder."""

    @model_validator(mode="before")
    @classmethod
    def _published_settings(cls, data: Any) -> Any:
        """Fill what the recipe leaves out from the known teachers' table."""
        if not isinstance(data, dict) or not isinstance(data.get("model"), str) or data.get("kind") == "replay":
            return data
        name = data.get("like") or data["model"]
        known = known_teacher(name) if isinstance(name, str) else None
        given = data.get("sampling") or {}
        if not isinstance(given, dict):
            return data
        if known is None:
            if data.get("like"):
                raise ValueError(f"has like={name!r}, which is no known teacher; `stillhouse teachers` lists them")
            return data | {"sampling": given}  # what is missing in it is then named key by key
        published = dict(known.settings())
        sampling = published.pop("sampling")
        return published | data | {"sampling": sampling | given}

    @model_validator(mode="after")
    def _one_way_of_sampling(self) -> Teacher:
        if self.adaptive and self.samples_per_problem != 1:
            raise ValueError("has adaptive and samples_per_problem; leave samples_per_problem out, or set adaptive to null")
        return self

    @property
    def max_samples(self) -> int:
        """Completions of one problem, at most."""
        return self.adaptive.max_samples if self.adaptive else self.samples_per_problem


class TransformersTeacher(Teacher):
    """A teacher that transformers runs inside Ray actors."""

    kind: Literal["transformers"]
    revision: Text | None = None
    """Commit or tag on the hub; null takes the newest."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of weights and activations."""
    batch_size: PositiveInt = 16
    """Completions drawn at once by one actor."""


class EngineTeacher(Teacher):
    """A teacher whose engine's own server Ray starts on its workers."""

    kind: Literal["vllm", "sglang", "transformers_serve", "llama_cpp"]
    revision: Text | None = None
    """Commit or tag on the hub; null takes the newest."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "bfloat16"
    """Type of weights and activations; auto takes what the model's own files say (FP8 for DeepSeek-R1)."""
    through: Literal["ray_serve", "own_server"] | None = None
    """Ray Serve LLM, which alone spreads one replica over several nodes, or the engine's own server in a thin actor. null takes
    ray_serve for a vllm in Ray's own environment, and own_server for everything else."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share each layer of one replica."""
    pipeline_parallel: PositiveInt = 1
    """Groups of GPUs, one after another, that share the layers of one replica; vllm through ray_serve."""
    replicas: PositiveInt = 1
    """Copies of the model; requests are spread over them."""
    gpus_per_replica: Annotated[int, Field(ge=0)] | None = None
    """null takes tensor_parallel × pipeline_parallel for vllm and sglang, and none for transformers_serve and llama_cpp."""
    accelerator: Text | None = None
    """ray_serve: the GPU as Ray calls it, for example H100; null takes any."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and completion together, tokens; null takes the model's own."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that the engine may take."""
    max_concurrent: PositiveInt = 256
    """Requests in flight per replica."""
    engine_python: Text | None = None
    """Interpreter of the environment that the engine is installed in, on the workers; null takes Ray's own."""
    engine_args: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Further arguments of the engine's command line, as they are."""
    dollars_per_gpu_hour: NonNegativeFloat = 0.0
    """For the cost in report and status; 0 reports hours alone."""
    startup_timeout_s: PositiveFloat = 3600.0
    """How long a server may take until it answers; a 671 B model loads for half an hour."""
    stream: bool = True
    """Ask for streams, so that a completion that goes in circles can be stopped."""
    stop_loops: bool = True
    """Stop a stream that repeats itself; the trace is kept with finish_reason loop and never trained on."""

    @model_validator(mode="after")
    def _fits_the_engine(self) -> EngineTeacher:
        if self.through == "ray_serve" and (self.kind != "vllm" or self.engine_python):
            raise ValueError("has through=ray_serve, which serves kind=vllm from Ray's own environment alone; leave it out")
        if self.pipeline_parallel > 1 and not self.on_ray_serve:
            raise ValueError("has pipeline_parallel above 1, which needs kind=vllm with through=ray_serve")
        if self.budget.max_dollars is not None:
            raise ValueError("has budget.max_dollars, and an engine of one's own has no price per token; use max_hours")
        return self

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica."""
        if self.gpus_per_replica is not None:
            return self.gpus_per_replica
        return self.tensor_parallel * self.pipeline_parallel if self.kind in ("vllm", "sglang") else 0

    @property
    def on_ray_serve(self) -> bool:
        """Whether Ray Serve LLM runs the engine, and not a thin actor of ours."""
        return self.kind == "vllm" and (self.through == "ray_serve" or (self.through is None and not self.engine_python))


class EndpointTeacher(Teacher):
    """A teacher behind an OpenAI-compatible HTTP endpoint."""

    kind: Literal["endpoint"]
    base_url: Text
    """For example https://api.example.com/v1, without user name or password."""
    revision: Text | None = None
    """What is known of the model's version; part of every trace's key."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; null sends none. The key itself never stands in a recipe."""
    api_key_file: Text | None = None
    """A file that holds the key and nothing else, read where the run starts; give this or api_key_env."""
    price_per_million_input_tokens: NonNegativeFloat = 0.0
    """Dollars."""
    price_per_million_output_tokens: NonNegativeFloat = 0.0
    """Dollars."""
    max_concurrent: PositiveInt = 64
    """Requests in flight, at most; fewer while the endpoint pushes back."""
    stream: bool = False
    """Ask for streams, so that a completion that goes in circles can be stopped."""
    stop_loops: bool = True
    """With stream: stop one that repeats itself; the trace is kept with finish_reason loop and never trained on."""
    connect_timeout_s: PositiveFloat = 10.0
    """Time limit until the endpoint takes the connection."""
    first_byte_timeout_s: PositiveFloat = 1800.0
    """Time limit from request to first byte; a whole answer comes all at once, after the last token."""
    idle_timeout_s: PositiveFloat = 300.0
    """Longest silence within an answer."""
    total_timeout_s: PositiveFloat = 7200.0
    """Longest time from request to last byte."""
    max_attempts: PositiveInt = 6
    """Requests made for one completion before the run stops."""
    extra_body: dict[str, Any] = Field(default={})
    """Further keys of the request's body, as the endpoint's own documentation has them; part of every trace's key."""

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        if "@" in value:  # the value may hold a password: say what is wrong without repeating it
            raise ValueError("must not carry a user name or password; name an environment variable in teacher.api_key_env")
        if not re.match(r"https?://[^/\s]+", value):
            raise ValueError(f"has to start with http:// or https:// and name a host; got {value!r}")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _a_name_and_not_a_key(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError(
                "has to be the name of an environment variable in capitals, such as DEEPSEEK_API_KEY, never the key itself"
            )
        return value

    @model_validator(mode="after")
    def _priced(self) -> EndpointTeacher:
        prices = self.price_per_million_input_tokens + self.price_per_million_output_tokens
        if self.budget.max_dollars is not None and not prices:
            raise ValueError("has budget.max_dollars and no price; give price_per_million_input_tokens and …_output_tokens")
        if self.api_key_env and self.api_key_file:
            raise ValueError("has api_key_env and api_key_file; give one of them")
        return self


class ReplayTeacher(Section):
    """Traces that exist already: a public data set or a file of one's own, read into the store and verified like any other."""

    kind: Literal["replay"]
    layout: Literal["open_r1", "openthoughts", "sky_t1", "jsonl"]
    """How the rows are built: OpenR1-Math-220k, OpenThoughts (1 to 3), Sky-T1, or our own plain one."""
    path: Text | None = None
    """A local JSONL or Parquet file; give this or name."""
    name: Text | None = None
    """A data set on the hub; give this or path."""
    subset: Text | None = None
    """Configuration of the data set; null takes its default."""
    split: Text = "train"
    """Split of the data set."""
    revision: Text | None = None
    """Commit or tag of the data set; part of every trace's provenance."""
    limit: PositiveInt | None = None
    """At most this many rows, from the start; null takes all."""
    problem_kind: VerifierKind = "math"
    """Which verifier judges the answers; what the data set says of them is kept as provenance and decides nothing. Rows of
    layout jsonl bring along what it needs, as rows of a problem file do."""
    model: Text = "unknown"
    """jsonl: who wrote the traces, where the rows do not say."""
    system_prompt: str | None = None
    """What the student is told before a problem; null tells it nothing."""
    prompt_suffix: str = ""
    """Text that follows every problem after a blank line, for the student."""
    store: Text | None = None
    """Where traces are kept: a folder or a URL such as s3://bucket/traces; null takes the run's folder."""
    spool: Text | None = None
    """A folder on a local disk for what is not in the store yet; null takes one in the run's folder."""

    @model_validator(mode="after")
    def _one_source(self) -> ReplayTeacher:
        if (self.path is None) == (self.name is None):
            raise ValueError("needs exactly one of path and name")
        return self


AnyTeacher = Annotated[TransformersTeacher | EngineTeacher | EndpointTeacher | ReplayTeacher, Field(discriminator="kind")]
