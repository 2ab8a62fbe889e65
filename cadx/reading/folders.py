"""What in a folder, or in a zip of one, people have put there."""

_SYSTEM_NAMES = ("thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found")


def is_hidden(name: str) -> bool:
    """Whether an operating system, an archiver or a file server put a file or folder of this name there, not a person.

    >>> is_hidden(".DS_Store"), is_hidden("Thumbs.db"), is_hidden("@eaDir"), is_hidden("1.dcm")
    (True, True, True, False)
    """
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES
