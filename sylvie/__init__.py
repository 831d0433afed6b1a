"""The command line of Sylvie."""
