"""Simulated machines: the ABI's tables, messages and transactions, without Linux below them. Needs no root.

``base`` frames, zones, store, kswapd's transactions; ``machine`` one address space without contents, quick; ``programs`` and ``enclave`` several with
contents, and every transaction; ``trace`` what programs touch; ``replay`` policies on a machine; ``opt`` the fewest faults possible.
"""
