"""A model without weights: its structure from the configuration, its parameters on the meta device."""

from collections import Counter
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from lvlm_prune.checkpoints.allocator import give_back_from
from lvlm_prune.checkpoints.checkpoint import PACKED, CheckpointFolder
from lvlm_prune.checkpoints.sizes import may_be_larger, refuse_absurd_sizes, refuse_larger_tensors
from lvlm_prune.checkpoints.versions import names_pattern, no_init_weights, nothing_in_memory, prepare
from lvlm_prune.errors import InputError, first_line, shortened

_AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM")

NEEDS_ORIGINAL = "pruning needs the original checkpoint"
# How tools announce quantized weights beside `config.json`: ModelOpt, GPTQ, AWQ, others.
_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


def build_skeleton(
    folder: CheckpointFolder,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The model of a checkpoint folder with its parameters on the meta device.

    Buffers (rotary tables and the like) are real, on the CPU. The model is in eval mode and needs no gradients.

    Args:
        folder: The checkpoint.
        dtype: Dtype to run in; `auto` is the one in which most of the weights are stored. Modules that the family keeps
            in float32 stay there.
        trust_remote_code: Run the model's own Python code where the checkpoint brings some.
        attn_implementation: As transformers takes it; its own choice when None.

    Raises:
        InputError: The model cannot be built: unknown architecture, code that is not trusted, a missing package,
            quantized weights, a dtype that does not exist.
    """
    quantization = folder.config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == PACKED:
        way_out = f"lvlm-prune unpack --model.path {folder.path} --output DIR"
        raise InputError("model.path", folder.path, f"is a packed checkpoint; unpack it first: `{way_out}`")
    _refuse_quantized(folder)
    if unread := unread_generation(folder):
        raise InputError("model.path", folder.path, unread)
    refuse_absurd_sizes(folder)
    config = _load_config(folder, trust_remote_code)
    model_class, config = _model_class(folder, config, trust_remote_code)
    _refuse_dtype(folder, config)
    torch_dtype = _resolve_dtype(folder, dtype)
    options: dict[str, Any] = {"dtype": torch_dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if may_be_larger(folder):
        _refuse_unfit(folder, model_class, config, options)
    give_back_from(2**16)  # parameters are on the CPU for a moment, each of them
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = model_class._from_config(config, **options)
        # Outside the context that sets the dtype: rotary tables are computed in float32, as `from_pretrained` does.
        prepare(model)
        _keep_in_float32(model, torch_dtype)
    except ImportError as error:
        problem = f"this model needs a package that is not installed: {' '.join(str(error).split())}"
        raise InputError("model.path", folder.path, problem) from error
    except ValueError as error:
        if attn_implementation is None:
            raise _not_built(folder, error) from error
        raise InputError("model.attn_implementation", attn_implementation, shortened(error, 200)) from error
    except Exception as error:
        # Of transformers, about the numbers of the configuration; of the checkpoint's own code it may be a bug.
        if trust_remote_code and _remote_reference(folder):
            raise
        raise _not_built(folder, error) from error
    finally:
        give_back_from()
    return model.eval().requires_grad_(False)


def _refuse_unfit(
    folder: CheckpointFolder, model_class: type[PreTrainedModel], config: PretrainedConfig, options: dict[str, Any]
) -> None:
    """Raise where the model would be larger than its tensors on disk, before anything of it is in memory."""
    model = None
    try:
        with nothing_in_memory():
            model = model_class._from_config(deepcopy(config), **options)
    except Exception as error:
        # What else is wrong is said when it is built; not every author's code builds without memory.
        if "overflow" in str(error):
            raise _not_built(folder, error) from error
    if model is not None:
        refuse_larger_tensors(model, folder)


def _refuse_quantized(folder: CheckpointFolder) -> None:
    """Raise where somebody says that the weights are quantized."""
    said = [name for name in _QUANTIZATION_FILES if (folder.path / name).exists()]
    if said or _announces_quantization(folder.config):
        where = said[0] if said else "config.json"
        raise InputError("model.path", folder.path, f"the weights are quantized ({where}); {NEEDS_ORIGINAL}")


def unread_generation(folder: CheckpointFolder) -> str:
    """Why transformers cannot read how the model is to answer, and so cannot load it; empty where it can."""
    try:
        GenerationConfig.from_pretrained(folder.path, local_files_only=True)
    except OSError:  # there is none, or no JSON in it: transformers does without
        return ""
    except Exception as cause:
        return f"its generation_config.json cannot be read ({type(cause).__name__}: {first_line(cause)})"
    return ""


def _announces_quantization(config: Any) -> bool:
    if isinstance(config, dict):
        named = any(config.get(name) for name in ("quantization_config", "compression_config"))
        return named or any(_announces_quantization(value) for value in config.values())
    return isinstance(config, list) and any(map(_announces_quantization, config))


def _not_built(folder: CheckpointFolder, error: Exception) -> InputError:
    problem = f"no model can be built from its config.json ({type(error).__name__}: {shortened(error, 200)})"
    return InputError("model.path", folder.path, problem)


def _load_config(folder: CheckpointFolder, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder.path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers checks numbers and types here, with errors of many kinds
        if "auto_map" in folder.config and not trust_remote_code:
            raise InputError(
                "model.trust_remote_code",
                "false",
                f"{folder.path} brings its own model code; read it, then allow it with --model.trust_remote_code true",
            ) from None
        if (model_class := _named_class(folder.config.get("architectures"))) is not None:
            # Some parts of omni models, stored on their own, are not in transformers' list of model types.
            with suppress(Exception):  # what is wrong was said above
                return model_class.config_class.from_pretrained(folder.path)
        model_type = folder.config.get("model_type")
        problem = (
            f"transformers {transformers.__version__} cannot read its configuration (model_type {model_type!r}): "
            f"{shortened(error, 200)}"
        )
        raise InputError("model.path", folder.path, problem) from error


def _model_class(
    folder: CheckpointFolder, config: PretrainedConfig, trust_remote_code: bool
) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """(class, configuration) of the model; for omni models those of the part that reads and thinks."""
    if trust_remote_code and (reference := _remote_reference(folder)):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(reference, folder.path), config
    if hasattr(config, "thinker_config"):
        config = config.thinker_config
    if (model_class := _named_class(config.architectures)) is not None:
        return model_class, config
    for name in _AUTO_CLASSES:
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", {})
        if type(config) in mapping:
            return mapping[type(config)], config
    problem = (
        f"transformers {transformers.__version__} has no model class for it (architectures {config.architectures})"
    )
    raise InputError("model.path", folder.path, problem)


def _named_class(architectures: Any) -> type[PreTrainedModel] | None:
    """The first class of transformers among `architectures` that generates text."""
    names = architectures if isinstance(architectures, list) else [architectures]
    classes = (getattr(transformers, name, None) for name in names if isinstance(name, str))
    return next(filter(_generates, classes), None)


def _generates(candidate: Any) -> bool:
    """Whether something that transformers exports is a model that generates text."""
    is_model = isinstance(candidate, type) and issubclass(candidate, PreTrainedModel)
    return is_model and bool(candidate.can_generate())


def _remote_reference(folder: CheckpointFolder) -> str | None:
    """Where the checkpoint's own model class is, as `auto_map` writes it."""
    auto_map = folder.config.get("auto_map", {})
    return next((auto_map[name] for name in (*_AUTO_CLASSES, "AutoModel") if name in auto_map), None)


def _resolve_dtype(folder: CheckpointFolder, dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return _stored_dtype(folder)
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise InputError("model.dtype", dtype, "must be auto, float32, bfloat16 or float16")
    return resolved


def _refuse_dtype(folder: CheckpointFolder, config: PretrainedConfig) -> None:
    """Raise where the configuration names a dtype in which transformers loads no model: nor would it the output."""
    named = getattr(config, "dtype", None)
    if named is None or isinstance(named, (str, dict)):
        return
    if not isinstance(named, torch.dtype) or not named.is_floating_point or named.itemsize == 1:
        problem = f"its config.json gives the dtype {shortened(named)}, in which no model can be loaded"
        raise InputError("model.path", folder.path, problem)


def _stored_dtype(folder: CheckpointFolder) -> torch.dtype:
    """The floating-point dtype in which most bytes of the checkpoint are stored."""
    sizes: Counter[torch.dtype] = Counter()
    for key in folder:
        stored = folder[key].torch_dtype
        if stored.is_floating_point:
            sizes[stored] += folder[key].nbytes
    if not sizes:
        raise InputError("model.path", folder.path, "holds no floating-point weights")
    stored, _ = sizes.most_common(1)[0]
    if stored.itemsize == 1:
        raise InputError("model.path", folder.path, f"the weights are quantized; {NEEDS_ORIGINAL}")
    return stored


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give what the family keeps in float32 that dtype, as `from_pretrained` does."""
    modules: set[str] = set()
    if dtype == torch.float16:
        modules.update(model._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        modules.update(model._keep_in_fp32_modules_strict or ())
    if not modules:
        return
    pattern = names_pattern(modules)
    for name, tensor in model.state_dict().items():
        if not pattern.search(name):
            continue
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor.float(), requires_grad=False)
        else:
            module._buffers[leaf] = tensor.float()
