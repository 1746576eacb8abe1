"""Encoding, scoring and reports; importable without Lightning."""
