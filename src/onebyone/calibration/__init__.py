"""Calibration: second moments of layers' inputs and outputs, measured on unlabelled data."""
