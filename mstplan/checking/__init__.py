"""Checks of the rungs against each other: predictions beside measurements, calibrations solved from traces and measurements."""
