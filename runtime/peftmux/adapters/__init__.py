"""What an adapter is: its files, its parts, and one lowering file per method. Used by the runtime and the trainer."""
