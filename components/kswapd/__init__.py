"""kswapd: which frames leave when memory runs low. Policies: ``two_list`` (the default), ``clock``, ``mglru``, ``mru``, ``random``;
``sampler`` only looks on, for `sylvie record`."""
