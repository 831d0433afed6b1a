"""kswapd: which frames leave when memory runs low. Policies: ``two_list`` (the default), ``clock``, ``mglru``, ``mru``, ``random``,
``spare_running`` (with what sched knows);
``sampler`` only looks on, for `sylvie record`."""
