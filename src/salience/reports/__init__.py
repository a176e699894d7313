"""What a job found, as JSON, as a page and as plots."""
