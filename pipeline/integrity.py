"""Is this checkpoint folder whole, safe and consistent? Every question that can be asked without running the model.

The loaders people use accept duplicate keys in a safetensors header, tensors that overlap, names like ``../x`` and NaN
weights. This check does not: it reads every byte itself and holds it against what config.json and the manifest promise.
No torch, and no code from the folder is run.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.pipeline.errors import IntegrityError
from stillhouse.pipeline.manifest import MANIFEST_NAME, json_type, read_manifest, strict_json, verify_manifest
from stillhouse.pipeline.safetensors_reader import TensorEntry, read_safetensors_header

ALLOWED_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".md", ".model"})
MAX_ABS_SCALE = 1e4
# (unsigned type of the same width, exponent bits): all exponent bits set means Inf or NaN.
_EXPONENT = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
_LAYER = re.compile(r"(?P<stack>.*\blayers)\.(?P<index>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True, slots=True)
class IntegrityReport:
    """What the check found: ``problems`` in words, each beginning with the file it is about; ``ok`` when there is none."""

    ok: bool
    problems: list[str]
    files: int
    tensors: int


def check_checkpoint(folder: Path | str) -> IntegrityReport:
    """Check an emitted checkpoint folder: files, manifest, safetensors, weights, configuration, tokenizer, template.

    Every check runs, so that one call names everything that is wrong, and each cause once: of a file that is foreign, missing
    or cut, what follows from that is not said again. The manifest's ``provenance`` has to hold
    ``chat_template_sha256`` (see ``chat_template_sha256``): the template that the student was trained with.
    """
    root = Path(folder)
    if not root.is_dir():
        return IntegrityReport(False, [f"{root}: no such folder"], 0, 0)
    paths = [path for path in sorted(root.rglob("*")) if path.is_symlink() or not path.is_dir()]
    faults_by_file = {path.relative_to(root).as_posix(): _check_file(root, path) for path in paths}
    problems = [fault for faults in faults_by_file.values() for fault in faults]
    hurt = {name for name, faults in faults_by_file.items() if faults}  # said above; not again below

    provenance: dict[str, Any] | None = None
    try:
        differences = verify_manifest(root)
        provenance = read_manifest(root)["provenance"]
    except IntegrityError as error:
        differences = []
        if MANIFEST_NAME not in hurt:
            problems.append(f"{MANIFEST_NAME}: {str(error).removeprefix(str(root / MANIFEST_NAME)).lstrip(': ')}")
    differences = [line for line in differences if line.partition(": ")[0] not in hurt]
    problems += differences
    hurt |= {line.partition(": ")[0] for line in differences}

    parsed = {
        name: _json(path)
        for path in paths
        if path.suffix == ".json" and path.is_file() and (name := path.relative_to(root).as_posix()) != MANIFEST_NAME
    }
    problems += [f"{name}: {value}" for name, value in parsed.items() if isinstance(value, ValueError) and name not in hurt]
    config = _mapping(parsed, "config.json", problems, hurt)
    generation = _mapping(parsed, "generation_config.json", problems, hurt)

    tensors: dict[str, TensorEntry] = {}
    for path in paths:
        if path.suffix != ".safetensors" or not path.is_file():
            continue
        entries, faults = read_safetensors_header(path)
        name = path.relative_to(root).as_posix()
        problems += [f"{name}: {fault}" for fault in faults]
        hurt |= {name} if faults else set()
        for entry in entries:
            if path.parent != root:
                continue  # an adapter beside the model has names of its own
            if entry.name in tensors:
                problems.append(f"{path.name}: tensor {entry.name!r} is also in {tensors[entry.name].file.name}")
            tensors[entry.name] = entry
    if tensors:
        problems += _check_index(parsed, tensors)
        problems += [f"{entry.file.name}: {fault}" for entry in tensors.values() for fault in _check_finite(entry)]
    if tensors and config:
        problems += _check_int4(tensors, config)
        problems += _check_architecture(tensors, config)
    if not tensors and not any(name.endswith(".safetensors") for name in hurt):
        problems.append("model.safetensors: no tensor in the folder")
    problems += _check_tokenizer(root, parsed, config, generation, hurt)
    if "chat_template.jinja" not in hurt:
        problems += _check_template(root, parsed, provenance)
    return IntegrityReport(not problems, problems, len(paths), len(tensors))


def chat_template_sha256(template: str) -> str:
    """Name a chat template by the sha256 of its UTF-8 text: what ``chat_template_sha256`` in a manifest holds."""
    return hashlib.sha256(template.encode()).hexdigest()


def _check_file(root: Path, path: Path) -> list[str]:
    name = path.relative_to(root).as_posix()
    if path.is_symlink() or not path.is_file():
        return [f"{name}: not a regular file; a checkpoint holds regular files only"]
    if any(part.startswith(".") for part in Path(name).parts):
        return [f"{name}: hidden files do not belong in a checkpoint"]
    if path.suffix not in ALLOWED_SUFFIXES or (path.suffix == ".model" and path.name != "tokenizer.model"):
        return [f"{name}: not a kind of file a checkpoint may hold (no code, no pickle; {', '.join(sorted(ALLOWED_SUFFIXES))})"]
    if path.suffix in {".txt", ".md", ".jinja", ".json"}:
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            return [f"{name}: not UTF-8 text: {error}"]
    return []


def _json(path: Path) -> Any:
    """The parsed file, or the ValueError that says why it does not parse."""
    try:
        return strict_json(path.read_bytes())
    except ValueError as error:
        return ValueError(f"not valid JSON: {error}")


def _mapping(parsed: dict[str, Any], name: str, problems: list[str], hurt: set[str]) -> dict[str, Any]:
    """A required JSON file as a mapping; empty, and a problem more, where it is not one or says nothing."""
    content = parsed.get(name)
    if isinstance(content, dict) and content:
        if "auto_map" in content:
            problems.append(f"{name}: auto_map makes loaders run code from the folder or from a hub; remove it")
        return content
    if name in hurt or isinstance(content, ValueError):
        return {}  # reported already
    if name not in parsed:
        problems.append(f"{name}: missing")
    elif content == {}:
        problems.append(f"{name}: an empty JSON object; it lacks every setting")
    else:
        problems.append(f"{name}: expected a JSON object, got {json_type(content)}")
    return {}


def _check_index(parsed: dict[str, Any], tensors: dict[str, TensorEntry]) -> list[str]:
    name = "model.safetensors.index.json"
    shards = sorted({entry.file.name for entry in tensors.values()})
    index = parsed.get(name)
    if name not in parsed:
        return [f"{name}: missing, and the tensors are in {len(shards)} files ({', '.join(shards)})"] if len(shards) > 1 else []
    if isinstance(index, ValueError):
        return []
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        return [f"{name}: needs the mapping 'weight_map'"]
    actual = {tensor: entry.file.name for tensor, entry in tensors.items()}
    wrong = sorted(tensor for tensor in weight_map.keys() | actual.keys() if weight_map.get(tensor) != actual.get(tensor))
    return [
        f"{name}: puts tensor {tensor!r} in {weight_map.get(tensor, 'no file')}, it is in {actual.get(tensor, 'no file')}"
        for tensor in wrong
    ]


def _check_finite(entry: TensorEntry) -> list[str]:
    if entry.dtype not in _EXPONENT:
        return []
    bits, exponent = _EXPONENT[entry.dtype]
    count = sum(int(np.count_nonzero((chunk & exponent) == exponent)) for chunk in entry.chunks(bits))
    return [f"tensor {entry.name!r} holds {count} NaN or Inf"] if count else []


def _floats(entry: TensorEntry) -> Any:
    if entry.dtype == "BF16":
        return ((chunk.astype(np.uint32) << 16).view(np.float32) for chunk in entry.chunks("<u2"))
    return entry.chunks({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[entry.dtype])


def _check_int4(tensors: dict[str, TensorEntry], config: dict[str, Any]) -> list[str]:
    """compressed-tensors pack-quantized: weight_packed I32 [N, K·bits/32], weight_scale [N, K/g], weight_shape I64 [2].

    Asymmetric ones have weight_zero_point I32 [N·bits/32, K/g], too.
    """
    parts = ["weight_packed", "weight_scale", "weight_shape"]
    modules: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in tensors.items():
        module, _, last = name.rpartition(".")
        if last in (*parts, "weight_zero_point"):
            modules[module][last] = entry
    quantization = config.get("quantization_config")
    if not modules:
        return ["config.json: quantization_config is there, and no tensor is quantized"] if quantization else []
    if quantization is None:
        return ["config.json: quantization_config is missing, and the tensors are quantized"]
    says = "config.json: quantization_config does not describe the quantized tensors: "
    try:
        if len(quantization["config_groups"]) != 1:
            raise ValueError(f"expected one group in config_groups, got {len(quantization['config_groups'])}")
        (group,) = quantization["config_groups"].values()
        bits, group_size = group["weights"]["num_bits"], group["weights"]["group_size"]
        if quantization["format"] != "pack-quantized" or type(bits) is not int or type(group_size) is not int:
            raise ValueError("expected format pack-quantized and whole numbers")
        if not (bits in (4, 8) and group_size >= 1):
            raise ValueError(f"num_bits={bits} and group_size={group_size} make no packed weight")
    except KeyError as error:
        return [f"{says}it lacks {error}"]
    except (TypeError, AttributeError):
        return [f"{says}expected config_groups, each with weights, num_bits and group_size"]
    except ValueError as error:
        return [f"{says}{error}"]
    if group["weights"].get("symmetric") is not True:
        parts.append("weight_zero_point")

    problems = []
    for module, found in modules.items():
        file = next(iter(found.values())).file.name
        if found.keys() != set(parts):
            problems.append(f"{file}: module {module!r} has {sorted(found)} and needs {parts}")
            continue
        packed, scale, shape = (found[part] for part in parts[:3])
        if shape.dtype != "I64" or shape.shape != (2,):
            problems.append(f"{file}: {shape.name!r} has to be I64 [2]; it is {shape.dtype} {list(shape.shape)}")
            continue
        n, k = (int(length) for length in next(shape.chunks("<i8")))
        if packed.dtype != "I32" or packed.shape != (n, -(-k * bits // 32)):
            expected = f"I32 [{n}, {-(-k * bits // 32)}]"
            problems.append(f"{file}: {packed.name!r} is {packed.dtype} {list(packed.shape)}; weight_shape asks for {expected}")
        zero = found.get("weight_zero_point")
        if zero and (zero.dtype != "I32" or zero.shape != (-(-n * bits // 32), -(-k // group_size))):
            expected = f"I32 [{-(-n * bits // 32)}, {-(-k // group_size)}]"
            problems.append(f"{file}: {zero.name!r} is {zero.dtype} {list(zero.shape)}; weight_shape asks for {expected}")
        if scale.dtype not in _EXPONENT or scale.shape != (n, -(-k // group_size)):
            expected = f"a float [{n}, {-(-k // group_size)}] at group_size {group_size}"
            problems.append(f"{file}: {scale.name!r} is {scale.dtype} {list(scale.shape)}; weight_shape asks for {expected}")
            continue
        with np.errstate(invalid="ignore"):
            absurd = sum(int(np.count_nonzero((v == 0) | (np.abs(v) >= MAX_ABS_SCALE))) for v in _floats(scale))
        if absurd:
            problems.append(f"{file}: {scale.name!r} holds {absurd} scales that are 0 or beyond ±{MAX_ABS_SCALE:g}")
    return problems


def _check_architecture(tensors: dict[str, TensorEntry], config: dict[str, Any]) -> list[str]:
    """Shapes as config.json says, for the decoder layout that Qwen2, Qwen3 and Llama share; every layer there and alike."""
    sizes = {key: config.get(key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    bad = {key: value for key, value in sizes.items() if type(value) is not int or value < 1}
    if bad:
        return [f"config.json: needs vocab_size, hidden_size and num_hidden_layers as whole numbers; got {bad}"]
    vocab, hidden, num_layers = sizes.values()
    heads, inner = config.get("num_attention_heads"), config.get("intermediate_size")
    kv_heads = config.get("num_key_value_heads", heads)
    expected: dict[str, tuple[int, ...]] = {"embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden)}
    expected |= {name: (hidden,) for name in ("input_layernorm", "post_attention_layernorm", "norm")}
    if type(inner) is int:
        expected |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    if type(heads) is int and type(kv_heads) is int and heads > 0:
        head = config["head_dim"] if type(config.get("head_dim")) is int else hidden // heads
        expected |= {"q_proj": (heads * head, hidden), "o_proj": (hidden, heads * head)}
        expected |= {name: (kv_heads * head, hidden) for name in ("k_proj", "v_proj")}
        expected |= {"q_norm": (head,), "k_norm": (head,)}
    problems = []
    for name, entry in tensors.items():
        module, _, last = name.rpartition(".")
        want = expected.get(module.rpartition(".")[2])
        if want is None or last not in ("weight", "weight_shape", "bias"):
            continue
        if last == "weight_shape":
            actual = tuple(int(v) for chunk in entry.chunks("<i8") for v in chunk) if entry.dtype == "I64" else entry.shape
        else:
            actual = entry.shape
        want = want[:1] if last == "bias" else want
        if actual != want:
            problems.append(f"{entry.file.name}: {name!r} is {list(actual)}, config.json asks for {list(want)}")

    layers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in tensors:
        if match := _LAYER.fullmatch(name):
            part = re.sub(r"weight_\w+$", "weight", match["rest"])  # one layer may stay in 16 bits where others are packed
            layers[match["stack"]][int(match["index"])].add(part)
    where = "model.safetensors"
    for stack, by_index in layers.items():
        if len(by_index) != num_layers or max(by_index) != num_layers - 1:
            problems.append(f"{where}: {stack} has the layers {sorted(by_index)}, config.json asks for 0 to {num_layers - 1}")
        usual = set().union(*by_index.values())
        problems += [
            f"{where}: layer {stack}.{i} lacks {sorted(usual - have)}" for i, have in sorted(by_index.items()) if usual - have
        ]
    if not layers:
        problems.append(f"{where}: no decoder layer, config.json asks for {num_layers}")
    modules = {name.rpartition(".")[0].rpartition(".")[2] for name in tensors}
    needed = {"embed_tokens", "norm"} | (set() if config.get("tie_word_embeddings") else {"lm_head"})
    problems += [f"{where}: no tensor for {module}" for module in sorted(needed - modules)]
    return problems


def _check_tokenizer(
    root: Path, parsed: dict[str, Any], config: dict[str, Any], generation: dict[str, Any], hurt: set[str]
) -> list[str]:
    problems: list[str] = []
    vocab_size = config.get("vocab_size")
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
            value = content.get(key)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            for token in ids:
                if type(token) is not int or token < 0 or (type(vocab_size) is int and token >= vocab_size):
                    problems.append(f"{name}: {key} {token!r} is not in the vocabulary of {vocab_size} tokens")
    if generation and generation.get("eos_token_id") in (None, []):
        problems.append("generation_config.json: no eos_token_id, so generation never stops by itself")

    settings = _mapping(parsed, "tokenizer_config.json", problems, hurt)
    if not _mapping(parsed, "tokenizer.json", problems, hurt):
        return problems
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    except Exception as error:  # the Rust binding raises the bare type
        problems += [] if "tokenizer.json" in hurt else [f"tokenizer.json: the tokenizers library refuses it: {error}"]
        return problems
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if type(vocab_size) is int and vocabulary and max(vocabulary.values()) >= vocab_size:
        problems.append(f"tokenizer.json: token id {max(vocabulary.values())} is beyond vocab_size {vocab_size} of config.json")
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if settings and not (isinstance(eos, str) and eos in vocabulary):
        problems.append(f"tokenizer_config.json: eos_token {eos!r} is not a token of tokenizer.json")
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    names = {token_id: token for token, token_id in vocabulary.items()}
    stops = generation.get("eos_token_id")
    for token in stops if isinstance(stops, list) else [stops]:
        if type(token) is int and token in names and token not in special:
            problems.append(
                f"generation_config.json: eos_token_id {token} is {names[token]!r}, which is text, not a special token"
            )
    return problems


def _check_template(root: Path, parsed: dict[str, Any], provenance: dict[str, Any] | None) -> list[str]:
    settings = parsed.get("tokenizer_config.json")
    inside = settings.get("chat_template") if isinstance(settings, dict) else None
    path = root / "chat_template.jinja"
    where, template = "tokenizer_config.json", inside
    if path.is_file():
        where, template = path.name, path.read_bytes().decode("utf-8", errors="replace")
        if inside is not None and inside != template:
            return [f"{where}: differs from the chat_template in tokenizer_config.json, and loaders read either"]
    if not isinstance(template, str) or not template.strip():
        return ["chat_template.jinja: no chat template in the folder"]
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    problems = []
    try:  # the environment that transformers renders chat templates with
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
        )
    except TemplateSyntaxError as error:
        problems.append(f"{where}: the chat template does not parse: {error}")
    if provenance is None:
        return problems  # the manifest cannot be read: reported already
    promised = provenance.get("chat_template_sha256")
    if promised is None:
        problems.append(f"{MANIFEST_NAME}: provenance has no chat_template_sha256, so the template of training is not known")
    elif promised != chat_template_sha256(template):
        problems.append(
            f"{where}: sha256 {chat_template_sha256(template)} is not the template of training, {promised} ({MANIFEST_NAME})"
        )
    return problems
