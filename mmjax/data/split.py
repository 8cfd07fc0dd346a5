"""Which documents are held out when no validation files are given."""

import hashlib


def is_held_out(text_utf8: bytes, share: float) -> bool:
  """Tells whether a document is held out: decided by its text alone, so that copies of it fall on the same side.

  Args:
    text_utf8: the document.
    share: about this share of all documents is held out, in [0, 1).
  """
  if share <= 0:
    return False
  return int.from_bytes(hashlib.sha256(text_utf8).digest()[:8], 'big') < share * 2**64
