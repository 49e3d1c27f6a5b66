"""A plugin that takes a name that is taken."""
