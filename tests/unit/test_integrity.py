"""Integrity of a checkpoint folder: a whole one passes, and every corruption is caught with a message naming the file."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stillhouse.pipeline.integrity import chat_template_sha256, check_checkpoint
from stillhouse.pipeline.manifest import read_manifest, write_manifest

HIDDEN, INNER, LAYERS, GROUP = 64, 96, 2, 32
HEADS, KV_HEADS, HEAD = 4, 2, 16
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{% generation %}x{% endgeneration %}{% endfor %}<think>\n"
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
PACKED = "model.layers.1.mlp.down_proj.weight_packed"
SCALE = "model.layers.1.mlp.down_proj.weight_scale"
SHAPE = "model.layers.1.mlp.down_proj.weight_shape"


def weights(vocab_size):
    rng = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(vocab_size, HIDDEN)).astype(np.float16),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, (n, k) in LINEARS.items():
            packed = rng.integers(-(2**31), 2**31, size=(n, k // 8), dtype=np.int64).astype(np.int32)
            tensors[f"{prefix}.{name}.weight_packed"] = packed
            tensors[f"{prefix}.{name}.weight_scale"] = rng.uniform(0.01, 0.1, size=(n, k // GROUP)).astype(np.float16)
            tensors[f"{prefix}.{name}.weight_shape"] = np.array([n, k], np.int64)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = np.ones(HIDDEN, np.float16)
    return tensors


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|end|>", "<|pad|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size()
    eos, pad = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|pad|>")
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "tie_word_embeddings": True,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "bos_token_id": None,
        "quantization_config": quantization,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [eos], "pad_token_id": pad})
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|end|>", "pad_token": {"content": "<|pad|>"}})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "README.md").write_text("# A tiny student\n")
    save_file(weights(vocab_size), folder / "model.safetensors", metadata={"format": "pt"})
    seal(folder)
    return folder


def seal(folder):
    write_manifest(folder, kind="checkpoint", extra={"chat_template_sha256": chat_template_sha256(TEMPLATE)})


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def test_an_untouched_checkpoint_passes(folder):
    """Good checkpoints would be refused."""
    report = check_checkpoint(folder)
    assert report.problems == []
    assert (report.ok, report.files, report.tensors) == (True, 8, 2 + LAYERS * (3 * len(LINEARS) + 2))


# -- corruption in storage or transport: the manifest is the one that was written with the folder


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 0x10
    path.write_bytes(raw)


FILES = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


def test_the_damage_below_meets_every_file(folder):
    """A file could be left out of the tests that hurt each one."""
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped bit", "cut in half", "emptied", "deleted", "made a link"])
def test_damage_to_any_file_is_caught(folder, name, damage, tmp_path):
    """A checkpoint that was hurt on its way would be served."""
    path = folder / name
    if damage == "flipped bit":
        flip_a_bit(path)
    elif damage == "cut in half":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "emptied":
        os.truncate(path, 0)
    elif damage == "deleted":
        path.unlink()
    else:
        shutil.move(path, tmp_path / name)
        path.symlink_to(tmp_path / name)
    report = check_checkpoint(folder)
    assert not report.ok
    assert any(problem.startswith(f"{name}: ") for problem in report.problems)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "modeling_x.py", "weights.pt", "notes.pkl", "extra.json", "sub/extra.txt", ".x.json"]
)
def test_a_foreign_file_is_caught(folder, name):
    """A pickle or a program could travel in a checkpoint that was declared safe."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps({}) if name.endswith(("bin", "pt", "pkl")) else b"{}")
    assert any(problem.startswith(f"{name}: ") for problem in check_checkpoint(folder).problems)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "modeling_x.py", "weights.pt", "notes.pkl", "model.gguf", "vocab.model", ".x.json"]
)
def test_a_sealed_foreign_file_is_caught(folder, name):
    """An exporter that writes a pickle would be trusted because it also wrote the manifest."""
    (folder / name).write_bytes(b"{}")
    seal(folder)
    (problem,) = check_checkpoint(folder).problems
    assert problem.startswith(f"{name}: ")


def test_two_files_with_their_names_swapped_are_caught(folder):
    """Configuration and generation settings could change places."""
    a, b = folder / "config.json", folder / "generation_config.json"
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)
    problems = check_checkpoint(folder).problems
    assert any(problem.startswith("config.json: changed") for problem in problems)
    assert any(problem.startswith("generation_config.json: changed") for problem in problems)


# -- corruption at the source: the exporter wrote something wrong and sealed it, so the hashes agree


