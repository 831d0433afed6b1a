"""autonuma: which page is on which node. Policies: ``hinting`` (the default), ``interleave``, ``tiering``. On one node there is nothing to do."""
