"""C sources: the gateway's C half (a cffi module), the stub, the launcher and the keeper; ``build.py`` builds them all."""
