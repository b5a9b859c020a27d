"""All there is to know of the 4-bit kernels on an NVIDIA GPU, in one call of under eight minutes.

    python -m stillhouse.kernels.bench.gpu --json gpu.json

Four sections, each with its own share of the time; JSON is written after every row, so that a run which is cut off keeps what
it has measured:

1. the machine: device, driver, versions, date; copy bandwidth and bf16 GEMM rate, the roofs that the rest is held against;
2. correctness of every path on the device, against float64 products of the decoded weight;
3. speed of one layer: CUDA graphs over so many copies of the weight that none of them is in the L2 cache, forward and
   forward + backward (dx alone, which is all that LoRA over a frozen weight asks for), against torch's bf16 layer, bitsandbytes
   NF4, torch's own int4 kernel, GemLite and torchao where they are installed;
4. a QLoRA step on a random model of Qwen2.5-0.5B's shape: tokens/s and peak memory, against PEFT + bitsandbytes and bf16 LoRA.

Ratios are peer over ours: above 1, ours is faster. Exit codes: 0, 1 where a result is wrong, 4 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch is imported where it is used: --help answers at once.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from stillhouse.kernels.formats import PackedWeight

NO_DEVICE = 4
SECONDS = {"machine": 20, "correctness": 130, "speed": 210, "qlora": 80}
"""How long each section may take before it stops between two rows; 440 s in all."""
SHAPES = ((4096, 4096), (8192, 8192), (14336, 4096))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
BACKWARD_BATCHES = (16, 128, 512, 2048)
CHECKED_BATCHES = (1, 2, 4, 8, 16, 17, 32, 64, 65, 128, 512)
MIN_BYTES = 256 << 20
QLORA_TOKENS = ((1, 64), (1, 512), (4, 512), (8, 1024))
INT4, NF4, DENSE, BITSANDBYTES = "int4 g32", "nf4", "torch bf16", "bitsandbytes nf4"
ATEN, GEMLITE, TORCHAO = "aten int4pack g128", "GemLite int4 g128", "torchao int4 g128"
OURS, PEERS = (INT4, NF4), (DENSE, BITSANDBYTES, ATEN, GEMLITE, TORCHAO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print tables to stdout; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m stillhouse.kernels.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here, after every row")
    parser.add_argument("--sections", nargs="+", choices=list(SECONDS), default=list(SECONDS), help="all by default")
    parser.add_argument("--seconds-factor", type=float, default=1.0, help="multiplies every section's time limit")
    options = parser.parse_args(arguments)
    if reason := why_not_here():
        print(reason, file=sys.stderr)
        return NO_DEVICE
    results: dict[str, Any] = {"sections": {}}
    sections = {"machine": machine, "correctness": correctness, "speed": speed, "qlora": qlora}
    started = time.monotonic()
    for name in options.sections:
        print(f"{name}: at most {SECONDS[name] * options.seconds_factor:.0f} s", file=sys.stderr)
        section: dict[str, Any] = {"rows": [], "missing": {}, "complete": False}
        results["sections"][name] = section
        section_started = time.monotonic()
        until = section_started + SECONDS[name] * options.seconds_factor
        for row in sections[name](section["missing"]):
            section["rows"].append(row)
            print(_line(row), flush=True)
            section["seconds"] = results["seconds"] = time.monotonic() - section_started
            _write(options.json, results)
            if time.monotonic() > until:
                print(f"{name}: cut off here, its time is up", file=sys.stderr)
                break
        else:
            section["complete"] = True
        for peer, reason in section["missing"].items():
            print(f"not measured: {peer}: {reason}")
        results["seconds"] = time.monotonic() - started
        _write(options.json, results)
    wrong = [row for row in results["sections"].get("correctness", {"rows": []})["rows"] if not row["ok"]]
    if wrong:
        print(f"{len(wrong)} results are wrong, the first: {wrong[0]}", file=sys.stderr)
    return 1 if wrong else 0


def why_not_here() -> str:
    """In one sentence, why nothing can be measured on this machine; empty where it can."""
    import torch

    if not torch.cuda.is_available():
        return (
            f"This benchmark needs an NVIDIA GPU, and torch {torch.__version__} finds no CUDA device on this machine; "
            "run it where `python -c 'import torch; print(torch.cuda.is_available())'` prints True."
        )
    from stillhouse.kernels import ops  # noqa: F401  (importing it registers the operators)

    if not torch._C._dispatch_has_kernel_for_dispatch_key("stillhouse::linear_int4", "CUDA"):
        return "The Triton kernels are not registered for CUDA, so there is nothing to measure: pip install 'stillhouse[gpu]'."
    return ""


# 1. The machine


def machine(missing: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Names and versions, then the two roofs."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    properties = torch.cuda.get_device_properties(0)
    versions = {"cuda": torch.version.cuda}
    for package in ("torch", "triton", "bitsandbytes", "peft", "transformers", "gemlite", "torchao"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            missing[package] = "not installed"
    yield {
        "what": "device",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory / 1e9,
        "l2_bytes": properties.L2_cache_size,
        "driver": _driver(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
    }
    yield {"what": "copy", "gb_per_s": _copy_rate() / 1e9}
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    yield {"what": "bf16 GEMM 8192", "tflop_per_s": 2 * 8192**3 / 1e12 / _seconds(lambda: a @ b.T, 20)}


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


# 2. Correctness

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 g32": ("int4", {"group_size": 32}),
    "int4 g128 asymmetric": ("int4", {"group_size": 128, "symmetric": False}),
    "nf4": ("nf4", {"double_quant": False}),
    "nf4 nested": ("nf4", {}),
    "fp4 nested": ("fp4", {}),
}
SMALL, ODD, LARGE = (1000, 264), (77, 45), (4096, 4096)


def correctness(missing: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Each layout, dtype and M: forward with a bias, and backward; the large shape, which is also timed, last and in bf16."""
    import torch

    for shape, layout, dtype in (
        *((SMALL, layout, dtype) for layout in LAYOUTS for dtype in (torch.bfloat16, torch.float16)),
        *((ODD, layout, torch.bfloat16) for layout in LAYOUTS),
        *((SMALL, layout, torch.float32) for layout in ("int4 g32", "nf4 nested")),
        *((LARGE, layout, torch.bfloat16) for layout in ("int4 g32", "nf4 nested")),
    ):
        packed = make_packed(layout, shape)
        for m in CHECKED_BATCHES:
            yield {"layout": layout, "shape": list(shape), "dtype": str(dtype), "M": m} | check(packed, m, dtype)


