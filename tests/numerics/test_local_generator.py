"""In-process generation against transformers' own, on random models: batches, padding, stopping, seeds and counts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from stillhouse.pipeline.errors import TeacherError
from stillhouse.pipeline.records import Sampling
from stillhouse.teachers.local import TransformersGenerator
from tests.tiny_models import ARCHITECTURES, make_model

# Different lengths, so that rows are padded, sorted and stop apart from each other.
PROMPTS = [
    "What is 3 + 4?",
    "a",
    "<|im_start|>user\nWhat is 3 + 4 - 2? Put the answer in \\boxed{}.<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "step by step the answer is 7 and then the other answer is 12",
    "user assistant system",
    "the answer is the answer is the answer is the answer is the answer is the answer is the answer is",
    "9 9 9",
    "<think>\n3 + 4 = 7\n",
]
NUM_NEW = 24


@pytest.fixture(scope="module", params=ARCHITECTURES)
def generator(request, tmp_path_factory) -> TransformersGenerator:
    folder = make_model(tmp_path_factory.mktemp("models") / request.param, request.param)
    return _generator_that_stops(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> TransformersGenerator:
    return _generator_that_stops(make_model(tmp_path_factory.mktemp("models") / "qwen", "Qwen2"))


def _generator_that_stops(folder: Path) -> TransformersGenerator:
    """Load a random model after naming end tokens that greedy decoding meets: a random model hardly writes its own EOS.

    Each stop is a token that one row writes at its own step, so the rows end one after the other and some never do.
    """
    generator = TransformersGenerator(folder, dtype="float32")
    greedy = [_reference_ids(generator, prompt, stop_ids=[]) for prompt in PROMPTS]
    chosen = {greedy[0][2], greedy[3][9]}
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": sorted(chosen)}))
    return TransformersGenerator(folder, dtype="float32")


def _reference_ids(generator: TransformersGenerator, prompt: str, stop_ids: list[int]) -> list[int]:
    """Greedy decoding of one prompt without cache, padding or batch: the whole text through the model for each token."""
    ids = generator.tokenizer.encode(prompt, add_special_tokens=False)
    new: list[int] = []
    with torch.inference_mode():
        while len(new) < NUM_NEW and not (new and new[-1] in stop_ids):
            logits = generator.model(torch.tensor([ids + new])).logits[0, -1]
            new.append(int(logits.argmax()))
    return new


def _generate_ids(generator: TransformersGenerator, prompts: list[str]) -> list[list[int]]:
    """Greedy decoding by transformers' ``generate`` over a left-padded batch; what follows an end token is cut off."""
    encoded = generator.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = generator.model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=False,
        max_new_tokens=NUM_NEW,
        eos_token_id=generator.stop_ids,
        pad_token_id=generator.pad_id,
    )
    rows = []
    for ids in output[:, encoded["input_ids"].shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(ids) if token in generator.stop_ids), len(ids))
        rows.append(ids[:end])
    return rows


def test_greedy_decoding_equals_transformers_generate(generator):
    """If it failed, the gate would grade texts that the checkpoint does not write in its users' hands."""
    expected = _generate_ids(generator, PROMPTS)
    assert expected == [_reference_ids(generator, prompt, generator.stop_ids) for prompt in PROMPTS]
    lengths = {len(ids) for ids in expected}
    assert len(lengths) > 2, "the prompts no longer make rows stop apart from each other"
    assert NUM_NEW in lengths

    completions = generator.complete(PROMPTS, range(len(PROMPTS)), Sampling(0.0, 1.0, NUM_NEW))
    for prompt, ids, completion in zip(PROMPTS, expected, completions):
        stopped = ids[-1] in generator.stop_ids
        assert completion.text == generator.tokenizer.decode(ids[:-1] if stopped else ids)
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert completion.num_completion_tokens == len(ids)
        assert completion.num_prompt_tokens == len(generator.tokenizer.encode(prompt, add_special_tokens=False))


def test_a_row_is_the_same_alone_and_in_any_batch(generator):
    """If it failed, a trace could not be generated again from its seed once the batch size or its neighbours change."""
    sampling = Sampling(0.8, 0.95, NUM_NEW)
    seeds = [2**63 - 1 - 10**12 * row for row in range(len(PROMPTS))]
    alone = [generator.complete([prompt], [seed], sampling)[0] for prompt, seed in zip(PROMPTS, seeds)]
    generator.batch_size = len(PROMPTS)
    together = generator.complete(PROMPTS, seeds, sampling)
    generator.batch_size = 3
    backwards = generator.complete(PROMPTS[::-1], seeds[::-1], sampling)[::-1]
    assert alone == together == backwards
    assert len({completion.finish_reason for completion in alone}) == 2, "both endings have to be in this comparison"


