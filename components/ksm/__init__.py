"""ksm: which equal pages share one frame. Policies: ``scan`` (the default), ``hot_aware``."""
