"""Every Triton kernel that the dispatch launches, compiled ahead of time for compute capability 8.0 and 9.0: no GPU is needed.

What is compiled is what is launched: the dispatch runs on CPU tensors with triton's launch replaced by a recorder, and each
recorded launch (kernel, argument types, compile-time constants, options) goes through triton's compiler and ptxas.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator

import pytest
import torch

from stillhouse.kernels import formats, gpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'stillhouse[gpu]'"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set: triton interprets instead of compiling"
    ),
]

CAPABILITIES = [(8, 0), (9, 0)]
SHAPE = (4096, 4096)
TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int32: "i32",
}
LAYOUTS = {
    "int4": ("int4", {"group_size": 32}),
    "int4-asymmetric": ("int4", {"group_size": 128, "symmetric": False}),
    "nf4": ("nf4", {"double_quant": False}),
    "nf4-nested": ("nf4", {}),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as the dispatch asked for it."""

    kernel: object
    arguments: dict[str, object]
    options: dict[str, object]

    def constants(self) -> dict[str, object]:
        return {name: value for name, value in self.arguments.items() if not isinstance(value, torch.Tensor)}

    def compile(self, capability: tuple[int, int]):
        """Run triton's compiler and ptxas for a device of that capability."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = f"*{TYPE_NAMES[value.dtype]}" if tensor else "i32"
            # What triton's launcher would find out about the arguments: an alignment of 16 (bytes, or a divisor).
            if (value.data_ptr() if tensor else value) % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=self.options)


@pytest.fixture
def recorded(monkeypatch, tmp_path) -> Iterator[list[Launch]]:
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(kernel, *positional, grid, warmup, **named):
        arguments = dict(zip(kernel.arg_names, positional))
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        arguments |= {name: value for name, value in named.items() if name in kernel.arg_names}
        launches.append(Launch(kernel, arguments, options))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(gpu, "_num_multiprocessors", lambda device: 132)
    # A cache of its own, so that a broken kernel is not hidden by an earlier run's cubin.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return launches


def weight_of(layout: str) -> gpu.GpuWeight:
    format, options = LAYOUTS[layout]
    packed = formats.empty_packed(
        SHAPE,
        format,
        group_size=options.get("group_size", 32),
        symmetric=options.get("symmetric", True),
        double_quant=options.get("double_quant", True),
    )
    if format == "int4":
        return gpu.GpuWeight(packed.shape, packed.group_size, packed.codes, packed.scales, packed.zero_points)
    nested = (packed.nested_absmax, packed.nested_quant_map, packed.nested_offset)
    return gpu.GpuWeight(packed.shape, packed.block_size, packed.codes, packed.absmax, None, *nested, format)


def call_everything(weight: gpu.GpuWeight, dtype: torch.dtype) -> None:
    """One call of each path and tile: forward of 1, 16, 32 and 64 rows, backward of 16, and the decode kernel."""
    num_rows, num_columns = weight.shape
    bias = torch.zeros(num_rows, dtype=dtype)
    for m in (1, 16, 32, 64) if dtype != torch.float32 else (1,):
        gpu.linear(torch.zeros(m, num_columns, dtype=dtype), weight, bias, "bf16")
    if dtype != torch.float32:
        gpu.linear_grad_x(torch.zeros(16, num_rows, dtype=dtype), weight, "bf16")
    gpu.decode(weight, dtype)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_launched_compiles(recorded, monkeypatch, capability, dtype, layout):
    """If it failed, the first call of a 4-bit layer on an A100 or H100 would be a compiler error, or not use tensor cores."""
    monkeypatch.setattr(gpu, "_capability", lambda device: capability)
    call_everything(weight_of(layout), dtype)
    names = {launch.kernel.fn.__name__ for launch in recorded}
    decoder = "decode_int4_kernel" if layout.startswith("int4") else "decode_table_kernel"
    if dtype == torch.float32:
        assert names == {"gemv_kernel", decoder}
    else:
        assert names == {"gemv_kernel", "skinny_kernel", "add_splits_kernel", "skinny_grad_x_kernel", decoder}
    for launch in recorded:
        compiled = launch.compile(capability)
        name = launch.kernel.fn.__name__
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        ptx = compiled.asm["ptx"]
        assert f".target sm_{capability[0]}{capability[1]}" in ptx
        tensor_core = "wgmma.mma_async" if capability >= (9, 0) and name == "skinny_kernel" else "mma.sync"
        assert (tensor_core in ptx) == name.startswith("skinny"), f"{name}: {tensor_core}"
        if tensor_core in ptx:
            assert re.search(rf"{tensor_core}.*\.f32\.{TYPE_NAMES[dtype].replace('fp', 'f')}", ptx), (
                "not accumulated in float32"
            )
        assert local_bytes(compiled.asm["cubin"]) <= MAX_LOCAL_BYTES, f"{name} spills: {launch.constants()}"


MAX_LOCAL_BYTES = 32
"""Of a thread's registers, kept in local memory: ptxas may put a few aside; a kernel that spills in its loop has hundreds."""


def local_bytes(cubin: bytes) -> int:
    """Stack of a thread in a cubin, as the cuobjdump that comes with triton reads it."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


def test_products_that_must_not_be_fused_are_not(recorded):
    """If it failed, nested absmax would decode in one rounding where bitsandbytes and the reference take two: other bits."""
    gpu.decode(weight_of("nf4-nested"), torch.float32)
    (launch,) = recorded
    assert "fma" not in launch.compile((9, 0)).asm["ptx"]


def test_the_row_kernel_of_int4_loops_without_a_barrier(recorded):
    """If it failed, decoding one token would wait for shared memory at every step: another layout of the tiles."""
    x = torch.zeros(1, SHAPE[1], dtype=torch.bfloat16)
    for layout in ("int4", "int4-asymmetric"):
        gpu.linear(x, weight_of(layout), None, "bf16")
    for launch in recorded:
        loops = list(loop_bodies(launch.compile((9, 0)).asm["ptx"]))
        assert loops
        assert not any("bar.sync" in body for body in loops)


def loop_bodies(ptx: str) -> Iterator[str]:
    """The text between each label and a branch back to it."""
    labels, lines = {}, ptx.splitlines()
    for number, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\d+_\d+):", line):
            labels[label[1]] = number
        elif (branch := re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\d+_\d+);", line)) and branch[1] in labels:
            yield "\n".join(lines[labels[branch[1]] : number])
