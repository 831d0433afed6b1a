"""thp: which pages become one 2 MiB block. Policies: ``adaptive`` (the default), ``always``, ``madvise``."""
