"""All code that depends on private Keras names, on a backend, or on a quantisation mode."""
