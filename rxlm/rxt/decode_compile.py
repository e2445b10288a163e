"""The compiled step: made once for a decoder and the shapes of its inputs, called without detours.

On a CPU inductor writes C++ for it; on CUDA it runs as a graph. What torch checks at every call
(guards on inputs and modules), and how it finds the compiled code, take a third of a small model's
step; here the inputs are compared once a turn (:func:`signature`), and the code is called.

Not here: what a step computes (:mod:`rxlm.rxt.decode_step`).
"""

from __future__ import annotations

import logging
import os
import shutil
import types
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rxlm.errors import UserError
from rxlm.nn.key_value_buffer import KeyValueBuffer
from rxlm.rxt.components import RxTDecoder
from rxlm.rxt.one_row_products import small_products_pass

logger = logging.getLogger(__name__)

Step = Callable[[RxTDecoder, Any], tuple[Tensor, Any]]

_COMPILED: WeakKeyDictionary[RxTDecoder, dict[Any, Any]] = WeakKeyDictionary()


def signature(inputs: Any) -> Any:
    """Return all that compiled code takes for granted about its inputs, to be compared."""
    leaves, structure = pytree.tree_flatten(inputs)
    return structure, tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    )


def compiled_step(step: Step, decoder: RxTDecoder, inputs: Any) -> Callable[[Any], Any]:
    """Return ``step`` of a decoder for inputs like these, compiled when they are new.

    It is kept as long as the decoder, so that later turns do not compile again. Weights may change
    between steps, their shapes, types and strides may not.

    Args:
        step: a function of the decoder and the inputs, without branches on their values.
        decoder: in evaluation mode.
        inputs: a tree of tensors; those of later calls have the same :func:`signature`.

    Raises:
        UserError: on a CPU without a C++ compiler.
    """
    weight = decoder.embedding.weight
    kind = weight.device.type
    key = (
        signature(inputs),
        tuple((part.dtype, part.device, part.stride()) for part in decoder.parameters()),
        decoder.training,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
    )
    found = _COMPILED.setdefault(decoder, {})
    if key not in found:
        check_compiler(weight.device)
        logger.info(
            "decode step: compiling for %d rows on %s, which takes up to a minute",
            len(inputs.ids),
            weight.device,
        )
        found[key] = _compile(step, decoder, inputs)
    return partial(_on_cuda if kind == "cuda" else _call, found[key], decoder)


def check_compiler(device: torch.device) -> None:
    """Raise ``UserError`` where a step for ``device`` cannot be compiled."""
    if device.type != "cpu":
        return
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise UserError(
            f"compile_decode needs a C++ compiler, but {name!r} is not on the path: install g++ "
            "(Debian: apt-get install g++), set CXX to another one, or leave compile_decode out."
        )


def _call(step: Step, decoder: RxTDecoder, inputs: Any) -> tuple[Tensor, Any]:
    return step(decoder, inputs)


def _on_cuda(step: Step, decoder: RxTDecoder, inputs: Any) -> tuple[Tensor, Any]:
    for layer in inputs.layers:
        if isinstance(layer, KeyValueBuffer):
            # A graph may write into what it is given only where that stays in its place.
            for part in (layer.key, layer.value):
                torch._dynamo.mark_static_address(part, guard=False)
    torch.compiler.cudagraph_mark_step_begin()
    logits, layers = step(decoder, inputs)
    # The next replay writes over what this one returned.
    return logits.clone(), tuple(
        layer
        if isinstance(layer, KeyValueBuffer)
        else type(layer)(*(part.clone() for part in layer))
        for layer in layers
    )


def _compile(step: Step, decoder: RxTDecoder, inputs: Any) -> Step:
    device = decoder.embedding.weight.device
    # torch.compile keeps what it made beside the code object, and at most eight of them: each step
    # gets a code object of its own.
    code = step.__code__.replace(co_name="compiled_decode_step")
    own = types.FunctionType(code, step.__globals__)
    compiled: Step = torch.compile(own, fullgraph=True, dynamic=False, options=_options(device))
    return _called_directly(compiled, decoder, inputs) if device.type == "cpu" else compiled


def _called_directly(compiled: Step, decoder: RxTDecoder, inputs: Any) -> Step:
    """Compile now, and return the code without what looks for it at every call."""
    ahead_of_time = getattr(compiled, "aot_compile", None)
    if ahead_of_time is None:  # torch before 2.10
        return compiled
    made = ahead_of_time(((decoder, inputs), {}))
    made.disable_guard_check()
    direct: Step = made
    return direct


def _options(device: torch.device) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if device.type == "cuda":
        options["triton.cudagraphs"] = True  # mode="reduce-overhead", which excludes options.
    elif device.type == "cpu":
        # The hundred small kernels of a step are called from C++: from Python, the calls take as
        # long as the kernels.
        options["cpp_wrapper"] = True
        # Ids are the model's or checked, experts the router's, columns ours: all are in range, and
        # a check in an innermost loop keeps it slow.
        options["assert_indirect_indexing"] = False
        options["post_grad_custom_pre_pass"] = small_products_pass()
    # Whatever a guard could find is in the key of ``compiled_step``; graphs of CUDA also depend on
    # where tensors lie.
    skip = (
        "skip_guard_on_all_nn_modules_unsafe" if device.type == "cuda" else "skip_all_guards_unsafe"
    )
    unguarded = getattr(torch.compiler, skip, None)
    if unguarded is not None:
        options["guard_filter_fn"] = unguarded
    return options
