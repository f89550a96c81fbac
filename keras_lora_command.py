"""The command `keras-lora`. It is outside the package because importing a part of a package imports the package first.

`import keras_lora` imports Keras and registers the adapted classes with it, which `keras.saving.load_model` needs. That
takes seconds, and `--help`, `inspect`, `diff` and `compress` do not need it. While this module is imported,
`keras_lora/__init__.py` imports nothing; `keras_lora.cli` imports the whole package for the commands that need it.
"""

import sys

from keras_lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
