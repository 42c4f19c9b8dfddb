"""Shared foundations that need no network: errors, units, tables, records and files."""
