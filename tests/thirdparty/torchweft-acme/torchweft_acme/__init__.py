"""A third party's strategy."""