def edit_json(folder, name, edit):
    content = json.loads((folder / name).read_text())
    edit(content)
    write_json(folder / name, content)
    seal(folder)


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    seal(folder)


def put(name, index, value):
    def edit(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][index] = value

    return edit


def swap(a, b):
    def edit(tensors):
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return edit


def replace(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (put(SCALE, (3, 1), np.nan), f"tensor {SCALE!r} holds 1 NaN or Inf"),
        (put(SCALE, (3, 1), -np.inf), f"tensor {SCALE!r} holds 1 NaN or Inf"),
        (put(SCALE, (3, 1), 0), f"{SCALE!r} holds 1 scales that are 0 or beyond"),
        (put(SCALE, (3, 1), 2e4), f"{SCALE!r} holds 1 scales that are 0 or beyond"),
        (put("model.norm.weight", 5, np.nan), "tensor 'model.norm.weight' holds 1 NaN or Inf"),
        (put("model.embed_tokens.weight", (0, 0), np.inf), "tensor 'model.embed_tokens.weight' holds 1 NaN or Inf"),
        (put(SHAPE, 1, 64), f"{PACKED!r} is I32 [64, 12]; weight_shape asks for I32 [64, 8]"),
        (replace(SHAPE, lambda t: t.astype(np.int32)), f"{SHAPE!r} has to be I64 [2]; it is I32 [2]"),
        (replace(SCALE, lambda t: t[:, :1].copy()), f"{SCALE!r} is F16 [64, 1]; weight_shape asks for a float [64, 3]"),
        (replace(SCALE, lambda t: t.astype(np.int32)), f"{SCALE!r} is I32 [64, 3]; weight_shape asks for a float [64, 3]"),
        (replace(PACKED, lambda t: t.view(np.uint8)), f"{PACKED!r} is U8 [64, 48]"),
        (replace("model.norm.weight", lambda t: t[:32].copy()), "'model.norm.weight' is [32], config.json asks for [64]"),
        (swap("model.embed_tokens.weight", "model.norm.weight"), "'model.norm.weight' is [258, 64]"),
        (lambda t: t.pop(SCALE), "needs ['weight_packed', 'weight_scale', 'weight_shape']"),
        (lambda t: [t.pop(name) for name in (PACKED, SCALE, SHAPE)], "layer model.layers.1 lacks ['mlp.down_proj.weight']"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], "has the layers [0], config.json asks for 0 to 1"),
        (lambda t: t.pop("model.norm.weight"), "no tensor for norm"),
        (rename("model.norm.weight", "../norm.weight"), "tensor '../norm.weight' has a name that no module could have"),
        (rename("model.norm.weight", "model/norm"), "tensor 'model/norm' has a name that no module could have"),
        (lambda t: t.update({"x.weight": np.zeros((0, 4), np.float32)}), "tensor 'x.weight' has the shape [0, 4]"),
    ],
)
def test_wrong_weights_are_caught_behind_a_right_hash(folder, edit, says):
    """A model that computes NaN, or that no loader can assemble, would be declared sound because its hash fits."""
    edit_tensors(folder, edit)
    problems = check_checkpoint(folder).problems
    assert any(problem.startswith("model.safetensors: ") and says in problem for problem in problems), problems


def read_parts(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 : 8 + length], raw[8 + length :]


