"""The compiled CPU libraries through their C interface, against the plain-torch specification: every shape, format and mode.

Every instruction set that this processor has is loaded side by side, and passes the same tests. The AVX2 and generic libraries
are the portable sources alone; the AVX-512 one takes these where its own paths do not reach.
"""

from __future__ import annotations

import pytest
import torch

from stillhouse.kernels import cpu, rounding
from stillhouse.kernels.reference import NF4_TABLE, decode_absmax, decode_int4, decode_nf4, pack_nibbles

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MODES = {"bf16": 0, "exact": 1, "int8": 2}
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The largest relative error of one rounding to nearest."""


@pytest.fixture(scope="module", params=cpu.ISAS)
def lib(request):
    best = cpu.best_isa()
    if best is None or cpu.library_path(request.param) is None:
        pytest.skip(f"no {request.param} library was built")
    if cpu.ISAS.index(request.param) < cpu.ISAS.index(best):
        pytest.skip(f"this processor has {best} at most")
    return cpu.load(request.param)


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


class Packed:
    """Random codes and scales of a format, their float32 decoding by the specification, and the struct that C++ reads."""

    def __init__(self, kind: str, rows: int, columns: int, group: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def codes_of(*shape):
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

        self.shape, self.group, self.is_int4 = (rows, columns), group, kind.startswith("int4")
        if self.is_int4:
            self.codes, grouped = codes_of(rows, -(-columns // 2)), (rows, -(-columns // group))
            self.scales = (torch.randn(grouped, generator=generator) * 0.1).to(torch.float16)
            self.zeros = codes_of(*grouped) & 15 if kind == "int4-asymmetric" else None
            self.struct = cpu.int4_weight(self.codes, self.scales, self.zeros, columns, group)
            return
        num_blocks = -(-rows * columns // group)
        self.codes = codes_of(-(-rows * columns // 2))
        self.absmax, self.nested = torch.rand(num_blocks, generator=generator) + 0.01, (None, None, None)
        if kind == "nf4-nested":
            self.absmax = codes_of(num_blocks)
            lengths = (-(-num_blocks // 256), 256, 1)
            self.nested = tuple(torch.randn(length, generator=generator) for length in lengths)
        self.struct = cpu.table_weight(self.codes, self.absmax, *self.nested, self.shape, group, "nf4")

    @property
    def decoded(self):
        if self.is_int4:
            return decode_int4(self.codes, self.scales, self.zeros, self.shape[1], self.group)
        return decode_nf4(self.codes, self.absmax, *self.nested, self.shape, self.group)

    @property
    def for_integers(self):
        """The weight that SH_INT8 multiplies by, float64: table levels are rounded to 127ths."""
        if self.is_int4:
            return self.decoded.double()
        levels = (torch.tensor(NF4_TABLE) * 127).round().double() / 127
        num_weights = self.shape[0] * self.shape[1]
        byte = self.codes.long()
        code = torch.stack((byte >> 4, byte & 15), 1).view(-1)[:num_weights]
        scales = decode_absmax(self.absmax, *self.nested).double().repeat_interleave(self.group)[:num_weights]
        return (levels[code] * scales).view(self.shape)


def forward(lib, packed, x, bias=None, mode="bf16", threads=1):
    y = torch.full((x.shape[0], packed.shape[0]), float("nan"), dtype=x.dtype)
    bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
    arguments = (pointer(x), DTYPES[x.dtype], pointer(bias), bias_dtype, pointer(y), x.shape[0], MODES[mode], threads)
    assert lib.sh_forward(packed.struct, *arguments) == 0
    return y


def backward(lib, packed, dy, mode="bf16", threads=1):
    dx = torch.full((dy.shape[0], packed.shape[1]), float("nan"), dtype=dy.dtype)
    arguments = (pointer(dy), DTYPES[dy.dtype], pointer(dx), dy.shape[0], MODES[mode], threads)
    assert lib.sh_backward(packed.struct, *arguments) == 0
    return dx


def dequantize(lib, packed, dtype, threads=1):
    out = torch.full(packed.shape, float("nan"), dtype=dtype)
    assert lib.sh_dequantize(packed.struct, pointer(out), DTYPES[dtype], threads) == 0
    return out


def same_bits(a, b):
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(integer), b.view(integer))


def operands(num_rows, num_columns, dtype, seed=1):
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within(y, exact, magnitude, additions):
    """Whether y, summed in float32 in any order and rounded once, can come from these factors.

    ``magnitude`` is the sum of the terms' absolute values: each of ``additions`` roundings errs by 2^-24 of at most that.
    """
    bound = magnitude * additions * 2.0**-24 + exact.abs() * HALF_STEP[y.dtype] * 1.01 + 2.0**-25 * (y.dtype == torch.float16)
    return bool(((y.double() - exact).abs() <= bound).all())


KINDS = ["int4", "int4-asymmetric", "nf4", "nf4-nested"]
# (rows, columns, group): sizes of one; odd columns; groups of 1, odd ones and some beyond a row; blocks that cross rows in the
# middle of a byte; several panels each way; a short last group.
SHAPES = [
    (1, 1, 32), (1, 7, 1), (3, 5, 2), (7, 33, 32), (5, 129, 64), (17, 31, 7), (64, 96, 64), (9, 1100, 48), (70, 64, 300),
    (130, 257, 64), (33, 1024, 32), (300, 80, 16), (72, 640, 64), (70, 512, 128), (66, 256, 8),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_the_specification_bit_for_bit(lib, kind, shape):
    """If it failed, a model would compute with other weights than the ones that were validated."""
    packed = Packed(kind, *shape)
    for dtype in DTYPES:
        for threads in (1, 2):
            assert same_bits(dequantize(lib, packed, dtype, threads), packed.decoded.to(dtype))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_rows_return_the_decoded_weight(lib, kind, shape, dtype):
    """If it failed, a product would read a wrong code or scale somewhere, or round a weight twice."""
    packed = Packed(kind, *shape)
    expected = packed.decoded.to(dtype)
    for mode in ("bf16", "exact"):
        assert torch.equal(forward(lib, packed, torch.eye(shape[1], dtype=dtype), mode=mode).T, expected)
        assert torch.equal(backward(lib, packed, torch.eye(shape[0], dtype=dtype), mode=mode), expected)


# From one row, which streams the weight, to more than the 512 whose sums wait at a time.
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 8, 19, 101, 523])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("mode", ["bf16", "exact"])
@pytest.mark.parametrize("shape", [(17, 31, 7), (9, 1100, 48), (130, 257, 64), (72, 640, 64), (70, 512, 128)], ids=str)
@pytest.mark.parametrize("kind", ["int4", "int4-asymmetric", "nf4-nested"])
def test_products_are_within_rounding_of_float64(lib, kind, shape, mode, dtype, num_rows):
    """If it failed, outputs or gradients would carry more error than float32 sums and one rounding can explain."""
    packed = Packed(kind, *shape)
    x, bias = operands(num_rows, shape[1], dtype), operands(1, shape[0], torch.float32, 2).view(-1)
    dy = operands(num_rows, shape[0], dtype, 3)
    rounded = mode == "bf16" and dtype == torch.bfloat16
    y, dx = forward(lib, packed, x, bias, mode), backward(lib, packed, dy, mode)

    def close(weight):
        magnitude = x.double().abs() @ weight.T.abs() + bias.abs()
        return (
            within(y, x.double() @ weight.T + bias.double(), magnitude, shape[1] + 1),
            within(dx, dy.double() @ weight, dy.double().abs() @ weight.abs(), shape[0]),
        )

    y_is_close, dx_is_close = close((packed.decoded.to(dtype) if rounded else packed.decoded).double())
    if rounded and lib.sh_isa() == b"avx512":
        # For few rows of x its own path need not round the weights, and is the more exact for it.
        y_is_close = y_is_close or close(packed.decoded.double())[0]
    assert y_is_close
    assert dx_is_close


def quantized_activations(x):
    """The specification of SH_INT8's activations: what x becomes, float64."""
    num_columns = x.shape[1]
    blocks = torch.nn.functional.pad(x.float(), (0, -num_columns % 32)).view(x.shape[0], -1, 32)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales == 0, 0.0, blocks / scales).round()
    return (codes.double() * scales.double()).view(x.shape[0], -1)[:, :num_columns]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_int8_sums_are_exact_but_for_float32_scales(lib, kind, shape, dtype):
    """If it failed, 8-bit activations would cost more accuracy than their own rounding, at groups that do not fit 32 too."""
    packed = Packed(kind, *shape)
    weight = packed.for_integers
    for num_rows in (1, 4, 6):
        x, bias = operands(num_rows, shape[1], dtype), operands(1, shape[0], dtype, 2).view(-1)
        x[0, ::3] = 0.0
        exact = quantized_activations(x) @ weight.T + bias.double()
        magnitude = quantized_activations(x).abs() @ weight.T.abs() + bias.double().abs()
        # int4's zero point is taken off an integer sum, so its terms count with their zero point; four roundings a stretch.
        if packed.is_int4:
            magnitude = magnitude * 2
        assert within(forward(lib, packed, x, bias, "int8"), exact, magnitude, shape[1] + 8)


