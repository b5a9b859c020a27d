"""int4 weights as GPTQ and AWQ store them, read back by unpackers written here from the layouts' descriptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.kernels.formats import PackedWeight, dequantize, quantize
from stillhouse.kernels.gptq import from_awq, from_gptq, to_gptq

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
SHAPES = [((24, 64), 32), ((8, 192), 64), ((40, 256), 128), ((16, 48), 24), ((8, 8), 8)]


def _nibble(word: np.int32, i: int) -> int:
    return (int(word) >> (4 * i)) & 15


def _read_gptq(tensors: dict[str, torch.Tensor], stored_minus_one: bool) -> np.ndarray:
    """Decode as the layout is described: one weight after the other, float32, shape (N, K)."""
    qweight, qzeros, scales, g_idx = (tensors[name].numpy() for name in ("qweight", "qzeros", "scales", "g_idx"))
    num_columns, num_rows = 8 * qweight.shape[0], qweight.shape[1]
    weight = np.empty((num_rows, num_columns), dtype=np.float32)
    for n in range(num_rows):
        for k in range(num_columns):
            zero = _nibble(qzeros[g_idx[k], n // 8], n % 8) + stored_minus_one
            weight[n, k] = np.float32(_nibble(qweight[k // 8, n], k % 8) - zero) * np.float32(scales[g_idx[k], n])
    return weight


def _write_awq(codes: np.ndarray, zeros: np.ndarray, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pack codes (N, K) and zeros (N, G) as AutoAWQ's GEMM layout is described."""

    def words(columns_last: np.ndarray) -> torch.Tensor:
        out = np.zeros((columns_last.shape[0], columns_last.shape[1] // 8), dtype=np.uint32)
        for r in range(out.shape[0]):
            for c in range(out.shape[1]):
                for i in range(8):
                    out[r, c] |= np.uint32(int(columns_last[r, 8 * c + AWQ_COLUMNS[i]]) << (4 * i))
        return torch.from_numpy(out.view(np.int32))

    return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scales.T.contiguous()}


def _random_packed(shape: tuple[int, int], group_size: int, symmetric: bool, lowest_zero: int = 1) -> PackedWeight:
    generator = torch.Generator().manual_seed(shape[1])
    grouped = (shape[0], shape[1] // group_size)
    return PackedWeight(
        "int4",
        shape,
        torch.randint(0, 256, (shape[0], shape[1] // 2), generator=generator, dtype=torch.uint8),
        group_size=group_size,
        scales=torch.randn(grouped, generator=generator).to(torch.float16),
        zero_points=None if symmetric else torch.randint(lowest_zero, 16, grouped, generator=generator, dtype=torch.uint8),
    )


def _assert_same(left: PackedWeight, right: PackedWeight) -> None:
    assert (left.format, left.shape, left.group_size) == (right.format, right.shape, right.group_size)
    assert left.tensors().keys() == right.tensors().keys()
    for name, tensor in right.tensors().items():
        assert torch.equal(left.tensors()[name], tensor), name


@pytest.mark.parametrize(("shape", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq_bytes_decode_to_the_same_weights_and_come_back(shape, group_size, symmetric, checkpoint_format):
    """If it failed, vLLM and GPTQModel would serve other weights than the ones that were validated."""
    packed = _random_packed(shape, group_size, symmetric, lowest_zero=0 if checkpoint_format == "gptq_v2" else 1)
    tensors = to_gptq(packed, checkpoint_format)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "qweight": ((shape[1] // 8, shape[0]), torch.int32),
        "qzeros": ((shape[1] // group_size, shape[0] // 8), torch.int32),
        "scales": ((shape[1] // group_size, shape[0]), torch.float16),
        "g_idx": ((shape[1],), torch.int32),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    theirs = _read_gptq(tensors, stored_minus_one=checkpoint_format == "gptq")
    assert torch.equal(dequantize(packed), torch.from_numpy(theirs))
    back = from_gptq(tensors, group_size, sym=symmetric, checkpoint_format=checkpoint_format)
    _assert_same(back, packed)
    again = to_gptq(back, checkpoint_format)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_symmetric_words_are_the_known_ones():
    """If it failed, kernels that take 0x77777777 for granted (Marlin, Exllama) would be off by one step everywhere."""
    packed = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    assert (to_gptq(packed)["qzeros"] == 0x77777777).all()
    assert (to_gptq(packed, "gptq_v2")["qzeros"] == 0x88888888 - 2**32).all()


def test_one_group_a_row_is_what_minus_one_means():
    """If it failed, checkpoints with group_size -1 could not be read."""
    packed = _random_packed((8, 64), 64, symmetric=False)
    tensors = to_gptq(packed)
    del tensors["g_idx"]
    _assert_same(from_gptq(tensors, -1, sym=False), packed)


def test_a_zero_point_of_0_is_refused_in_v1_both_ways():
    """Readers disagree about these bits; if it failed, one of them would serve a column shifted by 16 steps."""
    packed = _random_packed((8, 64), 32, symmetric=False)
    packed.zero_points[3, 1] = 0
    with pytest.raises(ValueError, match=r"1 of 16 zero points are 0.*Write checkpoint_format='gptq_v2'"):
        to_gptq(packed)
    tensors = to_gptq(packed, "gptq_v2")
    _assert_same(from_gptq(tensors, 32, sym=False, checkpoint_format="gptq_v2"), packed)
    tensors["qzeros"] -= 0x11111111  # as GPTQModel turns gptq_v2 into gptq: the borrow leaves a nibble of 15
    with pytest.raises(ValueError, match=r"\d of 16 stored zero points are 15.*convert it to 'gptq_v2'"):
        from_gptq(tensors, 32, sym=False)


def test_a_checkpoint_of_the_other_version_is_told():
    """Configs are known to lie about the version; if it failed, every weight would be off by one step."""
    packed = _random_packed((8, 64), 32, symmetric=True)
    with pytest.raises(ValueError, match=r"only zero points of 8, this one has \[9\]; the checkpoint is 'gptq_v2'"):
        from_gptq(to_gptq(packed, "gptq_v2"), 32)
    with pytest.raises(ValueError, match=r"only zero points of 8, this one has \[7\]; the checkpoint is 'gptq'"):
        from_gptq(to_gptq(packed), 32, checkpoint_format="gptq_v2")
    with pytest.raises(ValueError, match="pass sym=False"):
        from_gptq(to_gptq(_random_packed((8, 64), 32, symmetric=False)), 32)


def test_what_gptq_cannot_hold_is_refused():
    """If it failed, a checkpoint would be written that every reader decodes to noise, or read as noise."""
    with pytest.raises(ValueError, match="holds int4 weights, not nf4"):
        to_gptq(quantize(torch.ones(8, 64), "nf4"))
    with pytest.raises(ValueError, match="in_features=40 is not a multiple of group_size=32"):
        to_gptq(quantize(torch.ones(8, 40)))
    with pytest.raises(ValueError, match="in_features=36 is not a multiple of 8"):
        to_gptq(quantize(torch.ones(8, 36), group_size=9))
    with pytest.raises(ValueError, match="in_features=33 is not a multiple of 8"):
        to_gptq(quantize(torch.ones(8, 33), group_size=11))
    with pytest.raises(ValueError, match="out_features=9 is not a multiple of 8"):
        to_gptq(quantize(torch.ones(9, 64)))
    with pytest.raises(ValueError, match=r"checkpoint_format must be one of \('gptq', 'gptq_v2'\), not 'marlin'"):
        to_gptq(quantize(torch.ones(8, 64)), "marlin")
    tensors = to_gptq(_random_packed((8, 64), 32, symmetric=True))
    with pytest.raises(ValueError, match=r"a GPTQ layer needs \['scales'\]; it has \['g_idx', 'qweight', 'qzeros'\]"):
        from_gptq({name: tensor for name, tensor in tensors.items() if name != "scales"}, 32)
    with pytest.raises(ValueError, match=r"qzeros must be torch.int32 of shape \(1, 1\)"):
        from_gptq(tensors, 64)
    with pytest.raises(ValueError, match="g_idx is not k // 32: the columns were reordered by activation"):
        from_gptq(tensors | {"g_idx": torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32}, 32)
    with pytest.raises(ValueError, match=r"scales \(torch.float32\) has values that float16 does not hold"):
        from_gptq(tensors | {"scales": torch.full((2, 8), 1 / 3)}, 32)
    with pytest.raises(ValueError, match=r"must be torch.int32 of shape"):
        from_gptq(tensors | {"qweight": tensors["qweight"].to(torch.int64)}, 32)


@pytest.mark.parametrize(("shape", "group_size"), SHAPES)
def test_awq_columns_are_put_in_order(shape, group_size):
    """If it failed, an AWQ checkpoint would be read with its rows shuffled within each eight."""
    packed = _random_packed(shape, group_size, symmetric=False, lowest_zero=0)
    codes = np.stack((packed.codes.numpy() & 15, packed.codes.numpy() >> 4), axis=-1).reshape(shape)
    tensors = _write_awq(codes, packed.zero_points.numpy(), packed.scales)
    _assert_same(from_awq(tensors, group_size), packed)
    with pytest.raises(ValueError, match="scales must be float of shape"):
        from_awq(tensors | {"scales": tensors["scales"][:, :4]}, group_size)
