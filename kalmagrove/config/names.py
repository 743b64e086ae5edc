"""Names that come from others: of folders in a configuration, of files in a checkpoint's index."""


def is_file_name(name: object) -> bool:
    """Whether it names something within a folder, and cannot lead out of it.

    >>> [is_file_name(name) for name in ("model.safetensors", "..", "a/b", "/etc/passwd", "", None)]
    [True, False, False, False, False, False]
    """
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return not set(name) & {"/", "\\", "\0"}
