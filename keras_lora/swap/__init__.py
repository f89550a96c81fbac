"""What happens to the objects? A layer's class is swapped, it keeps its adapters in slots, and its flags are remembered."""
