"""Pre-training methods, one file each. Found by name through ``encoderguard.registry``."""
