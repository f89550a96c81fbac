"""Adapter files: an adapter as plain data, the bytes of its file, and the Hugging Face Hub."""
