"""Verifies recorded rows: each check derives a recorded number again from others, and names what contradicts it."""
