"""What each replica gets of the data, in which order, and with which random streams."""