def write_parts(folder, header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    seal(folder)


def first(header):
    return min((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][0])


def test_a_header_rewritten_by_the_tests_is_read(folder):
    """The tests below would pass because rewriting a header is itself a fault."""
    header, _, data = read_parts(folder / "model.safetensors")
    write_parts(folder, header, data)
    assert check_checkpoint(folder).problems == []


@pytest.mark.parametrize(
    ("header_edit", "says"),
    [
        (lambda h, raw, d: (b'{"a":1,"a":2}', d), "the key 'a' occurs twice"),
        (lambda h, raw, d: (raw[:1] + b'"__metadata__":{},' + raw[1:], d), "the key '__metadata__' occurs twice"),
        (lambda h, raw, d: (b" " + raw, d), "does not begin with '{'"),
        (lambda h, raw, d: (b"[" * 5000, d), "does not begin with '{'"),
        (lambda h, raw, d: (b'{"a":' * 50_000, d), "nested too deep"),
        (lambda h, raw, d: (h | {"__metadata__": {"format": 1}}, d), "__metadata__ has to map text to text"),
        (lambda h, raw, d: (h, d + b"\0" * 8), "the tensors end at byte"),
        (lambda h, raw, d: (h, d[:-8]), "the tensors end at byte"),
        (lambda h, raw, d: (move(h, 8), b"\0" * 8 + d), "leaves a gap of 8 bytes after 'the header'"),
        (lambda h, raw, d: (shift_first(h, 8), d), "overlaps"),
        (lambda h, raw, d: (with_first(h, dtype="F8_E8M0"), d), "has the dtype 'F8_E8M0'"),
        (lambda h, raw, d: (with_first(h, dtype=["F16"]), d), "has the dtype ['F16']"),
        (lambda h, raw, d: (with_first(h, shape=[2, -3]), d), "has the shape [2, -3]"),
        (lambda h, raw, d: (with_first(h, shape=[True, 2]), d), "has the shape [True, 2]"),
        (lambda h, raw, d: (with_first(h, shape=[2**40, 2**40]), d), "bytes where"),
        (lambda h, raw, d: (with_first(h, data_offsets=[8, 0]), d), "takes -8 bytes"),
        (lambda h, raw, d: (with_first(h, data_offsets=[0.0, 1.5]), d), "has the data_offsets [0.0, 1.5]"),
        (lambda h, raw, d: (with_first(h, data_offsets=[-4, 4]), d), "has the data_offsets [-4, 4]"),
        (lambda h, raw, d: (with_first(h, code="import os"), d), "needs exactly dtype, shape and data_offsets"),
        (lambda h, raw, d: (h | {"x": 3}, d), "tensor 'x' needs exactly dtype, shape and data_offsets"),
    ],
)
def test_a_header_outside_the_specification_is_caught(folder, header_edit, says):
    """Two loaders would read two different models from one file, or read beyond its end."""
    header, data = header_edit(*read_parts(folder / "model.safetensors"))
    write_parts(folder, header, data)
    problems = check_checkpoint(folder).problems
    assert any(problem.startswith("model.safetensors: ") and says in problem for problem in problems), problems


def move(header, by):
    return {
        name: info if name == "__metadata__" else info | {"data_offsets": [offset + by for offset in info["data_offsets"]]}
        for name, info in header.items()
    }


def shift_first(header, by):
    name = first(header)
    begin, end = header[name]["data_offsets"]
    return with_first(header, data_offsets=[begin + by, end + by])


def with_first(header, **changes):
    name = first(header)
    return header | {name: header[name] | changes}


def test_a_header_length_beyond_the_file_is_caught(folder):
    """A crafted length would make the reader ask for 16 exabytes of memory."""
    (folder / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    seal(folder)
    (problem,) = [p for p in check_checkpoint(folder).problems if "not safetensors" in p]
    assert problem.startswith("model.safetensors: not safetensors: the header should be 18446744073709551615 bytes")


def test_nan_is_found_in_bfloat16(folder):
    """The most common dtype of published weights would go unchecked, since numpy does not know it."""
    header, _, data = read_parts(folder / "model.safetensors")
    info = header["model.embed_tokens.weight"]
    info["dtype"] = "BF16"
    data = bytearray(data)
    begin, end = info["data_offsets"]
    data[begin:end] = np.full((end - begin) // 2, 0x3F80, "<u2").tobytes()
    write_parts(folder, header, bytes(data))
    assert check_checkpoint(folder).problems == []
    data[begin + 2 : begin + 6] = b"\xc1\x7f\x80\xff"  # a NaN and −Inf
    write_parts(folder, header, bytes(data))
    assert check_checkpoint(folder).problems == ["model.safetensors: tensor 'model.embed_tokens.weight' holds 2 NaN or Inf"]


def set_key(key, value):
    return lambda content: content.update({key: value})


def set_group_size(config):
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("config.json", set_key("eos_token_id", 258), "config.json: eos_token_id 258 is not in the vocabulary of 258 tokens"),
        ("config.json", set_key("bos_token_id", -1), "config.json: bos_token_id -1 is not in the vocabulary"),
        ("config.json", set_key("pad_token_id", "0"), "config.json: pad_token_id '0' is not in the vocabulary"),
        ("config.json", set_key("vocab_size", 256), "tokenizer.json: token id 257 is beyond vocab_size 256"),
        ("config.json", set_key("vocab_size", 300), "'model.embed_tokens.weight' is [258, 64], config.json asks for [300, 64]"),
        ("config.json", set_key("hidden_size", 128), "config.json asks for [128]"),
        ("config.json", set_key("num_key_value_heads", 4), "k_proj.weight_shape' is [32, 64], config.json asks for [64, 64]"),
        ("config.json", set_key("num_hidden_layers", 3), "has the layers [0, 1], config.json asks for 0 to 2"),
        ("config.json", set_key("num_hidden_layers", None), "config.json: needs vocab_size, hidden_size and num_hidden_layers"),
        ("config.json", set_key("tie_word_embeddings", False), "no tensor for lm_head"),
        ("config.json", set_key("auto_map", {"AutoModel": "x.Y"}), "config.json: auto_map makes loaders run code"),
        ("config.json", set_key("quantization_config", None), "quantization_config is missing, and the tensors are quantized"),
        ("config.json", lambda c: c.pop("quantization_config"), "config.json: quantization_config is missing"),
        ("config.json", set_key("quantization_config", {}), "the quantized tensors: it lacks 'config_groups'"),
        ("config.json", set_key("quantization_config", [1]), "expected config_groups, each with weights"),
        ("config.json", lambda c: c.clear(), "config.json: an empty JSON object"),
        ("generation_config.json", lambda c: c.clear(), "generation_config.json: an empty JSON object"),
        ("config.json", set_group_size, "weight_shape asks for a float [64, 1] at group_size 64"),
        ("generation_config.json", set_key("eos_token_id", None), "generation_config.json: no eos_token_id"),
        (
            "generation_config.json",
            set_key("eos_token_id", [0]),
            "generation_config.json: eos_token_id 0 is '!', which is text",
        ),
        ("generation_config.json", set_key("eos_token_id", [999]), "generation_config.json: eos_token_id 999 is not in"),
        ("tokenizer_config.json", set_key("eos_token", "</s>"), "tokenizer_config.json: eos_token '</s>' is not a token"),
        ("tokenizer_config.json", set_key("auto_map", {}), "tokenizer_config.json: auto_map makes loaders run code"),
        ("tokenizer_config.json", set_key("chat_template", "other"), "chat_template.jinja: differs from the chat_template in"),
        ("tokenizer.json", set_key("model", {"type": "Nonsense"}), "tokenizer.json: the tokenizers library refuses it"),
    ],
)
def test_a_configuration_that_contradicts_the_weights_is_caught(folder, name, edit, says):
    """The model would load with random rows, never stop, or run a stranger's code."""
    edit_json(folder, name, edit)
    problems = check_checkpoint(folder).problems
    assert any(says in problem for problem in problems), problems


def leaves(content, path=()):
    """Every key of nested mappings, as a path."""
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_no_value_of_the_wrong_type_makes_the_check_itself_fail(folder, name):
    """A crafted or broken file would end in a traceback instead of a verdict."""
    if name == "model.safetensors.index.json":
        write_json(folder / name, {"weight_map": {"model.norm.weight": "model.safetensors"}})
    original = json.loads((folder / name).read_text())
    for path in leaves(original):
        for strange in (None, -1, 10**30, "x", [[1]], {"a": [None]}):
            content = json.loads(json.dumps(original))
            parent = content
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = strange
            write_json(folder / name, content)
            if content == original:
                continue
            assert any(problem.startswith(f"{name}: ") for problem in check_checkpoint(folder).problems)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_or_unparsable_file_is_caught_behind_a_right_hash(folder, name):
    """An exporter that forgot the tokenizer would be declared sound."""
    (folder / name).write_text('{"a": 1, "a": 2}')
    seal(folder)
    assert any(p.startswith(f"{name}: not valid JSON: the key 'a' occurs twice") for p in check_checkpoint(folder).problems)
    (folder / name).unlink()
    seal(folder)
    assert f"{name}: missing" in check_checkpoint(folder).problems


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("manifest.json", None, "manifest.json: is missing: the folder was never finished"),
        ("manifest.json", b"[]", "manifest.json: expected a JSON object, got a list"),
        ("manifest.json", b"{", "manifest.json: cannot be read"),
        ("manifest.json", b"\xff", "manifest.json: not UTF-8 text"),
        ("tokenizer.json", None, "tokenizer.json: the manifest lists it and the folder lacks it"),
        ("tokenizer.json", b"{", "tokenizer.json: changed"),
        ("tokenizer.json", b"\xff", "tokenizer.json: not UTF-8 text"),
        ("tokenizer_config.json", None, "tokenizer_config.json: the manifest lists it"),
        ("config.json", None, "config.json: the manifest lists it"),
        ("config.json", b"[1]", "config.json: changed"),
        ("model.safetensors", None, "model.safetensors: the manifest lists it"),
        ("chat_template.jinja", None, "chat_template.jinja: the manifest lists it"),
        ("chat_template.jinja", b"{% for", "chat_template.jinja: changed"),
        ("pytorch_model.bin", b"x", "pytorch_model.bin: not a kind of file"),
    ],
)
def test_one_cause_gives_one_line(folder, name, content, says):
    """A user would look for three faults where one file is missing or broken."""
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    (problem,) = check_checkpoint(folder).problems
    assert problem.startswith(says)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "is not the template of training"),
        ("{% for m in messages %}", "the chat template does not parse"),
        ("", "no chat template in the folder"),
        (None, "no chat template in the folder"),
    ],
)
def test_another_chat_template_than_in_training_is_caught(folder, template, says):
    """The student would be prompted in a format it never saw, and its accuracy would fall for no visible reason."""
    if template is None:
        (folder / "chat_template.jinja").unlink()
    else:
        (folder / "chat_template.jinja").write_text(template)
    seal(folder)
    assert any(p.startswith("chat_template.jinja: ") and says in p for p in check_checkpoint(folder).problems)


