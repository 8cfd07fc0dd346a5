"""Compiled programs are shared between the tests of a session, and with the processes that they start."""

import os
import tempfile

_cache = tempfile.TemporaryDirectory(prefix='mmjax-compiled-')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _cache.name)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '0')
