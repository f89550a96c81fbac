"""Which layers? Patterns, blocks and presets, and the list that `apply_lora` works through."""
