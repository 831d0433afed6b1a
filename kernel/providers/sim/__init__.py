"""A simulated machine: the ABI's tables, messages and transactions, without Linux below them. Needs no root.

``machine`` frames, pages, store; ``trace`` what programs touch; ``replay`` a trace on a machine with a policy of kswapd; ``opt`` the
fewest faults possible.
"""
