"""Sets that are scored: images or videos in files, read one by one."""
