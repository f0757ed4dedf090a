"""Prepares a caller's model for calibration: removes wrappers, loads offloaded weights, and refuses a model that is
quantized, sharded or has adapters."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from octavo.capture.errors import UsageError
from octavo.capture.tensors import dtype_name
from octavo.capture.wrappers import inside

from .layers.install import swapped
from .torch_state import settled

# packages whose layer classes have integer weights, or get them later
_QUANTIZERS = ("torch.ao.nn.", "torchao.", "optimum.quanto.", "bitsandbytes.", "octavo.calibrate.")


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Context manager: prepares `model` for the statements in the body of `with`. Replaces wrappers by the modules
    inside them, removes the hooks with which accelerate offloads weights, and loads these weights. Puts torch's global
    state, such as default dtype, default device and autocast, into the state in which torch starts. Afterwards model
    and torch are as before.

    Raises UsageError, with a remedy, for a weight that is still on the meta device after loading, and for a model with
    group offloading or layerwise casting of diffusers.
    """
    with ExitStack() as stack:
        stack.enter_context(settled())
        stack.enter_context(_unwrapped(model))
        _check_hooks(model)
        stack.enter_context(_onloaded(model))
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                fact = "is on the meta device, so its values are not in memory"
                raise UsageError(f"{name}: {fact}. Load the model again without device_map and offloading.")
        yield


@contextmanager
def _unwrapped(model: nn.Module) -> Iterator[None]:
    """Replaces every wrapper in `model`, such as DataParallel, by the module that it wraps, inside the `with`
    statement."""
    with ExitStack() as stack:
        while wrapped := {name: inside(module) for name, module in _submodules(model) if inside(module) is not module}:
            outer = {name: module for name, module in wrapped.items() if not _below(name, wrapped)}
            stack.enter_context(swapped(model, outer))
        yield


def _submodules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]


def _below(name: str, others: dict[str, nn.Module]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


@contextmanager
def _onloaded(model: nn.Module) -> Iterator[None]:
    """Loads the weights of a model that accelerate offloads, and removes the offloading hooks, inside the `with`
    statement. Afterwards the model is offloaded as before. Does nothing for a model without such hooks, or with weights
    on several devices."""
    hooked = [module for module in model.modules() if _moves(getattr(module, "_hf_hook", None))]
    if not hooked or len({parameter.device for parameter in model.parameters() if not parameter.is_meta}) > 1:
        yield
        return
    from accelerate.hooks import remove_hook_from_module

    states = [(module, dict(vars(module))) for module in hooked]
    tables: list[dict[str, Any]] = [
        table for module in model.modules() for table in (module._parameters, module._buffers)
    ]
    tensors = [(table, dict(table)) for table in tables]
    try:
        for module in hooked:
            remove_hook_from_module(module)  # the library puts the weights back
            if vars(module).get("forward") == type(module).forward.__get__(module):
                del module.forward
        yield
    finally:
        for module, state in states:
            vars(module).update(state)
        for table, before in tensors:
            table.update(before)


def _moves(hook: Any) -> bool:
    """Returns whether `hook`, the accelerate hook of a module, does nothing else than move weights and inputs between
    devices. A module without a hook has None as `hook`, for which the result is False."""
    if hook is None:
        return False
    from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook

    if type(hook) is SequentialHook:
        return all(_moves(part) for part in hook.hooks)
    return type(hook) in (AlignDevicesHook, CpuOffload)


def _check_hooks(model: nn.Module) -> None:
    """Raises UsageError for a model with diffusers hooks that move or cast weights between calls: group offloading and
    layerwise casting."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hooks = registry.hooks if registry is not None else {}
        if (hook := hooks.get("group_offloading")) is not None:
            fact = f"{type(model).__name__}: group offloading moves its weights"
            if hook.config.offload_to_disk_path is not None:
                raise UsageError(f"{fact} to a disk. Load the model again, without group offloading.")
            call = "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).remove_hook('group_offloading')"
            raise UsageError(f"{fact}. Remove the hooks first: {call}.")
        if (hook := hooks.get("layerwise_casting")) is not None:
            dtype = dtype_name(hook.storage_dtype)
            fact = f"{type(model).__name__}: layerwise casting keeps its weights in {dtype}"
            raise UsageError(f"{fact}. Load the model again, without enable_layerwise_casting().")


def check_model(model: nn.Module) -> None:
    """Raises UsageError for a model whose layers are not plain float layers: the model is already quantized, sharded,
    compiled by torch.jit, or has peft adapters."""
    _check_adapters(model)
    kind = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "quantization_method", None) is not None:
        raise UsageError(f"{kind}: was loaded with quantized weights. Load the float model.")
    for name, module in model.named_modules():
        package, class_name = type(module).__module__, type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(f"{kind}: is compiled by torch.jit. Pass the model as it was before compiling.")
        if package.startswith("torch.distributed.fsdp.") and class_name == "FullyShardedDataParallel":
            raise UsageError(f"{name or 'model'}: {class_name} shards its weights. Pass the model before sharding.")
        if package.startswith(_QUANTIZERS):
            raise UsageError(
                f"{name or 'model'}: is already quantized (a {class_name} of {package}). Pass the float model."
            )
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise UsageError(f"{name}: this {class_name} has no weights yet. Call the model once first.")
        weight = module._parameters.get("weight")
        if weight is not None and (type(weight) is not nn.Parameter or not weight.is_floating_point()):
            _refuse(f"{name}.weight".lstrip("."), weight, class_name)


def _refuse(name: str, weight: Tensor, owner: str) -> NoReturn:
    """Raises UsageError for `weight`, which is not a float parameter: it is sharded or already quantized. `name` is the
    name of the weight, `owner` the class of its layer."""
    kind, dtype = type(weight).__name__, dtype_name(weight.dtype)
    if kind == "DTensor":
        raise UsageError(f"{name}: is sharded over several processes. Pass the whole model, before sharding.")
    raise UsageError(f"{name}: is already quantized (a {kind} of {dtype} in a {owner}). Pass the float model.")


def _check_adapters(model: nn.Module) -> None:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    peft = sys.modules.get("peft")
    if tuners is None or peft is None:  # peft is not imported, so no module is a peft layer
        return
    if isinstance(model, peft.PeftModel):
        merge = "merge_and_unload" if hasattr(model.base_model, "merge_and_unload") else "get_base_model"
        raise UsageError(f"{type(model).__name__}: peft wraps the model. Pass model.{merge}().")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)]
    if not layers:
        return
    merged = all(module.merged for _, module in layers)
    if hasattr(model, "unload_lora"):
        pipeline = "unload_lora_weights()" if merged else "fuse_lora() and unload_lora_weights()"
        alone = "unload_lora()" if merged else "fuse_lora() and unload_lora()"
        remedy = f"Call {pipeline} of the pipeline first, or {alone} of the model"
    else:
        remedy = "Call merge() of each such layer, and replace the layer by its get_base_layer()"
    state = "fused but not unloaded" if merged else "not fused"
    raise UsageError(f"{layers[0][0]}: has LoRA or another peft adapter that is {state}. {remedy}.")
