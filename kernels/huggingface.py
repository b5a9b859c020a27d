"""Quantize while loading: ``AutoModelForCausalLM.from_pretrained(path, quantization_config=StillhouseConfig(...))``.

    from stillhouse.kernels.huggingface import StillhouseConfig, register
    register()
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=StillhouseConfig(format="nf4"))
    model.save_pretrained(folder)  # packed; from_pretrained(folder) reads it back bit for bit, after register()

Each ``torch.nn.Linear`` but the excluded ones becomes a ``Linear4bit``, one layer at a time: the 16-bit weight of a layer is
freed before the next is read. Written for transformers 5.23's ``HfQuantizer``; transformers is imported at first use.
"""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from stillhouse.kernels import formats
from stillhouse.kernels.linear import Linear4bit

METHOD = "stillhouse"
logger = logging.getLogger(__name__)


def register() -> None:
    """Tell transformers of the quantization method ``stillhouse``; calling it again does nothing."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(_classes().StillhouseConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(_classes().StillhouseQuantizer)


def __getattr__(name: str) -> Any:
    if name in ("StillhouseConfig", "StillhouseQuantizer", "QuantizeLinear"):
        return getattr(_classes(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _classes() -> SimpleNamespace:
    """The classes that inherit from transformers', made at first use so that importing this module stays cheap."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class StillhouseConfig(QuantizationConfigMixin):
        """How a model's linear layers are packed in 4 bits.

        Args:
            format: ``int4`` or ``nf4``.
            group_size: int4: weights along K that share one scale.
            block_size, double_quant: nf4: weights that share one absmax; whether absmax are rounded to 8 bits.
            modules_to_not_convert: names (full, a trailing part, or a regular expression) of layers that stay as they are.
        """

        def __init__(
            self,
            format: str = "int4",
            group_size: int = 32,
            block_size: int = 64,
            double_quant: bool = True,
            modules_to_not_convert: list[str] | None = None,
            quant_method: str = METHOD,
        ) -> None:
            if format not in formats.FORMATS:
                raise ValueError(f"format must be one of {formats.FORMATS}, not {format!r}")
            if quant_method != METHOD:
                raise ValueError(f"a StillhouseConfig has quant_method {METHOD!r}, not {quant_method!r}")
            self.quant_method = quant_method
            self.format = format
            self.group_size = group_size
            self.block_size = block_size
            self.double_quant = double_quant
            self.modules_to_not_convert = ["lm_head"] if modules_to_not_convert is None else list(modules_to_not_convert)

        def settings(self) -> dict[str, Any]:
            """The arguments of ``formats.quantize`` beside the weight."""
            names = ("format", "group_size", "block_size", "double_quant")
            return {name: getattr(self, name) for name in names}

    class StillhouseQuantizer(HfQuantizer):
        """Replaces linear layers: before loading when the checkpoint is packed, as each weight arrives when it is not."""

        requires_calibration = False

        def _process_model_before_weight_loading(self, model, **kwargs):
            skip = self.get_modules_to_not_convert(
                model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules
            )
            tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
            linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
            wanted = {name for name in linears if should_convert_module(name, skip)}
            if wanted & tied:
                logger.warning("%s shares its weight with an embedding and stays as it is", sorted(wanted & tied))
            self.to_quantize = wanted - tied
            if not self.to_quantize:
                raise ValueError(f"nothing to quantize: of {sorted(linears)} all are tied or in modules_to_not_convert={skip}")
            if self.pre_quantized:
                for name in self.to_quantize:
                    model.set_submodule(name, _empty_layer(linears[name], self.quantization_config.settings()))

        def _process_model_after_weight_loading(self, model, **kwargs):
            left = sorted(name for name in self.to_quantize if not isinstance(model.get_submodule(name), Linear4bit))
            if left:
                raise ValueError(f"the checkpoint has no weight to quantize for {left}; are these its architecture's names?")
            return model

        def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
            module_name, _, tensor_name = param_name.rpartition(".")
            return not self.pre_quantized and tensor_name == "weight" and module_name in self.to_quantize

        def get_quantize_ops(self):
            return QuantizeLinear(self)

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            """Through adapters: the packed weights themselves are frozen."""
            return True

        @property
        def is_compileable(self) -> bool:
            return True

    class QuantizeLinear(ConversionOps):
        """Packs one layer's weight as it comes from the file, and puts a ``Linear4bit`` in the layer's place."""

        def __init__(self, quantizer: StillhouseQuantizer) -> None:
            self.quantizer = quantizer

        def convert(self, input_dict, *, model=None, missing_keys=None, **kwargs):
            for parameter_name, value in input_dict.items():
                weight = value[0] if isinstance(value, list) else value
                name = parameter_name.rpartition(".")[0]
                linear = model.get_submodule(name)
                try:
                    packed = formats.quantize(weight, **self.quantizer.quantization_config.settings())
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error
                # The bias may still be on its way: the parameter moves with the layer, and loading goes on by name.
                layer = Linear4bit.from_packed(packed, linear.bias, dtype=weight.dtype)
                layer.requires_grad_(False).train(linear.training)
                model.set_submodule(name, layer)
                if missing_keys is not None:
                    missing_keys.discard(parameter_name)
            return {}

    for cls in (StillhouseConfig, StillhouseQuantizer, QuantizeLinear):
        cls.__module__, cls.__qualname__ = __name__, cls.__name__  # found by pickle through __getattr__
    return SimpleNamespace(
        StillhouseConfig=StillhouseConfig, StillhouseQuantizer=StillhouseQuantizer, QuantizeLinear=QuantizeLinear
    )


def _empty_layer(linear: nn.Linear, settings: dict[str, Any]) -> Linear4bit:
    """A packed layer of a linear layer's size, its tensors on the meta device until the checkpoint's take their place."""
    device = torch.device("meta")
    packed = formats.empty_packed((linear.out_features, linear.in_features), device=device, **settings)
    return Linear4bit.from_packed(packed, linear.bias, dtype=linear.weight.dtype).requires_grad_(False)
