"""A real ghOSt kernel (SOSP '21): its enclaves, queues, status words and transactions, by the ABI that its ghostfs says it speaks.

``fs`` is there one, and which versions; ``abi`` layouts and numbers of 84, 90 and 91, messages as Python sees them; ``enclave`` the rest. It has been tried on
an imitation of ghostfs only, never on such a kernel: ``docs/ghost-kernel.md``.
"""
