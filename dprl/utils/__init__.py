"""General helpers: errors, files, signals, seeds, timers, types of settings, and the machine."""
