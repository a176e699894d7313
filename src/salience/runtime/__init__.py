"""Running a model token by token."""
