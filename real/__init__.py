"""The real machine; empty until the torch lanes are built."""
