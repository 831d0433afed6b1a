"""Where events come from and transactions go to. ``sim``: a simulated machine."""
