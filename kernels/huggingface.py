"""Quantize while loading: ``AutoModelForCausalLM.from_pretrained(path, quantization_config=StillhouseConfig(...))``.

    from stillhouse.kernels.huggingface import StillhouseConfig, register
    register()
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=StillhouseConfig(format="nf4"))
    model.save_pretrained(folder)  # packed; from_pretrained(folder) reads it back bit for bit, after register()

Each ``torch.nn.Linear`` but the excluded ones becomes a ``Linear4bit``, one layer at a time: the 16-bit weight of a layer is
freed before the next is read. ``head="int4"`` packs the embedding and the output head too, after loading. A model that was
packed in place (``swap.py``, ``embedding.py``) saves and reloads in the same way, through ``mark_as_packed``. Written for
transformers 5.23's ``HfQuantizer``; transformers is imported at first use.
"""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from stillhouse.kernels import embedding, formats
from stillhouse.kernels.linear import ACTIVATIONS, Activations, Linear4bit

METHOD = "stillhouse"
_FORMAT_SETTINGS = ("format", "group_size", "symmetric", "block_size", "double_quant")
_LAYER_SETTINGS = (*_FORMAT_SETTINGS, "activations")
logger = logging.getLogger(__name__)


def register() -> None:
    """Tell transformers of the quantization method ``stillhouse``; calling it again does nothing."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(_classes().StillhouseConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(_classes().StillhouseQuantizer)


def describe_packed(model: nn.Module) -> Any:
    """The ``StillhouseConfig`` that says how a model's ``Linear4bit`` layers and its head are packed.

    Raises:
        ValueError: nothing is packed, or its layers differ in ways that one config does not say.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    packed, dense = {}, []
    for name, module in model.named_modules():
        name = name.replace(".base_layer", "")  # the name when PEFT is gone: an adapter is saved apart from its base
        if isinstance(module, Linear4bit):
            packed[name] = _settings_of(module)
        elif hasattr(module, "weight_packed") or type(module).__module__.startswith("bitsandbytes."):
            raise ValueError(f"layer {name!r} is packed by another library; take it over with swap_to_kernels first")
        elif isinstance(module, nn.Linear) and ".lora_" not in name and not hasattr(module, "base_layer"):
            dense.append(name)
    kinds = set(packed.values())
    if len(kinds) > 1:
        raise ValueError(f"its layers are packed in {len(kinds)} ways, of which a config holds one: {sorted(map(str, kinds))}")
    rows = model.get_input_embeddings()
    head = {}
    if isinstance(rows, embedding.PackedEmbedding):
        head = {"head": rows.format, "head_group_size": rows.group_size, "head_symmetric": rows.zero_points is None}
        head["head_activations"] = model.get_output_embeddings().activations
    if not packed and not head:
        raise ValueError("nothing in it is packed")
    config = _classes().StillhouseConfig(
        **dict(zip(_LAYER_SETTINGS, *kinds)) if kinds else {}, modules_to_not_convert=dense, **head
    )
    missed = sorted(name for name in packed if not should_convert_module(name, dense))
    if missed:
        raise ValueError(f"the names of layers that are not packed, {dense}, also match {missed}, which are")
    return config


def mark_as_packed(model: nn.Module) -> None:
    """Make a transformers model, whose layers were packed in place, save and reload as one of ours.

    Its quantizer and config become ours. Where no config can describe it, ``save_pretrained`` refuses and says why, rather than
    write a folder that reloads as another model.
    """
    from transformers.quantizers.base import HfQuantizer

    try:
        config, problem = describe_packed(model), None
    except ValueError as error:
        config, problem = _classes().StillhouseConfig(), f"this model cannot be saved: {error}"
    old = getattr(model, "hf_quantizer", None)
    if isinstance(old, HfQuantizer) and old.quantization_config.quant_method == METHOD and problem is None:
        config.modules_to_not_convert = old.quantization_config.modules_to_not_convert
    quantizer = _classes().StillhouseQuantizer(config, pre_quantized=True)
    quantizer.cannot_save = problem
    model.hf_quantizer, model.config.quantization_config = quantizer, config
    model.is_quantized, model.quantization_method = True, METHOD
    if problem is None and getattr(model, "is_loaded_in_4bit", False):
        model.is_loaded_in_4bit = False  # what transformers and PEFT call a bitsandbytes model


