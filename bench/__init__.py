"""Microbenchmarks: `wsss-ops bench`. See README.md here."""
