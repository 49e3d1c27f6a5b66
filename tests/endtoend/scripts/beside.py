"""A module beside a script."""

VALUE = "found beside the script"


def double(number):
    return 2 * number