def test_int8_error_is_that_of_eight_bits(lib):
    """If it failed, the fast mode would be useless for serving: blocks of 8 bits keep a product within about one percent."""
    packed = Packed("int4", 96, 512, 32)
    x = operands(8, 512, torch.float32)
    exact = x @ packed.decoded.T
    assert (forward(lib, packed, x, mode="int8") - exact).norm() < 0.012 * exact.norm()


@pytest.mark.parametrize("mode", ["bf16", "exact", "int8"])
@pytest.mark.parametrize("group", [44, 64])
@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_threads_change_no_bit(lib, kind, group, mode):
    """If it failed, a result would depend on the machine that computes it."""
    packed = Packed(kind, 200, 1100 if group == 44 else 1088, group)
    for num_rows in (1, 3, 101):
        x = operands(num_rows, packed.shape[1], torch.bfloat16)
        assert same_bits(forward(lib, packed, x, mode=mode, threads=2), forward(lib, packed, x, mode=mode))
        if mode != "int8":
            dy = operands(num_rows, 200, torch.bfloat16)
            assert same_bits(backward(lib, packed, dy, mode, threads=2), backward(lib, packed, dy, mode))


@pytest.mark.parametrize("mode", ["bf16", "exact", "int8"])
@pytest.mark.parametrize("group", [44, 64])
@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_a_row_of_a_batch_is_the_row_alone(lib, kind, group, mode):
    """The portable sources' own promise: if it failed, an answer would depend on who shares the batch."""
    if lib.sh_isa() == b"avx512" and group == 64:
        pytest.skip("AVX-512's own paths sum few rows in another order than many")
    packed = Packed(kind, 200, 1088 if group == 64 else 1100, group)
    x, dy = operands(101, packed.shape[1], torch.bfloat16), operands(101, 200, torch.bfloat16)
    y = forward(lib, packed, x, mode=mode)
    dx = None if mode == "int8" else backward(lib, packed, dy, mode)
    for row in (0, 50, 100):
        assert same_bits(forward(lib, packed, x[row : row + 1].contiguous(), mode=mode), y[row : row + 1])
        if dx is not None:
            assert same_bits(backward(lib, packed, dy[row : row + 1].contiguous(), mode), dx[row : row + 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["bf16", "exact", "int8"])
def test_what_is_not_finite_spoils_its_row_and_no_other(lib, mode, bad):
    """If it failed, a diverging activation would turn into plausible numbers, or spoil its neighbours in a batch."""
    packed = Packed("int4-asymmetric", 20, 70, 32)
    x = operands(5, 70, torch.float32)
    clean = forward(lib, packed, x, mode=mode)
    x[2, 33] = bad
    y = forward(lib, packed, x, mode=mode)
    assert same_bits(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    if mode == "int8":
        assert not y[2].isfinite().any()
    else:
        expected = x[2] @ packed.decoded.T
        assert torch.equal(y[2].isnan(), expected.isnan())
        assert torch.equal(y[2] == float("inf"), expected == float("inf"))
        assert torch.equal(y[2] == -float("inf"), expected == -float("inf"))


@pytest.mark.parametrize("mode", ["bf16", "exact", "int8"])
def test_scales_that_are_not_finite_are_not_hidden(lib, mode):
    """0x7fff is a NaN whose bits overflow if rounded as a number: if it failed, a broken checkpoint would look healthy."""
    packed = Packed("int4", 24, 96, 32)
    packed.scales.view(torch.int16)[5, 1] = 0x7FFF
    packed.scales[7, 0] = float("inf")
    broken = torch.zeros(24, dtype=torch.bool)
    broken[[5, 7]] = True
    for dtype in DTYPES:
        decoded = dequantize(lib, packed, dtype)
        assert torch.equal(decoded.isnan(), packed.decoded.isnan())
        assert torch.equal(decoded.isinf(), packed.decoded.isinf())
        for num_rows in (1, 8):
            y = forward(lib, packed, operands(num_rows, 96, dtype), mode=mode)
            assert torch.equal(~y.isfinite(), broken.expand_as(y))


def test_denormal_and_zero_activations_quantize_without_division_by_zero(lib):
    """If it failed, a row of zeros, or of numbers too small to have a scale, would give NaN."""
    packed = Packed("int4", 24, 96, 32)
    x = torch.zeros(3, 96)
    x[1] = 1e-45
    x[2, :32] = 1.0
    y = forward(lib, packed, x, mode="int8")
    assert torch.equal(y[0], torch.zeros(24))
    assert (y[1].abs() < 1e-40).all()
    assert torch.allclose(y[2], packed.decoded[:, :32].sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["bf16", "exact", "int8"])
def test_no_rows_is_no_work(lib, mode):
    """If it failed, an empty batch would crash a server."""
    packed = Packed("int4", 20, 70, 32)
    assert forward(lib, packed, torch.empty(0, 70), mode=mode).shape == (0, 20)


def test_what_is_unknown_is_refused(lib):
    """If it failed, a new dtype or mode would be read as another and give garbage."""
    packed, x, y = Packed("int4", 4, 7, 4), torch.ones(1, 7), torch.full((1, 4), 5.0)
    assert lib.sh_forward(packed.struct, pointer(x), 3, None, 0, pointer(y), 1, 0, 1) == 1
    assert lib.sh_forward(packed.struct, pointer(x), 0, None, 0, pointer(y), 1, 3, 1) == 1
    assert lib.sh_backward(packed.struct, pointer(y), 0, pointer(x), 1, 2, 1) == 1
    unknown = type(packed.struct).from_buffer_copy(packed.struct)
    unknown.format = 9
    assert lib.sh_forward(unknown, pointer(x), 0, None, 0, pointer(y), 1, 0, 1) == 1
    assert lib.sh_dequantize(unknown, pointer(x), 0, 1) == 1
    assert torch.equal(y, torch.full((1, 4), 5.0))
    assert torch.equal(x, torch.ones(1, 7))


# Encoders


def _weights(rows, columns, how, seed=5):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if how == "ties":  # many quotients and errors fall exactly on a border
        return (w * 300).round() / 64
    w[:, ::7] = 0.0
    # Small and large ones meet the limits of float16's scales.
    return {"large": (w * 2e5).clamp(-456960, 456960), "small": w * 1e-5, "bf16": (w * 0.02).bfloat16().float(), "plain": w}[
        how
    ]


@pytest.mark.parametrize("how", ["plain", "small", "large", "bf16", "ties"])
@pytest.mark.parametrize("scale_search", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 1000, 128), (33, 100, 1)], ids=str)
def test_int4_encoder_chooses_what_rounding_chooses(lib, shape, symmetric, scale_search, how):
    """If it failed, a checkpoint's bytes would depend on whether a C++ compiler was at hand."""
    rows, columns, group = shape
    w, num_groups = _weights(rows, columns, how), -(-columns // group)
    padded = torch.nn.functional.pad(w, (0, num_groups * group - columns)).view(-1, group)
    codes, scales, zeros = rounding.round_int4(padded, symmetric=symmetric, scale_search=scale_search)
    expected = pack_nibbles(codes.view(rows, -1)[:, :columns], high_first=False)
    for threads in (1, 2):
        found = torch.full_like(expected, 0xEE)
        found_scales = torch.full((rows, num_groups), float("nan"), dtype=torch.float16)
        found_zeros = None if symmetric else torch.full((rows, num_groups), 0xEE, dtype=torch.uint8)
        outputs = (pointer(found), pointer(found_scales), pointer(found_zeros))
        assert lib.sh_quantize_int4(pointer(w), rows, columns, group, symmetric, scale_search, *outputs, threads) == 0
        assert torch.equal(found, expected)
        assert same_bits(found_scales.view(-1), scales)
        assert symmetric or torch.equal(found_zeros.view(-1), zeros)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 1000, 16385, 70001])
