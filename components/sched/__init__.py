"""sched: which thread runs where. Policies: ``fifo_per_cpu`` (the default), ``fifo_centralized``, ``round_robin``, ``shinjuku``, ``edf``, ``cfs``,
``numa_aware``; ``probe`` looks on, for the bench."""
