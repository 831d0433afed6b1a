"""The Sylvie library: enclave, tables, channels, transactions, gateway. Mechanism only; policies are in ``components/``."""
