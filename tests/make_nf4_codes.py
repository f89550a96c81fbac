"""Write `tests/nf4_codes.npz`: what bitsandbytes makes of `nf4_weights`, for `tests/test_nf4.py`.

    pip install --target .cache/bitsandbytes --no-deps bitsandbytes==0.50.2
    PYTHONPATH=.cache/bitsandbytes:tests python tests/make_nf4_codes.py

It needs PyTorch, and runs on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("nf4_codes.npz")
#: Whole blocks, a row of zeros, a shorter last block, an odd size, and more blocks than share a scale.
SHAPES = [(64, 96), (3, 64), (7, 20), (7, 9), (1, 1), (260, 64)]


def nf4_weights(shape: tuple[int, int]) -> np.ndarray:
    """Weights that look random, the same on every machine."""
    place = np.arange(shape[0] * shape[1])
    part = (place * 7919 % 1009 - 504).astype("float32") / np.float32(504)
    size = (place // 64 * 31 % 17 + 1).astype("float32") / np.float32(8)
    found = (part * np.abs(part) * size).reshape(shape)
    if shape == (3, 64):
        found[1] = 0
    return found


def main() -> None:
    """Quantise and write."""
    import bitsandbytes.functional as bnb
    import torch

    arrays = {}
    for shape in SHAPES:
        codes, state = bnb.quantize_4bit(
            torch.tensor(nf4_weights(shape)), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        found = {"codes": codes.reshape(-1), "absmax": state.absmax, "scale": state.state2.absmax, "mean": state.offset}
        arrays |= {f"{shape[0]}x{shape[1]}.{name}": each.numpy() for name, each in found.items()}
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
