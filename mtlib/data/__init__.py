"""Data: small worlds drawn from a seed, and the real sets, one file each; `download` fetches and verifies."""
