"""Readers: one file per input format."""
