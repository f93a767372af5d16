"""Calibration observes: it runs the reference pipeline and streams what the passes need into statistics."""
