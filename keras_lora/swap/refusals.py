"""Methods of Keras that an adapted layer or model refuses, because they would lose or break the adapters."""

from __future__ import annotations

from typing import Any

from keras_lora import adapters
from keras_lora.compat import keras_internals, stored_kernel

_WITHOUT_ADAPTERS = (
    "`{name}` would write '{layer}' without its adapters. Expected a plain model. Received: an adapted one. Call "
    "`keras_lora.merge_lora(model)` first, or keep the adapter apart with `keras_lora.save_adapter(model, path)`."
)
_REASONS = {
    "save_to_preset": _WITHOUT_ADAPTERS,
    "export_to_transformers": _WITHOUT_ADAPTERS,
    "enable_lora": (
        "`enable_lora` would add Keras's own adapter to '{layer}', which keras_lora adapted; files and merging "
        "support only one of the two. Expected a plain layer. Received: an adapted one. Add an adapter with "
        "`keras_lora.apply_lora(model, name=...)`. If you want Keras's, call `keras_lora.remove_lora(model)` first; "
        "`keras_lora.interop.from_enable_lora(model)` converts it."
    ),
    "quantize": (
        "`quantize` would leave the adapted layers of '{layer}' as they are. Expected a plain model. Received: an adapted "
        "one. Quantise first: save the adapter with `keras_lora.save_adapter`, call `keras_lora.remove_lora(model)` and "
        "`model.quantize(...)`, and load it with `keras_lora.load_adapter`."
    ),
}

_STORED = (
    "`{name}` would not know how the kernels of '{layer}' are stored. Expected a plain model with float kernels. Received: "
    "kernels in fewer digits. Save it with `model.save`, or make it float: `keras_lora.apply_lora(model)`, then "
    "`keras_lora.merge_lora(model)`."
)


def add_refusals(cls: Any, base: type) -> None:
    """Let `cls`, an adapted class of `base`, refuse those methods that `base` has."""
    for name in _REASONS:
        if hasattr(base, name):
            setattr(
                cls, keras_internals.called_first(name), _refusal(name, getattr(base, keras_internals.called_first(name)))
            )


def _refusal(name: str, method: Any) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers = keras_internals.with_all_sublayers(self)
        if any(isinstance(each, adapters.Adapter) for each in layers):
            raise ValueError(_REASONS[name].format(name=name, layer=self.name))
        if any(stored_kernel.is_stored(each) for each in layers):
            raise ValueError(_STORED.format(name=name, layer=self.name))
        return method(self.as_base(), *args, **kwargs)  # its kernels are as Keras stores them

    return refuse
