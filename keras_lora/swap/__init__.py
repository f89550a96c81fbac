"""Changing the objects: swap a layer's class, keep its adapters in slots, and remember its trainable flags."""
