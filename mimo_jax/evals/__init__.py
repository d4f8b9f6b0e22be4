"""Evaluations: functions of parameters and data, usable alone and from training."""
