"""`python -m keras_lora` is the command line."""

import sys

from keras_lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
