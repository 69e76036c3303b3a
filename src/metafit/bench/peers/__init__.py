"""The peers, each run through its own public API."""
