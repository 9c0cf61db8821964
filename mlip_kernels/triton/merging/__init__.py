"""Merging family in Triton."""
