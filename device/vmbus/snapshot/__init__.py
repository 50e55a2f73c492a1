"""Snapshots: a saved VM as a directory that is either whole or absent."""
