"""int4 weights as GGUF's Q4_0 blocks, checked by the gguf package's own decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.kernels.formats import PackedWeight, dequantize, quantize
from stillhouse.kernels.gguf import from_q4_0, to_q4_0


def _decoded(blocks: torch.Tensor) -> np.ndarray:
    """One weight after the other from ggml's description: float16 d, low nibbles first, then the high ones."""
    rows = blocks.numpy()
    weight = np.empty((rows.shape[0], rows.shape[1] // 18 * 32), dtype=np.float32)
    for n in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            block = rows[n, k // 32 * 18 : (k // 32 + 1) * 18]
            byte = int(block[2 + k % 16])
            code = byte & 15 if k % 32 < 16 else byte >> 4
            weight[n, k] = np.float32(block[:2].view(np.float16)[0]) * np.float32(code - 8)
    return weight


def _random_packed(shape: tuple[int, int]) -> PackedWeight:
    generator = torch.Generator().manual_seed(shape[0])
    return PackedWeight(
        "int4",
        shape,
        torch.randint(0, 256, (shape[0], shape[1] // 2), generator=generator, dtype=torch.uint8),
        group_size=32,
        scales=torch.randn((shape[0], shape[1] // 32), generator=generator).to(torch.float16),
    )


@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (5, 256), (33, 64)])
def test_q4_0_decodes_to_the_same_weights_and_comes_back(shape):
    """If it failed, llama.cpp would run other weights than the ones that were validated."""
    packed = _random_packed(shape)
    blocks = to_q4_0(packed)
    assert (blocks.shape, blocks.dtype) == ((shape[0], shape[1] // 32 * 18), torch.uint8)
    assert torch.equal(torch.from_numpy(_decoded(blocks)), dequantize(packed))
    for given in (blocks, blocks.view(-1), blocks.t().contiguous().t()):
        back = from_q4_0(given, shape)
        assert torch.equal(back.codes, packed.codes)
        assert torch.equal(back.scales, packed.scales)
        assert torch.equal(to_q4_0(back), blocks)


@pytest.mark.parametrize("shape", [(1, 32), (64, 96), (48, 1024)])
def test_the_gguf_package_decodes_the_same_bits(shape):
    """If it failed, a GGUF file written from our codes would not hold our weights."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    packed = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    for weight in (packed, _random_packed(shape)):
        theirs = torch.from_numpy(quants.dequantize(to_q4_0(weight).numpy(), GGMLQuantizationType.Q4_0))
        assert torch.equal(theirs.view(torch.int32), dequantize(weight).view(torch.int32))


def test_what_the_gguf_package_quantized_is_read():
    """If it failed, a Q4_0 file of somebody else's could not be taken over block for block."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    w = torch.randn(24, 128, generator=torch.Generator().manual_seed(2))
    theirs = quants.quantize(w.numpy(), GGMLQuantizationType.Q4_0)
    packed = from_q4_0(torch.from_numpy(theirs), (24, 128))
    assert torch.equal(dequantize(packed), torch.from_numpy(quants.dequantize(theirs, GGMLQuantizationType.Q4_0)))
    assert np.array_equal(to_q4_0(packed).numpy(), theirs)


def test_a_gguf_file_of_our_blocks_is_read_back(tmp_path):
    """The whole way through a file: if it failed, shapes or bytes would be turned round between us and llama.cpp."""
    gguf = pytest.importorskip("gguf")
    packed = _random_packed((16, 96))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", to_q4_0(packed).numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf.GGUFReader(tmp_path / "model.gguf").tensors[0]
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
    back = from_q4_0(torch.from_numpy(np.array(tensor.data)), tuple(int(size) for size in reversed(tensor.shape)))
    assert back.shape == (16, 96)
    assert torch.equal(dequantize(back), dequantize(packed))


def test_what_q4_0_cannot_hold_is_refused():
    """If it failed, a GGUF file would be written that decodes to other weights, or read at the wrong offsets."""
    with pytest.raises(ValueError, match="holds int4 weights, not nf4"):
        to_q4_0(quantize(torch.ones(2, 64), "nf4"))
    with pytest.raises(ValueError, match=r"holds symmetric weights.*symmetric=True, or export compressed-tensors"):
        to_q4_0(quantize(torch.ones(2, 64), symmetric=False))
    with pytest.raises(ValueError, match=r"groups of 32, not group_size=64"):
        to_q4_0(quantize(torch.ones(2, 64), group_size=64))
    with pytest.raises(ValueError, match=r"in_features=1001 does not fit GGUF Q4_0's blocks of 32; export compressed-tensors"):
        to_q4_0(quantize(torch.ones(2, 1001)))
    with pytest.raises(ValueError, match="in_features=33 does not fit"):
        from_q4_0(torch.zeros(36, dtype=torch.uint8), (2, 33))
    with pytest.raises(ValueError, match=r"shape \(2, 64\) is 72 bytes, uint8, not 71 of torch.uint8"):
        from_q4_0(torch.zeros(71, dtype=torch.uint8), (2, 64))