def test_the_manifest_has_to_say_which_template_it_was(folder):
    """A manifest without the training template's hash would pass whatever template lies in the folder."""
    write_manifest(folder, kind="checkpoint", extra={})
    assert read_manifest(folder)["provenance"] == {}
    (problem,) = check_checkpoint(folder).problems
    assert problem.startswith("manifest.json: provenance has no chat_template_sha256")


def shard(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    layer_1 = {name: tensor for name, tensor in tensors.items() if "layers.1." in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in layer_1}
    parts = {"model-00001-of-00002.safetensors": rest, "model-00002-of-00002.safetensors": layer_1}
    for name, part in parts.items():
        save_file(part, folder / name)
    weight_map = {tensor: name for name, part in parts.items() for tensor in part}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return parts, weight_map


def test_asymmetric_weights_are_read_with_their_zero_points(folder):
    """A checkpoint with zero points would be refused, or one that lost them would pass and decode to other weights."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    write_json(folder / "config.json", config)

    def add_zero_points(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            n, groups = tensors[name].shape
            tensors[name.replace("weight_scale", "weight_zero_point")] = np.full((n // 8, groups), 0x88, np.int32)

    seal(folder)
    assert sum("needs ['weight_packed'" in problem for problem in check_checkpoint(folder).problems) == LAYERS * len(LINEARS)
    edit_tensors(folder, add_zero_points)
    assert check_checkpoint(folder).problems == []
    zero = SCALE.replace("weight_scale", "weight_zero_point")
    edit_tensors(folder, replace(zero, lambda t: t[:4].copy()))
    (problem,) = check_checkpoint(folder).problems
    assert f"{zero!r} is I32 [4, 3]; weight_shape asks for I32 [8, 3]" in problem


def test_shards_are_read_together(folder):
    """A large model, which comes in several files, would be refused."""
    shard(folder)
    seal(folder)
    assert check_checkpoint(folder).problems == []


def test_shards_that_do_not_fit_their_index_are_caught(folder):
    """Swapped, doubled or forgotten shards would load half a model without a word."""
    parts, weight_map = shard(folder)
    a, b = (folder / name for name in parts)
    index = folder / "model.safetensors.index.json"
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)
    seal(folder)
    assert any(
        p.startswith(f"{index.name}: puts tensor 'model.norm.weight' in {a.name}") for p in check_checkpoint(folder).problems
    )

    save_file(parts[a.name], a)
    save_file(parts[b.name] | {"model.norm.weight": parts[a.name]["model.norm.weight"]}, b)
    seal(folder)
    assert f"{b.name}: tensor 'model.norm.weight' is also in {a.name}" in check_checkpoint(folder).problems

    save_file(parts[b.name], b)
    index.unlink()
    seal(folder)
    (problem,) = check_checkpoint(folder).problems
    assert problem.startswith(f"{index.name}: missing, and the tensors are in 2 files")

    write_json(index, {"weight_map": weight_map})
    b.unlink()
    seal(folder)
    assert any(p.endswith(f"in {b.name}, it is in no file") for p in check_checkpoint(folder).problems)


def test_a_folder_that_is_not_there_is_a_problem_not_a_pass(tmp_path):
    """A typing error in a path would be reported as a sound checkpoint, or as a traceback."""
    assert check_checkpoint(tmp_path / "nowhere").problems == [f"{tmp_path / 'nowhere'}: no such folder"]
    assert not check_checkpoint(tmp_path).ok