def _settings_of(layer: Linear4bit) -> tuple[Any, ...]:
    """A layer's ``_LAYER_SETTINGS``; those of another format are at their defaults, so that equal layers compare equal."""
    if layer.format == "int4":
        return (layer.format, layer.group_size, layer.zero_points is None, 64, True, layer.activations)
    return (layer.format, 32, True, layer.block_size, layer.nested_absmax is not None, layer.activations)


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
        """How a model's linear layers, and its head, are packed.

        Args:
            format: ``int4`` or ``nf4``; ``fp4`` only of a checkpoint that holds it already.
            group_size, symmetric: int4: weights along K that share one scale; whether there are no zero points.
            block_size, double_quant: nf4: weights that share one absmax; whether absmax are rounded to 8 bits.
            activations: how the layers multiply, as in :func:`stillhouse.kernels.linear.linear4bit`.
            modules_to_not_convert: names (full, a trailing part, or a regular expression) of layers that stay as they are.
            head: None, or ``int4`` or ``int8``: how embedding and output head are packed, tied or not.
            head_group_size, head_symmetric, head_activations: as in :func:`stillhouse.kernels.embedding.quantize_head`.
        """

        def __init__(
            self,
            format: str = "int4",
            group_size: int = 32,
            symmetric: bool = True,
            block_size: int = 64,
            double_quant: bool = True,
            activations: str = "bf16",
            modules_to_not_convert: list[str] | None = None,
            head: str | None = None,
            head_group_size: int | None = 32,
            head_symmetric: bool = True,
            head_activations: str = "bf16",
            quant_method: str = METHOD,
        ) -> None:
            if format not in formats.READABLE_FORMATS:
                raise ValueError(f"format must be one of {formats.READABLE_FORMATS}, not {format!r}")
            if head is not None and head not in embedding.HEAD_FORMATS:
                raise ValueError(f"head must be None or one of {embedding.HEAD_FORMATS}, not {head!r}")
            for name, value in (("activations", activations), ("head_activations", head_activations)):
                if value not in ACTIVATIONS:
                    raise ValueError(f"{name} must be one of {ACTIVATIONS}, not {value!r}")
            if quant_method != METHOD:
                raise ValueError(f"a StillhouseConfig has quant_method {METHOD!r}, not {quant_method!r}")
            self.quant_method = quant_method
            self.format = format
            self.group_size = group_size
            self.symmetric = symmetric
            self.block_size = block_size
            self.double_quant = double_quant
            self.activations = activations
            self.modules_to_not_convert = ["lm_head"] if modules_to_not_convert is None else list(modules_to_not_convert)
            self.head = head
            self.head_group_size = head_group_size
            self.head_symmetric = head_symmetric
            self.head_activations = head_activations

        def settings(self) -> dict[str, Any]:
            """The arguments of ``formats.quantize`` beside the weight."""
            return {name: getattr(self, name) for name in _FORMAT_SETTINGS}

        def head_settings(self) -> dict[str, Any]:
            """The arguments of ``embedding.quantize_head`` beside the model and the format."""
            return {name: getattr(self, f"head_{name}") for name in ("group_size", "symmetric", "activations")}

    class StillhouseQuantizer(HfQuantizer):
        """Replaces linear layers: before loading when the checkpoint is packed, as each weight arrives when it is not."""

        requires_calibration = False
        cannot_save: str | None = None
        """Why ``save_pretrained`` could not write what ``from_pretrained`` reads, for a model that ``mark_as_packed`` saw."""

        def _process_model_before_weight_loading(self, model, **kwargs):
            config = self.quantization_config
            if not self.pre_quantized and config.format not in formats.FORMATS:
                raise ValueError(f"{config.format} is only read, not written; quantize to one of {formats.FORMATS}")
            skip = self.get_modules_to_not_convert(model, config.modules_to_not_convert, model._keep_in_fp32_modules)
            tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
            head = model.get_output_embeddings() if config.head else None
            linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
            wanted = {name for name, module in linears.items() if module is not head and should_convert_module(name, skip)}
            if wanted & tied:
                logger.warning("%s shares its weight with an embedding and stays as it is", sorted(wanted & tied))
            self.to_quantize = wanted - tied
            if not self.to_quantize and not config.head:
                raise ValueError(f"nothing to quantize: of {sorted(linears)} all are tied or in modules_to_not_convert={skip}")
            if self.pre_quantized:
                for name in self.to_quantize:
                    model.set_submodule(name, _empty_layer(linears[name], config.settings(), config.activations))
                if config.head:
                    embedding.install_empty_head(model, config.head, **config.head_settings())

        def _process_model_after_weight_loading(self, model, **kwargs):
            left = sorted(name for name in self.to_quantize if not isinstance(model.get_submodule(name), Linear4bit))
            if left:
                raise ValueError(f"the checkpoint has no weight to quantize for {left}; are these its architecture's names?")
            config = self.quantization_config
            if config.head and not self.pre_quantized:
                embedding.quantize_head(model, config.head, **config.head_settings())
            return model

        def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
            module_name, _, tensor_name = param_name.rpartition(".")
            return not self.pre_quantized and tensor_name == "weight" and module_name in self.to_quantize

        def get_quantize_ops(self):
            return QuantizeLinear(self)

        def is_serializable(self) -> bool:
            if self.cannot_save is not None:
                logger.warning("%s", self.cannot_save)
            return self.cannot_save is None

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
                config = self.quantizer.quantization_config
                try:
                    packed = formats.quantize(weight, **config.settings())
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error
                # The bias may still be on its way: the parameter moves with the layer, and loading goes on by name.
                layer = Linear4bit.from_packed(packed, linear.bias, activations=config.activations, dtype=weight.dtype)
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


def _empty_layer(linear: nn.Linear, settings: dict[str, Any], activations: Activations) -> Linear4bit:
    """A packed layer of a linear layer's size, its tensors on the meta device until the checkpoint's take their place."""
    packed = formats.empty_packed((linear.out_features, linear.in_features), device=torch.device("meta"), **settings)
    layer = Linear4bit.from_packed(packed, linear.bias, activations=activations, dtype=linear.weight.dtype)
    return layer.requires_grad_(False)
