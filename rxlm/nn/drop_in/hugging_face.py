"""Linear attention inside models of transformers: put in, decoded, saved, loaded.

    model = inject_linear_attention(AutoModelForCausalLM.from_pretrained(...), mu=0.2)
    model.generate(ids, past_key_values=linear_cache(model.config))
    save_injected(model, folder); model = load_injected(folder)

transformers is imported when a function needs it. Not here: training, adapters (peft works on the
result), models that fuse projections and attention in one module.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.drop_in.mixing import LiZASettings, LiZAttention, projections_of

Model = TypeVar("Model", bound=nn.Module)
SETTINGS_FILE, WEIGHTS_FILE = "linear_attention.json", "model.safetensors"


def inject_linear_attention(
    model: Model, settings: LiZASettings | None = None, **changes: Any
) -> Model:
    """Wrap every self-attention of a model, in place.

    Args:
        model: of transformers (or with a ``config`` that names its heads likewise); causal and
            bidirectional ones are told apart by ``is_causal`` of their attention modules.
        settings: what is put in; None = the defaults.
        changes: fields of :class:`~rxlm.nn.drop_in.mixing.LiZASettings`, in place of ``settings``.

    Returns:
        The model. Its old weights are now called ``....base_attn....``.

    Raises:
        UserError: if there is no attention module that is known, or it was done before.
    """
    if settings is not None and changes:
        raise UserError(f"give settings or single fields ({', '.join(sorted(changes))}), not both.")
    try:
        chosen = LiZASettings(**changes) if settings is None else settings
    except TypeError as error:
        raise UserError(f"inject_linear_attention: {error}; see LiZASettings.") from None
    if any(isinstance(module, LiZAttention) for module in model.modules()):
        raise UserError("the model has linear attention already: inject it once.")
    found = [name for name, module in model.named_modules() if projections_of(module) is not None]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no attention module with projections that are known here."
        )
    for index, name in enumerate(found):
        base = model.get_submodule(name)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _wrap(base, model, name, index, chosen))
    return model


def linear_cache(config: Any) -> Any:
    """Return an empty ``DynamicCache`` that also carries the states of linear attention.

    It is reordered, repeated and reset like any cache; it cannot be cropped, because a recurrent
    state does not forget its last token.

    Args:
        config: of the model.
    """
    return _cache_class()(config=config)


def save_injected(model: nn.Module, folder: str | Path) -> None:
    """Write configuration, settings and weights of a model that was injected.

    Args:
        model: as :func:`inject_linear_attention` returned it, trained or not.
        folder: is made if missing.

    Raises:
        UserError: for a model without linear attention, or a class outside of transformers.
    """
    from safetensors.torch import save_model

    wrapped = [module for module in model.modules() if isinstance(module, LiZAttention)]
    if not wrapped:
        raise UserError("the model has no linear attention: inject_linear_attention comes first.")
    name = type(model).__name__
    if not hasattr(_transformers(), name):
        raise UserError(f"{name} is not a class of transformers, so it cannot be found at loading.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    config.save_pretrained(folder)
    settings = {"model_class": name, "settings": wrapped[0].settings.to_dict()}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_model(model, str(folder / WEIGHTS_FILE))


def load_injected(folder: str | Path) -> Any:
    """Read what :func:`save_injected` wrote; the model is in evaluation mode.

    Raises:
        UserError: if the folder holds something else.
    """
    from safetensors.torch import load_model

    folder = Path(folder)
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise UserError(f"{folder} has no {SETTINGS_FILE}: it was not written by save_injected.")
    stored: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    transformers = _transformers()
    model_class = getattr(transformers, stored["model_class"])
    model = model_class(transformers.AutoConfig.from_pretrained(folder))
    inject_linear_attention(model, LiZASettings(**stored["settings"]))
    load_model(model, str(folder / WEIGHTS_FILE))
    return model.eval()


def _wrap(
    base: nn.Module, model: nn.Module, name: str, index: int, settings: LiZASettings
) -> LiZAttention:
    config: Any = getattr(base, "config", None) or getattr(model, "config", None)
    num_heads = _first(base, config, "num_heads", "num_attention_heads")
    width = _first(None, config, "hidden_size")
    head_dim = _first(base, config, "head_dim", "attention_head_size")
    causal = getattr(base, "is_causal", None)
    if num_heads is None or (head_dim is None and width is None) or causal is None:
        raise UserError(
            f"{name} ({type(base).__name__}) does not say how many heads it has, or whether it is "
            "causal: wrap it with LiZAttention, which takes both."
        )
    heads = int(num_heads)
    if head_dim is None:
        assert width is not None
        head_dim = width // heads
    key_value_heads = _first(base, config, "num_key_value_heads")
    layer = getattr(base, "layer_idx", None)
    wrapper = LiZAttention(
        base,
        settings,
        num_heads=heads,
        head_dim=int(head_dim),
        num_key_value_heads=int(key_value_heads or heads),
        bidirectional=not causal,
        hidden_dim=width,
        layer_idx=index if layer is None else layer,
    )
    parameter = next(base.parameters())
    wrapper.memory_gate.to(parameter.device)
    wrapper.linear_attn.to(parameter.device)
    return wrapper.train(base.training)


def _first(module: nn.Module | None, config: Any, *names: str) -> int | None:
    """Return the first of these attributes that the module or the configuration has."""
    for owner in (module, config):
        for name in names:
            value = getattr(owner, name, None)
            if value is not None:
                return value
    return None


@functools.cache
def _cache_class() -> Any:
    dynamic_cache: Any = _transformers().DynamicCache

    class LinearDynamicCache(dynamic_cache):
        """Keys and values of softmax attention, and the states of linear attention by layer."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.linear_states: dict[int, Any] = {}

        def reset(self) -> None:
            super().reset()
            self.linear_states.clear()

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._select(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            for layer, state in self.linear_states.items():
                rows = torch.arange(state.num_tokens.shape[0]).repeat_interleave(repeats)
                self.linear_states[layer] = state.select(rows.to(state.num_tokens.device))

        def crop(self, *_: Any, **__: Any) -> None:
            raise UserError(
                "a cache with linear attention cannot be cropped: a recurrent state does not "
                "forget its last token. Use a decoding method that never takes tokens back."
            )

        def _select(self, rows: Tensor) -> None:
            for layer, state in self.linear_states.items():
                self.linear_states[layer] = state.select(rows.to(state.num_tokens.device))

    return LinearDynamicCache


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise UserError(
            "this needs Hugging Face transformers: pip install 'transformers>=5.0'."
        ) from None
