"""`sdq-deploy demo`: the whole road on the embedded model, and a report of what came out."""
