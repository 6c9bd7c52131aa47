"""Filters of training sets, one file each. Found by name through ``encoderguard.registry``."""
