"""Adapters from and to other libraries."""
