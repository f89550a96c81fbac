"""Choose which layers to adapt: patterns, blocks and presets, and the list that `apply_lora` uses."""
