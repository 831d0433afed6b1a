"""One folder per component: ``__main__.py`` is the process, every other file a policy or what its policies share."""
