"""Detectors, one file each. Found by name through ``encoderguard.registry``."""
