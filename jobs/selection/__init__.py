"""What the job `select` is made of: its data and its methods."""
