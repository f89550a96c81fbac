"""A callback that saves an adapter during training."""

from __future__ import annotations

import difflib
import os
import string
import tempfile
from pathlib import Path
from typing import Any

import keras

from keras_lora import checks
from keras_lora.applying import require_adapted
from keras_lora.compat import training_internals
from keras_lora.files import huggingface, tensor_file
from keras_lora.files.saving import save_adapter
from keras_lora.swap.adapters_of_model import only_name


class SaveAdapter(keras.callbacks.Callback):
    """Save an adapter, and everything trained with it, during `fit`.

    The arguments are those of `keras.callbacks.ModelCheckpoint`. The files are those of `keras_lora.save_adapter`: small,
    and replaced atomically, so a crash during a save leaves the old file. They have no optimizer; to continue a training
    that was interrupted, use `keras.callbacks.BackupAndRestore` too.

    Args:
        filepath: A path that ends in `.safetensors`. It may contain `{epoch}`, which starts at 1, names from the logs, such
            as `{val_loss:.2f}`, and with an integer `save_freq` also `{batch}`. The folder must exist.
        monitor: The name in the logs that decides what is best.
        verbose: 1 prints a line for each file.
        save_best_only: Save only if `monitor` is better than ever before. NaN is never better. As long as the logs do not
            have `monitor`, the adapter is saved with a warning.
        mode: `"min"`, `"max"` or `"auto"`, which takes the direction from the name or the metric.
        save_freq: `"epoch"`, or a number of batches.
        initial_value_threshold: The value to be better than. Pass the best one so far if you continue a training.
        name: The name of the adapter, if the model has several.

    Raises:
        ValueError: An argument is wrong. When training begins: the model is not adapted, or has several adapters and none
            was named. After the first batch: `mode="auto"`, and the direction of `monitor` is unknown.
        FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError: When training begins: the file cannot be
            written.

    Example:

    >>> import keras, keras_lora, numpy as np, os, tempfile
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> keras_lora.apply_lora(model, rank=4).compile("adam", "mse")
    >>> folder = tempfile.mkdtemp()
    >>> path = os.path.join(folder, "epoch_{epoch}.safetensors")
    >>> save = keras_lora.callbacks.SaveAdapter(path)
    >>> history = model.fit(np.ones((8, 16)), np.ones((8, 2)), epochs=2, verbose=0, callbacks=[save])
    >>> sorted(os.listdir(folder))
    ['epoch_1.safetensors', 'epoch_2.safetensors']
    """

    @checks.helpful
    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        mode: str = "auto",
        save_freq: int | str = "epoch",
        initial_value_threshold: float | None = None,
        *,
        name: str | None = None,
    ):
        super().__init__()
        if huggingface.is_address(filepath):
            raise ValueError(
                f"`SaveAdapter` saves to a local path; a lost connection would end the training. Received: {filepath!r}. "
                "Save to the Hub after `fit`, with `keras_lora.save_adapter`."
            )
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"`mode` must be one of ('auto', 'min', 'max'). Received: mode={mode!r}.")
        if save_freq != "epoch" and not (checks.is_integer(save_freq) and save_freq > 0):  # type: ignore[operator]
            raise ValueError(f"`save_freq` must be 'epoch' or a positive integer. Received: save_freq={save_freq!r}.")
        if initial_value_threshold is not None and not checks.is_number(initial_value_threshold):
            raise ValueError(
                f"`initial_value_threshold` must be a finite number or None. Received: {initial_value_threshold!r}."
            )
        self.filepath = os.fspath(tensor_file.checked_path(filepath))
        self.monitor, self.mode, self.verbose, self.name = monitor, mode, verbose, name
        self.save_best_only, self.save_freq = checks.flag("save_best_only", save_best_only), save_freq
        self.best = initial_value_threshold
        self._fields = {field for _, field, _, _ in string.Formatter().parse(self.filepath) if field is not None}
        if wrong := sorted(self._fields & ({"", "batch"} if save_freq == "epoch" else {""})):
            raise ValueError(
                f"`filepath` may contain '{{epoch}}', names from the logs, and '{{batch}}' if `save_freq` is an integer. "
                f"Received: {wrong[0]!r} in {self.filepath!r}, with save_freq={save_freq!r}."
            )
        self._epoch = self._batches = 0
        self._last_batch = -1
        self._checked = self._seen = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        require_adapted(self.model, "SaveAdapter")
        only_name(self.model, self.name)
        self._last_batch, self._checked = -1, False
        folder, path = Path(self.filepath).parent, Path(self.filepath)
        if not any(field is not None for _, field, _, _ in string.Formatter().parse(str(folder))):
            _check_folder(folder, path)
        if path.is_dir():
            raise IsADirectoryError(f"`SaveAdapter` cannot write {path}: it is a folder. Expected the path of a file.")
        if self.save_best_only and self.best is None and path.exists():
            checks.warn(
                f"{path} exists, and the first epoch replaces it, even if the adapter in it is better. If you continue a "
                "training, pass its best value so far as `initial_value_threshold`."
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch, self._last_batch = epoch, -1

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._checked:
            self._check_names(logs or {})
        self._batches += batch - self._last_batch  # more than one with `steps_per_execution`
        self._last_batch = batch
        if self.save_freq != "epoch" and self._batches >= int(self.save_freq):
            self._batches = 0
            self._save(logs or {}, batch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self.save_freq == "epoch":
            self._save(logs or {})

    def _check_names(self, logs: dict[str, Any]) -> None:
        """Compare the names with those in the logs of the first batch. A later callback or validation may add others."""
        self._checked = True
        if self.save_best_only and self.mode == "auto":
            self.mode = training_internals.direction_of(self.model, self.monitor)
        used = self._fields | ({self.monitor} if self.save_best_only else set())
        for name in sorted(each.partition(".")[0].partition("[")[0] for each in used - {"epoch", "batch"}):
            if name.removeprefix("val_") not in logs:
                near = difflib.get_close_matches(name, [*logs, *(f"val_{each}" for each in logs)], n=1)
                checks.warn(
                    f"`SaveAdapter` uses '{name}', which the logs do not have after the first batch. They have "
                    f"{sorted(logs)}."
                    f"{f' Did you mean {near[0]!r}?' if near else ''} Training goes on, because a callback may add it."
                )

    def _save(self, logs: dict[str, Any], batch: int | None = None) -> None:
        if self.save_best_only and not self._is_best(logs):
            return
        values = {"epoch": self._epoch + 1, **({} if batch is None else {"batch": batch + 1}), **logs}
        try:
            path = self.filepath.format(**values)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"`SaveAdapter` cannot fill in its `filepath` {self.filepath!r}: {error!r}. Expected names out of "
                f"{sorted(values)}. Names that start with 'val_' need `validation_data` in `fit`, and at each epoch."
            ) from error
        save_adapter(self.model, path, name=self.name)
        if self.verbose:
            print(f"\nEpoch {self._epoch + 1}: saved the adapter to {path}")

    def _is_best(self, logs: dict[str, Any]) -> bool:
        """Whether `monitor` is better than before; it becomes the best value then."""
        if self.monitor not in logs:
            if not self._seen:
                checks.warn(
                    f"`save_best_only` needs '{self.monitor}' in the logs, which have {sorted(logs)}. The adapter is saved, "
                    "best or not, until they have it. Names that start with 'val_' need `validation_data` in `fit`."
                )
            return not self._seen
        now, first = float(logs[self.monitor]), self.best is None
        self._seen = True
        better = now == now and (first or (now > self.best if self.mode == "max" else now < self.best))  # type: ignore[operator]
        if better:
            self.best = now
        elif self.verbose:
            print(f"\nEpoch {self._epoch + 1}: {self.monitor} {now:.5f} is not better than {self.best}")
        return better


def _check_folder(folder: Path, path: Path) -> None:
    """Raise an error unless a file can be made in `folder`. Only trying tells: permissions, quotas, file systems."""
    if not folder.is_dir():
        kind = NotADirectoryError if folder.exists() else FileNotFoundError
        raise kind(f"`SaveAdapter` cannot write {path}: there is no folder {folder}. Make it before training.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise type(error)(error.errno, f"{error.strerror}, so `SaveAdapter` cannot write", str(path)) from error