def make_packed(layout: str, shape: tuple[int, int], device: str = "cuda") -> PackedWeight:
    """A random weight in one of ``LAYOUTS``."""
    import dataclasses

    import torch

    from stillhouse.kernels.formats import quantize

    format, options = LAYOUTS[layout]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    packed = quantize(weight, "nf4" if format == "fp4" else format, **options)
    return dataclasses.replace(packed, format=format)  # any code is a valid fp4 code


def check(packed: PackedWeight, m: int, dtype: torch.dtype) -> dict[str, Any]:
    """Run one case forward and backward; ``ok`` and the errors, in units of what the declared roundings allow.

    The memory that the outputs will get was filled with NaN. Within bounds is not enough: the root mean square of the errors
    must also be that of one rounding, which a wrong weight here and there would exceed.
    """
    import torch

    from stillhouse.kernels.formats import dequantize
    from stillhouse.kernels.linear import linear4bit

    num_rows, num_columns = packed.shape
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, num_columns, generator=generator).to("cuda", dtype).requires_grad_()
    bias = torch.randn(num_rows, generator=generator).to("cuda", dtype)
    dy = torch.randn(m, num_rows, generator=generator).to("cuda", dtype)
    with full_precision_sums():
        poison(m * max(num_rows, num_columns) * 4)
        y = linear4bit(x, packed, bias)
        poison(m * max(num_rows, num_columns) * 4)
        (dx,) = torch.autograd.grad(y, x, dy)
    exact, rounded = dequantize(packed).double(), dequantize(packed, dtype).double()
    # One row is multiplied with the weight as it is, more rows with the weight in their dtype.
    forward_weight = exact if m == 1 and num_columns % 8 == 0 else rounded
    forward = compare(y.detach(), x.detach(), forward_weight.T, bias)
    backward = compare(dx, dy, rounded, None)
    return {"ok": forward["ok"] and backward["ok"], "forward": forward, "backward": backward}


