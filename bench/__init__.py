"""Measurements, always beside native Linux in the same run: ``python -m bench`` (``make bench``)."""
