"""Backends that come with the core, through the same door as everybody else's."""
