"""Starting points: the initial factors of an adapter, from the kernels, from data, or from gradients."""
