"""Lowering of the vnm ops on this device: each function returns an Inductor node, or None for the reference."""
