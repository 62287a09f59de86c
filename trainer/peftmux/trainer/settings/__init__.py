"""What a run is asked for: flags, files and environment to checked values."""