@pytest.mark.parametrize("block", [1, 3, 64, 4096])
def test_table_encoder_chooses_what_rounding_chooses(lib, count, block):
    """If it failed, an nf4 base would differ between machines; a zero block and values on a border are among the weights."""
    w = torch.randn(count, generator=torch.Generator().manual_seed(6))
    w[: block + 1] = 0.0
    table = torch.tensor(NF4_TABLE)
    middles = (table[:-1] + table[1:]) / 2
    border = w[-min(count, 16) :]
    border[: min(count, 15)] = middles[: min(count, 15)]
    border[-1] = 1.0
    expected, tensors = rounding.round_nf4(w, block_size=block, double_quant=False)
    for threads in (1, 2):
        absmax = torch.full_like(tensors["absmax"], float("nan"))
        codes = torch.full((-(-count // 2),), 0xEE, dtype=torch.uint8)
        assert lib.sh_block_absmax(pointer(w), count, block, pointer(absmax), threads) == 0
        assert same_bits(absmax, tensors["absmax"])
        outputs = (pointer(absmax), pointer(table), pointer(codes), threads)
        assert lib.sh_quantize_table16(pointer(w), count, block, *outputs) == 0
        assert torch.equal(codes, pack_nibbles(expected, high_first=True))


# The machine's limits


@pytest.mark.parametrize("num_bytes", [0, 5, 4096, 1_000_003])
def test_bandwidth_reads_every_byte_once(lib, num_bytes):
    """If it failed, the bandwidth that others are measured against would be of fewer bytes than it says."""
    data = torch.randint(0, 256, (-(-num_bytes // 8) * 8,), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    data[num_bytes:] = 0
    expected = 0
    for word in data.view(torch.int64).tolist():
        expected ^= word & (2**64 - 1)
    for threads in (1, 2, 3):
        assert lib.sh_read_bandwidth(pointer(data), num_bytes, threads) == expected


def test_peak_counts_what_it_runs(lib):
    """If it failed, a roofline would be drawn against a wrong peak; an instruction that is absent counts nothing."""
    one = [lib.sh_peak(kind, 100, 1) for kind in range(3)]
    assert one[0] > 0
    assert [lib.sh_peak(kind, 200, 2) for kind in range(3)] == [4 * operations for operations in one]
    if lib.sh_isa() != b"avx512":
        assert one[1:] == [0, 0]
