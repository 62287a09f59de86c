"""The engine: schedule, run, update, publish."""
