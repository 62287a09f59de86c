"""Operators of the engine: each folder holds its definition (`reference.py`) beside its fast forms."""
