"""A plugin whose own library is not there."""
