"""Save and load adapter files: only what was trained, as safetensors, with everything needed to rebuild it.

The format is documented in `docs/adapter_file.md`. `adapter_state.py` defines the content and puts it into a model;
`tensor_file.py` reads and writes the bytes.
"""

from __future__ import annotations

import os
from typing import Any

from keras_lora import checks
from keras_lora.applying import require_adapted
from keras_lora.checks import AnyLayer
from keras_lora.compat import keras_internals
from keras_lora.files import huggingface, tensor_file
from keras_lora.files.adapter_state import AdapterState
from keras_lora.swap.addresses import walking_once


@checks.helpful
@walking_once()
@keras_internals.without_tensorflow()
def save_adapter(
    model: Any, path: str | os.PathLike[str], *, name: str | None = None, fingerprint_weights: bool = False
) -> None:
    """Save an adapter of a model, and everything that was trained with it, to a safetensors file.

    Args:
        model: An adapted model, or an adapted part of one.
        path: A path that ends in `.safetensors`. An existing file is replaced atomically. Or an address on the Hugging Face
            Hub, `"hf://owner/name"` or `"hf://owner/name/french.safetensors"`. The repository is created if it does not
            exist, public unless the account settings say otherwise, and gets a model card if it has none.
        name: The name of the adapter, if the model has several. The file stores neither the name nor whether the adapter
            is active.
        fingerprint_weights: Write a fingerprint of the base kernels that the adapter changes. Loading into a base with
            other weights then warns. It costs one pass over these kernels, when saving and when loading.

    Raises:
        ValueError: The model is not adapted, has several adapters and none was named, or the path has another ending. No
            file is written then.
        ImportError, FileNotFoundError, PermissionError, ConnectionError: The Hub refuses or cannot be reached, or
            `huggingface_hub` is not installed. The message tells you what to do.

    Example:

    >>> import keras, keras_lora, os, tempfile
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> path = os.path.join(tempfile.mkdtemp(), "french.safetensors")
    >>> keras_lora.save_adapter(keras_lora.apply_lora(model, rank=1), path)
    >>> os.path.getsize(path) < 2000
    True
    """
    if huggingface.is_address(path):
        with huggingface.uploading(path, getattr(model, "name", "")) as file:
            save_adapter(model, file, name=name, fingerprint_weights=fingerprint_weights)
        return
    path = tensor_file.checked_path(path)
    require_adapted(model, "save_adapter")
    AdapterState.of(model, name, fingerprint_weights=fingerprint_weights).write(path)


@checks.helpful
@walking_once()
@keras_internals.without_tensorflow()
def load_adapter(
    model: AnyLayer, path: str | os.PathLike[str], *, name: str | None = None, trainable: bool = True
) -> AnyLayer:
    """Load an adapter file into a model, in place.

    A plain model is adapted as the file describes. In an adapted model, the file's values are loaded into an existing
    adapter of the same method. Its rank may be larger, and its scale and dropout may differ; a kernel that the file does
    not change is left as the base has it. Nothing is compiled again then. With a new `name` the file is added as another
    adapter, as by `keras_lora.apply_lora`. If the file has a fingerprint of the weights it was trained on and the model
    has other weights, you get a warning.

    Args:
        model: The base model, plain or adapted. If the file was made from a part of a model, pass the same part.
        path: A file written by `save_adapter`, or an address on the Hugging Face Hub: `"hf://owner/name"` for its
            `adapter.safetensors`, `"hf://owner/name/french.safetensors"`, `"hf://owner/name@revision"`. It is downloaded
            into the cache of `huggingface_hub`, and read from there if there is no network.
        name: The name of the new adapter, or of the adapter to load into.
        trainable: Whether the loaded adapter, and everything that was trained with it, is trainable. If False, toggling
            `model.trainable` makes them trainable again.

    Returns:
        `model` itself. If an adapter was added, call `compile` before training.

    Raises:
        ValueError: The file is damaged, of another kind, or does not fit the model. The message lists everything missing,
            unexpected or of another shape. The model is unchanged, as after every error.
        FileNotFoundError: There is no such file.
        ImportError, PermissionError, ConnectionError: The Hub refuses or cannot be reached, or `huggingface_hub` is not
            installed. The message tells you what to do.

    Example:

    >>> import keras, keras_lora, os, tempfile
    >>> base = lambda: keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> path = os.path.join(tempfile.mkdtemp(), "french.safetensors")
    >>> keras_lora.save_adapter(keras_lora.apply_lora(base(), rank=1), path)
    >>> len(keras_lora.load_adapter(base(), path).trainable_variables)
    2
    """
    checks.keras_layer(model)
    AdapterState.read(path).put_into(model, f"The adapter file {path}", name=name, trainable=trainable)
    return model
