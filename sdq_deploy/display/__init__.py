"""What a user sees while work goes on: consoles, progress, the course of an export. Commands and jobs share it."""
