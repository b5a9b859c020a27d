"""Packed weights in files of their own: the same bytes each time, and an explanation where a file is another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stillhouse.kernels.compressed_tensors import to_compressed_tensors
from stillhouse.kernels.formats import PackedWeight, dequantize, quantize
from stillhouse.kernels.packed_file import METADATA_KEY


def _weight() -> torch.Tensor:
    return torch.randn(9, 130, generator=torch.Generator().manual_seed(0))


def _fp4() -> PackedWeight:
    codes = torch.arange(64, dtype=torch.uint8)
    return PackedWeight("fp4", (2, 64), codes, block_size=64, absmax=torch.tensor([1.0, 2.0]))


PACKED = {
    "int4": lambda: quantize(_weight()),
    "int4 g64 asymmetric": lambda: quantize(_weight(), group_size=64, symmetric=False),
    "nf4 nested": lambda: quantize(_weight(), "nf4"),
    "nf4 plain 128": lambda: quantize(_weight(), "nf4", block_size=128, double_quant=False),
    "fp4": _fp4,
}


@pytest.mark.parametrize("kind", PACKED)
def test_a_saved_weight_comes_back_whole_and_saves_to_the_same_bytes(tmp_path, kind):
    """If it failed, a weight would change between the run that made it and the run that serves it."""
    packed = PACKED[kind]()
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    packed.save(first)
    back = PackedWeight.load(first)
    assert (back.format, back.shape, back.group_size, back.block_size) == (
        packed.format,
        packed.shape,
        packed.group_size,
        packed.block_size,
    )
    assert back.tensors().keys() == packed.tensors().keys()
    for name, tensor in packed.tensors().items():
        assert back.tensors()[name].dtype == tensor.dtype
        assert torch.equal(back.tensors()[name], tensor), name
    back.save(str(second))
    assert first.read_bytes() == second.read_bytes()


def test_two_processes_write_the_same_bytes(tmp_path):
    """safetensors orders several metadata entries at random: if that came through, hashes would differ from run to run."""
    script = (
        "import sys, torch\n"
        "from stillhouse.kernels.formats import quantize\n"
        "w = torch.arange(-96.0, 96.0).view(2, 96)\n"
        "quantize(w, 'nf4', double_quant=True).save(sys.argv[1])\n"
    )
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, path in enumerate(paths):
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=os.environ | {"PYTHONHASHSEED": str(i)})
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_another_library_reads_the_tensors(tmp_path):
    """If it failed, the file would need this project to be read at all."""
    packed = quantize(_weight(), symmetric=False)
    packed.save(tmp_path / "weight.safetensors")
    with safe_open(tmp_path / "weight.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["codes", "scales", "zero_points"]
        assert json.loads(file.metadata()[METADATA_KEY]) == {
            "block_size": None,
            "format": "int4",
            "group_size": 32,
            "layout": 1,
            "shape": [9, 130],
        }
        assert torch.equal(file.get_tensor("codes"), packed.codes)


def test_views_are_saved_as_what_they_show(tmp_path):
    """Tensors that are parts of larger ones: if it failed, a file would hold the whole buffer, or the wrong part."""
    packed = quantize(_weight())
    wide = torch.zeros((9, 2 * packed.codes.shape[1]), dtype=torch.uint8)
    wide[:, ::2] = packed.codes
    view = PackedWeight("int4", packed.shape, wide[:, ::2], group_size=32, scales=packed.scales)
    view.save(tmp_path / "view.safetensors")
    packed.save(tmp_path / "plain.safetensors")
    assert (tmp_path / "view.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    """If it failed, a full disk would cost the file that was there before."""
    target = tmp_path / "weight.safetensors"
    packed = quantize(_weight())
    packed.save(target)
    before = target.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    broken = PackedWeight("int4", packed.shape, packed.codes, group_size=32, scales=packed.scales).to("meta")
    with pytest.raises(Exception, match="meta"):
        broken.save(target)
    assert target.read_bytes() == before
    target.unlink()
    target.mkdir()
    with pytest.raises(OSError, match="directory"):
        packed.save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["weight.safetensors"]


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _saved(path, tensors, settings) -> None:
    save_file(tensors, path, metadata={METADATA_KEY: settings if isinstance(settings, str) else json.dumps(settings)})


def test_a_file_that_is_another_one_is_explained(tmp_path):
    """If it failed, a wrong or damaged file would be decoded to noise, or end in a traceback that says nothing."""
    path = tmp_path / "weight.safetensors"
    packed = quantize(_weight(), symmetric=False)
    good = {"block_size": None, "format": "int4", "group_size": 32, "layout": 1, "shape": [9, 130]}
    tensors = packed.tensors()
    with pytest.raises(FileNotFoundError, match=r"weight\.safetensors': there is no such file"):
        PackedWeight.load(path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*make it first"):
        packed.save(tmp_path / "nowhere" / "weight.safetensors")
    path.write_bytes(b"GGUF and so on, not safetensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        PackedWeight.load(path)
    packed.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        PackedWeight.load(path)
    save_file(to_compressed_tensors(quantize(torch.ones(2, 64))), path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"this one has \['format'\] and the tensors \['weight_packed'.*kernels.compressed_tensors"
    ):
        PackedWeight.load(path)
    _saved(path, tensors, good | {"layout": 2})
    with pytest.raises(ValueError, match="layout 2, this version of stillhouse reads 1; update stillhouse"):
        PackedWeight.load(path)
    for wrong in ("{", "[1]", good | {"shape": [9]}, good | {"shape": [9, "x"]}, good | {"format": "int3"}, {"layout": 1}):
        _saved(path, tensors, wrong)
        with pytest.raises(ValueError, match=METADATA_KEY):
            PackedWeight.load(path)
    _saved(path, tensors, good | {"shape": [9, 128]})
    with pytest.raises(
        ValueError, match=r"weight\.safetensors': int4 weight of shape \(9, 128\).*codes must be uint8 of shape \(9, 64\)"
    ):
        PackedWeight.load(path)
    _saved(path, {**tensors, "bias": torch.zeros(9)}, good)
    with pytest.raises(ValueError, match=r"the tensors must be codes and some of .*found .*'bias'"):
        PackedWeight.load(path)
    _saved(path, {**tensors, "zero_points": tensors["zero_points"] + 16}, good)
    with pytest.raises(ValueError, match="zero_points must be 0…15, the largest is"):
        PackedWeight.load(path)
    _saved(path, tensors, good)
    assert torch.equal(dequantize(PackedWeight.load(path)), dequantize(packed))
