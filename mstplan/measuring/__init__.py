"""Measurement: real steps on a device, a process each, and the files that keep what they took. `measurement.py` needs no torch."""
