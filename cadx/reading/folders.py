"""What in a folder, or in a zip of one, people have put there."""

_SYSTEM_FILES = ("thumbs.db", "desktop.ini")


def is_hidden(name: str) -> bool:
    """Whether an operating system put a file or folder of this name there, not a person.

    >>> is_hidden(".DS_Store"), is_hidden("Thumbs.db"), is_hidden("1.dcm")
    (True, True, False)
    """
    return name.startswith(".") or name.casefold() in _SYSTEM_FILES
