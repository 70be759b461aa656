"""What a file holds instead of what was expected: a web page, a git-lfs pointer, nothing."""

from __future__ import annotations

_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml version")


def mistaken_for(head: bytes) -> str | None:
  """Recognises a file that is not what its name says.

  Args:
    head: its first bytes; 256 are enough.

  Returns:
    What it is and what to do, to be put into a message; None if it is none of the known kinds.
  """
  start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
  if not head:
    return "is empty; copy or download it again"
  if start.startswith(_POINTER):
    return "is a git-lfs pointer and not the file itself; fetch it with: git lfs pull"
  if start[:64].lower().startswith(_PAGES):
    return (
      "is a web page and not the file itself (a login, quota or error page, say); download it again"
    )
  return None
