"""What a PTX program does that a device would not forgive."""


class PTXError(Exception):
    """A fault of the program: an access that is not allowed, a race, a value that nobody has written."""


class NotModelled(Exception):
    """The program uses what the interpreter does not know: says nothing about the program."""
