"""buddy: who gets which free frames. Policies: ``buddy`` (the default) and ``next_fit``."""