def test_the_seed_decides_the_sample(qwen):
    """If it failed, samples of one problem would repeat each other, or a rerun would differ."""
    sampling = Sampling(1.0, 1.0, 12)
    prompts = [PROMPTS[0]] * 16
    first = qwen.complete(prompts, range(16), sampling)
    assert qwen.complete(prompts, range(16), sampling) == first
    assert [completion.seed for completion in first] == list(range(16))
    assert len({completion.text for completion in first}) == 16
    assert qwen.complete(prompts, [3] * 16, sampling) == [first[3]] * 16


def test_samples_follow_the_models_own_distribution(qwen):
    """If it failed, a padded row would be sampled from the logits of another position, or at another temperature."""
    temperature, count = 1.5, 3000
    ids = qwen.tokenizer.encode(PROMPTS[4], add_special_tokens=False)
    with torch.inference_mode():
        probabilities = torch.softmax(qwen.model(torch.tensor([ids])).logits[0, -1].double() / temperature, dim=-1)
    # Two continuations of the longest prompt in each batch make the counted rows padded ones.
    prompts = [PROMPTS[4]] * count + [PROMPTS[5]] * 12
    qwen.batch_size = len(prompts)
    completions = qwen.complete(prompts, range(len(prompts)), Sampling(temperature, 1.0, 1))[:count]
    qwen.batch_size = 16
    # Outcomes, not tokens: lone bytes of a character all read as the replacement sign, and end tokens as nothing.
    expected: dict[tuple[str, str], float] = {}
    for token, probability in enumerate(probabilities.tolist()):
        stopped = token in qwen.stop_ids
        outcome = ("", "stop") if stopped else (qwen.tokenizer.decode([token]), "length")
        expected[outcome] = expected.get(outcome, 0.0) + probability
    found = Counter((completion.text, completion.finish_reason) for completion in completions)
    assert set(found) <= set(expected)
    for outcome, probability in expected.items():
        allowed = 6 * (probability * (1 - probability) / count) ** 0.5 + 1 / count
        assert abs(found[outcome] / count - probability) < allowed, outcome


def test_the_end_token_counts_and_may_be_the_last_one_allowed(qwen):
    """If it failed, completions that just fit would be dropped as cut, and token bills would be off by one a trace."""
    greedy = _reference_ids(qwen, PROMPTS[0], qwen.stop_ids)
    assert greedy[-1] in qwen.stop_ids
    exact, short = (
        qwen.complete([PROMPTS[0]], [0], Sampling(0.0, 1.0, number))[0] for number in (len(greedy), len(greedy) - 1)
    )
    assert (exact.finish_reason, exact.num_completion_tokens) == ("stop", len(greedy))
    assert (short.finish_reason, short.num_completion_tokens) == ("length", len(greedy) - 1)
    assert exact.text == short.text


def test_special_tokens_in_a_completion_are_kept(qwen):
    """If it failed, think tags that a tokenizer holds as special would vanish from every trace."""
    # So hot that every token is about as likely as any other.
    completions = qwen.complete([PROMPTS[0]] * 64, range(64), Sampling(50.0, 1.0, NUM_NEW))
    text = "".join(completion.text for completion in completions)
    assert "<|im_start|>" in text
    assert "<think>" in text


def test_batches_are_reported_as_they_finish(qwen):
    """If it failed, a progress bar would stand still or run over."""
    seen: list[int] = []
    qwen.batch_size = 3
    completions = qwen.complete(PROMPTS, range(8), Sampling(0.0, 1.0, 2), on_batch=seen.append)
    qwen.batch_size = 16
    assert seen == [3, 3, 2]
    assert len(completions) == 8


def _break(folder: Path, how: str) -> Path:
    weights = folder / "model.safetensors"
    match how:
        case "no folder":
            return folder / "nowhere"
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:5000])
        case "other shapes":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
        case "no tokenizer":
            for path in folder.glob("tokenizer*"):
                path.unlink()
        case "broken config":
            (folder / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize("how", ["no folder", "no weights", "cut weights", "other shapes", "no tokenizer", "broken config"])
def test_a_model_that_cannot_be_loaded_is_one_clear_error(tmp_path, qwen, how):
    """If it failed, a wrong path or half a download would end in a library's traceback, or generate noise."""
    folder = shutil.copytree(qwen.model.config._name_or_path, tmp_path / "model")
    with pytest.raises(TeacherError, match=r"cannot be loaded \(.+\); give a folder with config.json"):
        TransformersGenerator(_break(folder, how), dtype="float32")


def test_a_model_without_an_end_token_is_refused(tmp_path, qwen):
    """If it failed, every completion would run to its full length and be dropped as cut."""
    folder = shutil.copytree(qwen.model.config._name_or_path, tmp_path / "model")
    for name, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        content = json.loads((folder / name).read_text())
        content[key] = None
        (folder / name).write_text(json.dumps(content))
    (folder / "generation_config.json").unlink()
    with pytest.raises(TeacherError, match="names no EOS token"):
        TransformersGenerator(folder, dtype="float32")
