"""Pages that need nothing beside them: one look for all reports."""