def compare(actual: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> dict[str, Any]:
    """Hold ``actual`` against ``left @ right + bias``, where ``right`` is float64.

    Returns:
        ``ok``; ``of_bound``: the largest error over its bound; ``rms_of_rounding``: root mean square of the errors over that of
        the results, in units of the dtype's eps.
    """
    import torch

    bias = torch.zeros((), dtype=torch.float64, device=actual.device) if bias is None else bias.double()
    expected = left.double() @ right + bias
    magnitude = left.double().abs() @ right.abs() + bias.abs()
    eps = torch.finfo(actual.dtype).eps
    # Tensor cores align a block of products and cut off below the last bits: 2**-22 a term, not 2**-24. Then one rounding,
    # or two where a library adds the bias after the first.
    bound = (right.shape[0] + 34) * 2.0**-22 * magnitude + eps * (expected.abs() + bias.abs())
    error = (actual.double() - expected).abs()
    of_bound = float((error / bound).nan_to_num(nan=float("inf")).max())
    rms = float(error.square().mean().sqrt() / expected.square().mean().sqrt() / eps)
    # float32 has no final rounding that outweighs the sum's: its root mean square is bounded by the sum's.
    return {
        "ok": of_bound <= 1 and rms <= (1 if actual.dtype != torch.float32 else 64),
        "of_bound": of_bound,
        "rms_of_rounding": rms,
    }


def poison(size_bytes: int) -> None:
    """Leave NaN in the memory that torch hands out next: a result that no program writes is then seen."""
    import torch

    blocks = [
        torch.full((size // 4 + 1,), float("nan"), device="cuda") for size in (size_bytes // 2, size_bytes, 32 * size_bytes)
    ]
    del blocks


def full_precision_sums() -> Any:
    """Keep cuBLAS from rounding partial sums to 16 bits, which it may and which no bound could tell from a mistake."""
    import contextlib

    import torch

    @contextlib.contextmanager
    def off() -> Iterator[None]:
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
        matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
        try:
            yield
        finally:
            matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before

    return off()


# 3. Speed


def speed(missing: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of microseconds a call: forward for every shape and M, then forward + backward."""
    import torch

    copy_bytes_per_s = _copy_rate()
    for shape in SHAPES:
        weight_NK = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * shape[1] ** -0.5
        made = contenders(weight_NK, missing)
        for passed, batches in (("forward", BATCHES), ("forward+backward", BACKWARD_BATCHES)):
            for m in batches:
                x = torch.randn(m, shape[1], device="cuda", dtype=torch.bfloat16)
                dy = torch.randn(m, shape[0], device="cuda", dtype=torch.bfloat16)
                times, how = {}, {}
                for name, (layers, _) in made.items():
                    if passed == "forward" or name in (*OURS, DENSE, BITSANDBYTES):
                        _measure_into(times, how, name, layers, x, dy, passed, missing)
                row = {
                    "shape": list(shape),
                    "pass": passed,
                    "M": m,
                    "us": times,
                    "eager": [n for n, h in how.items() if h == "eager"],
                }
                row["ratios"] = {f"{p} / {o}": times[p] / times[o] for o in OURS if o in times for p in PEERS if p in times}
                row["of_copy_bandwidth"] = {
                    name: made[name][1] / (times[name] * 1e-6) / copy_bytes_per_s for name in (*OURS, DENSE) if name in times
                }
                yield row
        del made, weight_NK
        torch.cuda.empty_cache()


def contenders(weight_NK: torch.Tensor, missing: dict[str, str]) -> dict[str, tuple[list[nn.Module], int]]:
    """Each contender's layers, MIN_BYTES of weight in all, and the bytes of one; ``missing`` is told what cannot be made."""
    import copy

    made = {}
    for name in (*OURS, *PEERS):
        try:
            layer = make_layer(name, weight_NK)
            size = _weight_bytes(name, weight_NK)
            layers = [layer, *(copy.deepcopy(layer) for _ in range(-(-MIN_BYTES // size) - 1))]
        except (ImportError, AttributeError, TypeError, RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
            # Peers change their interfaces; ours may not fail.
            if name in OURS:
                raise
            missing[name] = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
            continue
        made[name] = (layers, size)
    return made


def make_layer(name: str, weight_NK: torch.Tensor) -> nn.Module:
    """One frozen layer of a contender, on the GPU, for bfloat16 activations."""
    import torch
    from torch import nn

    from stillhouse.kernels.formats import quantize
    from stillhouse.kernels.linear import Linear4bit

    num_rows, num_columns = weight_NK.shape
    if name == INT4:
        return Linear4bit(quantize(weight_NK, "int4", group_size=32), activations="bf16", dtype=torch.bfloat16)
    if name == NF4:
        return Linear4bit(quantize(weight_NK, "nf4"), activations="bf16", dtype=torch.bfloat16)
    if name == BITSANDBYTES:
        return bitsandbytes_layer(weight_NK, None)
    if name == ATEN:
        return _aten_int4(weight_NK, 128)
    if name == GEMLITE:
        return _gemlite(weight_NK, 128)
    layer = nn.Linear(num_columns, num_rows, bias=False, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    layer.weight.copy_(weight_NK)
    if name == TORCHAO:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        quantize_(
            layer, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
        )
    return layer


def bitsandbytes_layer(weight_NK: torch.Tensor, bias: nn.Parameter | None) -> nn.Module:
    """bitsandbytes' NF4 layer with nested absmax, as transformers makes it for QLoRA with bfloat16 compute."""
    import bitsandbytes as bnb
    import torch

    settings = {"quant_type": "nf4", "compress_statistics": True}
    layer = bnb.nn.Linear4bit(weight_NK.shape[1], weight_NK.shape[0], bias=False, compute_dtype=torch.bfloat16, **settings)
    layer.weight = bnb.nn.Params4bit(weight_NK.to(torch.bfloat16), requires_grad=False, module=layer, **settings)
    layer.bias = bias
    return layer.to("cuda")  # this is where it quantizes


def _groups(weight_NK: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric codes 0…15 (N, K) and scales (N, K / group_size): peers are timed, not compared in accuracy."""
    groups = weight_NK.view(weight_NK.shape[0], -1, group_size)
    scales = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scales).round() + 8).clamp(0, 15).view(weight_NK.shape), scales.squeeze(-1)


def _aten_int4(weight_NK: torch.Tensor, group_size: int) -> nn.Module:
    import torch
    from torch import nn

    codes, scales = _groups(weight_NK, group_size)
    codes = codes.to(torch.int32)
    as_bytes = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(as_bytes, 8)
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous().to(torch.bfloat16)

    class AtenInt4(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("packed", packed)
            self.register_buffer("scales_and_zeros", scales_and_zeros)

        def forward(self, x):
            return torch.ops.aten._weight_int4pack_mm(x, self.packed, group_size, self.scales_and_zeros)

    return AtenInt4()


def _gemlite(weight_NK: torch.Tensor, group_size: int) -> nn.Module:
    import torch
    from gemlite.helper import A16Wn

    codes, scales = _groups(weight_NK, group_size)
    scales = scales.to(torch.bfloat16)
    return A16Wn(device="cuda:0").from_weights(codes.to(torch.uint8), scales, torch.full_like(scales, 8), 4, group_size)


def _weight_bytes(name: str, weight_NK: torch.Tensor) -> int:
    """Bytes that a product has to read of the weight, by its format."""
    bits = {DENSE: 16, INT4: 4.5, NF4: 4.127, BITSANDBYTES: 4.127}.get(name, 4.25)
    return int(weight_NK.numel() * bits / 8)


def _measure_into(times, how, name, layers, x, dy, passed, missing) -> None:
    """Time one contender; a peer that fails at this M is named in ``missing``."""
    try:
        seconds, how[name] = time_layers(layers, x, dy, passed)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, NotImplementedError) as error:
        if name in OURS:
            raise
        missing[f"{name}, {passed}, M={x.shape[0]}"] = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
        return
    times[name] = seconds * 1e6


def time_layers(layers: Sequence[nn.Module], x: torch.Tensor, dy: torch.Tensor, passed: str) -> tuple[float, str]:
    """Seconds a call, and ``graph`` or, where a call cannot be captured, ``eager`` (with what Python costs)."""
    import torch

    def call_all() -> None:
        for layer in layers:
            if passed == "forward":
                with torch.no_grad():
                    layer(x)
            else:
                x_MK = x.detach().requires_grad_()
                torch.autograd.grad(layer(x_MK), x_MK, dy)

    # What is compiled or allocated at a first call is, before the capture, and on a stream of its own as captures ask for.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call_all()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call_all()
    except RuntimeError:
        torch.cuda.synchronize()
        return _seconds(call_all, 3) / len(layers), "eager"
    return _seconds(graph.replay, 10) / len(layers), "graph"


def _seconds(call: Callable[[], object], num_calls: int) -> float:
    """Median seconds of a call by CUDA events, after two to warm up."""
    import torch

    for _ in range(2):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(num_calls)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def _copy_rate() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    import torch

    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), 20)


# 4. A QLoRA step


def qlora(missing: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Tokens a second and peak memory of LoRA steps (rank 16 on every linear layer, AdamW, bf16), each contender in turn."""
    import gc

    import torch

    for name in (NF4, INT4, BITSANDBYTES, DENSE):
        try:
            model = qlora_model(name)
        except ImportError as error:
            missing[name] = str(error)
            continue
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        loaded = torch.cuda.memory_allocated()
        for num_sequences, length in QLORA_TOKENS:
            generator = torch.Generator().manual_seed(3)
            ids = torch.randint(0, model.config.vocab_size, (num_sequences, length), generator=generator).to("cuda")

            def step(ids: torch.Tensor = ids, model: nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss

            first_loss = step().item()
            torch.cuda.reset_peak_memory_stats()
            seconds = _seconds(step, 5)
            yield {
                "contender": name if name != DENSE else "bf16 LoRA",
                "tokens": [num_sequences, length],
                "tokens_per_s": num_sequences * length / seconds,
                "loaded_gb": loaded / 1e9,
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                "first_loss": first_loss,
            }
        del model, optimizer, step
        gc.collect()
        torch.cuda.empty_cache()


def qlora_model(name: str) -> nn.Module:
    """A random model of Qwen2.5-0.5B's shape on the GPU, its linear layers in a contender's format, with LoRA adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from stillhouse.kernels.linear import Linear4bit
    from stillhouse.kernels.peft_lora import register_with_peft

    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=True)).to(torch.bfloat16)
    targets = [key for key, module in model.named_modules() if isinstance(module, nn.Linear) and key != "lm_head"]
    for key in targets if name != DENSE else []:
        linear = model.get_submodule(key)
        if name == BITSANDBYTES:
            layer = bitsandbytes_layer(linear.weight.detach(), linear.bias)
        elif name == NF4:
            layer = Linear4bit.from_linear(linear, "nf4", activations="bf16")
        else:
            layer = Linear4bit.from_linear(linear, "int4", group_size=32, activations="bf16")
        model.set_submodule(key, layer)
    model.requires_grad_(False)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, register_with_peft(lora)).train()


# Output


def _write(path: Path | None, results: dict[str, Any]) -> None:
    """Write whole or not at all: a run that is killed leaves the file as it was after the row before."""
    if path is None:
        return
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(results, indent=1))
    os.replace(unfinished, path)


def _line(row: dict[str, Any]) -> str:
    """One row as text."""
    if "us" in row:
        times = "  ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
        ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        bandwidth = "  ".join(f"{name} {100 * part:.0f} %" for name, part in row["of_copy_bandwidth"].items())
        eager = f"  (without a graph: {', '.join(row['eager'])})" if row["eager"] else ""
        head = f"{row['shape'][0]}x{row['shape'][1]} {row['pass']} M={row['M']}"
        return f"{head}\n    microseconds: {times}{eager}\n    times as fast: {ratios}\n    of copy bandwidth: {bandwidth}"
    if "ok" in row:
        errors = "  ".join(
            f"{k} {row[k]['of_bound']:.2f} of bound, rms {row[k]['rms_of_rounding']:.2f} eps" for k in ("forward", "backward")
        )
        return f"{'ok   ' if row['ok'] else 'WRONG'} {row['layout']} {row['shape']} {row['dtype']} M={row['M']}: {errors}"
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())


if __name__ == "__main__":
    sys.exit(main())
