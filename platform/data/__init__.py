"""Data feeding: sources of rows, preference data, batches that do not depend on the world size, text."""
